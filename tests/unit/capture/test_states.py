"""Packed sequences of rows, and samples that are written while the next ones are computed."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from speculators_cli.core.capture.states import (
    MAX_IN_FLIGHT,
    SampleWriter,
    WrittenShard,
    pack,
    plan_sequences,
    sample_file,
)
from speculators_cli.core.data.formats import FORMATS, v1
from speculators_cli.core.data.supervised_rows import held_states
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.engines.engine import CapturedStates
from speculators_cli.core.engines.host_states import Storage
from speculators_cli.core.errors import MachineError

HIDDEN, NUM_AUX = 24, 3
AS_COMPUTED = Storage(None, has_all_last_states=False)
# e4m3 keeps 4 bits with the leading one: half a unit of the last place is 1/16 of the value.
FLOAT8_RTOL = 2**-4


def make_row(name: str, num_tokens: int, num_prompt: int = 2) -> TokenRow:
    ids = np.arange(num_tokens, dtype=np.int32) + 3
    return TokenRow(name, ids, np.arange(num_tokens) >= num_prompt)


def make_states(
    rows: Sequence[TokenRow], storage: Storage = AS_COMPUTED, dtype: torch.dtype = torch.float32
) -> CapturedStates:
    """Random states, of a scale that differs from layer to layer."""
    rng = torch.Generator().manual_seed(0)
    packed = pack(rows, storage)
    aux = torch.randn(len(packed.input_ids), NUM_AUX * HIDDEN, generator=rng)
    aux *= torch.tensor([1.0, 20.0, 400.0]).repeat_interleave(HIDDEN)
    return CapturedStates(
        aux.to(dtype), torch.randn(len(packed.rows), HIDDEN, generator=rng).to(dtype)
    )


def write(
    folder: Path, rows: Sequence[TokenRow], storage: Storage, states: CapturedStates
) -> WrittenShard:
    finished: list[WrittenShard] = []
    shard = WrittenShard(folder)
    with SampleWriter(storage, 2, finished.append) as writer:
        writer.add(rows, states, shard)
        writer.finish(shard)
    assert finished == [shard]
    return shard


def read(folder: Path, name: str) -> Any:
    return FORMATS["v1"].read_sample(sample_file(folder, name))


def test_rows_are_packed_into_the_same_sequences_every_time() -> None:
    lengths = [40, 3, 90, 17, 30, 25, 8, 300]
    rows = [make_row(f"{i:06d}", n) for i, n in enumerate(lengths)]

    sequences = list(plan_sequences(rows, 100))

    names = [[row.name for row in sequence] for sequence in sequences]
    assert names == [[row.name for row in sequence] for sequence in plan_sequences(rows, 100)]
    assert sorted(name for sequence in names for name in sequence) == [row.name for row in rows]
    assert all(
        sum(len(row.input_ids) for row in sequence) <= 100 or len(sequence) == 1
        for sequence in sequences
    )
    assert max(map(len, names)) > 1


@pytest.mark.parametrize("has_all", [False, True])
def test_last_states_are_asked_for_where_they_are_stored(has_all: bool) -> None:
    rows = [make_row("a", 5, 3), make_row("b", 4, 1)]

    packed = pack(rows, Storage(None, has_all_last_states=has_all))

    assert packed.input_ids.tolist() == [3, 4, 5, 6, 7, 3, 4, 5, 6]
    assert packed.input_ids.dtype == torch.int64
    assert list(packed.lengths) == [5, 4]
    assert packed.rows.tolist() == (list(range(9)) if has_all else [3, 4, 6, 7, 8])


@pytest.mark.parametrize("has_all", [False, True])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float8"])
def test_samples_have_their_own_rows_of_the_states(
    tmp_path: Path, dtype: Any, has_all: bool
) -> None:
    rows = [make_row("000007", 5, 3), make_row("000002-turn1", 9, 1), make_row("000003", 2, 1)]
    storage = Storage(dtype, has_all_last_states=has_all)
    states = make_states(rows, storage)

    shard = write(tmp_path, rows, storage, states)

    start = first = 0
    for row in rows:
        sample = read(tmp_path, row.name)
        mask = torch.from_numpy(row.loss_mask)
        kept = torch.ones_like(mask) if has_all else mask
        end, stop = start + len(mask), first + int(kept.sum())
        assert sample.input_ids.tolist() == row.input_ids.tolist()
        assert torch.equal(sample.loss_mask.bool(), mask)
        assert not sample.is_normed
        expected = states.aux[start:end].split(HIDDEN, dim=1)
        for found, exact in zip(sample.aux_hidden_states, expected, strict=True):
            assert_stored(found[:], exact, dtype)
        last = sample.last_hidden_states
        assert len(held_states(last)) == int(kept.sum())
        assert_stored(last[kept.nonzero().flatten()], states.last[first:stop], dtype)
        start, first = end, stop
    assert first == len(states.last)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["000002-turn1.pt", "000003.pt", "000007.pt"]
    assert shard.num_samples == 3
    assert shard.num_bytes == sum(file.stat().st_size for file in files)


def assert_stored(found: Tensor, exact: Tensor, dtype: str | None) -> None:
    if dtype is None:
        assert torch.equal(found, exact)
    elif dtype == "bfloat16":
        assert torch.equal(found, exact.bfloat16())
    else:
        # Values near zero have fewer bits: the smallest step is 2^-9 of a 448th of the largest.
        atol = float(exact.abs().max()) * 2**-9 / 448 * 2
        torch.testing.assert_close(found.float(), exact, rtol=FLOAT8_RTOL, atol=atol)
        assert not torch.equal(found.float(), exact)


def test_float8_takes_half_of_bfloat16(tmp_path: Path) -> None:
    rows = [make_row("a", 200, 100)]
    sizes = []
    for dtype in ("bfloat16", "float8"):
        storage = Storage(dtype, has_all_last_states=False)
        folder = tmp_path / dtype
        folder.mkdir()
        sizes.append(write(folder, rows, storage, make_states(rows, storage)).num_bytes)

    # 700 rows of 24 values, in one byte more each, but for 4 bytes of scale per row.
    assert sizes[0] - sizes[1] == pytest.approx(700 * (24 - 4), abs=1000)


@pytest.mark.parametrize("part", ["aux", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_whose_states_are_not_finite_are_counted_and_not_written(
    tmp_path: Path, part: str, value: float
) -> None:
    rows = [make_row("a", 5), make_row("b", 6), make_row("c", 4)]
    states = make_states(rows)
    getattr(states, part)[6 if part == "aux" else 4, 1] = value

    shard = write(tmp_path, rows, AS_COMPUTED, states)

    assert shard.non_finite == ["b"]
    assert shard.num_samples == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pt", "c.pt"]


def test_float16_that_overflows_is_found_before_it_is_converted(tmp_path: Path) -> None:
    rows = [make_row("a", 5)]
    storage = Storage("float8", has_all_last_states=False)
    states = make_states(rows, storage, torch.float16)
    states.aux[2, 3] = 70_000.0  # beyond float16: infinite

    assert write(tmp_path, rows, storage, states).non_finite == ["a"]


def test_shards_are_finished_in_order_and_after_all_of_their_samples(tmp_path: Path) -> None:
    finished: list[tuple[str, int, int]] = []

    def on_shard(shard: WrittenShard) -> None:
        num_files = len(list(shard.folder.glob("*.pt")))
        finished.append((shard.folder.name, shard.num_samples, num_files))

    with SampleWriter(AS_COMPUTED, 3, on_shard) as writer:
        for number in range(4):
            shard = WrittenShard(tmp_path / str(number))
            shard.folder.mkdir()
            for part in range(3):
                rows = [make_row(f"{part}-{i}", 4) for i in range(2)]
                writer.add(rows, make_states(rows), shard)
            writer.finish(shard)

    assert finished == [(str(number), 6, 6) for number in range(4)]


def hold_writes(monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]) -> None:
    """Call `act` with the name of each sample before it is written."""
    write_sample = v1.write_sample

    def held(sample: Any, file: Path) -> None:
        act(file.stem)
        write_sample(sample, file)

    monkeypatch.setattr(v1, "write_sample", held)


def test_few_sequences_are_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, num_added = threading.Event(), 0
    hold_writes(monkeypatch, lambda _: may_write.wait(20))

    def add_all() -> None:
        nonlocal num_added
        with SampleWriter(AS_COMPUTED, 1, lambda _: None) as writer:
            for number in range(MAX_IN_FLIGHT + 4):
                rows = [make_row(str(number), 4)]
                writer.add(rows, make_states(rows), WrittenShard(tmp_path))
                num_added += 1

    thread = threading.Thread(target=add_all)
    thread.start()
    thread.join(0.3)

    num_before = num_added
    may_write.set()
    thread.join(20)
    assert num_before == MAX_IN_FLIGHT
    assert num_added == MAX_IN_FLIGHT + 4
    assert len(list(tmp_path.iterdir())) == MAX_IN_FLIGHT + 4


@pytest.mark.parametrize("num_after", [0, MAX_IN_FLIGHT + 2])
def test_an_error_of_a_thread_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_after: int
) -> None:
    def fail(name: str) -> None:
        if name == "bad":
            raise MachineError("the disk is full", hint="Free disk space")

    hold_writes(monkeypatch, fail)
    finished: list[WrittenShard] = []
    shard = WrittenShard(tmp_path)

    def write_all() -> None:
        with SampleWriter(AS_COMPUTED, 2, finished.append) as writer:
            for name in ("good", "bad", *map(str, range(num_after))):
                rows = [make_row(name, 4)]
                writer.add(rows, make_states(rows), shard)
            writer.finish(shard)

    with pytest.raises(MachineError, match="the disk is full"):
        write_all()

    assert finished == []
    assert not (tmp_path / "bad.pt").exists()
    assert not any(thread.name.startswith("writer") for thread in threading.enumerate())


def test_an_error_of_the_engine_is_not_replaced_by_one_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise MachineError("the disk is full", hint="Free disk space")

    hold_writes(monkeypatch, fail)
    rows = [make_row("a", 4)]

    def stop_after_a_write() -> None:
        with SampleWriter(AS_COMPUTED, 2, lambda _: None) as writer:
            writer.add(rows, make_states(rows), WrittenShard(tmp_path))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_after_a_write()


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    rows = [make_row("a", 4)]

    with pytest.raises(MachineError, match="No space left"):
        write(tmp_path, rows, AS_COMPUTED, make_states(rows))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "own", "size"),
    [
        (None, torch.float32, 4),
        (None, torch.bfloat16, 2),
        ("bfloat16", torch.float32, 2),
        ("float8", torch.float32, 1),
    ],
)
def test_sizes_of_values_are_those_of_the_files(dtype: Any, own: torch.dtype, size: int) -> None:
    storage = Storage(dtype, has_all_last_states=True)

    assert storage.item_bytes(own) == size
    assert storage.is_float8 == (dtype == "float8")
