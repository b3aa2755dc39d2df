"""A data format: names and layout of the tensors of a sample in a `.pt` file."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from speculators_cli.core.data.float8 import ScaledStates
from speculators_cli.core.data.formats.layout import Layout, Values, check_layout, read_values
from speculators_cli.core.data.sample import (
    BadSampleError,
    Sample,
    SampleTokens,
    States,
    refusing_sample,
)
from speculators_cli.core.data.stored import StoredStates
from speculators_cli.core.data.supervised_rows import SupervisedRows
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.tensor_spec import TensorSpec, find_common


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """Reads the samples of one format."""

    name: str  # in settings and messages
    suffixes: tuple[str, ...]  # of the names of its files
    prefix: str = ""
    version: int | None = None  # of `--data-format-version`; None: `--data-format` has its name
    has_own_names: bool = False  # whether the file name identifies the format
    # Default aux layers of its generators, from the number of layers; None: vLLM's.
    usual_layer_ids: Callable[[int], tuple[int, ...]] | None = None
    conversion: str = ""  # command that converts its samples to v1

    @property
    def flag(self) -> str:
        """Return the flag to read samples of this format."""
        if self.version is None:
            return f"--data-format {self.name}"
        return f"--data-format-version {self.version}"

    def is_named(self, file_name: str) -> bool:
        """Whether a file of this name can be a sample of this format."""
        return file_name.startswith(self.prefix) and file_name.endswith(self.suffixes)

    def recognises(self, content: Mapping[object, object]) -> bool:  # noqa: ARG002
        """Whether the dict in a `.pt` file is a sample of this format."""
        return False

    def stamp_beside(self, folder: Path) -> str:  # noqa: ARG002
        """Return a stamp of the additional files that samples in a folder are read from."""
        return ""

    def verify(self, file: Path) -> None:  # noqa: B027 - a format may have no checksums
        """Verify the checksums of a sample.

        Raises:
            BadSampleError: A checksum does not match, or the file is not a sample.
            OSError: It cannot be opened.
        """

    @abstractmethod
    def read_sample(self, file: Path) -> Sample:
        """Read a sample; its hidden states are read on use."""

    @abstractmethod
    def read_tokens(self, file: Path) -> SampleTokens:
        """Read header, ids and mask of a sample, without its hidden states."""


@dataclass(frozen=True, kw_only=True)
class SampleFormat(Format):
    """Reads samples that are one file of `torch.save` each."""

    lay_out: Callable[
        [Mapping[object, object]], Layout
    ]  # content of a file -> location of its parts
    signs: frozenset[str]  # keys that identify the format

    def recognises(self, content: Mapping[object, object]) -> bool:
        """Whether a dict has all of these keys."""
        return self.signs <= content.keys()

    @refusing_sample()
    def verify(self, file: Path) -> None:
        """Verify the checksums of a sample."""
        with Archive(file) as archive:
            archive.verify()

    @refusing_sample()
    def read_sample(self, file: Path) -> Sample:
        """Read a sample: ids and mask into memory, hidden states on use.

        Raises:
            BadSampleError: The file is not a sample of this format.
            OSError: It cannot be opened.
        """
        import torch

        with Archive(file) as archive:
            layout = self.read_layout(archive)
            values = read_values(archive, layout)
            *aux, last = _find_states(archive, layout, values)
        loss_mask = torch.from_numpy(values.loss_mask)
        if values.is_supervised_only:
            last = SupervisedRows(last, loss_mask)
        input_ids = torch.from_numpy(values.input_ids)
        return Sample(input_ids, loss_mask, tuple(aux), last, values.is_normed)

    @refusing_sample()
    def read_tokens(self, file: Path) -> SampleTokens:
        """Read header, ids and mask of a sample, without its hidden states.

        Raises:
            BadSampleError: The file is not a sample of this format.
            OSError: It cannot be opened.
        """
        with Archive(file) as archive:
            return self.read_tokens_in(archive)

    @refusing_sample()
    def read_tokens_in(self, archive: Archive) -> SampleTokens:
        """Read header, ids and mask of the sample in an open file.

        Raises:
            BadSampleError: The file is not a sample of this format.
        """
        layout = self.read_layout(archive)
        values = read_values(archive, layout)
        return SampleTokens(
            values.input_ids,
            values.loss_mask,
            hidden_size=layout.hidden_states[-1].shape[1],
            num_aux_layers=len(layout.hidden_states) - 1,
            dtype=find_common(spec.dtype for spec in layout.hidden_states),
            is_normed=values.is_normed,
            fingerprint=archive.fingerprint,
        )

    @refusing_sample()
    def read_layout(self, archive: Archive) -> Layout:
        """Find and check the parts of a sample in its file.

        Raises:
            BadSampleError: The file is not a sample of this format.
        """
        content = archive.content
        if not isinstance(content, dict):
            raise BadSampleError(f"is {_kind(content)}, not a dict of tensors")
        _refuse_foreign(content, self.name)
        layout = self.lay_out(content)
        check_layout(layout, archive.num_bytes)
        for spec in layout.parts:
            archive.check(spec)
        return layout


def late_layer_ids(num_verifier_layers: int) -> tuple[int, ...]:
    """Return the default aux layers of the generators of `.pt` samples."""
    n = num_verifier_layers
    return (3, n // 2 + 1, n - 2)


def get_tensor(content: Mapping[object, object], key: str, num_dimensions: int = 1) -> TensorSpec:
    """Return the tensor of a key, without additional leading dimensions of size 1.

    Raises:
        BadSampleError: The key is missing, or not a tensor.
    """
    if key not in content:
        raise BadSampleError(f"has no `{key}`; found {_names(content)}")
    value = content[key]
    if not isinstance(value, TensorSpec):
        raise BadSampleError(f"has {_kind(value)} as `{key}`, expected a tensor")
    return value.without_batch(num_dimensions)


def split_columns(
    content: Mapping[object, object], key: str, last: TensorSpec, last_key: str
) -> list[TensorSpec]:
    """Split one matrix into its layers, each as wide as the last hidden states.

    Raises:
        BadSampleError: The sizes do not match.
    """
    aux = get_tensor(content, key, 2)
    if len(aux.shape) != 2 or len(last.shape) != 2:
        raise BadSampleError(
            f"has `{key}` of shape {list(aux.shape)} and `{last_key}` of shape "
            f"{list(last.shape)}, expected [seq_len, aux*hidden] and [seq_len, hidden]"
        )
    width, hidden_size = aux.shape[1], last.shape[1]
    if hidden_size == 0 or width == 0 or width % hidden_size:
        raise BadSampleError(
            f"has `{key}` {width:,} wide, not a multiple of the {hidden_size:,} of `{last_key}`"
        )
    return [aux.columns(start, start + hidden_size) for start in range(0, width, hidden_size)]


def _find_states(archive: Archive, layout: Layout, values: Values) -> list[States]:
    """Return the rows of each layer, which are read on use."""
    import torch

    stored = [StoredStates.of(archive, spec) for spec in layout.hidden_states]
    if not values.scales:
        return [*stored]
    scales = [torch.from_numpy(x.copy())[:, None] for x in values.scales]  # else not writable
    return [ScaledStates(*pair) for pair in zip(stored, scales, strict=True)]


def _refuse_foreign(content: Mapping[object, object], name: str) -> None:
    """Reject samples of other formats and of other tools, with a specific message."""
    # The table imports this module.
    from speculators_cli.core.data.formats import FORMATS

    found = next((form.name for form in FORMATS.values() if form.recognises(content)), name)
    if found != name:
        raise BadSampleError(f"is a {found} sample, read as {name}", other_format=found)
    if "token_ids" in content and "input_ids" not in content:
        raise BadSampleError("has `token_ids` instead of `input_ids`, as in another tool's format")
    if content and all(isinstance(key, int) for key in content):
        raise BadSampleError("is a table of token counts, not a sample")


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, TensorSpec) else f"a {type(value).__name__}"


def _names(content: Mapping[object, object]) -> str:
    names = [f"`{key[:40]}`" for key in content if isinstance(key, str)]
    return ", ".join(names[:8]) or "no keys"
