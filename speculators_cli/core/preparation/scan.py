"""Read all files of a folder as samples, without their hidden states, and find problems."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.formats.detect import detect, verify
from speculators_cli.core.data.sample import (
    BadSampleError,
    Problem,
    SampleHeader,
    SampleTokens,
    reason_of,
)
from speculators_cli.core.data.token_counts import TokenCounts
from speculators_cli.core.progress import Progress

READERS = 8  # threads
T = TypeVar("T")


@dataclass(frozen=True)
class Scan:
    """Properties of one sample that do not need its hidden states."""

    file: Path
    format: str
    header: SampleHeader
    num_bytes: int
    tokens_hash: bytes  # equal for samples with the same ids
    is_mask_full: bool  # every token is supervised


def scan_files(
    files: Sequence[Path], counts: TokenCounts, progress: Progress
) -> tuple[list[Scan], list[Problem]]:
    """Read every file as a sample, or report its problem; count supervised tokens."""
    scans: list[Scan] = []
    problems: list[Problem] = []
    for file, result in in_threads(scan, files, "Reading samples", progress):
        if isinstance(result, str):
            problems.append(Problem(file, result))
        else:
            scans.append(result[0])
            counts.add(result[1])
    return scans, problems


def scan(file: Path) -> tuple[Scan, SampleTokens] | str:
    """Read a file without its hidden states, or return its problem."""
    try:
        name, tokens = detect(file)
        found = Scan(
            file=file,
            format=name,
            header=tokens.header(),
            num_bytes=file.stat().st_size,
            tokens_hash=blake2b(tokens.input_ids.tobytes(), digest_size=16).digest(),
            is_mask_full=bool(tokens.loss_mask.all()),
        )
        return found, tokens
    except (BadSampleError, OSError) as error:
        return reason_of(error)


def find_outliers(scans: Sequence[Scan]) -> tuple[list[Scan], list[Problem]]:
    """Separate outliers, with another format or other sizes than most samples."""

    def kind(scan: Scan) -> tuple[str, int, int]:
        return scan.format, scan.header.hidden_size, scan.header.num_aux_layers

    usual = Counter(map(kind, scans)).most_common(1)[0][0]
    problems = [
        Problem(
            s.file,
            f"is {s.format} with hidden size {s.header.hidden_size:,} and "
            f"{s.header.num_aux_layers} aux layers, most are {usual[0]} with {usual[1]:,} and "
            f"{usual[2]}",
        )
        for s in scans
        if kind(s) != usual
    ]
    return [s for s in scans if kind(s) == usual], problems


def check_tokens(scans: Sequence[Scan], total_seq_len: int) -> Iterator[Problem]:
    """Find problems in ids and masks."""
    first: dict[bytes, Path] = {}
    for s in scans:
        if s.header.num_tokens < 2:
            yield Problem(s.file, f"has {s.header.num_tokens} tokens, too few for training")
        elif s.header.num_supervised_tokens == 0:
            yield Problem(s.file, "has no supervised token")
        elif not NEXT_TOKEN.has_target(s.header.first_target, total_seq_len):
            yield Problem(
                s.file,
                f"has its first supervised token after {s.header.first_target:,} others, beyond "
                f"the {total_seq_len:,} of `--total-seq-len`",
            )
        elif s.is_mask_full:
            yield Problem(s.file, "has all tokens supervised, including the prompt")
        other = first.setdefault(s.tokens_hash, s.file)
        if other is not s.file and s.header.num_tokens:
            yield Problem(s.file, f"has the same tokens as `{other}`")


def verify_checksums(files: Sequence[Path], progress: Progress) -> Iterator[Problem]:
    """Verify the checksums of every archive."""
    for file, problem in in_threads(find_damage, files, "Verifying", progress):
        if problem is not None:
            yield Problem(file, problem)


def find_damage(file: Path) -> str | None:
    """Return what is wrong with the bytes of a readable file."""
    try:
        verify(file)
    except BadSampleError as error:
        return error.reason
    except OSError:
        pass  # reported by the scan
    return None


def in_threads(
    work: Callable[[Path], T], files: Sequence[Path], description: str, progress: Progress
) -> Iterator[tuple[Path, T]]:
    """Yield each file with its result, in order."""
    with progress.task(description, len(files)) as task, ThreadPoolExecutor(READERS) as pool:
        for file, result in zip(files, pool.map(work, files), strict=True):
            task.advance()
            yield file, result
