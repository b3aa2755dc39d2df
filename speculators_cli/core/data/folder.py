"""SampleFolder: samples on disk, in folders whose files are scanned by their headers."""

import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import chain
from pathlib import Path

from speculators_cli.core.data.alignment import NEXT_TOKEN, Alignment
from speculators_cli.core.data.data_config import FILE_NAME, DataConfig, read_data_config
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.formats.detect import describe_names, detect, read_again
from speculators_cli.core.data.formats.format import Format
from speculators_cli.core.data.index import Entry, FileStamp, read_index, write_index
from speculators_cli.core.data.sample import (
    BadSampleError,
    ChangedSampleError,
    Problem,
    Sample,
    SampleHeader,
    SampleTokens,
)
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import Progress

NOT_SAMPLES = {"token_freq.pt"}
PACKED = {".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip", ".zst"}
BAD_SHARE = 0.01  # of the folder, unless `--max-bad-samples` is passed
MAX_NAMED = 10
SCANNED_AT_ONCE = 16  # files per task of a thread


@dataclass(frozen=True)
class SampleFolder(SampleSource):
    """Samples of one format in files; ids are indices into `entries`."""

    entries: tuple[Entry, ...]
    format: str
    bad: tuple[Problem, ...] = ()
    configs: tuple[DataConfig, ...] = ()
    alignment: Alignment = NEXT_TOKEN

    @cached_property
    def headers(self) -> Sequence[SampleHeader]:
        """Headers of the samples, from the scan."""
        return [entry.header for entry in self.entries]

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.stamp.num_bytes for entry in self.entries)

    @cached_property
    def data_hash(self) -> str:
        """Return a hash of the names and sizes of all samples."""
        lines = [f"{entry.name}\0{entry.stamp.num_bytes}\n" for entry in self.entries]
        return sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """Return a hash of the names, sizes and contents of all samples."""
        lines = [f"{x.name}\0{x.stamp.num_bytes}\0{x.fingerprint}\n" for x in self.entries]
        return sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()

    def write_index(self, file: Path) -> None:
        """Save the headers, for the next scan of the same files."""
        write_index(self.entries, file, data_format=self.format, alignment=self.alignment)

    def path(self, sample_id: int) -> Path:
        """Return the file of a sample."""
        return self.entries[sample_id].file

    def read(self, sample_id: int) -> Sample:
        """Read a sample; its hidden states are read from disk on use.

        Raises:
            ChangedSampleError: The file has changed since the scan.
        """
        entry = self.entries[sample_id]
        try:
            num_bytes = entry.file.stat().st_size
        except OSError as error:
            raise ChangedSampleError(entry.file, error.strerror or str(error)) from None
        if num_bytes != entry.stamp.num_bytes:
            raise ChangedSampleError(
                entry.file, "has a different size than at the start of the run"
            )
        sample = read_again(entry.file, self.format)
        shape = (entry.header.num_tokens, entry.header.hidden_size)
        layers = (*sample.aux_hidden_states, sample.last_hidden_states)
        if {tuple(states.shape) for states in layers} != {shape} or (
            len(layers) != entry.header.num_aux_layers + 1
        ):
            raise ChangedSampleError(
                entry.file, "has different shapes than at the start of the run"
            )
        return sample

    def select(self, ids: Iterable[int]) -> "SampleFolder":
        """Select some of the samples, in the order of `ids`."""
        return replace(self, entries=tuple(self.entries[i] for i in ids))


