"""Rewrite a folder of v0 samples as v1 samples; each file is written completely or not at all."""

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators_cli.core.data import data_config
from speculators_cli.core.data.convert import Changes, convert_file, has_same_values, is_converted
from speculators_cli.core.data.data_config import (
    LayerIds,
    guess_num_layers,
    read_data_config,
    resolve_layer_ids,
    warn_of_assumed,
)
from speculators_cli.core.data.folder import find_files, hint_of_no_samples, is_sample_name
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.sample import BadSampleError, Problem, SampleHeader, reason_of
from speculators_cli.core.errors import DataError, MachineError, SettingsError
from speculators_cli.core.files import (
    DISK_ERRORS,
    TEMPORARY,
    check_output_dir,
    disk_error,
    find_existing,
    format_bytes,
    sync,
)
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES
from speculators_cli.settings.convert_v0 import ConvertV0Settings, FilesSettings

if TYPE_CHECKING:
    from torch import Tensor

    from speculators_cli.core.models.verifier_files import VerifierFiles
    from speculators_cli.core.models.verifier_shape import VerifierShape

# Of the final norm: division by a smaller one amplifies rounding errors a thousandfold.
MIN_NORM_WEIGHT = 1e-3
MAX_WORKERS = 4
LEFTOVER = re.compile(
    rf"{re.escape(TEMPORARY)}(.+\.pt|{re.escape(data_config.FILE_NAME)})\.\d+(-\d+)?"
)
FIRST_BYTES = b"PK\3\4\0\0\0\x08" + bytes(6)  # of a file by `ArchiveWriter`, which has no date


@dataclass(frozen=True)
class Job:
    """One file to convert."""

    source: Path
    output: Path
    num_bytes: int  # of the source
    header: SampleHeader  # of the source
    is_converted: bool  # by an earlier run

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one value of the source's hidden states."""
        return ITEM_BYTES[self.header.dtype]


@dataclass(frozen=True)
class ConversionReport:
    """What was converted."""

    num_files: int
    num_converted: int  # in this run; in a dry run, the number that would be
    num_already_converted: int
    num_sources_removed: int
    num_bytes: int  # of the sources converted in this run
    duration_seconds: float
    layer_ids: tuple[int, ...] | None  # of the aux hidden states; None if unknown
    are_layer_ids_assumed: bool
    last_hidden_states_are_normed: bool
    largest_round_trip_error: float | None  # relative; None if the norm was not undone
    problems: tuple[Problem, ...]
    is_dry_run: bool

    def to_json(self) -> dict[str, Any]:
        """Return the fields, with paths as strings."""
        problems = [{"file": str(p.file), "problem": p.problem} for p in self.problems]
        return {**asdict(self), "problems": problems}


def convert_v0(settings: ConvertV0Settings, *, progress: Progress = SILENT) -> ConversionReport:
    """Convert all samples that are not converted yet.

    Raises:
        SettingsError: A folder or the verifier cannot be used; nothing was written.
        DataError: The folder has no samples, or its layer ids are invalid.
        MachineError: The disk is full or fills up; samples converted so far are kept.
    """
    started_at = time.perf_counter()
    files = settings.files
    check_output_dir(files.output_dir, flag="--output-dir")
    # Read once: importing torch and transformers takes longer than copying some gigabytes.
    verifier = read_verifier(settings)
    changes = Changes(
        files.dtype, load_norm_weight(verifier) if settings.verifier.undo_norm else None
    )
    found = list(find_files(files.v0_path))
    sources = [(name, f) for name, f in found if is_sample_name(f.name, "v0")]
    if not sources:
        raise DataError(
            f"`{files.v0_path}` holds no samples: no `.pt` or `.ckpt` file was found",
            hint=hint_of_no_samples(found),
        )
    jobs, problems = list_jobs(sources, files.output_dir, changes)
    if not jobs:
        raise DataError(
            f"None of the {len(sources):,} files in `{files.v0_path}` can be converted; the first, "
            f"`{problems[0].file}`, {problems[0].problem}",
            hint="Pass a folder of v0 samples; `speculators train` reads other formats directly",
        )
    layer_ids = find_layer_ids(settings, [f for _, f in found], jobs, verifier)
    if layer_ids is not None:
        warn_of_assumed(layer_ids, progress, whose=f"`{files.v0_path}` has")
    to_do = [job for job in jobs if not job.is_converted]
    num_bytes = sum(job.num_bytes for job in to_do)
    errors: list[float] = []
    num_removed = 0
    if not files.dry_run:
        check_space(to_do, files)
        files.output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(files.output_dir)
        # A stopped run may have left sources of finished copies, which are still to be removed.
        to_handle = jobs if files.delete_source else to_do
        for job, result in convert_all(to_handle, files, changes, progress):
            if isinstance(result, Problem):
                problems.append(result)
                continue
            num_removed += files.delete_source
            if not job.is_converted:
                errors.append(result)
        data_config.write_data_config(
            files.output_dir,
            verifier=settings.verifier.verifier_name_or_path,
            layer_ids=layer_ids.ids if layer_ids else None,
            is_assumed=layer_ids.is_assumed if layer_ids else False,
        )
    return ConversionReport(
        num_files=len(sources),
        num_converted=len(to_do) if files.dry_run else len(errors),
        num_already_converted=len(jobs) - len(to_do),
        num_sources_removed=num_removed,
        num_bytes=num_bytes,
        duration_seconds=time.perf_counter() - started_at,
        layer_ids=layer_ids.ids if layer_ids else None,
        are_layer_ids_assumed=bool(layer_ids and layer_ids.is_assumed),
        last_hidden_states_are_normed=changes.norm_weight is None,
        largest_round_trip_error=None if changes.norm_weight is None else max(errors, default=0.0),
        problems=tuple(problems),
        is_dry_run=files.dry_run,
    )


