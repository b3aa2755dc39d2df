"""Open a file of weights: safetensors, or a pickled state dict, whose code is not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speculators_cli.core.reading import Tensors, UnreadableError, check_content, open_safetensors
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

CONVERT = "Convert the model to safetensors with `save_pretrained` of transformers"


@contextmanager
def open_weights(file: Path) -> Iterator[Tensors]:
    """Open a file of weights, by its suffix; only its header is read.

    Raises:
        UnreadableError: It is not a valid file of weights, or its pickle would run code.
    """
    if file.suffix == ".safetensors":
        with open_safetensors(file) as tensors:
            yield tensors
        return
    check_content(file)
    try:
        with Archive(file) as archive:
            yield Tensors(file, _StateDict(archive), CONVERT)
    except TorchFileError as error:
        raise UnreadableError(file, error.reason, hint=CONVERT) from None


@dataclass(frozen=True)
class _Slice:
    """A tensor that has not been read."""

    spec: TensorSpec

    def get_shape(self) -> list[int]:
        return list(self.spec.shape)


class _StateDict:
    """Tensors of a pickled state dict; its code is not run."""

    def __init__(self, archive: Archive) -> None:
        if not isinstance(archive.content, dict):
            raise TorchFileError("has no state dict")
        self._archive = archive
        self._specs = {
            str(key): value
            for key, value in archive.content.items()
            if isinstance(value, TensorSpec)
        }

    def keys(self) -> list[str]:
        return list(self._specs)

    def get_tensor(self, name: str) -> Tensor:
        return self._archive.read_tensor(self._specs[name])

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._specs[name])
