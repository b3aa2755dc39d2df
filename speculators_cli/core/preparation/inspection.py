"""Describe a folder of samples, and find problems in it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.data_config import (
    FILE_NAME,
    DataConfig,
    guess_num_layers,
    read_data_config,
    resolve_layer_ids,
)
from speculators_cli.core.data.folder import find_files, hint_of_no_samples, is_sample_name
from speculators_cli.core.data.formats.detect import describe_names, read_again
from speculators_cli.core.data.packing import plan_epoch
from speculators_cli.core.data.sample import Problem, Sample
from speculators_cli.core.data.source import spread_evenly
from speculators_cli.core.data.token_counts import TokenCounts
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import check_output_dir
from speculators_cli.core.models.agreement import (
    Agreement,
    find_wrong_marks,
    measure_agreement,
)
from speculators_cli.core.models.verifier import (
    VerifierConfig,
    load_frozen_verifier,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.preparation.inspection_page import write_page
from speculators_cli.core.preparation.inspection_report import Distribution, InspectionReport
from speculators_cli.core.preparation.scan import (
    Scan,
    check_tokens,
    find_outliers,
    scan_files,
    verify_checksums,
)
from speculators_cli.core.preparation.states import StatesReport, check_states
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.inspect_data import InspectDataSettings, InspectSettings


def inspect_data(settings: InspectDataSettings, *, progress: Progress = SILENT) -> InspectionReport:
    """Read headers, ids and masks of all samples, and the hidden states of some.

    Raises:
        SettingsError: The verifier cannot be used.
        DataError: The folder has no samples, or no readable ones.
        MachineError: The hub is unreachable.
    """
    wanted = settings.inspect
    if wanted.html is not None:
        check_output_dir(wanted.html.parent, flag="--html")
        if wanted.html.is_dir():
            raise SettingsError(
                f"`--html`: `{wanted.html}` is a folder",
                hint=f"Pass a file in it, such as `{wanted.html / 'report.html'}`",
            )
    listing = list(find_files(wanted.data_path))
    found = [file for _, file in listing]
    files = [file for file in found if is_sample_name(file.name)]
    if not files:
        raise DataError(
            f"`{wanted.data_path}` holds no samples: no {describe_names()} file was found",
            hint=hint_of_no_samples(listing),
        )
    counts = TokenCounts(None)
    scans, problems = scan_files(files, counts, progress)
    if not scans:
        raise DataError(
            f"None of the {len(files):,} files in `{wanted.data_path}` is a sample; the first, "
            f"`{problems[0].file}`, {problems[0].problem}",
            hint="Capture them again, or pass a folder of samples",
        )
    usual, more = find_outliers(scans)
    problems += [*more, *check_tokens(scans, wanted.total_seq_len)]
    drawn = draw(usual, wanted.samples)
    states = check_states(drawn_samples(drawn), progress)
    problems += [Problem(drawn[i].file, text) for i, text in states.problems]
    agreement = verifier = None
    if wanted.verifier_name_or_path is not None:
        verifier_files = VerifierFiles(wanted.verifier_name_or_path)
        verifier = read_verifier_config(verifier_files, trust_remote_code=wanted.trust_remote_code)
        vocab_size, agreement, more = measure_verifier(verifier_files, verifier, drawn, progress)
        problems += more
        problems += find_contradictions(
            usual, vocab_size, verifier.hidden_size, agreement, wanted.data_path
        )
    if wanted.verify:
        problems += verify_checksums(files, progress)
    configs = [read_data_config(f) for f in found if f.name == FILE_NAME]
    warn_of_assumed_ids(configs, progress)
    problems += check_layer_ids(wanted.data_path, configs, usual[0], verifier)
    report = make_report(wanted, scans, usual, counts.total(), problems, states, agreement, configs)
    if wanted.html is not None:
        write_page(report, wanted.html, name=str(wanted.data_path))
    return report


def draw(scans: Sequence[Scan], num_samples: int) -> list[Scan]:
    """Select samples that have tokens, evenly spaced and deterministically."""
    usable = [s for s in scans if s.header.num_tokens > 1]
    return [usable[i] for i in spread_evenly(len(usable), num_samples)]


def drawn_samples(scans: Sequence[Scan]) -> list[Callable[[], Sample]]:
    """Return readers of samples, to keep only one at a time in memory."""
    return [partial(read_again, s.file, s.format) for s in scans]


def measure_verifier(
    files: VerifierFiles, config: VerifierConfig, drawn: Sequence[Scan], progress: Progress
) -> tuple[int, Agreement | None, list[Problem]]:
    """Return the verifier's vocabulary size, the agreement, and samples that contradict it."""
    vocab_size = files.read_vocab_size(config.modules)
    fitting = [
        s
        for s in drawn
        if s.header.hidden_size == config.hidden_size and s.header.max_token_id < vocab_size
    ]
    if not fitting:
        return vocab_size, None, []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    verifier = load_frozen_verifier(files, config, progress=progress).to(device)
    with progress.task("Measuring LM-head accuracy", len(fitting)) as task:

        def read_all() -> Iterator[Sample]:
            for read in drawn_samples(fitting):
                yield read()
                task.advance()

        agreement = measure_agreement(verifier, read_all())
    wrong = find_wrong_marks(verifier, drawn_samples(fitting))
    problems = [Problem(fitting[i].file, marks.problem) for marks in wrong for i in marks.indices]
    return vocab_size, agreement, problems


