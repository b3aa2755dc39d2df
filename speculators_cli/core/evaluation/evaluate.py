"""evaluate(settings): what a trained draft reaches on prompts, with its verifier."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from speculators_cli.core.errors import DataError, MachineError, SettingsError
from speculators_cli.core.evaluation.examples import choose_examples
from speculators_cli.core.evaluation.html_page import write_page
from speculators_cli.core.evaluation.intervals import length_interval
from speculators_cli.core.evaluation.job import Job
from speculators_cli.core.evaluation.measurement import answer_alone, measure
from speculators_cli.core.evaluation.report import (
    EvaluationReport,
    count_categories,
    count_context_lengths,
    share_refused_outside,
)
from speculators_cli.core.evaluation.verifier import MEMORY_HINT
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.evaluate import EvaluateSettings


def evaluate(settings: EvaluateSettings, *, progress: Progress = SILENT) -> EvaluationReport:
    """Draft and verify answers to prompts, and compare them with the verifier's own.

    Raises:
        SettingsError: A setting or the verifier cannot be used.
        DataError: The prompts cannot be used.
        CheckpointError: The draft is incomplete, or is another verifier's.
        MachineError: Memory is short, or the hub cannot be reached.
    """
    if settings.engine.is_served:
        raise SettingsError(
            "`--engine vllm` and `--endpoint` are not of this function",
            hint="Call `evaluate_served`",
        )
    started_at = time.perf_counter()
    page = settings.result.html
    if page is not None:
        check_page(page)
    job = Job(settings, progress)
    found = job.questions
    with memory_explained():
        work = job.work
        drafter = job.build_drafter(job.source)
        source = job.source
        risk = source.algorithm.find_length_risk(source.config, job.num_draft_tokens)
        if risk is not None:
            progress.warn(risk)
        own = answer_alone(job.verifier, work, progress).answers
        measured = measure(job.verifier, drafter, work, own, progress=progress)
        if measured.num_passes == 0:
            raise DataError(
                "Every answer ends with its first token: there is nothing to draft",
                hint="Pass other prompts: these are not what the verifier was trained on",
            )
        against = job.compare(measured, own)
        speedups = job.predict_speedups(measured)
        diagnosis = job.diagnose(measured)
    seed, drafting = settings.drafting.seed, settings.drafting
    report = EvaluationReport(
        draft=job.source.name,
        verifier=job.files.name_or_path,
        prompts=str(settings.prompts.prompts),
        num_bad_rows=found.num_bad_rows,
        num_too_long=found.num_too_long,
        max_new_tokens=drafting.max_new_tokens,
        temperature=drafting.temperature,
        dtype=str(job.dtype).removeprefix("torch."),
        device=job.device_name,
        batch_size=work.batch_size,
        measured=measured,
        interval=length_interval(measured.answers, seed=seed),
        categories=count_categories(found.questions, measured.answers, seed=seed),
        context_lengths=count_context_lengths(measured.answers),
        refused_outside_vocab=share_refused_outside(measured.answers, job.source.vocab_map.t2d),
        speedups=speedups,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if job.is_cuda else None,
        against=against,
        diagnosis=diagnosis,
        min_acceptance_length=settings.result.min_acceptance_length,
        duration_seconds=time.perf_counter() - started_at,
    )
    if page is not None:
        examples = choose_examples(found.questions, measured.answers, job.tokens)
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(report, examples, page)
    return report


def check_page(page: Path) -> None:
    """Check that the page can be written, without writing.

    Raises:
        SettingsError: It cannot.
    """
    check_output_dir(page.parent, flag="--html")
    if page.is_dir():
        raise SettingsError(
            f"`--html`: `{page}` is a folder", hint=f"Pass a file, such as `{page / 'report.html'}`"
        )


@contextmanager
def memory_explained() -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into one with a hint.

    Raises:
        MachineError: Memory is short.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise MachineError(
            "The GPU is out of memory", hint=f"Lower `--batch-size`. {MEMORY_HINT}"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MachineError(
            "The machine is out of memory", hint=f"Lower `--batch-size`. {MEMORY_HINT}"
        ) from None
