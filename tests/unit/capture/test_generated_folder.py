"""The output folder: what it was begun with, whose it is, and who writes into it."""

import json
import os
from pathlib import Path

import pytest

from speculators_cli.core.capture.generated_folder import (
    LOCK_NAME,
    GeneratedFolder,
    agree,
    read_json,
    remove_leftovers,
)
from speculators_cli.core.data.token_shards import MANIFEST_NAME
from speculators_cli.core.errors import DataError, SettingsError

MANIFEST = {"verifier": "some/verifier", "seed": 3, "layer_ids": [2, 4], "split": None}


def test_the_first_run_writes_the_manifest_and_the_next_ones_agree(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "tokens"

    agree(folder, MANIFEST)
    before = (folder / MANIFEST_NAME).read_bytes()
    agree(folder, MANIFEST)

    assert json.loads(before) == {"schema_version": 1, **MANIFEST}
    assert (folder / MANIFEST_NAME).read_bytes() == before
    assert [file.name for file in folder.iterdir()] == [MANIFEST_NAME]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 4}, "seed: `3` then, `4` now"),
        ({"verifier": "other/one"}, "verifier: `some/verifier` then, `other/one` now"),
        ({"layer_ids": [2, 5]}, "layer_ids: `[2, 4]` then, `[2, 5]` now"),
        ({"split": "train"}, "split: `None` then, `train` now"),
        ({"new": 1}, "new: `None` then, `1` now"),
    ],
)
def test_what_differs_is_named_with_both_values(
    tmp_path: Path, changes: dict[str, object], line: str
) -> None:
    agree(tmp_path / "tokens", MANIFEST)

    with pytest.raises(SettingsError) as raised:
        agree(tmp_path / "tokens", MANIFEST | changes)

    assert str(raised.value).splitlines()[1:] == [f"  {line}"]
    assert raised.value.hint
    assert read_json(tmp_path / "tokens" / MANIFEST_NAME)["seed"] == 3


def test_every_difference_is_listed(tmp_path: Path) -> None:
    agree(tmp_path / "tokens", MANIFEST)

    with pytest.raises(SettingsError) as raised:
        agree(tmp_path / "tokens", {"verifier": "other/one", "split": None, "layer_ids": [2, 4]})

    assert len(str(raised.value).splitlines()) == 3


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine.txt").write_text("mine")

    with pytest.raises(SettingsError, match="did not write"):
        agree(tmp_path / "tokens", MANIFEST)

    assert [file.name for file in (tmp_path / "tokens").iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_leftovers_of_a_killed_run_are_accepted(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    folder.mkdir()
    (folder / f".tmp-{MANIFEST_NAME}.4711").write_text('{"schema')

    agree(folder, MANIFEST)

    assert read_json(folder / MANIFEST_NAME)["seed"] == 3


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    leftovers = (".tmp-000007.pt.4711", ".tmp-000007-turn2.pt.4711-1", ".tmp-done.json.1")
    kept = ("000007.pt", "done.json", ".tmp-notes", ".tmp-mine.txt.3", "tmp-000007.pt.4711")
    for name in (*leftovers, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmp-folder.pt.1").mkdir()
    (tmp_path / ".tmp-link.pt.1").symlink_to(tmp_path / "done.json")

    remove_leftovers(tmp_path)

    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*kept, ".tmp-folder.pt.1", ".tmp-link.pt.1"}


@pytest.mark.parametrize("content", ["", "{", "[]", "\0\0"])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)

    with pytest.raises(DataError) as raised:
        agree(tmp_path, MANIFEST)

    assert str(tmp_path / MANIFEST_NAME) in str(raised.value)


def test_a_second_run_is_refused_with_the_process_of_the_first(tmp_path: Path) -> None:
    folder = GeneratedFolder(tmp_path / "out")

    with (
        folder.locked(),
        pytest.raises(SettingsError, match=f"being written by process {os.getpid()} on `"),
        GeneratedFolder(tmp_path / "out").locked(),
    ):
        pass

    # Whoever was refused must not have removed the lock of the first, nor may it stay.
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lock_goes_with_the_block_however_it_ends(tmp_path: Path) -> None:
    def fail_in_the_block() -> None:
        with GeneratedFolder(tmp_path).locked():
            assert (tmp_path / LOCK_NAME).exists()
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail_in_the_block()

    assert not (tmp_path / LOCK_NAME).exists()
    with GeneratedFolder(tmp_path).locked():
        assert read_json(tmp_path / LOCK_NAME)["pid"] == os.getpid()


def test_a_lock_that_a_killed_run_left_is_taken(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere"}')

    with GeneratedFolder(tmp_path).locked():
        assert read_json(tmp_path / LOCK_NAME)["pid"] == os.getpid()

    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with (
        pytest.raises(SettingsError, match=r"`--output-dir`: .* is not a folder"),
        GeneratedFolder(tmp_path / "out").locked(),
    ):
        pass


def test_paths_are_of_the_number_of_the_shard() -> None:
    folder = GeneratedFolder(Path("out"))

    assert folder.shard(7) == Path("out/tokens/tokens-00007.safetensors")
    assert folder.samples_of(7) == Path("out/samples/00007")
    assert folder.done(7) == Path("out/samples/00007/done.json")
