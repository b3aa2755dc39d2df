"""generate_data(settings): from prompts or conversations to samples of the verifier."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from speculators_cli.core.capture.engines import Engines
from speculators_cli.core.capture.generated_folder import (
    POLL_SECONDS,
    accept_contents,
    agree,
    refuse_contents,
    remove_leftovers,
    wait_for_agreement,
)
from speculators_cli.core.capture.job import Job, open_job
from speculators_cli.core.capture.rendered import RenderCounts, check_left_out
from speculators_cli.core.capture.report import GenerationReport, StageTime
from speculators_cli.core.capture.show_masks import MarkedRow, mark_row
from speculators_cli.core.capture.state_stage import StateStage, count_shard_bytes, sum_up_states
from speculators_cli.core.capture.token_stage import RowMaker, make_tokens, sum_up_tokens
from speculators_cli.core.conversations.bad_rows import BadRows
from speculators_cli.core.conversations.prompt_files import Prompts, open_prompts, read_prompts
from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.data.token_counts import FILE_NAME, TokenCounts, write_token_freq
from speculators_cli.core.data.token_shards import read_counts, read_shard
from speculators_cli.core.errors import DataError
from speculators_cli.core.files import check_free_space
from speculators_cli.core.progress import Progress
from speculators_cli.settings.generate_data import GenerateDataSettings


def generate_data(settings: GenerateDataSettings, *, progress: Progress) -> GenerationReport | None:
    """Write tokens, then samples, into the output folder; what is there already is kept.

    Each rank has shards of its own, from the input to the samples. The first rank waits for the
    others, and reports.

    Returns:
        None on ranks other than the first.

    Raises:
        SettingsError: A setting, the verifier or the output folder cannot be used.
        DataError: The input cannot be used.
        MachineError: The disk is full, the engine fails, or hidden states cannot be right.
    """
    job = open_job(settings)
    prompts = open_prompts(settings.input.prompts, split=settings.input.split or None)
    num_rows = count_rows(prompts, settings)
    is_first = job.place.rank == 0
    with (
        job.folder.locked(job.place),
        closing(Engines(job)) as engines,
    ):
        run = _Run(job, prompts, num_rows, engines, progress)
        report = run.make_tokens()
        if not settings.tokens.tokens_only:
            report = run.make_states(report)
        if is_first:
            # All ranks have written all of their files.
            for folder in (job.folder.tokens, job.folder.samples, job.folder.folder):
                remove_leftovers(folder)
            job.folder.remove_rank_locks()
    return report


def count_rows(prompts: Prompts, settings: GenerateDataSettings) -> int:
    """Return the number of rows of the input that are read.

    Raises:
        DataError: The input has no rows.
    """
    num_rows = prompts.count_rows()
    if num_rows == 0:
        raise DataError(f"`{prompts.name}` has no rows", hint="Pass a file with prompts")
    return min(num_rows, settings.input.max_conversations or num_rows)


def read_masked_rows(settings: GenerateDataSettings, number: int) -> list[MarkedRow]:
    """Return the first rows of tokens as text; nothing is written.

    Raises:
        SettingsError: A setting or the verifier cannot be used.
        DataError: The input cannot be used, or no token is supervised.
        MachineError: The engine fails.
    """
    job = open_job(settings)
    prompts = open_prompts(settings.input.prompts, split=settings.input.split or None)
    bad = BadRows(settings.input.max_bad_rows)
    sources = read_prompts(prompts, bad, vocab_size=job.vocab_size)
    with closing(Engines(job)) as engines:
        rendered = RowMaker(job, lambda: engines.answerer).make(list(islice(sources, number)))
    rows = [row for one in rendered for row in one.rows][:number]
    if not rows:
        check_left_out(
            RenderCounts.total(map(RenderCounts.of, rendered)),
            [left for one in rendered for left in one.left_out],
        )
    return [MarkedRow(row.name, tuple(mark_row(job.tokenizer, row))) for row in rows]


class _Run:
    """The stages of one run, for one rank."""

    def __init__(
        self,
        job: Job,
        prompts: Prompts,
        num_rows: int,
        engines: Engines,
        progress: Progress,
    ) -> None:
        self._job = job
        self._prompts = prompts
        self._num_rows = num_rows
        self._shards = job.all_shards(num_rows)
        self._engines = engines
        self._progress = progress
        self._own = job.own_shards(num_rows)
        self._is_first = job.place.rank == 0

    def make_tokens(self) -> GenerationReport | None:
        """Write the shards of tokens; on the first rank, wait for the others and report."""
        job = self._job
        self._agree(job.folder.tokens, tokens_manifest(job, self._prompts))
        before = {shard for shard in self._shards if job.folder.shard(shard).exists()}
        started_at = time.perf_counter()
        make_tokens(job, self._prompts, self._num_rows, self._engines, self._progress)
        if not self._is_first:
            return None
        _wait_for(job.folder.shard(shard) for shard in self._shards)
        seconds = time.perf_counter() - started_at
        try:
            totals = sum_up_tokens(job, self._shards)
        except DataError:
            refuse_contents(job.folder.tokens)
            raise
        accept_contents(job.folder.tokens)
        new = [read_counts(job.folder.shard(n)) for n in self._shards if n not in before]
        counts = totals.rendered
        return GenerationReport(
            output_dir=job.folder.folder,
            verifier=job.files.name_or_path,
            layer_ids=job.layer_ids,
            num_conversations=totals.bad.num_rows,
            num_bad_rows=totals.bad.num_bad,
            bad_rows=tuple(f"{row.place} {row.reason}" for row in totals.bad.listed),
            num_rows=counts.num_rows,
            num_tokens=counts.num_tokens,
            num_supervised_tokens=counts.num_supervised_tokens,
            num_truncated_answers=counts.num_without_end,
            num_truncated_rows=counts.num_cut,
            left_out=dict(counts.left_out),
            num_bytes=totals.num_bytes,
            tokens_time=StageTime(sum(x["rendered"]["num_tokens"] for x in new), seconds),
        )

    def make_states(self, tokens: GenerationReport | None) -> GenerationReport | None:
        """Write the samples; on the first rank, complete the folder and the report.

        Args:
            tokens: The report on the tokens; None on ranks other than the first.
        """
        job = self._job
        self._agree(job.folder.samples, states_manifest(job))
        missing = [shard for shard in self._shards if not job.folder.done(shard).exists()]
        if self._is_first:
            self._check_disk(missing)
            verifier, layer_ids = job.files.name_or_path, job.layer_ids
            write_data_config(job.folder.folder, verifier=verifier, layer_ids=layer_ids)
        started_at = time.perf_counter()
        stage = StateStage(job, self._engines, self._progress)
        stage.run(self._own)
        if tokens is None:
            return None
        _wait_for(job.folder.done(shard) for shard in self._shards)
        seconds = time.perf_counter() - started_at
        write_token_freq(self._count_tokens().total(), job.folder.folder / FILE_NAME)
        accept_contents(job.folder.samples)
        totals = sum_up_states(job, self._shards)
        new = [read_counts(job.folder.shard(shard)) for shard in missing]
        return replace(
            tokens,
            num_samples=totals.num_samples,
            num_non_finite=totals.num_non_finite,
            num_bytes=tokens.num_bytes + totals.num_bytes,
            head_agreement=stage.head_agreement,
            states_time=StageTime(sum(x["rendered"]["num_tokens"] for x in new), seconds),
        )

    def _agree(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Begin or continue a stage; ranks other than the first wait for it to do so."""
        (agree if self._is_first else wait_for_agreement)(folder, manifest)

    def _check_disk(self, shards: Sequence[int]) -> None:
        """Check that the samples of shards fit, before the first one is captured."""
        check_free_space(
            self._job.folder.folder,
            count_shard_bytes(shards, self._job),
            what="the set of samples",
            hint="Pass another `--output-dir`, `--storage-dtype float8`, or `--tokens-only` to "
            "train without stored hidden states",
        )

    def _count_tokens(self) -> TokenCounts:
        counts = TokenCounts(self._job.vocab_size)
        for shard in self._shards:
            for row in read_shard(self._job.folder.shard(shard)).rows:
                counts.add_ids(row.input_ids, row.loss_mask)
        return counts


