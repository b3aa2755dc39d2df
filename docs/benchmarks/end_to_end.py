"""Time a small training run, from the start of the command to its end.

    python docs/benchmarks/end_to_end.py make /tmp/e2e
    python docs/benchmarks/end_to_end.py run ours /tmp/e2e --cold
    python docs/benchmarks/end_to_end.py run upstream /tmp/e2e --cold

`make` writes a verifier of SmolLM2-135M's shape, vocabulary maps, and the same random samples
twice: as v1 `.pt` files, and as speculators 0.9.0 stores them (`datasets` writes its table).
Upstream must be installed, `pip install speculators==0.9.0`, with a torch that both tools support.

`run` starts `speculators train` of one tool with its defaults, except for settings that make the
draft and the work the same: AdamW, a frozen LM head (upstream's command cannot train it), no extra
norms, full attention, the same logging interval. Upstream gets a mask token, which EAGLE-3 does not
use, because the verifier has no tokenizer. Ours adds noise and checks for non-finite states,
upstream does neither. Arguments after `--` are passed to the tool, after the script's own.

A phase ends when the tool prints its line: `start_up` with the first optimizer step, `steps`,
`validation` and `checkpoint` with theirs, `exit` with the process. Our checkpoints end when their
folders are renamed. Upstream logs the last steps of an epoch before they finish on the device, so
some of their time may count as its checkpoint. `steps` includes waiting for data; `computing` is
the number of steps times the median step without it, from our log lines and `data_wait_share`, and
from upstream's forward, backward and optimizer times.

On a GPU, both tools run unchanged. Upstream trains on accelerators only: on CPU, its device is
replaced by a CPU, flex attention by SDPA and the Triton loss by its eager loss, and both tools
compute in float32. Its twelve workers are too many for a few cores: `-- --num-workers 1`.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from random_verifier import write_verifier
from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.data_config import default_layer_ids, write_data_config
from speculators_cli.core.data.formats.v1 import write_sample
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.verifier import read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles

PHASES = ("start_up", "steps", "validation", "checkpoint", "exit")
SPREAD = 0.7  # of the logarithm of a sample's length
POOL_TOKENS = 4096  # tokens with random states; each sample uses them in another order
# Run upstream's trainer, written for accelerators, on a CPU.
UPSTREAM_ON_CPU = """
import sys, torch
from speculators.cli import app
from speculators.train import trainer
torch.accelerator.synchronize = lambda *_: None
trainer.get_local_rank = lambda: "cpu"
app(sys.argv[1:])
"""


@dataclass
class Step:
    """A log line of an optimizer step."""

    moment: float
    number: int  # from 1
    epoch: int
    seconds: float | None = None  # of computing, if the line has it


@dataclass
class Trace:
    """Log lines of a run, with times."""

    started_at: float
    ends: list[tuple[float, str]] = field(default_factory=list)  # of phases
    steps: list[Step] = field(default_factory=list)

    def add_step(self, step: Step) -> None:
        """Add a log line; the first ends the start-up phase."""
        self.ends.append((step.moment, "steps" if self.steps else "start_up"))
        self.steps.append(step)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; each time stamp ends the part since the one before."""
        totals = dict.fromkeys(PHASES, 0.0)
        moment = self.started_at
        for end, phase in sorted(self.ends):
            totals[phase] += end - moment
            moment = end
        return totals


