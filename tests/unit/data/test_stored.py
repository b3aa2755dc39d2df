"""Hidden states that stay in their file: which rows are read, and a file that changes meanwhile."""

import ctypes
import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.data import stored
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.sample import BadSampleError, ChangedSampleError, Sample
from speculators_cli.core.data.stored import StoredStates
from speculators_cli.core.torch_file import open_file
from speculators_cli.core.torch_file.open_file import OpenFile

S, HIDDEN, AUX = 2500, 6, 3  # more rows than one call of the system takes


def matrix(num_rows: int, width: int) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)).bfloat16()


def contents(num_tokens: int = S, mask: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """The same sample in each format of `.pt` files."""
    layers = matrix((AUX + 1) * num_tokens, HIDDEN).view(AUX + 1, num_tokens, HIDDEN)
    if mask is None:
        mask = torch.arange(num_tokens) % 7 > 2
    tokens = {"input_ids": torch.arange(num_tokens), "loss_mask": mask.long()}
    wide = torch.cat(list(layers[:-1]), -1)
    return {
        "v0": tokens | {"hidden_state": wide, "target": layers[-1].clone()},
        "v1": tokens | {"hidden_states": [x.clone() for x in layers]},
        "specforge": tokens | {"aux_hidden_state": wide[None], "hidden_state": layers[-1:].clone()},
    }


def write(file: Path, content: object) -> Path:
    torch.save(content, file)
    return file


def pack(*samples: Sample, total_seq_len: int, dtype: torch.dtype = torch.bfloat16) -> Batch:
    return collate(
        list(range(len(samples))),
        samples,
        total_seq_len=total_seq_len,
        num_aux_layers=AUX,
        hidden_size=HIDDEN,
        dtype=dtype,
    )


def in_memory(sample: Sample) -> Sample:
    aux = tuple(states[:] for states in sample.aux_hidden_states)
    last = sample.last_hidden_states[:]
    return Sample(sample.input_ids, sample.loss_mask, aux, last, sample.is_normed)


@pytest.mark.parametrize("block_bytes", [0, stored.BLOCK_BYTES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["v0", "v1", "specforge"])
def test_a_batch_from_files_is_the_one_from_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dtype: torch.dtype,
    block_bytes: int,
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    # Trap: a run of supervised rows, single ones, a wide gap, the last row.
    mask = torch.zeros(S, dtype=torch.bool)
    mask[[3, 4, 5, 9, 11, S - 1]] = True
    mask[700:1900] = True
    samples = [
        FORMATS[name].read_sample(write(tmp_path / f"{i}.pt", content[name]))
        for i, content in enumerate([contents(), contents(S, mask)])
    ]

    # The second sample is cut.
    found = pack(*samples, total_seq_len=S + 1000, dtype=dtype)

    expected = pack(*map(in_memory, samples), total_seq_len=S + 1000, dtype=dtype)
    assert torch.equal(found.aux_hidden_states, expected.aux_hidden_states)
    assert torch.equal(found.last_hidden_states, expected.last_hidden_states)
    wide = contents()["v0"]["hidden_state"].to(dtype)
    assert torch.equal(found.aux_hidden_states[: S - 1], wide[:-1])
    assert torch.equal(found.last_hidden_states[-1], samples[1].last_hidden_states[1001:1002][0])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(0, 39), unique=True).map(sorted),
    start=st.integers(0, 9),
    stride=st.tuples(st.integers(0, 9), st.integers(1, 3)),
    width=st.integers(1, 5),
    is_apart=st.booleans(),
)
def test_rows_are_those_of_the_strided_view(
    rows: list[int],
    start: int,
    stride: tuple[int, int],
    width: int,
    is_apart: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    numbers = torch.arange(1000, dtype=torch.int16)
    file = tmp_path_factory.mktemp("stored") / "numbers"
    file.write_bytes(numbers.numpy().tobytes())
    source = OpenFile(file.open("rb", buffering=0), file)
    expected = numbers[start:].as_strided((40, width), stride)[rows]

    states = StoredStates(source, "int16", 2 * start, (40, width), stride)
    into = np.zeros((len(rows), width + is_apart), np.int16)[:, :width]
    for block_bytes in (0, stored.BLOCK_BYTES):
        with patch.object(stored, "BLOCK_BYTES", block_bytes):
            states.read_into(into.view(np.uint8), np.array(rows, np.int64))
        assert into.tolist() == expected.tolist()
        into[:] = 0

    assert states[torch.tensor(rows, dtype=torch.int64)].tolist() == expected.tolist()


def test_rows_are_taken_by_slice_indices_and_mask(tmp_path: Path) -> None:
    values = matrix(50, HIDDEN)
    file = write(tmp_path / "x.pt", contents(50)["v1"] | {"hidden_states": [values, values]})
    states = FORMATS["v1"].read_sample(file).last_hidden_states

    assert torch.equal(states[7:20], values[7:20])
    assert torch.equal(states[-3:], values[-3:])
    assert torch.equal(states[torch.tensor([1, 4, 30])], values[[1, 4, 30]])
    assert torch.equal(states[values[:, 0] > 0], values[values[:, 0] > 0])
    assert torch.equal(torch.cat(list(states.split(16))), values)
    assert states[:0].shape == (0, HIDDEN)


def test_wide_gaps_between_rows_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = 40_000  # values a row: a gap of one row is wide
    file = write(
        tmp_path / "x.pt",
        contents(50)["v1"] | {"hidden_states": [matrix(50, wide) for _ in range(2)]},
    )
    states = FORMATS["v1"].read_sample(file).last_hidden_states
    num_bytes: list[int] = []
    real = open_file._preadv

    def preadv(descriptor: int, pieces: NDArray[np.int64], start: int) -> int:
        num_bytes.append(real(descriptor, pieces, start))
        return num_bytes[-1]

    monkeypatch.setattr(open_file, "_preadv", preadv)
    states[torch.tensor([3, 4, 40])]

    assert num_bytes == [2 * 2 * wide, 2 * wide]


@pytest.mark.parametrize("block_bytes", [0, stored.BLOCK_BYTES])
@pytest.mark.parametrize("name", ["v0", "v1"])
def test_a_read_that_the_system_cuts_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    sample = FORMATS[name].read_sample(write(tmp_path / "x.pt", contents(40)[name]))
    expected = pack(in_memory(sample), total_seq_len=39)
    num_calls = [0]
    real = open_file._preadv

    def preadv(descriptor: int, pieces: NDArray[np.int64], start: int) -> int:
        num_calls[0] += 1
        # Some pieces whole and the next in part: 43 bytes are no multiple of a row's.
        before = pieces[:, 1].cumsum() - pieces[:, 1]
        some = pieces[before < 43].copy()
        some[-1, 1] = min(some[-1, 1], 43 - before[len(some) - 1])
        return real(descriptor, some, start)

    monkeypatch.setattr(open_file, "_preadv", preadv)
    found = pack(sample, total_seq_len=39)

    assert torch.equal(found.aux_hidden_states, expected.aux_hidden_states)
    assert torch.equal(found.last_hidden_states, expected.last_hidden_states)
    assert num_calls[0] > 39 * HIDDEN * 2 * AUX // 43


CHANGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "written anew": lambda file: file.write_bytes(b"other"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["v0", "v1"])
def test_a_file_that_shrinks_while_it_is_open_is_an_error_with_its_name(
    tmp_path: Path, name: str, change: str
) -> None:
    # Trap: touching a mapped page behind the new end of a file ends the process.
    file = write(tmp_path / "data_0.pt", contents(20_000)[name])
    sample = FORMATS[name].read_sample(file)
    CHANGES[change](file)

    with pytest.raises(ChangedSampleError) as error:
        pack(sample, total_seq_len=20_000)

    assert error.value.message == f"`{file}` can no longer be read: is shorter than it was"
    assert error.value.exit_code == 3


def test_a_file_that_is_removed_or_replaced_while_it_is_open_is_read_on(tmp_path: Path) -> None:
    file = write(tmp_path / "data_0.pt", contents(30)["v1"])
    sample = FORMATS["v1"].read_sample(file)
    write(tmp_path / "new.pt", contents(3)["v1"]).replace(file)
    file.unlink()

    assert torch.equal(sample.last_hidden_states[:], contents(30)["v1"]["hidden_states"][-1])


def test_a_disk_that_fails_is_an_error_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = FORMATS["v1"].read_sample(write(tmp_path / "data_0.pt", contents(30)["v1"]))

    def preadv(*_: object) -> int:
        ctypes.set_errno(errno.ESTALE)
        return -1

    monkeypatch.setattr(open_file, "_preadv", preadv)

    with pytest.raises(ChangedSampleError, match=r"data_0.pt` can no .*: fails: Stale file handle"):
        sample.last_hidden_states[:]


def test_files_are_closed_with_their_samples(tmp_path: Path) -> None:
    def count_open() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    file = write(tmp_path / "x.pt", contents(30)["v1"])
    damaged = tmp_path / "y.pt"
    damaged.write_bytes(file.read_bytes()[:-9])
    gc.collect()
    before = count_open()

    samples = [FORMATS["v1"].read_sample(file) for _ in range(9)]
    held = count_open()
    errors = []
    for _ in range(9):
        with pytest.raises(BadSampleError) as error:
            FORMATS["v1"].read_sample(damaged)
        errors.append(error)
    del samples
    gc.collect()

    assert held == before + 9
    assert count_open() == before
