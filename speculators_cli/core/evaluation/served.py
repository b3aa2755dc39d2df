"""evaluate_served(settings): what a draft reaches in a serving engine, counted by the engine."""

import os
import time
from contextlib import closing

from speculators_cli.core.engines.endpoint_measured import MeasuredEndpoint
from speculators_cli.core.engines.measured import MeasuredEngine, MeasuredRun
from speculators_cli.core.engines.vllm_args import parse_vllm_args
from speculators_cli.core.engines.vllm_measured import MeasuredVLLM, ServedDraft
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import DataError
from speculators_cli.core.evaluation.job import Job
from speculators_cli.core.evaluation.measurement import Work
from speculators_cli.core.evaluation.served_report import ServedReport, Throughput
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.evaluate import EvaluateSettings


def evaluate_served(settings: EvaluateSettings, *, progress: Progress = SILENT) -> ServedReport:
    """Answer prompts in vLLM or through a server, with the draft and, in vLLM, without it.

    Raises:
        SettingsError: A setting, the verifier or the interpreter cannot be used.
        DataError: The prompts cannot be used.
        CheckpointError: The draft is incomplete, or is another verifier's.
        MachineError: vLLM is missing or has failed, or the server cannot be used.
    """
    started_at = time.perf_counter()
    job = Job(settings, progress)
    with closing(open_drafting(job)) as engine:
        measured = Measured(engine, job, progress, "with the draft")
    if measured.counted.num_passes == 0:
        raise DataError(
            "The engine has counted no verifier pass over draft tokens",
            hint="Pass prompts whose answers have more than one token",
        )
    alone = None
    if settings.engine.endpoint is None:
        with closing(open_vllm(job, None)) as plain:
            alone = Measured(plain, job, progress, "without a draft")
    return ServedReport(
        draft=job.source.name,
        verifier=job.files.name_or_path,
        prompts=str(settings.prompts.prompts),
        num_bad_rows=job.questions.num_bad_rows,
        num_too_long=job.questions.num_too_long,
        max_new_tokens=settings.drafting.max_new_tokens,
        temperature=settings.drafting.temperature,
        engine=engine.fingerprint,
        counted=measured.counted,
        num_different=None if alone is None else count_different(measured.counted, alone.counted),
        throughputs=tuple(
            Throughput(concurrency, rates, None if alone is None else alone.rates[concurrency])
            for concurrency, rates in measured.rates.items()
        ),
        min_acceptance_length=settings.result.min_acceptance_length,
        duration_seconds=time.perf_counter() - started_at,
    )


class Measured:
    """The runs of an engine: a first one that is counted, then timed ones.

    Args:
        engine: The engine.
        job: What is answered, and how often.
        progress: Reports finished runs.
        how: `with the draft` or `without a draft`.
    """

    def __init__(self, engine: MeasuredEngine, job: Job, progress: Progress, how: str) -> None:
        given, work = job.settings.engine, job.work
        runs = [n for n in given.concurrencies for _ in range(given.repeats)]
        rates: dict[int, list[float]] = {n: [] for n in given.concurrencies}
        with progress.task(f"Serving {how}", 1 + len(runs)) as task:
            # Not timed: compiles and warms up what the others use.
            self.counted = run(engine, work, max(given.concurrencies))
            task.advance()
            for concurrency in runs:
                rates[concurrency].append(run(engine, work, concurrency).tokens_per_second)
                task.advance()
        self.rates = {n: tuple(found) for n, found in rates.items()}


def run(engine: MeasuredEngine, work: Work, concurrency: int) -> MeasuredRun:
    """Answer all prompts once."""
    return engine.run(work.prompts, work.sampling, concurrency)


def open_drafting(job: Job) -> MeasuredEngine:
    """The engine with the draft: a server that has it, or vLLM, which loads it."""
    endpoint = job.settings.engine.endpoint
    if endpoint is not None:
        return MeasuredEndpoint(
            endpoint,
            job.files.name_or_path,
            api_key=os.environ.get("OPENAI_API_KEY"),
            progress=job.progress,
        )
    return open_vllm(
        job, ServedDraft(job.source.name, job.source.config.algorithm, job.num_draft_tokens)
    )


def open_vllm(job: Job, draft: ServedDraft | None) -> MeasuredVLLM:
    """Open vLLM for the verifier of a job; it is loaded with the first run."""
    given = job.settings.engine
    setup = VLLMSetup(
        job.files.name_or_path,
        str(job.dtype).removeprefix("torch."),
        python=given.vllm_python,
        tensor_parallel_size=given.tensor_parallel_size,
        args=parse_vllm_args(given.vllm_args),
        trust_remote_code=job.settings.source.trust_remote_code,
    )
    return MeasuredVLLM(setup, draft)


def count_different(drafted: MeasuredRun, alone: MeasuredRun) -> int:
    """Answers that differ from those without a draft."""
    return sum(a != b for a, b in zip(drafted.answers, alone.answers, strict=True))
