"""The kinds of sample sources, one of which is chosen by the contents of the folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.folder import SampleFolder, read_folders
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.tokens import StatesShape, TokenFolder, has_only_shards, read_tokens
from speculators_cli.core.errors import DataError
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
    capture: Literal["stored", "online"] = "stored"
    live: StatesShape | None = None  # of hidden states that are computed while training


@dataclass(frozen=True)
class SourceKind:
    """One kind of sample source."""

    name: str
    is_in: Callable[[Sequence[Path]], bool]  # whether folders have samples of this kind
    open: Callable[[Request, Progress], SampleSource]
    capture: Literal["stored", "online"] = "stored"


def open_samples(request: Request, progress: Progress) -> SampleSource:
    """Open the samples in folders, with the first kind of source that supports them.

    Raises:
        DataError: They cannot be used.
    """
    kinds = [kind for kind in SOURCES if kind.capture == request.capture]
    # A kind that was asked for reports by itself what is missing in the folders.
    kind = next((kind for kind in kinds if kind.is_in(request.folders)), kinds[-1])
    return kind.open(request, progress)


def choose_capture(
    given: Literal["stored", "online", "auto"], folders: Sequence[Path]
) -> Literal["stored", "online"]:
    """Choose where hidden states come from: `auto` is online for folders of tokens only.

    Raises:
        DataError: Some folders have samples, others only tokens, which would be ignored.
    """
    if given != "auto":
        return given
    tokens = [folder for folder in folders if has_only_shards(folder)]
    others = [folder for folder in folders if folder not in tokens]
    if tokens and others:
        raise DataError(
            f"`{tokens[0]}` holds tokens without hidden states, `{others[0]}` samples with them",
            hint="Pass folders of one kind, or `--capture online` for tokens in all of them",
        )
    return "online" if tokens else "stored"


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


def _open_tokens(request: Request, progress: Progress) -> TokenFolder:
    assert request.live is not None, "known wherever states can be computed"
    return read_tokens(
        request.folders, shape=request.live, alignment=request.alignment, progress=progress
    )


# Files of hidden states are last: any folder may have them.
SOURCES: list[SourceKind] = [
    SourceKind("tokens", lambda _: True, _open_tokens, capture="online"),
    SourceKind("files", lambda _: True, _open_folders),
]