def read_verifier(settings: ConvertV0Settings) -> "tuple[VerifierFiles, VerifierShape] | None":
    """Read files and sizes of the verifier, if the settings have one."""
    name = settings.verifier.verifier_name_or_path
    if name is None:
        return None
    from speculators_cli.core.models import verifier, verifier_shape
    from speculators_cli.core.models.verifier_files import VerifierFiles

    files = VerifierFiles(name)
    # How its norm is computed is needed only to undo it.
    read = (
        verifier.read_verifier_config
        if settings.verifier.undo_norm
        else verifier_shape.read_verifier_shape
    )
    return files, read(files, trust_remote_code=settings.verifier.trust_remote_code)


def load_norm_weight(verifier: "tuple[VerifierFiles, VerifierShape] | None") -> "Tensor":
    """Load the weights of the verifier's final norm; [hidden], float32."""
    from speculators_cli.core.models.verifier import VerifierConfig, load_final_norm

    assert verifier is not None, "the settings require it where it is needed"
    files, config = verifier
    assert isinstance(config, VerifierConfig), "read in full to undo the norm"
    weight, bias = load_final_norm(files, config)
    if config.is_norm_centred or bias is not None:
        kind = "a LayerNorm, which subtracts the mean" if config.is_norm_centred else "biased"
        raise SettingsError(
            f"The final norm of `{config.name_or_path}` cannot be undone: it is {kind}",
            hint="Omit `--undo-norm`: `speculators train` reads normed states directly",
        )
    smallest = weight.abs().min().item()
    if smallest < MIN_NORM_WEIGHT:
        raise SettingsError(
            f"The final norm of `{config.name_or_path}` cannot be undone: its smallest weight is "
            f"{smallest:.1e}",
            hint="Omit `--undo-norm`: `speculators train` reads normed states directly",
        )
    return weight


def list_jobs(
    sources: Sequence[tuple[str, Path]], output_dir: Path, changes: Changes
) -> tuple[list[Job], list[Problem]]:
    """Map each file to its output, and list those that are unreadable or would collide."""
    jobs: list[Job] = []
    problems: list[Problem] = []
    taken: set[Path] = set()
    for name, source in sources:
        output = (output_dir / name).with_suffix(".pt")
        try:
            header = FORMATS["v0"].read_tokens(source).header()
            if output in taken:
                raise BadSampleError(f"would be written to `{output}`, as another file is")
            if any(folder.is_symlink() for folder in folders_below(output_dir, output)):
                raise BadSampleError(f"would be written through a link, to `{output}`")
            num_bytes = source.stat().st_size
        except (BadSampleError, OSError) as error:
            problems.append(Problem(source, reason_of(error)))
        else:
            taken.add(output)
            done = is_converted(source, output, changes)
            jobs.append(Job(source, output, num_bytes, header, done))
    return jobs, problems


def folders_below(output_dir: Path, output: Path) -> Iterator[Path]:
    """Yield the folders between the output folder and a file in it."""
    yield from (f for f in output.parents if output_dir in f.parents)