def main() -> None:
    """Make the inputs, or run a tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="write verifier, maps and samples")
    making.add_argument("folder", type=Path)
    making.add_argument("--num-samples", type=int, default=1000)
    making.add_argument("--mean-tokens", type=int, default=500)
    making.add_argument("--supervised-fraction", type=float, default=0.6)
    making.add_argument("--draft-vocab-size", type=int, default=32000)
    making.add_argument("--verifier", type=Path, help="folder to use instead of random weights")
    making.add_argument(
        "--only-ours", action="store_true", help="skip samples in upstream's format"
    )
    making.set_defaults(command=make)
    usage = "%(prog)s TOOL FOLDER [options] [-- FLAGS OF THE TOOL]"
    running = commands.add_parser("run", help="time a run", usage=usage)
    running.add_argument("tool", choices=sorted(TOOLS))
    running.add_argument("folder", type=Path)
    running.add_argument("--epochs", type=int, default=3)
    running.add_argument("--total-seq-len", type=int, default=8192)
    running.add_argument("--ttt-steps", type=int, default=3)
    running.add_argument("--log-every", type=int, default=10, help="steps per log line")
    running.add_argument("--cold", action="store_true", help="clear compilation caches first")
    running.set_defaults(command=run)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.flags = words[end + 1 :]
    options.folder = options.folder.absolute()
    options.command(options)


def make(options: argparse.Namespace) -> None:
    """Write verifier, maps and samples."""
    folder: Path = options.folder
    if not options.only_ours and find_spec("datasets") is None:
        sys.exit("needs `pip install speculators==0.9.0`, or pass --only-ours")
    for name in ("ours", "upstream"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "ours").mkdir(parents=True)
    verifier_dir = options.verifier.absolute() if options.verifier else folder / "verifier"
    if not options.verifier:
        shape, vocab_size = SHAPES["smollm2-135m"]
        shape = replace(shape, max_position_embeddings=8192)
        write_verifier(verifier_dir, shape, vocab_size, is_tied=True, device=torch.device("cpu"))
    (folder / "verifier.txt").write_text(str(verifier_dir))
    files = VerifierFiles(str(verifier_dir))
    verifier = read_verifier_config(files, trust_remote_code=False)
    vocab_size = files.read_vocab_size(verifier.modules)
    write_data_config(
        folder / "ours",
        verifier=str(verifier_dir),
        layer_ids=default_layer_ids(verifier.num_layers),
    )
    counts = np.zeros(vocab_size, dtype=np.int64)
    table: dict[str, list[object]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    for i, sample in enumerate(draw_samples(options, verifier.hidden_size, vocab_size)):
        write_sample(sample, folder / "ours" / f"data_{i}.pt")
        np.add.at(counts, sample.input_ids[sample.loss_mask].numpy(), 1)
        if options.only_ours:
            continue
        write_upstream_states(sample, folder / "upstream" / "hidden_states" / f"hs_{i}.safetensors")
        table["input_ids"].append(sample.input_ids.numpy())
        table["loss_mask"].append(sample.loss_mask.long().numpy())
        table["seq_len"].append(sample.num_tokens)
    VocabMap.choose(counts, options.draft_vocab_size).save(folder / "d2t.npy", folder / "t2d.npy")
    if not options.only_ours:
        from datasets import Dataset

        Dataset.from_dict(table).with_format("torch").save_to_disk(folder / "upstream")


def draw_samples(
    options: argparse.Namespace, hidden_size: int, vocab_size: int
) -> Iterator[Sample]:
    """Seeded samples of log-normal lengths, a prompt and a supervised answer each."""
    generator = torch.Generator().manual_seed(0)
    center = np.log(options.mean_tokens) - SPREAD**2 / 2
    lengths = torch.empty(options.num_samples).log_normal_(center, SPREAD, generator=generator)
    pool = torch.randn(4, POOL_TOKENS, hidden_size, generator=generator).bfloat16()
    for num_tokens in lengths.round().long().clamp(min=8).tolist():
        rows = torch.randint(POOL_TOKENS, (num_tokens,), generator=generator)
        *aux, last = pool[:, rows].unbind()
        yield Sample(
            input_ids=torch.randint(1, vocab_size, (num_tokens,), generator=generator),
            loss_mask=torch.arange(num_tokens) >= (1 - options.supervised_fraction) * num_tokens,
            aux_hidden_states=tuple(aux),
            last_hidden_states=last,
            is_normed=False,
        )


def write_upstream_states(sample: Sample, file: Path) -> None:
    """A sample's states as upstream's vLLM connector writes them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    layers = (*sample.aux_hidden_states, sample.last_hidden_states)
    states: Tensor = torch.stack([layer[:] for layer in layers], dim=1)
    save_file({"token_ids": sample.input_ids, "hidden_states": states}, file)


