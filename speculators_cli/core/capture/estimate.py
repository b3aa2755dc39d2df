"""estimate(settings): tokens, time, memory and disk of a run, without loading weights."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from speculators_cli.core.capture.generate import count_rows
from speculators_cli.core.capture.job import Job, open_job
from speculators_cli.core.capture.state_stage import count_bytes
from speculators_cli.core.capture.token_stage import RowMaker
from speculators_cli.core.conversations.bad_rows import BadRows
from speculators_cli.core.conversations.prompt_files import open_prompts, read_prompts
from speculators_cli.core.data.source import spread_evenly
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.engines.engine import Answer, Prompt, Sampling
from speculators_cli.core.files import find_existing
from speculators_cli.settings.generate_data import GenerateDataSettings

NUM_READ, NUM_RENDERED = 4096, 256  # conversations: the first ones, and those among them
TOKEN_BYTES = 5  # of an id and its loss mask
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
MATMUL_SECONDS = 0.3
# Of the speed of large matrix products: measured with Llama-3.1-8B on an H100 and a CPU.
EFFICIENCY = {"cuda": 0.7, "cpu": 0.5}
WORK_BYTES = 2**30  # of a forward pass, beside the weights


@dataclass(frozen=True)
class Estimate:
    """What a run would take; None means unknown."""

    num_conversations: int
    num_rows: int
    num_tokens: int  # with `--regenerate`: at most, if every answer has the maximum length
    num_supervised_tokens: int
    is_upper_bound: bool
    bytes_per_token: float  # of the samples
    num_bytes: int  # of tokens and samples
    free_bytes: int  # on the disk of the output folder
    memory_bytes: int | None  # of one GPU, by the transformers engine
    device_memory_bytes: int | None
    capture_tokens_per_second: float | None  # of one rank
    capture_seconds: float | None  # over all ranks

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the run cannot fit; empty if it can."""
        found = []
        if self.num_bytes > self.free_bytes:
            found.append("the samples need more than the free disk space")
        needed, memory = self.memory_bytes, self.device_memory_bytes
        if needed is not None and memory is not None and needed > memory:
            found.append("the verifier needs more than the memory of one GPU")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return asdict(self) | {"problems": list(self.problems)}


def estimate(settings: GenerateDataSettings, *, num_ranks: int = 1) -> Estimate:
    """Render a part of the input, and estimate the rest; nothing is written.

    Raises:
        SettingsError: A setting or the verifier cannot be used.
        DataError: The input cannot be used.
        MachineError: The hub cannot be reached.
    """
    job = open_job(settings)
    prompts = open_prompts(settings.input.prompts, split=settings.input.split or None)
    num_conversations = count_rows(prompts, settings)
    bad = BadRows(sys.maxsize)
    stop = min(num_conversations, NUM_READ)
    sources = list(read_prompts(prompts, bad, stop=stop, vocab_size=job.vocab_size))
    sources = [sources[i] for i in spread_evenly(len(sources), NUM_RENDERED)] if sources else []
    maker = RowMaker(job, lambda: AssumedAnswers(job.end_ids))
    rows = [row for one in maker.make(sources) for row in one.rows]
    scale = num_conversations / max(len(sources), 1)
    num_tokens = sum(len(row.input_ids) for row in rows)
    num_supervised = sum(int(row.loss_mask.sum()) for row in rows)
    bytes_per_token = count_bytes(num_tokens, num_supervised, job) / max(num_tokens, 1)
    is_stored = not settings.tokens.tokens_only
    per_token = TOKEN_BYTES + (bytes_per_token if is_stored else 0)
    is_local = settings.engine.engine == "transformers" and is_stored
    speed = measure_speed(job) if is_local else None
    is_on_gpu = job.device.type == "cuda" and settings.engine.device_map is None
    return Estimate(
        num_conversations=num_conversations,
        num_rows=round(len(rows) * scale),
        num_tokens=round(num_tokens * scale),
        num_supervised_tokens=round(num_supervised * scale),
        is_upper_bound=settings.tokens.regenerate,
        bytes_per_token=bytes_per_token,
        num_bytes=round(num_tokens * scale * per_token),
        free_bytes=shutil.disk_usage(find_existing(settings.input.output_dir)).free,
        memory_bytes=_count_memory(job) if is_local and is_on_gpu else None,
        device_memory_bytes=(
            torch.cuda.get_device_properties(job.device).total_memory if is_on_gpu else None
        ),
        capture_tokens_per_second=speed,
        capture_seconds=None if speed is None else num_tokens * scale / speed / num_ranks,
    )


class AssumedAnswers:
    """Answers of the maximum length, with an end token, so that conversations go on."""

    def __init__(self, end_ids: Iterable[int]) -> None:
        self._end = min(end_ids, default=0)

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Nothing: no such answer is kept."""
        return {}

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Answer each prompt by a repeated token."""
        for index in range(len(prompts)):
            yield Answer(index, [self._end] * sampling.max_new_tokens, is_truncated=False)

    def close(self) -> None:
        """There is nothing to release."""


def _count_memory(job: Job) -> int:
    """Return the memory of one GPU: weights, states of a few sequences, and work buffers."""
    shape, tokens = job.config, job.settings.engine.capture_tokens
    embeddings = job.vocab_size * shape.hidden_size * (1 if shape.is_tied else 2)
    num_states = 2 * tokens * (len(job.layer_ids) + 1) * shape.hidden_size
    layers = CaptureCost(shape).num_layer_parameters
    layers *= 1 if job.settings.engine.in_float8 else job.dtype.itemsize
    return layers + (embeddings + num_states) * job.dtype.itemsize + WORK_BYTES


def measure_speed(job: Job) -> float:
    """Return the tokens per second of a capture, from the speed of matrix products here."""
    cost = CaptureCost(job.config, in_float8=job.settings.engine.in_float8)
    rate = measure_matmul(job.device, job.dtype) * EFFICIENCY[job.device.type]
    return rate * cost.speedup / (2 * cost.num_layer_parameters)


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of large matrix products; FLOP per second."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def run() -> float:
        started_at = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started_at

    run()
    times = [run()]
    while sum(times) < MATMUL_SECONDS:
        times.append(run())
    return float(2 * size**3 / np.median(times))
