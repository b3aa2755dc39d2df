"""The output folder: what it was begun with, whose it is, and who writes into it."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from speculators_cli.core.capture.generated_folder import (
    LOCK_NAME,
    GeneratedFolder,
    accept_contents,
    agree,
    read_json,
    refuse_contents,
    remove_leftovers,
    wait_for_agreement,
)
from speculators_cli.core.data.token_shards import MANIFEST_NAME
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.place import Place

ALONE = Place()
MANIFEST = {"verifier": "some/verifier", "seed": 3, "layer_ids": [2, 4], "split": None}


def begin(folder: Path) -> None:
    """What a run leaves that ends after its first shard."""
    agree(folder, MANIFEST)
    (folder / "tokens-00000.safetensors").write_text("of use")


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
    begin(tmp_path / "tokens")

    with pytest.raises(SettingsError) as raised:
        agree(tmp_path / "tokens", MANIFEST | changes)

    assert str(raised.value).splitlines()[1:] == [f"  {line}"]
    assert raised.value.hint
    assert read_json(tmp_path / "tokens" / MANIFEST_NAME)["seed"] == 3


def test_every_difference_is_listed(tmp_path: Path) -> None:
    begin(tmp_path / "tokens")

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
        folder.locked(ALONE),
        pytest.raises(SettingsError, match=f"being written by process {os.getpid()} on `"),
        GeneratedFolder(tmp_path / "out").locked(ALONE),
    ):
        pass

    # Whoever was refused must not have removed the lock of the first, nor may it stay.
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lock_goes_with_the_block_however_it_ends(tmp_path: Path) -> None:
    def fail_in_the_block() -> None:
        with GeneratedFolder(tmp_path).locked(ALONE):
            assert (tmp_path / LOCK_NAME).exists()
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail_in_the_block()

    assert not (tmp_path / LOCK_NAME).exists()
    with GeneratedFolder(tmp_path).locked(ALONE):
        assert read_json(tmp_path / LOCK_NAME)["pid"] == os.getpid()


def test_a_lock_that_a_killed_run_left_is_taken(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere"}')

    with GeneratedFolder(tmp_path).locked(ALONE):
        assert read_json(tmp_path / LOCK_NAME)["pid"] == os.getpid()

    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")

    with (
        pytest.raises(SettingsError, match=r"`--output-dir`: .* is not a folder"),
        GeneratedFolder(tmp_path / "out").locked(ALONE),
    ):
        pass


def test_paths_are_of_the_number_of_the_shard() -> None:
    folder = GeneratedFolder(Path("out"))

    assert folder.shard(7) == Path("out/tokens/tokens-00007.safetensors")
    assert folder.samples_of(7) == Path("out/samples/00007")
    assert folder.done(7) == Path("out/samples/00007/done.json")


def rank_of_run(rank: int, port: int) -> Place:
    return Place(rank, 4, rank, 4, "localhost", port)


def test_ranks_of_a_run_hold_the_folder_together(tmp_path: Path) -> None:
    folder = GeneratedFolder(tmp_path)

    with (
        folder.locked(rank_of_run(2, 1)),
        folder.locked(rank_of_run(0, 1)),
        folder.locked(rank_of_run(1, 1)),
    ):
        assert len(list(tmp_path.iterdir())) == 3

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", [ALONE, rank_of_run(0, 2)], ids=["alone", "several"])
def test_a_run_is_refused_while_a_rank_of_another_is_left(tmp_path: Path, first: Place) -> None:
    folder = GeneratedFolder(tmp_path)

    with (
        folder.locked(rank_of_run(3, 1)),
        pytest.raises(SettingsError, match=f"being written by process {os.getpid()} on `"),
        folder.locked(first),
    ):
        pass

    with folder.locked(first):
        pass


def test_two_processes_of_one_rank_are_refused(tmp_path: Path) -> None:
    folder = GeneratedFolder(tmp_path)

    with (
        folder.locked(rank_of_run(3, 1)),
        pytest.raises(SettingsError, match="is being written"),
        folder.locked(rank_of_run(3, 1)),
    ):
        pass


def test_the_lock_of_a_killed_rank_is_of_no_effect(tmp_path: Path) -> None:
    (tmp_path / "generate-data.rank3.lock").write_text('{"pid": 1, "host": "x", "run": "other"}')

    with GeneratedFolder(tmp_path).locked(ALONE):
        pass


def test_a_run_that_wrote_nothing_is_replaced_by_one_with_other_inputs(tmp_path: Path) -> None:
    agree(tmp_path, MANIFEST)
    (tmp_path / ".tmp-tokens-00000.safetensors.4711").write_text("incomplete")

    agree(tmp_path, MANIFEST | {"seed": 4})

    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST_NAME]
    assert read_json(tmp_path / MANIFEST_NAME)["seed"] == 4


@pytest.mark.parametrize("others", [MANIFEST, MANIFEST | {"seed": 4}], ids=["same", "other"])
def test_other_ranks_wait_until_a_run_that_wrote_nothing_is_replaced(
    tmp_path: Path, others: dict[str, object]
) -> None:
    agree(tmp_path, MANIFEST)

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait_for_agreement, tmp_path, others)
        time.sleep(0.5)
        is_done = waiting.done()
        agree(tmp_path, others)
        waiting.result(timeout=20)

    assert is_done == (others == MANIFEST)


def test_a_removal_that_was_killed_is_completed(tmp_path: Path) -> None:
    begin(tmp_path)
    refuse_contents(tmp_path)
    (tmp_path / MANIFEST_NAME).unlink()  # it is removed before all else

    agree(tmp_path, MANIFEST | {"seed": 4})

    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_refused_contents_are_replaced_by_a_run_with_other_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    agree(folder, MANIFEST)
    (folder / "tokens-00000.safetensors").write_text("useless")
    (folder / ".tmp-tokens-00001.safetensors.4711").write_text("incomplete")
    (folder / "00000").mkdir()
    (folder / "00000" / "000001.pt").write_text("useless")
    refuse_contents(folder)

    agree(folder, MANIFEST)
    assert (folder / "tokens-00000.safetensors").exists()
    agree(folder, MANIFEST | {"seed": 4})

    assert [file.name for file in folder.iterdir()] == [MANIFEST_NAME]
    assert read_json(folder / MANIFEST_NAME)["seed"] == 4


def test_files_of_others_are_never_removed_with_refused_contents(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    agree(folder, MANIFEST)
    (folder / "mine.txt").write_text("mine")
    refuse_contents(folder)

    with pytest.raises(SettingsError, match="did not write"):
        agree(folder, MANIFEST | {"seed": 4})

    assert (folder / "mine.txt").read_text() == "mine"


def test_contents_that_pass_at_last_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    begin(folder)
    refuse_contents(folder)
    accept_contents(folder)

    with pytest.raises(SettingsError, match="seed: `3` then, `4` now"):
        agree(folder, MANIFEST | {"seed": 4})
