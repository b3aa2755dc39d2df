"""SampleFolder: which files are samples, in which order, and what is remembered of them."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import set_crc32_options

from speculators_cli.core.data.folder import SampleFolder, read_folders
from speculators_cli.core.data.formats.format import SampleFormat
from speculators_cli.core.data.sample import ChangedSampleError, SampleTokens
from speculators_cli.core.data.source import split
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import SilentProgress
from tests.recorded_progress import RecordedProgress


def write(
    file: Path, *, num_tokens: int = 6, hidden: int = 4, aux: int = 2, value: float = 0.0
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "input_ids": torch.arange(num_tokens),
        "loss_mask": torch.ones(num_tokens, dtype=torch.long),
        "hidden_states": [torch.full((num_tokens, hidden), value) for _ in range(aux + 1)],
    }
    torch.save(content, file)


def read(*folders: Path, **changes: Any) -> SampleFolder:
    arguments: Mapping[str, Any] = {
        "version": 1,
        "index_file": None,
        "max_bad_samples": None,
        "progress": SilentProgress(),
    } | changes
    return read_folders(folders, **arguments)


def names(dataset: SampleFolder) -> list[str]:
    return [entry.name for entry in dataset.entries]


def test_samples_are_found_in_sorted_order_at_any_depth(tmp_path: Path) -> None:
    # Trap: the order of the file system differs from host to host, and the split with it.
    for name in ("b/data_2.pt", "b/data_10.pt", "a.pt", "c/d/e.pt", "b/data_1.pt"):
        write(tmp_path / name)

    assert names(read(tmp_path)) == [
        "a.pt",
        "b/data_1.pt",
        "b/data_10.pt",
        "b/data_2.pt",
        "c/d/e.pt",
    ]


def test_only_samples_are_taken(tmp_path: Path) -> None:
    # Trap: a name that merely ends in "pt", and the table of token counts, are no samples.
    write(tmp_path / "data_0.pt")
    for name in ("script", "receipt", "data_1.pt.tmp", "data_2.ckpt"):
        shutil.copy(tmp_path / "data_0.pt", tmp_path / name)
    torch.save({1: 2}, tmp_path / "token_freq.pt")

    dataset = read(tmp_path)

    assert names(dataset) == ["data_0.pt"]
    assert dataset.bad == ()


def test_v0_samples_may_be_called_ckpt(tmp_path: Path) -> None:
    content = {
        "input_ids": torch.arange(5),
        "loss_mask": torch.ones(5),
        "hidden_state": torch.zeros(5, 12),
        "target": torch.zeros(5, 4),
    }
    torch.save(content, tmp_path / "data_0.ckpt")
    torch.save(content, tmp_path / "data_1.pt")

    assert names(read(tmp_path, version=0)) == ["data_0.ckpt", "data_1.pt"]


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "far.pt")
    data = tmp_path / "data"
    write(data / "near.pt")
    (data / "far").symlink_to(tmp_path / "disk")
    (data / "linked.pt").symlink_to(tmp_path / "disk" / "far.pt")
    (tmp_path / "disk" / "back").symlink_to(data)
    (data / "self").symlink_to(data)
    (data / "gone.pt").symlink_to(tmp_path / "nowhere")

    assert names(read(data)) == ["far/far.pt", "linked.pt", "near.pt"]


def test_what_cannot_be_opened_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap: a link that leads nowhere is no file, yet a sample is lost.
    write(tmp_path / "data_0.pt")
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.pt").symlink_to(tmp_path / "circle.pt")
    write(tmp_path / "secret.pt")
    opened = os.open

    def refuse(file: Path, flags: int) -> int:
        if file.name == "secret.pt":
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, flags)

    monkeypatch.setattr(os, "open", refuse)
    dataset = read(tmp_path, max_bad_samples=3)

    assert names(dataset) == ["data_0.pt"]
    assert {problem.file.name: problem.problem for problem in dataset.bad} == {
        "gone.pt": "cannot be read: No such file or directory",
        "circle.pt": "cannot be read: Too many levels of symbolic links",
        "secret.pt": "cannot be read: Permission denied",
    }
    with pytest.raises(DataError, match="3 of 4 samples cannot be used"):
        read(tmp_path, max_bad_samples=2)


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a" / "data_0.pt")
    listed = os.scandir

    def refuse(folder: Path) -> object:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(DataError, match="a` cannot be listed: Permission denied"):
        read(tmp_path)


def test_samples_without_a_token_to_predict_are_named_and_harmless(tmp_path: Path) -> None:
    for number, num_tokens in enumerate([6, 1, 0, 2]):
        write(tmp_path / f"data_{number}.pt", num_tokens=num_tokens)
    warnings = RecordedProgress()

    dataset = read(tmp_path, progress=warnings)

    assert dataset.lengths.tolist() == [5, 0, 0, 1]
    (text,) = warnings.warnings
    assert "2 of 4 samples have fewer than two tokens" in text
    assert "data_1.pt` has 1" in text
    assert "data_2.pt` has 0" in text


def test_a_folder_of_packed_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "data_0.pt.gz").write_bytes(b"")

    with pytest.raises(DataError, match=r"no `\.pt` file was found") as error:
        read(tmp_path)

    assert error.value.hint == "Unpack the files, such as `data_0.pt.gz`"


@pytest.mark.parametrize("change", ["shrinks", "vanishes", "other shapes"])
def test_a_sample_that_changes_after_the_scan_is_an_error_with_its_name(
    tmp_path: Path, change: str
) -> None:
    file = tmp_path / "data_0.pt"
    write(file, num_tokens=300)
    dataset = read(tmp_path)
    if change == "shrinks":
        os.truncate(file, 100)
    elif change == "vanishes":
        file.unlink()
    else:
        write(file, num_tokens=100)
        dataset = replace_size(dataset, num_bytes=file.stat().st_size)

    with pytest.raises(ChangedSampleError, match=r"data_0.pt` can no longer be read: ") as error:
        dataset.read(0)

    assert error.value.exit_code == 3


def replace_size(dataset: SampleFolder, num_bytes: int) -> SampleFolder:
    """As if a file had been as large from the first."""
    (entry,) = dataset.entries
    entry = replace(entry, stamp=replace(entry.stamp, num_bytes=num_bytes))
    return replace(dataset, entries=(entry,))


def test_a_second_scan_opens_no_file_that_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, index = tmp_path / "data", tmp_path / "index.json"
    for number in range(4):
        write(data / f"data_{number}.pt", num_tokens=5 + number)
    first = read(data, index_file=index)
    first.write_index(index)
    write(data / "data_2.pt", num_tokens=30)
    opened: list[str] = []
    read_tokens = SampleFormat.read_tokens

    def spy(self: SampleFormat, file: Path) -> SampleTokens:
        opened.append(file.name)
        return read_tokens(self, file)

    monkeypatch.setattr(SampleFormat, "read_tokens", spy)

    second = read(data, index_file=index)

    assert opened == ["data_2.pt"]
    assert [entry.header.num_tokens for entry in second.entries] == [5, 6, 30, 8]
    assert second.entries[0] == first.entries[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"index_version": 99}', '{"files": 3}'])
def test_an_index_that_cannot_be_used_is_made_again(tmp_path: Path, text: str) -> None:
    write(tmp_path / "data" / "data_0.pt")
    index = tmp_path / "index.json"
    index.write_text(text)

    assert len(read(tmp_path / "data", index_file=index)) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("num_tokens", "6"), ("hidden_size", None), ("is_normed", 1), ("dtype", [])]
)
def test_an_index_of_other_types_is_made_again(tmp_path: Path, key: str, value: object) -> None:
    data, index = tmp_path / "data", tmp_path / "index.json"
    write(data / "data_0.pt")
    first = read(data)
    first.write_index(index)
    content = json.loads(index.read_text())
    (entry,) = content["files"].values()
    entry["header"][key] = value
    index.write_text(json.dumps(content))

    assert read(data, index_file=index) == first


def test_a_fifo_in_the_place_of_an_index_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "data" / "data_0.pt")
    os.mkfifo(tmp_path / "index.json")

    assert len(read(tmp_path / "data", index_file=tmp_path / "index.json")) == 1


def test_headers_are_read_without_the_hidden_states(tmp_path: Path) -> None:
    # Trap: lengths taken from file sizes, or a scan that reads every state.
    write(tmp_path / "data_0.pt", num_tokens=4096, hidden=256)
    read_before = _bytes_read()

    dataset = read(tmp_path)

    assert dataset.lengths.tolist() == [4095]
    assert (tmp_path / "data_0.pt").stat().st_size > 12_000_000
    assert _bytes_read() - read_before < 1_000_000


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_the_split_has_its_own_random_state(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / f"data_{number}.pt")
    dataset = read(tmp_path)

    torch.manual_seed(0)
    first = split(dataset, 0.9)
    torch.manual_seed(1)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    second = split(dataset, 0.9)

    assert [names(part) for part in first] == [names(part) for part in second]
    assert torch.equal(torch.rand(1), drawn)
    assert [len(part) for part in first] == [36, 4]
    assert sorted(names(first[0]) + names(first[1])) == sorted(names(dataset))


@pytest.mark.parametrize(
    ("num_samples", "ratio", "sizes"),
    [(1, 0.9, [1, 0]), (2, 0.9, [1, 1]), (3, 1.0, [3, 0]), (3, 0.01, [1, 2])],
)
def test_small_folders_keep_something_to_train_on(
    tmp_path: Path, num_samples: int, ratio: float, sizes: list[int]
) -> None:
    for number in range(num_samples):
        write(tmp_path / f"data_{number}.pt")

    assert [len(part) for part in split(read(tmp_path), ratio)] == sizes


def test_odd_sizes_are_left_out_and_named(tmp_path: Path) -> None:
    for number in range(120):
        write(tmp_path / f"data_{number}.pt", hidden=8 if number == 7 else 4)
    warnings = RecordedProgress()

    dataset = read(tmp_path, progress=warnings)

    assert (len(dataset), dataset.hidden_size) == (119, 4)
    assert [bad.file.name for bad in dataset.bad] == ["data_7.pt"]
    assert "has hidden size 8 and 2 aux layers, the others 4 and 2" in warnings.warnings[0]


def test_the_limit_of_bad_samples_can_be_set(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"data_{number}.pt")
    for number in range(3):
        (tmp_path / f"data_{number}.pt").write_bytes(b"")

    with pytest.raises(DataError, match="3 of 10 samples cannot be used") as error:
        read(tmp_path, max_bad_samples=2)
    assert "--max-bad-samples 3" in str(error.value.hint)
    assert len(read(tmp_path, max_bad_samples=3)) == 7


def test_the_hash_sees_names_and_sizes_alone(tmp_path: Path) -> None:
    write(tmp_path / "data_0.pt")
    write(tmp_path / "data_1.pt")
    before = read(tmp_path).data_hash
    os.utime(tmp_path / "data_0.pt", (0, 0))
    touched = read(tmp_path).data_hash
    shutil.copytree(tmp_path, tmp_path.parent / "elsewhere")
    moved = read(tmp_path.parent / "elsewhere").data_hash
    write(tmp_path / "data_0.pt", num_tokens=90)
    grown = read(tmp_path).data_hash

    assert before == touched == moved
    assert grown != before


@pytest.mark.parametrize("has_checksums", [True, False])
def test_the_content_hash_sees_other_values_of_the_same_size(
    tmp_path: Path, has_checksums: bool
) -> None:
    set_crc32_options(has_checksums)
    try:
        write(tmp_path / "data/data_0.pt", value=1.0)
        before = read(tmp_path / "data")
        copied = read(shutil.copytree(tmp_path / "data", tmp_path / "elsewhere"))
        write(tmp_path / "data/data_0.pt", value=2.0)
        after = read(tmp_path / "data")
    finally:
        set_crc32_options(True)

    assert before.content_hash == copied.content_hash
    assert before.data_hash == after.data_hash
    assert before.content_hash != after.content_hash


def test_a_sample_written_anew_is_seen_although_its_moment_is_set_back(tmp_path: Path) -> None:
    # Trap: an index that takes a file of the same size and moment for the one it scanned.
    data, index = tmp_path / "data", tmp_path / "index.json"
    data.mkdir()
    write(data / "data_0.pt", value=1.0)
    before = read(data)
    before.write_index(index)
    moment = (data / "data_0.pt").stat().st_mtime_ns
    write(data / "data_0.pt", value=2.0)
    os.utime(data / "data_0.pt", ns=(moment, moment))

    assert read(data, index_file=index).content_hash != before.content_hash


def test_a_file_that_changes_during_the_run_is_a_clear_error(tmp_path: Path) -> None:
    write(tmp_path / "data_0.pt", num_tokens=50)
    dataset = read(tmp_path)
    write(tmp_path / "data_0.pt", num_tokens=5)

    with pytest.raises(DataError, match="has a different size than at the start of the run"):
        dataset.read(0)


def test_mixed_types_take_the_most_common_one(tmp_path: Path) -> None:
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.bfloat16]):
        content = {
            "input_ids": torch.arange(4),
            "loss_mask": torch.ones(4),
            "hidden_states": [torch.zeros(4, 8, dtype=dtype)] * 3,
        }
        torch.save(content, tmp_path / f"data_{number}.pt")

    assert read(tmp_path).dtype == "bfloat16"