def read_folders(
    folders: Sequence[Path],
    *,
    data_format: str = "auto",
    version: int,
    index_file: Path | None,
    max_bad_samples: int | None,
    progress: Progress,
    alignment: Alignment = NEXT_TOKEN,
    on_tokens: Callable[[SampleTokens], None] | None = None,
) -> SampleFolder:
    """Scan folders for samples, reading headers only, and skip invalid files.

    Args:
        folders: Searched recursively.
        data_format: `pt`, `speculators`, `specforge`, or `auto`: detected from the files.
        version: Format version of `.pt` samples.
        index_file: Headers of an earlier scan, used for unchanged files.
        max_bad_samples: Maximum number of files skipped; None: 1 % of the folder.
        progress: Reports progress and skipped files.
        alignment: Which tokens of a sample are targets.
        on_tokens: Called with ids and mask of every readable sample, in order, including those
            skipped later for their sizes; requires `index_file` None.

    Raises:
        DataError: No samples, samples of another format, or too many invalid files.
    """
    found = [(name, file) for folder in folders for name, file in find_files(folder)]
    configs = tuple(read_data_config(f) for _, f in found if f.name == FILE_NAME)
    name = choose_format(found, data_format, version)
    files = [x for x in found if is_sample_name(x[1].name, name)]
    shown = ", ".join(f"`{folder}`" for folder in folders)
    if not files:
        raise DataError(
            f"{shown} holds no samples: no `{FORMATS[name].suffixes[0]}` file was found",
            hint=hint_of_no_samples(found),
        )
    known = read_index(index_file, name, alignment) if index_file is not None else {}
    stamp_beside = lru_cache(maxsize=None)(FORMATS[name].stamp_beside)  # cached per folder
    entries: list[Entry] = []
    broken: list[tuple[Path, BadSampleError]] = []
    with progress.task("Reading samples", len(files)) as task, ThreadPoolExecutor(8) as pool:
        # Several files per task: handing over one file takes half as long as its scan.
        chunks = [files[i : i + SCANNED_AT_ONCE] for i in range(0, len(files), SCANNED_AT_ONCE)]
        scans = chain.from_iterable(
            pool.map(
                lambda x: [_scan(n, f, name, alignment, known, stamp_beside) for n, f in x], chunks
            )
        )
        for (_, file), result in zip(files, scans, strict=True):
            if isinstance(result, BadSampleError):
                broken.append((file, result))
            else:
                entry, tokens = result
                entries.append(entry)
                if on_tokens is not None:
                    assert tokens is not None, "no index was used"
                    on_tokens(tokens)
            task.advance()
    _refuse_other_format(broken, len(files), name, shown)
    entries, outliers = _split_off_outliers(entries)
    bad = (*(Problem(file, error.reason) for file, error in broken), *outliers)
    _judge_bad(bad, len(files), max_bad_samples, progress)
    _warn_of_short(entries, progress)
    samples = SampleFolder(tuple(entries), name, bad, configs, alignment)
    if not samples.lengths.any():
        raise DataError(
            f"No sample of {shown} has two tokens or more", hint="Capture longer conversations"
        )
    return samples


def choose_format(found: Sequence[tuple[str, Path]], data_format: str, version: int) -> str:
    """Choose the format to read files as: `data_format`, or as detected for `auto`.

    `.pt` files have the version `version`. Without any, the first readable file decides: SpecForge
    and the first generators of v0 use the same file names.
    """
    versioned = next(form for form in FORMATS.values() if form.version == version)
    if data_format != "auto":
        return data_format if data_format in FORMATS else versioned.name
    files = [file for _, file in found if is_sample_name(file.name)]
    own = [form for form in FORMATS.values() if form.has_own_names]
    named = next((form for form in own if any(form.is_named(file.name) for file in files)), None)
    if named is not None:
        if not all(named.is_named(file.name) for file in files):
            suffixes = sorted({file.suffix for file in files})
            raise DataError(
                f"The samples are of several formats: {', '.join(f'`{x}`' for x in suffixes)}",
                hint="Pass `--data-format` to choose one of them",
            )
        return named.name
    if any(file.suffix == versioned.suffixes[0] for file in files):
        return versioned.name
    return _detect_first(files, versioned)


def _detect_first(files: Sequence[Path], versioned: Format) -> str:
    """Detect the format of the first readable file; that of `versioned` for other versions."""
    for file in files:
        try:
            name = detect(file)[0]
        except (BadSampleError, OSError):
            continue
        return name if FORMATS[name].version is None else versioned.name
    return versioned.name


def is_sample_name(name: str, data_format: str | None = None) -> bool:
    """Whether a file of this name can be a sample, of one format or of any."""
    formats = FORMATS.values() if data_format is None else (FORMATS[data_format],)
    return name not in NOT_SAMPLES and any(form.is_named(name) for form in formats)


