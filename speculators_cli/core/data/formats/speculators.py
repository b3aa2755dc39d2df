"""Upstream speculators since 0.5: `hs_{i}.safetensors`, with its mask in row `i` of an Arrow table.

The table is saved by `datasets`, in the folder of the states or in its parent. Last hidden states
are from before the verifier's final norm.
"""

import re
from functools import lru_cache
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.float8 import ScaledStates
from speculators_cli.core.data.formats.arrow_table import STATE_FILE, TokenTable, read_table
from speculators_cli.core.data.formats.format import Format
from speculators_cli.core.data.formats.layout import FLOAT8, HIDDEN_STATE_DTYPES, INTEGER_DTYPES
from speculators_cli.core.data.formats.safetensors_file import SafetensorsFile
from speculators_cli.core.data.sample import (
    BadSampleError,
    Sample,
    SampleTokens,
    States,
    check_ids,
)
from speculators_cli.core.files import read_parts

STATES, SCALES, TOKENS = "hidden_states", "hidden_states_scales", "token_ids"
LOCK = Lock()
NAME = re.compile(r"hs_(\d+)\.safetensors")


class SpeculatorsFormat(Format):
    """Reads samples whose states and masks are in different files, without checksums."""

    def stamp_beside(self, folder: Path) -> str:
        """Return sizes and mtimes of the files of the Arrow table."""
        table_dir = _find_table(folder)
        if table_dir is None:
            return ""
        files = [table_dir / STATE_FILE, *sorted(table_dir.glob("*.arrow"))]
        stats = [file.stat() for file in files]
        return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)

    def read_sample(self, file: Path) -> Sample:
        """Read a sample: ids and mask into memory, hidden states on use.

        Raises:
            BadSampleError: The file or its row of the table is not a sample.
            MachineError: pyarrow is not installed.
            OSError: It cannot be opened.
        """
        import torch

        with SafetensorsFile(file) as tensors:
            tokens = _read_tokens(file, tensors)
            layers = range(tokens.num_aux_layers + 1)
            states: list[States] = [tensors.states(STATES, layer) for layer in layers]
            if tokens.dtype == FLOAT8:
                scales = torch.from_numpy(tensors.read(SCALES).reshape(-1, 1).astype(np.float32))
                states = [ScaledStates(tensors.states(STATES, k), scales) for k in layers]
        *aux, last = states
        return Sample(
            torch.from_numpy(tokens.input_ids),
            torch.from_numpy(tokens.loss_mask),
            tuple(aux),
            last,
            is_normed=False,
        )

    def read_tokens(self, file: Path) -> SampleTokens:
        """Read header, ids and mask of a sample, without its hidden states.

        Raises:
            BadSampleError: The file or its row of the table is not a sample.
            MachineError: pyarrow is not installed.
            OSError: It cannot be opened.
        """
        with SafetensorsFile(file) as tensors:
            return _read_tokens(file, tensors)


def _read_tokens(file: Path, tensors: SafetensorsFile) -> SampleTokens:
    num_tokens, num_layers, hidden_size = _check_states(tensors)
    ids = tensors.tensors[TOKENS]
    if ids.dtype not in INTEGER_DTYPES:
        raise BadSampleError(f"has `{TOKENS}` of type {ids.kind}")
    if ids.shape != (num_tokens,):
        raise BadSampleError(f"has {prod(ids.shape):,} token ids but {num_tokens:,} hidden states")
    token_ids = tensors.read(TOKENS).astype(np.int64)
    check_ids(token_ids, TOKENS)
    loss_mask = _read_mask(file, token_ids)
    return SampleTokens(
        token_ids,
        loss_mask,
        hidden_size=hidden_size,
        num_aux_layers=num_layers - 1,
        dtype=tensors.tensors[STATES].dtype,
        is_normed=False,
        fingerprint=_fingerprint(tensors, token_ids, loss_mask),
    )


def _fingerprint(tensors: SafetensorsFile, *tokens: NDArray[Any]) -> str:
    """Hash ids, mask, header and parts of the hidden states: there is no checksum."""
    digest = sha256()
    for array in tokens:
        digest.update(array.tobytes())
    digest.update(read_parts(tensors.source.descriptor))
    return digest.hexdigest()[:32]


def _check_states(tensors: SafetensorsFile) -> tuple[int, int, int]:
    """Check the states without reading them; return tokens, layers and hidden size."""
    names = tensors.tensors.keys()
    missing = [name for name in (STATES, TOKENS) if name not in names]
    if missing:
        raise BadSampleError(f"has no `{missing[0]}`; found {', '.join(sorted(names)[:8])}")
    states = tensors.tensors[STATES]
    shape = states.shape
    if len(shape) != 3 or shape[1] < 2 or shape[2] == 0:
        raise BadSampleError(f"has `{STATES}` {list(shape)}, expected [seq_len, layers, hidden]")
    if states.dtype not in (*HIDDEN_STATE_DTYPES, FLOAT8):
        raise BadSampleError(f"has hidden states of type {states.kind}, expected floats")
    if states.dtype == FLOAT8:
        if SCALES not in names:
            raise BadSampleError(f"has float8 states without `{SCALES}`")
        scales = tensors.tensors[SCALES]
        if scales.shape != (shape[0], 1, 1):
            raise BadSampleError(
                f"has `{SCALES}` {list(scales.shape)}, expected {[shape[0], 1, 1]}"
            )
        if scales.dtype not in ("float32", "float64", "float16"):
            raise BadSampleError(f"has `{SCALES}` of type {scales.kind}, expected F32")
    return shape[0], shape[1], shape[2]


def _read_mask(file: Path, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Read the loss mask of the sample's row, whose ids must equal those of the states."""
    match = NAME.fullmatch(file.name)
    if match is None:
        raise BadSampleError("has no row number in its name, expected `hs_` and a number")
    row = int(match[1])
    folder = _find_table(file.parent)
    if folder is None:
        raise BadSampleError("has no Arrow table in its folder or in the parent folder")
    table = _open_table(folder)
    if row >= table.num_rows:
        raise BadSampleError(f"has no row in `{folder}`, which has {table.num_rows:,} rows")
    if not np.array_equal(table.input_ids[row], token_ids):
        raise BadSampleError(f"has different tokens than row {row:,} of the Arrow table")
    mask = table.loss_mask[row]
    is_supervised: NDArray[np.bool_] = mask == 1
    if mask.shape != token_ids.shape or not (is_supervised | (mask == 0)).all():
        raise BadSampleError(f"has an invalid loss mask in row {row:,} of the table")
    return is_supervised


def _find_table(folder: Path) -> Path | None:
    """Return the folder of the table of the samples in a folder: the same, or its parent."""
    return next((x for x in (folder, folder.parent) if (x / STATE_FILE).exists()), None)


def _open_table(folder: Path) -> TokenTable:
    """Open the Arrow table in a folder, which is read once over all threads.

    Raises:
        BadSampleError: It cannot be read.
        MachineError: pyarrow is not installed.
    """
    with LOCK:
        table = _read_once(folder)
    if isinstance(table, str):
        raise BadSampleError(table)
    return table


@lru_cache(maxsize=64)
def _read_once(folder: Path) -> TokenTable | str:
    """Read a table, or return why it cannot be read, so that it is tried only once."""
    try:
        return read_table(folder)
    except BadSampleError as error:
        return error.reason


FORMAT = SpeculatorsFormat(
    name="speculators", prefix="hs_", suffixes=(".safetensors",), has_own_names=True
)