def tokens_manifest(job: Job, prompts: Prompts) -> dict[str, Any]:
    """Return everything that the tokens depend on."""
    given, tokens = job.settings.input, job.settings.tokens
    manifest: dict[str, Any] = {
        "verifier": job.files.name_or_path,
        "vocab_size": job.vocab_size,
        "chat_template": job.template_hash,
        "end_ids": sorted(job.end_ids),
        "prompts": prompts.fingerprint(),
        "max_conversations": given.max_conversations,
        "shard_size": given.shard_size,
        "total_seq_len": tokens.total_seq_len,
        "thinking": tokens.thinking,
        "regenerate": tokens.regenerate,
    }
    if tokens.regenerate:
        manifest |= {
            "engine": "endpoint" if job.settings.engine.endpoint else job.settings.engine.engine,
            "dtype": str(job.dtype).removeprefix("torch."),
            "compute_dtype": job.settings.engine.compute_dtype,
            "weights": job.weights_hash,
            "temperature": tokens.temperature,
            "top_p": tokens.top_p,
            "max_new_tokens": tokens.max_new_tokens,
            "seed": tokens.seed,
            "skip_truncated_answers": tokens.skip_truncated_answers,
        }
    return manifest


def states_manifest(job: Job) -> dict[str, Any]:
    """Return everything that the hidden states of given tokens depend on."""
    storage, engine = job.settings.storage, job.settings.engine
    return {
        "verifier": job.files.name_or_path,
        "weights": job.weights_hash,
        "layer_ids": list(job.layer_ids),
        "engine": engine.engine,
        "dtype": str(job.dtype).removeprefix("torch."),
        "compute_dtype": engine.compute_dtype,
        "storage_dtype": storage.storage_dtype,
        "all_last_states": storage.all_last_states,
        "capture_tokens": engine.capture_tokens,
    }


def _wait_for(files: Iterable[Path]) -> None:
    """Wait until other ranks have written files; their launcher ends this one if they fail."""
    for file in files:
        while not file.exists():
            time.sleep(POLL_SECONDS)