def find_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Find files below a folder, in sorted order, following links; each with its relative name.

    Folders that contain themselves through a link are entered once. FIFOs, sockets and devices are
    skipped. Broken links are included: each is a lost sample.

    Raises:
        DataError: A folder cannot be listed.
    """
    seen: set[tuple[int, int]] = set()

    def walk(current: Path) -> Iterator[Path]:
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(current) as listing:
                children = sorted(listing, key=lambda child: child.name)
        except OSError as error:
            raise DataError(
                f"`{current}` cannot be listed: {error.strerror}",
                hint="Make every folder of the samples readable, or pass another folder",
            ) from None
        for child in children:
            mode = _find_mode(child)
            if stat.S_ISDIR(mode):
                yield from walk(Path(child.path))
            elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                yield Path(child.path)

    for file in walk(folder):
        yield file.relative_to(folder).as_posix(), file


def _scan(
    name: str,
    file: Path,
    data_format: str,
    alignment: Alignment,
    known: dict[str, Entry],
    stamp_beside: Callable[[Path], str],
) -> tuple[Entry, SampleTokens | None] | BadSampleError:
    """Read a file, or find it in the index, which does not have tokens."""
    try:
        status = file.stat()
        beside = stamp_beside(file.parent)
        stamp = FileStamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns, beside)
        cached = known.get(str(file.absolute()))
        if cached is not None and cached.stamp == stamp:
            return Entry(file, name, stamp, cached.header, cached.fingerprint), None
        tokens = FORMATS[data_format].read_tokens(file)
        return Entry(file, name, stamp, tokens.header(alignment), tokens.fingerprint), tokens
    except BadSampleError as error:
        return error
    except OSError as error:
        return BadSampleError(f"cannot be read: {error.strerror}")


def _refuse_other_format(
    broken: list[tuple[Path, BadSampleError]], num_files: int, data_format: str, shown: str
) -> None:
    others = [error.other_format for _, error in broken if error.other_format is not None]
    if len(others) * 2 <= num_files:
        return
    found = FORMATS[others[0]]
    is_forced = found.version is not None and FORMATS[data_format].version is None
    hint = f"Pass `{'--data-format pt ' * is_forced}{found.flag}`"
    if found.conversion:
        hint += f", or rewrite them with `{found.conversion}`"
    raise DataError(
        f"{shown} holds {found.name} samples, which were read as {data_format}", hint=hint
    )


def _split_off_outliers(entries: list[Entry]) -> tuple[list[Entry], list[Problem]]:
    """Separate outliers, whose sizes differ from most samples."""
    if not entries:
        return [], []
    sizes = Counter((e.header.hidden_size, e.header.num_aux_layers) for e in entries)
    usual = sizes.most_common(1)[0][0]
    kept, outliers = [], []
    for entry in entries:
        size = (entry.header.hidden_size, entry.header.num_aux_layers)
        if size == usual:
            kept.append(entry)
        else:
            reason = (
                f"has hidden size {size[0]:,} and {size[1]} aux layers, "
                f"the others {usual[0]:,} and {usual[1]}"
            )
            outliers.append(Problem(entry.file, reason))
    return kept, outliers


def hint_of_no_samples(found: Sequence[tuple[str, Path]]) -> str:
    """Return the hint for a folder without samples, based on its files."""
    packed = next((name for name, file in found if file.suffix in PACKED), None)
    if packed is not None:
        return f"Unpack the files, such as `{packed}`"
    sample = next((name for name, file in found if is_sample_name(file.name)), None)
    if sample is not None:
        return f"Pass the `--data-format` of its samples, such as `{sample}`"
    if found:
        return (
            f"Correct the path: it holds other files, such as `{found[0][0]}`, and no "
            f"{describe_names()}"
        )
    return "Correct the path, or capture samples into it: it has no files"


def _find_mode(child: "os.DirEntry[str]") -> int:
    """Return the mode of a file or of its link target; of a broken link, its own."""
    try:
        return child.stat().st_mode
    except OSError:
        return child.stat(follow_symlinks=False).st_mode


def _warn_of_short(entries: Sequence[Entry], progress: Progress) -> None:
    """Warn of valid samples without tokens to predict."""
    short = [entry for entry in entries if entry.header.num_tokens < 2]
    if short:
        lines = _list_some([f"`{entry.file}` has {entry.header.num_tokens}" for entry in short])
        text = f"{len(short):,} of {len(entries):,} samples have fewer than two tokens"
        progress.warn("\n".join([f"{text}, and are not used", *lines]))


def _list_some(lines: Sequence[str]) -> list[str]:
    """Indent the first lines, and say how many are left out."""
    num_more = len(lines) - MAX_NAMED
    more = [f"  and {num_more:,} more"] if num_more > 0 else []
    return [*(f"  {line}" for line in lines[:MAX_NAMED]), *more]


def _judge_bad(
    bad: tuple[Problem, ...], num_files: int, max_bad_samples: int | None, progress: Progress
) -> None:
    """Warn if a few files are skipped; raise an error for many."""
    if not bad:
        return
    limit = math.ceil(BAD_SHARE * num_files) if max_bad_samples is None else max_bad_samples
    lines = _list_some([f"`{sample.file}` {sample.problem}" for sample in bad])
    if len(bad) == num_files or len(bad) > limit:
        raise DataError(
            "\n".join([f"{len(bad):,} of {num_files:,} samples cannot be used", *lines]),
            hint=f"Repair or remove them, or allow more with `--max-bad-samples {len(bad)}`"
            if len(bad) < num_files
            else "Capture them again: `speculators inspect-data` lists what is wrong with each",
        )
    noun = "sample" if len(bad) == 1 else "samples"
    progress.warn("\n".join([f"Skipped {len(bad):,} {noun} that cannot be used", *lines]))
