"""Samples as upstream speculators 0.9.0 and `datasets` wrote them: see `tests/oracle/`."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.data.formats import FORMATS, speculators
from speculators_cli.core.data.formats.arrow_table import read_table
from speculators_cli.core.data.sample import BadSampleError
from speculators_cli.core.errors import MachineError
from speculators_cli.core.progress import SilentProgress

RECORDED = Path(__file__).parents[2] / "oracle" / "upstream-0.9.0-data"
CAPTURED = (0, 1, 3)
SPECULATORS = FORMATS["speculators"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the recorded folder that may be written into."""
    return Path(shutil.copytree(RECORDED / "bf16", tmp_path / "data"))


def states_file(folder: Path, row: int) -> Path:
    return folder / "hidden_states" / f"hs_{row}.safetensors"


# Upstream rounds a float8 state's scale to bfloat16 before it multiplies, we round once: the two
# are up to two of bfloat16's roundings apart, 2^-8 each.
@pytest.mark.parametrize(("name", "rtol"), [("bf16", 0.0), ("fp8", 2**-7)])
def test_upstreams_samples_are_what_upstream_reads(name: str, rtol: float) -> None:
    expected = load_file(RECORDED / f"{name}-expected.safetensors")

    for row in CAPTURED:
        sample = SPECULATORS.read_sample(states_file(RECORDED / name, row))
        header = SPECULATORS.read_tokens(states_file(RECORDED / name, row)).header()

        assert torch.equal(sample.input_ids, expected[f"{row}.input_ids"])
        assert torch.equal(sample.loss_mask.long(), expected[f"{row}.loss_mask"])
        aux = torch.cat([states[:] for states in sample.aux_hidden_states], dim=-1)
        last = sample.last_hidden_states[:]
        for found, key in ((aux, "hidden_states"), (last, "verifier_last_hidden_states")):
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected[f"{row}.{key}"], rtol=rtol, atol=0)
        assert not sample.is_normed
        assert header.num_supervised_tokens == int(expected[f"{row}.loss_mask"].sum())
        assert (header.num_aux_layers, header.hidden_size) == (3, 24)
        on_disk = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}
        assert header.dtype == on_disk[name]


def test_the_fingerprint_sees_other_states_of_the_same_size(folder: Path, tmp_path: Path) -> None:
    file = states_file(folder, 0)
    before = SPECULATORS.read_tokens(file).fingerprint
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    tensors = load_file(file)
    tensors["hidden_states"] *= 1.5
    save_file(tensors, file)

    assert SPECULATORS.read_tokens(states_file(copied, 0)).fingerprint == before
    assert SPECULATORS.read_tokens(file).fingerprint != before


def test_the_table_may_lie_beside_the_states(folder: Path) -> None:
    for file in (folder / "hidden_states").iterdir():
        file.rename(folder / file.name)

    tokens = SPECULATORS.read_tokens(folder / "hs_3.safetensors")

    assert tokens.num_tokens == 9


def test_a_changed_table_is_read_again_by_the_next_scan(folder: Path, tmp_path: Path) -> None:
    def scan() -> int:
        speculators._read_once.cache_clear()  # a scan is the first of its process
        dataset = read_folders(
            [folder],
            version=1,
            index_file=tmp_path / "index.json",
            max_bad_samples=0,
            progress=SilentProgress(),
        )
        dataset.write_index(tmp_path / "index.json")
        return dataset.num_supervised_tokens

    before = scan()
    for shard in folder.glob("*.arrow"):
        table = pa.ipc.open_stream(shard.read_bytes()).read_all()
        place = table.schema.get_field_index("loss_mask")
        field = table.schema.field(place)
        ones = pa.array([[1] * len(mask) for mask in table["loss_mask"]], field.type)
        changed = table.set_column(place, field, ones)
        with pa.ipc.new_stream(shard.with_suffix(".new"), table.schema) as out:
            out.write_table(changed)
        shard.with_suffix(".new").replace(shard)

    assert scan() > before > 0


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no-states": (without("hidden_states"), "has no `hidden_states`; found token_ids"),
    "no-ids": (without("token_ids"), "has no `token_ids`"),
    "other-ids": (lambda x: x["token_ids"].add_(1), "has different tokens than row 1"),
    "negative-ids": (lambda x: x["token_ids"].sub_(99), "has negative ids"),
    "unequal": (
        lambda x: x.update(token_ids=x["token_ids"][1:].clone()),
        "has 7 token ids but 8 hidden states",
    ),
    "flat": (lambda x: x.update(hidden_states=torch.zeros(8, 24)), "expected [seq_len, layers"),
    "integers": (
        lambda x: x.update(hidden_states=x["hidden_states"].int()),
        "has hidden states of type I32",
    ),
    "no-scales": (
        lambda x: x.update(hidden_states=x["hidden_states"].to(torch.float8_e4m3fn)),
        "has float8 states without `hidden_states_scales`",
    ),
    "one-scale": (
        lambda x: x.update(
            hidden_states=x["hidden_states"].to(torch.float8_e4m3fn),
            hidden_states_scales=torch.ones(1),
        ),
        "has `hidden_states_scales` [1], expected [8, 1, 1]",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_is_no_sample_is_refused(folder: Path, name: str) -> None:
    edit, reason = EDITS[name]
    file = states_file(folder, 1)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)

    with pytest.raises(BadSampleError) as error:
        SPECULATORS.read_sample(file)

    assert reason in error.value.reason


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1"])
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    states_file(folder, 1).write_bytes(content)

    with pytest.raises(BadSampleError, match="is not a safetensors file"):
        SPECULATORS.read_tokens(states_file(folder, 1))


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = states_file(folder, 1)
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(BadSampleError, match="is not a safetensors file"):
        SPECULATORS.read_sample(file)