def run(options: argparse.Namespace) -> None:
    """Run a tool's command once, and print where its time went."""
    folder: Path = options.folder
    if not (folder / "d2t.npy").exists():
        sys.exit(f"{folder} holds no inputs: `make` them first")
    caches = folder / "caches" / options.tool
    if options.cold:
        shutil.rmtree(caches, ignore_errors=True)
    is_cold = not caches.exists()
    save_path = folder / f"{options.tool}-run"
    shutil.rmtree(save_path, ignore_errors=True)
    tool = TOOLS[options.tool]()
    command = [sys.executable, *tool.command(options, save_path), *options.flags]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "2000",  # or upstream would break its lines
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    trace = Trace(started_at=time.time())
    with (
        (folder / f"{options.tool}.log").open("w", buffering=1) as log,
        subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            moment = time.time()
            # Wide lines are filled up, with spaces or strokes.
            squeezed = re.sub(r"([ ─━])\1{9,}", r"\1" * 3, line.rstrip())
            log.write(f"{moment - trace.started_at:9.3f} {squeezed}\n")
            tool.read(line, moment, trace)
    ended_at = time.time()
    if process.returncode != 0:
        sys.exit(f"{options.tool} ended with {process.returncode}: see {log.name}")
    num_steps = tool.finish(save_path, trace)
    trace.ends.append((ended_at, "exit"))
    print(json.dumps(describe(options, trace, num_steps, is_cold=is_cold)))


def describe(
    options: argparse.Namespace, trace: Trace, num_steps: int, *, is_cold: bool
) -> dict[str, object]:
    """A run in figures; times are seconds."""
    seconds = {phase: round(value, 2) for phase, value in trace.seconds().items()}
    steps = [step.seconds for step in trace.steps if step.seconds is not None]
    step_seconds = statistics.median(steps) if steps else None
    computing = None if step_seconds is None else num_steps * step_seconds
    total = trace.ends[-1][0] - trace.started_at
    return {
        "tool": options.tool,
        "flags": options.flags,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "is_cold": is_cold,
        "num_samples": sum(1 for _ in (options.folder / "ours").glob("*.pt")),
        "epochs": options.epochs,
        "total_seq_len": options.total_seq_len,
        "num_steps": num_steps,
        "step_ms": None if step_seconds is None else round(step_seconds * 1e3, 1),
        "total": round(total, 2),
        **seconds,
        "computing": None if computing is None else round(computing, 2),
        "not_computing": None if computing is None else round(total - computing, 2),
    }


class Ours:
    """`speculators train` of this project."""

    def command(self, options: argparse.Namespace, save_path: Path) -> list[str]:
        """What follows `python`."""
        folder: Path = options.folder
        return [
            *("-m", "speculators_cli", "train", "--freeze-head"),
            *("--verifier-name-or-path", (folder / "verifier.txt").read_text()),
            *("--data-path", str(folder / "ours")),
            *("--d2t-path", str(folder / "d2t.npy"), "--t2d-path", str(folder / "t2d.npy")),
            *("--save-path", str(save_path), "--epochs", str(options.epochs)),
            *("--total-seq-len", str(options.total_seq_len)),
            *("--ttt-steps", str(options.ttt_steps), "--log-every-steps", str(options.log_every)),
        ]

    def read(self, line: str, moment: float, trace: Trace) -> None:
        """Take in a line."""
        if match := re.match(r"step (\d+)/\d+ ", line):
            trace.add_step(Step(moment, int(match[1]), epoch=-1))
        elif re.match(r"epoch \d+/\d+ validated", line):
            trace.ends.append((moment, "validation"))

    def finish(self, save_path: Path, trace: Trace) -> int:
        """Take in what the run wrote.

        Returns:
            Optimizer steps done.
        """
        trace.ends += [
            (path.stat().st_ctime, "checkpoint")
            for path in save_path.iterdir()
            if path.name.isdecimal()
        ]
        records = map(json.loads, (save_path / "metrics.jsonl").read_text().splitlines())
        logged = {record["step"]: record for record in records if record["split"] == "train"}
        for step in trace.steps:
            step.epoch = logged[step.number]["epoch"]
        for last, step in pairwise(trace.steps):
            if last.epoch == step.epoch:
                share = 1 - logged[step.number]["data_wait_share"]
                step.seconds = share * (step.moment - last.moment) / (step.number - last.number)
        return trace.steps[-1].number


class Upstream:
    """`speculators train` of vllm-project/speculators 0.9.0."""

    PHASE_ENDS = (
        (r"Training epoch \d+/\d+ completed", "steps"),
        (r"Validation epoch \d+/\d+ completed", "validation"),
        (r"Checkpoint saved to|Updated checkpoint_best", "checkpoint"),
    )

    def command(self, options: argparse.Namespace, save_path: Path) -> list[str]:
        """What follows `python`."""
        folder: Path = options.folder
        has_gpu = torch.cuda.is_available()
        on_cpu = "--hidden-states-dtype float32 --draft-attn-impl sdpa --loss-implementation eager"
        return [
            *(("-m", "speculators") if has_gpu else ("-c", UPSTREAM_ON_CPU)),
            *("train", "--speculator-type", "eagle3", "--on-missing", "raise"),
            *("--verifier-name-or-path", (folder / "verifier.txt").read_text()),
            *("--data-path", str(folder / "upstream")),
            *("--d2t-path", str(folder / "d2t.npy"), "--t2d-path", str(folder / "t2d.npy")),
            *("--save-path", str(save_path), "--epochs", str(options.epochs)),
            *("--total-seq-len", str(options.total_seq_len)),
            *("--ttt-steps", str(options.ttt_steps), "--log-freq", str(options.log_every)),
            *("--optimizer", "adamw", "--lr", "1e-4", "--mask-token-id", "0"),
            *("--full-attention-indices", "0", "--no-norm-before-fc", "--no-norm-output"),
            *(() if has_gpu else on_cpu.split()),
        ]

    def read(self, line: str, moment: float, trace: Trace) -> None:
        """Take in a line."""
        said = dict(re.findall(r"([\w/]+)=([\d.e+-]+)", line))
        if "global_step" in said:
            parts = [float(said[f"profile/{name}_ms"]) for name in ("fwd", "bwd", "opt")]
            step = Step(moment, int(said["global_step"]) + 1, int(said["epoch"]))
            # The first compiles.
            step.seconds = sum(parts) / 1e3 if trace.steps else None
            trace.add_step(step)
        for pattern, phase in self.PHASE_ENDS:
            if re.search(pattern, line):
                trace.ends.append((moment, phase))

    def finish(self, save_path: Path, trace: Trace) -> int:
        """Take in what the run wrote.

        Returns:
            Optimizer steps done.
        """
        del trace
        states = [json.loads(f.read_text()) for f in save_path.glob("*/training_state.json")]
        return max(int(state["global_step"]) for state in states)


TOOLS: dict[str, type[Ours] | type[Upstream]] = {"ours": Ours, "upstream": Upstream}

if __name__ == "__main__":
    main()
