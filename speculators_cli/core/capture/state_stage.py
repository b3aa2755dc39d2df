"""Stage 2: from shards of tokens to samples with hidden states."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from speculators_cli.core.capture.engines import Engines
from speculators_cli.core.capture.generated_folder import (
    DONE_NAME,
    read_json,
    refuse_contents,
    remove_leftovers,
)
from speculators_cli.core.capture.job import Job
from speculators_cli.core.capture.states import (
    SampleWriter,
    WrittenShard,
    pack,
    plan_sequences,
    sample_file,
)
from speculators_cli.core.data.token_shards import read_counts, read_shard
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.host_states import Storage
from speculators_cli.core.engines.state_checks import check_head, check_layers
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.errors import MachineError
from speculators_cli.core.files import check_free_space, disk_errors, replacing, write_json
from speculators_cli.core.models.verifier import load_frozen_verifier
from speculators_cli.core.progress import Progress

MAX_NON_FINITE_SHARE = 0.01  # of the samples of a shard
MIN_NON_FINITE = 10  # fewer do not end the command


def storage_of(job: Job) -> Storage:
    """Return how hidden states are stored."""
    given = job.settings.storage
    dtype = None if given.storage_dtype == "auto" else given.storage_dtype
    return Storage(dtype, given.all_last_states)


def count_bytes(num_tokens: int, num_supervised_tokens: int, job: Job) -> int:
    """Return the size of the hidden states of so many tokens, as they are stored."""
    storage = storage_of(job)
    num_last = num_tokens if storage.has_all_last_states else num_supervised_tokens
    width = job.config.hidden_size * storage.item_bytes(job.dtype)
    return (num_tokens * len(job.layer_ids) + num_last) * width


def count_shard_bytes(shards: Sequence[int], job: Job) -> int:
    """Return the size of the hidden states of shards of tokens."""
    counts = [read_counts(job.folder.shard(number))["rendered"] for number in shards]
    num_tokens = sum(x["num_tokens"] for x in counts)
    return count_bytes(num_tokens, sum(x["num_supervised_tokens"] for x in counts), job)


@dataclass
class StateStage:
    """Captures the samples of this rank.

    Args:
        job: The verifier and the settings.
        engines: Compute hidden states.
        progress: Reports progress.
    """

    job: Job
    engines: Engines
    progress: Progress
    num_tokens: int = 0  # captured by this run
    head_agreement: float | None = None

    def run(self, shards: Sequence[int]) -> None:
        """Write the samples of shards that are not complete.

        Raises:
            MachineError: The disk is full, or the hidden states cannot be right.
        """
        missing = [n for n in shards if not self.job.folder.done(n).exists()]
        if not missing:
            return
        storage, writers = storage_of(self.job), self.job.settings.storage.writers
        with (
            self.progress.task("Capturing shards", len(missing)) as task,
            SampleWriter(storage, writers, self._finish) as writer,
        ):
            for number in missing:
                self._capture_shard(number, writer)
                task.advance()

    def _capture_shard(self, number: int, writer: SampleWriter) -> None:
        shard = read_shard(self.job.folder.shard(number))
        folder = self.job.folder.samples_of(number)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        check_free_space(
            folder,
            count_shard_bytes([number], self.job),
            what=f"the next shard of {len(shard.rows):,} samples",
            hint="Free disk space, then rerun the same command to continue, or pass "
            "`--storage-dtype float8`",
        )
        written = WrittenShard(folder)
        storage = storage_of(self.job)
        for rows in plan_sequences(shard.rows, self.job.settings.engine.capture_tokens):
            if all(sample_file(folder, row.name).exists() for row in rows):
                for row in rows:
                    written.count(row.name, sample_file(folder, row.name).stat().st_size)
                continue
            packed = pack(rows, storage)
            states = self.engines.capturer.capture(packed)
            if self.num_tokens == 0:
                with self._refusing():
                    self._check_first(packed, states)
            writer.add(rows, states, written)
            self.num_tokens += len(packed.input_ids)
        writer.finish(written)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Let a run with another engine replace states that cannot be right."""
        try:
            yield
        except MachineError:
            refuse_contents(self.job.folder.samples)
            raise

    def _check_first(self, packed: Packed, states: CapturedStates) -> None:
        check_layers(states, self.job.layer_ids)
        engine = self.engines.capturer
        if isinstance(engine, TransformersEngine):
            verifier = load_frozen_verifier(self.job.files, self.job.config)
            self.head_agreement = check_head(packed, states, verifier, engine.logits)

    def _finish(self, shard: WrittenShard) -> None:
        """Mark a shard as complete."""
        num_rows = shard.num_samples + len(shard.non_finite)
        num_broken = len(shard.non_finite)
        if num_broken == num_rows > 0 or (
            num_broken >= MIN_NON_FINITE and num_broken > MAX_NON_FINITE_SHARE * num_rows
        ):
            refuse_contents(self.job.folder.samples)
            raise MachineError(
                f"{num_broken:,} of {num_rows:,} samples have hidden states that are not finite, "
                f"such as `{shard.non_finite[0]}`",
                hint="Pass `--dtype bfloat16` or `--dtype float32`: float16 overflows in many "
                "verifiers",
            )
        remove_leftovers(shard.folder)
        content = {
            "num_samples": shard.num_samples,
            "num_bytes": shard.num_bytes,
            "non_finite": sorted(shard.non_finite),
        }
        with replacing(shard.folder / DONE_NAME) as temporary:
            write_json(content, temporary)


@dataclass(frozen=True)
class StateTotals:
    """Counts over the samples of all shards."""

    num_samples: int
    num_bytes: int
    num_non_finite: int


def sum_up_states(job: Job, shards: Sequence[int]) -> StateTotals:
    """Add up the counts of shards, of all ranks and earlier runs."""
    counts = [read_json(job.folder.done(number)) for number in shards]
    return StateTotals(
        sum(x["num_samples"] for x in counts),
        sum(x["num_bytes"] for x in counts),
        sum(len(x["non_finite"]) for x in counts),
    )