def test_a_file_without_a_row_is_refused(folder: Path) -> None:
    file = states_file(folder, 1).rename(states_file(folder, 4))

    with pytest.raises(BadSampleError, match="has no row"):
        SPECULATORS.read_tokens(file)


def test_states_without_a_table_are_refused(folder: Path) -> None:
    (folder / "state.json").unlink()

    with pytest.raises(BadSampleError, match="has no Arrow table"):
        SPECULATORS.read_tokens(states_file(folder, 1))


@pytest.mark.parametrize("state", ["{}", "[]", "no json", '{"_data_files": [{"filename": "no"}]}'])
def test_a_table_that_cannot_be_read_is_named(folder: Path, state: str) -> None:
    (folder / "state.json").write_text(state)

    with pytest.raises(BadSampleError, match="has an Arrow table that cannot be read"):
        SPECULATORS.read_tokens(states_file(folder, 1))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["state.json", "data-00001-of-00002.arrow"])
def test_a_pointer_in_place_of_a_table_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)

    with pytest.raises(BadSampleError) as caught:
        SPECULATORS.read_tokens(states_file(folder, 1))

    assert f"{name}` is a Git LFS pointer, not the file itself" in caught.value.reason


def test_a_pointer_in_place_of_states_is_named_with_its_fix(folder: Path) -> None:
    file = states_file(folder, 1)
    file.write_text(POINTER)

    with pytest.raises(BadSampleError) as caught:
        SPECULATORS.read_tokens(file)

    assert caught.value.reason == (
        "is not a safetensors file: it is a Git LFS pointer, not the file itself: run "
        f"`git lfs pull` in `{file.parent}`"
    )


def test_a_damaged_table_is_named(folder: Path) -> None:
    for entry in json.loads((folder / "state.json").read_text())["_data_files"]:
        (folder / entry["filename"]).write_bytes(b"ARROW1" * 9)

    with pytest.raises(BadSampleError, match="has an Arrow table that cannot be read"):
        SPECULATORS.read_tokens(states_file(folder, 1))


def test_a_missing_pyarrow_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    with pytest.raises(MachineError, match="pyarrow is not installed") as error:
        SPECULATORS.read_tokens(states_file(folder, 1))

    assert "speculators-cli[arrow]" in str(error.value.hint)


def write_table(folder: Path, columns: dict[str, Any], **how: Any) -> None:
    """Put another table in the place of the recorded one."""
    for shard in folder.glob("*.arrow"):
        shard.unlink()
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(**how)
    with pa.ipc.new_stream(folder / "x.arrow", table.schema, options=options) as out:
        out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))


