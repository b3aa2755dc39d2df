"""Read a map of a draft vocabulary from `.npy`, `.pt` or `.safetensors`."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.reading import (
    UnreadableError,
    check_content,
    open_safetensors,
    opening,
    read_npy,
)
from speculators_cli.core.torch_file.archive import Archive
from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.tensor_spec import TensorSpec

HINT = "Rebuild both maps with `speculators build-vocab-map`, or pass `--full-vocab`"
MAX_WHOLE = 2**53  # the largest range of exact integers in a float64


def read_map(file: Path, key: str) -> NDArray[np.int64]:
    """Read a vector of integers.

    Args:
        file: A `.npy` file, or one of `torch.save` or safetensors: with the vector only or, as in
            drafts and other tools, among others under its key.
        key: `d2t` or `t2d`.

    Returns:
        [length], int64, whatever dtype it has in the file; True is 1.

    Raises:
        UnreadableError: It cannot be read, or is not such a vector.
    """
    check_content(file, fix=HINT)
    with opening(file) as descriptor:
        is_zip = os.pread(descriptor, 2, 0) == b"PK"
    if is_zip:
        array = _read_archive(file, key)
    elif file.suffix == ".safetensors":
        array = _read_safetensors(file, key)
    else:
        array = read_npy(file, fix=HINT)
    return _as_whole_numbers(array, file)


def _read_archive(file: Path, key: str) -> NDArray[np.generic]:
    """Read a tensor of `torch.save`; no code of the file is run."""
    if file.suffix == ".npz":
        raise UnreadableError(
            file,
            "is an archive of several arrays",
            hint=f'Save only `{key}`: `np.save("{key}.npy", np.load("{file.name}")["{key}"])`',
        )
    try:
        with Archive(file) as archive:
            content = archive.content
            if isinstance(content, dict) and key in content:
                content = content[key]
            if isinstance(content, TensorSpec):
                return archive.read(content)
    except TorchFileError as error:
        raise UnreadableError(file, error.reason, hint=HINT) from None
    if isinstance(content, list) and all(isinstance(x, int | float) for x in content):
        return np.array(content)
    keys = ", ".join(f"`{name}`" for name in content) if isinstance(content, dict) else ""
    found = f"a dict with {keys or 'nothing in it'}" if isinstance(content, dict) else "no tensor"
    raise UnreadableError(file, f"holds {found}, expected a tensor or one as `{key}`", hint=HINT)


def _read_safetensors(file: Path, key: str) -> NDArray[np.generic]:
    with open_safetensors(file, fix=HINT) as tensors:
        names = tensors.names()
        name = key if key in names or len(names) != 1 else names[0]
        tensor = tensors.get_tensor(name)
    array: NDArray[np.generic] = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    return array


def _as_whole_numbers(array: NDArray[np.generic], file: Path) -> NDArray[np.int64]:
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise UnreadableError(
            file, f"holds {array.dtype} of shape {list(array.shape)}, expected a vector", hint=HINT
        )
    if array.dtype.kind in "uf":
        values = array.astype(np.float64)
        is_whole = (values == np.trunc(values)) & (np.abs(values) < MAX_WHOLE)
        if not is_whole.all():
            broken = array[~is_whole][0]
            raise UnreadableError(file, f"holds {broken}, expected whole numbers", hint=HINT)
    return array.astype(np.int64)