def find_contradictions(
    scans: Sequence[Scan],
    vocab_size: int,
    hidden_size: int,
    agreement: Agreement | None,
    folder: Path,
) -> Iterator[Problem]:
    """Find contradictions between the samples and the verifier."""
    for s in scans:
        if s.header.max_token_id >= vocab_size:
            yield Problem(
                s.file,
                f"has token id {s.header.max_token_id:,}, beyond the verifier's vocabulary of "
                f"{vocab_size:,}",
            )
    found = scans[0].header.hidden_size
    if found != hidden_size:
        yield Problem(folder, f"has hidden size {found:,}, the verifier {hidden_size:,}")
    elif agreement is not None and (problem := agreement.problem) is not None:
        yield Problem(folder, problem)


def warn_of_assumed_ids(configs: Sequence[DataConfig], progress: Progress) -> None:
    """Warn of layer ids that `data_config.json` marks as assumed."""
    for config in configs:
        if config.layer_ids is not None and config.is_assumed:
            ids = ",".join(map(str, config.layer_ids))
            progress.warn(
                f"The layer ids `{ids}` in `{config.file}` were assumed",
                hint=f"Pass `--target-layer-ids {ids}` to `speculators train` to confirm them",
            )


def check_layer_ids(
    folder: Path,
    configs: Sequence[DataConfig],
    usual: Scan,
    verifier: VerifierConfig | None,
) -> list[Problem]:
    """Find contradictions of `data_config.json` with the samples or the verifier."""
    num_layers = guess_num_layers(configs)
    if num_layers is None:
        return []
    try:
        resolve_layer_ids(
            configs,
            num_verifier_layers=verifier.num_layers if verifier else num_layers,
            num_aux_layers=usual.header.num_aux_layers,
            data_format=usual.format,
            given=None,
        )
    except DataError as error:
        return [Problem(folder, f"has invalid layer ids: {error.message}")]
    return []


def make_report(
    wanted: InspectSettings,
    scans: Sequence[Scan],
    usual: Sequence[Scan],
    counts: NDArray[np.int64],
    problems: Sequence[Problem],
    states: StatesReport,
    agreement: Agreement | None,
    configs: Sequence[DataConfig],
) -> InspectionReport:
    """Assemble the report."""
    formats = {s.format for s in scans}
    lengths = np.array([s.header.num_tokens for s in usual], dtype=np.int64)
    supervised = np.array([s.header.num_supervised_tokens for s in usual], dtype=np.int64)
    packing = plan_epoch(
        np.array([NEXT_TOKEN.count_positions(n) for n in lengths.tolist()], dtype=np.int64),
        total_seq_len=wanted.total_seq_len,
        seed=0,
        epoch=0,
        global_batch=1,
    )
    header = usual[0].header
    epoch_seconds = max(int(lengths.sum()), 1) / wanted.tokens_per_second
    dtypes = Counter(s.header.dtype for s in usual)
    return InspectionReport(
        format="mixed" if len(formats) > 1 else scans[0].format,
        num_samples=len(scans),
        num_bytes=sum(s.num_bytes for s in scans),
        tokens=summarize(lengths),
        supervised_tokens=summarize(supervised),
        supervised_fractions=spread_fractions(supervised, lengths),
        coverage_by_size=cover(counts),
        hidden_size=header.hidden_size,
        num_aux_layers=header.num_aux_layers,
        dtypes=dict(dtypes),
        is_normed=header.is_normed,
        layer_ids=next((c.layer_ids for c in configs if c.layer_ids is not None), None),
        are_layer_ids_assumed=any(c.is_assumed for c in configs if c.layer_ids is not None),
        layer_ids_convention=next((c.convention for c in configs if c.layer_ids), None),
        verifier=next((c.verifier for c in configs if c.verifier is not None), None),
        total_seq_len=wanted.total_seq_len,
        num_packed_sequences=len(packing.sequences),
        fill=packing.fill,
        tokens_per_second=wanted.tokens_per_second,
        epoch_seconds=epoch_seconds,
        disk_bytes_per_second=sum(s.num_bytes for s in usual) / epoch_seconds,
        num_samples_looked_at=states.num_samples,
        layer_rms=states.layer_rms,
        agreement=agreement,
        problems=tuple(sorted(set(problems), key=lambda p: (str(p.file), p.problem))),
    )


def spread_fractions(supervised: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[int, ...]:
    """Count samples by their fraction of supervised tokens, in ten bins from none to all."""
    shares = supervised / np.maximum(lengths, 1)
    return tuple(np.histogram(shares, bins=10, range=(0, 1))[0].tolist())


def cover(counts: NDArray[np.int64]) -> dict[int, float]:
    """Return the fraction of supervised tokens covered by the top 1, 2, 4, ... token ids."""
    shares = np.sort(counts)[::-1].cumsum() / max(int(counts.sum()), 1)
    num_seen = int(np.count_nonzero(counts))
    sizes = [2**k for k in range(20) if 2**k < num_seen] + ([num_seen] if num_seen else [])
    return {size: float(shares[size - 1]) for size in sizes}


def summarize(values: NDArray[np.int64]) -> Distribution:
    """Return minimum, median and so on, and a histogram of ten bins from minimum to maximum."""
    histogram, _ = np.histogram(values, bins=10)
    return Distribution(
        min=int(values.min()),
        median=float(np.median(values)),
        p95=float(np.percentile(values, 95)),
        max=int(values.max()),
        total=int(values.sum()),
        histogram=tuple(histogram.tolist()),
    )