IDS = [[5, 6, 7]] * 2
TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no-mask": ({"input_ids": IDS}, "not one column `input_ids` and one `loss_mask`"),
    "twice": ({"input_ids": IDS, "Loss_mask": IDS}, "not one column"),
    "flat": ({"input_ids": [1, 2], "loss_mask": IDS}, "a column of int64, expected lists"),
    "text-ids": ({"input_ids": [["a"]] * 2, "loss_mask": IDS}, "`input_ids` of string"),
    "text-mask": ({"input_ids": IDS, "loss_mask": [["a"]] * 2}, "`loss_mask` of string"),
    "nested": ({"input_ids": [[[1]]] * 2, "loss_mask": IDS}, "`input_ids` of list"),
    "dictionary": (
        {"input_ids": pa.array(["a", "b"]).dictionary_encode(), "loss_mask": IDS},
        "a column of dictionary",
    ),
    "nested-dictionary": (
        {
            "input_ids": pa.ListArray.from_arrays([0, 1, 2], pa.array([1, 2]).dictionary_encode()),
            "loss_mask": IDS,
        },
        "`input_ids` of dictionary",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_other_columns_is_named(folder: Path, name: str) -> None:
    columns, reason = TABLES[name]
    write_table(folder, columns)

    with pytest.raises(BadSampleError) as error:
        SPECULATORS.read_tokens(states_file(folder, 1))

    assert error.value.reason.startswith("has an Arrow table that cannot be read: ")
    assert reason in error.value.reason


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_a_compressed_table_is_named(folder: Path, compression: str) -> None:
    # What it unpacks to is as large as it claims.
    write_table(folder, {"input_ids": IDS, "loss_mask": IDS}, compression=compression)

    with pytest.raises(BadSampleError, match="it is compressed"):
        SPECULATORS.read_tokens(states_file(folder, 1))


def test_tables_of_all_types_of_numbers_are_read(folder: Path) -> None:
    ids = load_file(states_file(folder, 1))["token_ids"].tolist()
    mask = [i % 2 for i in range(len(ids))]
    others = {"text": pa.array(["a", "b"]).dictionary_encode(), "more": [None, {"a": [1]}]}
    for id_type, mask_type in [
        (pa.list_(pa.int32()), pa.large_list(pa.bool_())),
        (pa.large_list(pa.uint64()), pa.list_(pa.float32())),
        (pa.list_(pa.int16()), pa.list_(pa.uint8())),
    ]:
        columns = {
            "loss_mask": pa.array([[], mask], pa.list_(pa.int64())).cast(mask_type),
            "input_ids": pa.array([[1], ids], id_type),
        }
        write_table(folder, others | columns)
        speculators._read_once.cache_clear()

        assert SPECULATORS.read_tokens(states_file(folder, 1)).loss_mask.tolist() == mask


@pytest.mark.parametrize(
    ("ids", "mask", "reason"),
    [
        (None, [1] * 8, "has different tokens than row 1"),
        ([2**31] * 8, [1] * 8, "has different tokens than row 1"),
        ([None] * 8, [1] * 8, "has different tokens than row 1"),
        (..., None, "has an invalid loss mask in row 1"),
        (..., [1] * 7 + [None], "has an invalid loss mask in row 1"),
        (..., [1] * 7, "has an invalid loss mask in row 1"),
        (..., [1] * 7 + [2], "has an invalid loss mask in row 1"),
    ],
)
def test_a_row_without_its_ids_or_mask_is_named(
    folder: Path, ids: Any, mask: Any, reason: str
) -> None:
    if ids is ...:
        ids = load_file(states_file(folder, 1))["token_ids"].tolist()
    write_table(folder, {"input_ids": [[1], ids], "loss_mask": [[1], mask]})

    with pytest.raises(BadSampleError) as error:
        SPECULATORS.read_tokens(states_file(folder, 1))

    assert reason in error.value.reason


@pytest.mark.parametrize("place", ["state.json", "x.arrow", "hidden_states/hs_1.safetensors"])
@pytest.mark.parametrize("kind", ["a FIFO", "a folder", "a device"])
def test_what_is_no_file_is_an_error_without_waiting(folder: Path, place: str, kind: str) -> None:
    write_table(folder, {"input_ids": IDS, "loss_mask": IDS})
    (folder / place).unlink()
    if kind == "a device":
        (folder / place).symlink_to("/dev/zero")
    else:
        (os.mkfifo if kind == "a FIFO" else Path.mkdir)(folder / place)

    with pytest.raises((BadSampleError, OSError), match=f"{kind}, not a file"):
        SPECULATORS.read_tokens(states_file(folder, 1))


def test_a_table_that_lists_a_file_twice_is_named(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] *= 2
    (folder / "state.json").write_text(json.dumps(state))

    with pytest.raises(BadSampleError, match="lists a file twice"):
        SPECULATORS.read_tokens(states_file(folder, 1))


def shards_and_offsets() -> Iterator[tuple[str, int]]:
    """Every word of the metadata and offsets of the recorded table, some a run."""
    for shard in sorted((RECORDED / "bf16").glob("*.arrow")):
        yield from ((shard.name, at) for at in range(0, shard.stat().st_size - 8, 4))


def read_damaged(folder: Path, damage: list[tuple[str, int, bytes]]) -> set[str]:
    """Read the table with each damage on its own; which errors were not ours."""
    found = set()
    for name, at, data in damage:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:at] + data + whole[at + len(data) :])
        try:
            table = read_table(folder)
            for row in range(table.num_rows):
                table.input_ids[row].sum(), table.loss_mask[row].sum()
        except BadSampleError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is what the test looks for
            found.add(f"{name} {at} {data!r}: {error!r}")
        (folder / name).write_bytes(whole)
    return found


def test_a_damaged_table_never_ends_the_process(folder: Path) -> None:
    # Trap: pyarrow looks values up at whatever place a damaged offset gives.
    words = [struct.pack("<i", x) for x in (-5, -1, 0, 1, 7, 2**20, 2**31 - 1, -(2**31))]
    words += [struct.pack("<q", x) for x in (-1, 2**40, 2**62)] + [b"\xff"]
    places = list(shards_and_offsets())[::5]
    damage = [(*place, word) for place, word in zip(places, cycle(words), strict=False)]
    assert len(damage) > 100
    # The offsets of the lists, too, wherever they are.
    for shard, lengths in zip(sorted(folder.glob("*.arrow")), [(11, 8), (14, 9)], strict=True):
        start = shard.read_bytes().index(struct.pack("<3i", 0, lengths[0], sum(lengths)))
        damage += [(shard.name, start + 4, struct.pack("<i", x)) for x in (-5, 2**30, 2**31 - 1)]

    child = os.fork()
    if child == 0:
        found = read_damaged(folder, damage)
        sys.stderr.writelines(found)
        os._exit(1 if found else 0)
    _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0
