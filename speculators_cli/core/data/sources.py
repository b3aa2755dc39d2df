"""The kinds of sample sources, one of which is chosen by the contents of the folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.folder import SampleFolder, read_folders
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.progress import Progress


@dataclass(frozen=True)
class Request:
    """The samples to open, and how to read them."""

    folders: tuple[Path, ...]
    data_format: str  # `auto`, `pt`, `speculators` or `specforge`
    version: int  # format version of `.pt` samples
    index_file: Path | None  # headers of an earlier scan
    max_bad_samples: int | None  # maximum number of files skipped; None: 1 % of the folder
    alignment: Alignment


@dataclass(frozen=True)
class SourceKind:
    """One kind of sample source."""

    name: str
    is_in: Callable[[Sequence[Path]], bool]  # whether folders have samples of this kind
    open: Callable[[Request, Progress], SampleSource]


def open_samples(request: Request, progress: Progress) -> SampleSource:
    """Open the samples in folders, with the first kind of source that supports them.

    Raises:
        DataError: They cannot be used.
    """
    kind = next(kind for kind in SOURCES if kind.is_in(request.folders))
    return kind.open(request, progress)


def _open_folders(request: Request, progress: Progress) -> SampleFolder:
    return read_folders(
        request.folders,
        data_format=request.data_format,
        version=request.version,
        index_file=request.index_file,
        max_bad_samples=request.max_bad_samples,
        alignment=request.alignment,
        progress=progress,
    )


# Files of hidden states are last: any folder may have them.
SOURCES: list[SourceKind] = [SourceKind("files", lambda _: True, _open_folders)]