def find_layer_ids(
    settings: ConvertV0Settings,
    found: Sequence[Path],
    jobs: Sequence[Job],
    verifier: "tuple[VerifierFiles, VerifierShape] | None",
) -> LayerIds | None:
    """Return the layer ids passed or in the data; None if they depend on an unknown verifier."""
    given = settings.verifier.target_layer_ids
    configs = [read_data_config(f) for f in found if f.name == data_config.FILE_NAME]
    num_aux_layers = jobs[0].header.num_aux_layers
    if verifier is not None:
        num_layers: int | None = verifier[1].num_layers
    else:
        num_layers = max(given) if given is not None else guess_num_layers(configs)
    if num_layers is None:
        return None
    return resolve_layer_ids(
        configs,
        num_verifier_layers=num_layers,
        num_aux_layers=num_aux_layers,
        data_format="v0",
        given=given,
    )


def check_space(jobs: Sequence[Job], files: FilesSettings) -> None:
    """Check that the disk has room for all samples."""
    bytes_per_value = ITEM_BYTES[files.dtype] if files.dtype else None
    sizes = [
        job.num_bytes * (bytes_per_value or job.bytes_per_value) // job.bytes_per_value
        for job in jobs
    ]
    if files.delete_source:
        # Each removed source makes room for the next copy.
        sizes = sorted(sizes)[-count_workers(files) :]
    free = shutil.disk_usage(find_existing(files.output_dir)).free
    if sum(sizes) > free:
        raise MachineError(
            f"`{files.output_dir}` has {format_bytes(free)} free, the samples need "
            f"{format_bytes(sum(sizes))}",
            hint="Free disk space, or pass `--delete-source` or `--dtype bfloat16`",
        )


def count_workers(files: FilesSettings) -> int:
    """Return the number of files to convert in parallel."""
    return files.workers or min(MAX_WORKERS, os.cpu_count() or 1)


def remove_leftovers(output_dir: Path) -> None:
    """Remove incomplete files of a killed run, as identified by their contents."""
    for file in output_dir.rglob(f"{TEMPORARY}*"):
        match = LEFTOVER.fullmatch(file.name)
        if match is not None and file.is_file() and not file.is_symlink():
            is_config = match[1] == data_config.FILE_NAME
            first = data_config.FIRST_BYTES if is_config else FIRST_BYTES
            with file.open("rb") as stream:
                start = stream.read(len(first))
            # A record's data is written before its header: until then, the file begins with zeros.
            if first.startswith(start) or not start.strip(b"\0"):
                file.unlink()


def convert_all(
    jobs: Sequence[Job], files: FilesSettings, changes: Changes, progress: Progress
) -> Iterator[tuple[Job, float | Problem]]:
    """Convert all files; return each one's round-trip error, or why it was not converted."""

    def convert(job: Job) -> float | Problem:
        return convert_job(job, changes, delete_source=files.delete_source)

    total = sum(job.num_bytes for job in jobs)
    with (
        progress.task("Converting", total, is_bytes=True) as task,
        ThreadPoolExecutor(count_workers(files)) as pool,
    ):
        try:
            for job, result in zip(jobs, pool.map(convert, jobs), strict=True):
                task.advance(job.num_bytes)
                yield job, result
        except MachineError:
            pool.shutdown(cancel_futures=True)
            raise
        except OSError as error:
            pool.shutdown(cancel_futures=True)
            raise disk_error(files.output_dir, str(error.strerror)) from None


def convert_job(job: Job, changes: Changes, *, delete_source: bool) -> float | Problem:
    """Convert one file if needed, then remove its source if requested.

    Raises:
        OSError: The disk is full or fails.
    """
    error = 0.0
    try:
        if delete_source:
            FORMATS["v0"].verify(job.source)
        is_checked = job.is_converted and has_same_values(job.source, job.output, changes)
        if not is_checked:
            error = convert_file(job.source, job.output, changes)
        if delete_source:
            if not is_checked and not has_same_values(job.source, job.output, changes):
                return Problem(job.source, f"differs from its copy `{job.output}`")
            sync(job.output.parent)
            job.source.unlink()
    except BadSampleError as bad:
        return Problem(job.source, bad.reason)
    except OSError as failure:
        if failure.errno in DISK_ERRORS:
            raise
        return Problem(job.source, f"cannot be converted: {failure.strerror}")
    return error
