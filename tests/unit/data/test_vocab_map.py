"""VocabMap: two files that must agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError

MASK = [False, True, False, True, True, False]


def write(folder: Path, d2t: Any, t2d: Any) -> tuple[Path, Path]:
    np.save(folder / "d2t.npy", d2t)
    np.save(folder / "t2d.npy", t2d)
    return folder / "d2t.npy", folder / "t2d.npy"


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("mask_dtype", [np.bool_, np.uint8, np.int64])
def test_offsets_lead_to_the_kept_ids(tmp_path: Path, dtype: Any, mask_dtype: Any) -> None:
    files = write(
        tmp_path, np.array([1, 2, 2], dtype), np.array([0, 1, 0, 1, 1, 0], dtype=mask_dtype)
    )

    vocab_map = VocabMap.load(*files)

    assert vocab_map.kept_ids.tolist() == [1, 3, 4]
    assert (vocab_map.vocab_size, vocab_map.draft_vocab_size) == (6, 3)
    assert not vocab_map.is_full
    assert (vocab_map.d2t.dtype, vocab_map.t2d.dtype) == (torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16, np.uint64])
def test_whole_numbers_of_any_type_are_read(tmp_path: Path, dtype: Any) -> None:
    files = write(tmp_path, np.array([1, 2, 2], dtype), np.array([0, 1, 0, 1, 1, 0], dtype))

    vocab_map = VocabMap.load(*files)

    assert vocab_map.d2t.tolist() == [1, 2, 2]
    assert (vocab_map.d2t.dtype, vocab_map.t2d.dtype) == (torch.int64, torch.bool)


def test_a_map_in_the_order_of_frequency_is_sorted(tmp_path: Path) -> None:
    # Draft tokens 0, 1, 2 are the verifier's 4, 1, 3.
    files = write(tmp_path, np.array([4, 0, 1]), np.array(MASK))

    vocab_map = VocabMap.load(*files)

    assert vocab_map.kept_ids.tolist() == [1, 3, 4]
    assert vocab_map.d2t.tolist() == [1, 2, 2]


D2T, T2D = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 0, 1, 1, 0]).bool()


BOTH = {"d2t": D2T, "t2d": T2D}
CONTENTS: dict[str, Callable[[str], Any]] = {
    "tensor": lambda key: BOTH[key],
    "dict": lambda key: {key: BOTH[key]},
    "both": lambda _: BOTH,
    "bfloat16": lambda key: BOTH[key].bfloat16(),
    "list": lambda key: BOTH[key].tolist(),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_maps_are_read_as_torch_saves_them(tmp_path: Path, kind: str) -> None:
    for key in BOTH:
        torch.save(CONTENTS[kind](key), tmp_path / f"{key}.pt")

    vocab_map = VocabMap.load(tmp_path / "d2t.pt", tmp_path / "t2d.pt")

    assert vocab_map.kept_ids.tolist() == [1, 3, 4]
    assert vocab_map.t2d.tolist() == MASK


def test_maps_are_read_from_a_draft(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(BOTH | {"fc.weight": torch.ones(2, 2)}, file)

    vocab_map = VocabMap.load(file, file)

    assert vocab_map.kept_ids.tolist() == [1, 3, 4]


def test_maps_alone_in_their_files_may_have_any_name(tmp_path: Path) -> None:
    for key, value in BOTH.items():
        save_file({"map": value}, tmp_path / f"{key}.safetensors")

    vocab_map = VocabMap.load(tmp_path / "d2t.safetensors", tmp_path / "t2d.safetensors")

    assert vocab_map.kept_ids.tolist() == [1, 3, 4]


@pytest.mark.parametrize(
    ("name", "save", "reason", "hint"),
    [
        ("d2t.pt", lambda f: torch.save({"t2d": T2D}, f), "a dict with `t2d`, expected", "Rebuild"),
        ("d2t.pt", lambda f: torch.save("text", f), "holds no tensor", "Rebuild"),
        ("d2t.pt", lambda f: f.write_bytes(b"PK\3\4"), "is truncated", "Rebuild"),
        ("d2t.npz", lambda f: np.savez(f, d2t=D2T), "several arrays", "Save only `d2t`: `np"),
        ("d2t.safetensors", lambda f: save_file({"a": D2T, "b": T2D}, f), "no tensor `d2t`", ""),
        ("d2t.npy", lambda f: f.write_bytes(b""), "is empty", "Rebuild"),
        ("d2t.npy", lambda f: f.write_text("version https://git-lfs"), "LFS", "git lfs pull"),
        ("d2t.npy", lambda f: f.write_bytes(b"\x93NUMPY"), "is not an array", "Rebuild"),
        ("d2t.npy", Path.mkdir, "is a folder", "Pass the path of a file"),
    ],
    ids=[
        *("other-key", "text", "truncated", "npz", "other-tensors"),
        *("empty", "lfs-pointer", "no-header", "folder"),
    ],
)
def test_files_that_hold_no_map_are_refused(
    tmp_path: Path, name: str, save: Callable[[Path], None], reason: str, hint: str
) -> None:
    np.save(tmp_path / "t2d.npy", np.array(MASK))
    save(tmp_path / name)

    with pytest.raises(SettingsError, match=reason) as error:
        VocabMap.load(tmp_path / name, tmp_path / "t2d.npy")

    assert name in error.value.message
    assert hint in str(error.value.hint)


def test_the_full_map_keeps_every_token() -> None:
    vocab_map = VocabMap.full(5)

    assert vocab_map.is_full
    assert vocab_map.kept_ids.tolist() == [0, 1, 2, 3, 4]


def test_the_kept_ids_stay_with_the_map_whatever_the_default_device() -> None:
    with torch.device("meta"):
        kept_ids = VocabMap(torch.tensor([1, 2], device="cpu"), torch.ones(4).bool()).kept_ids

    assert kept_ids.device.type == "cpu"


@pytest.mark.parametrize(
    ("d2t", "t2d", "reason"),
    [
        ([1, 3, 4], MASK, "has verifier ids, expected offsets"),
        ([4, 1, 3], MASK, "has verifier ids, expected offsets"),
        (MASK, [1, 2, 2], "is the target-to-draft map and `.*t2d.npy` the other: swap them"),
        (np.array(MASK, int), [1, 2, 2], "swap them"),
        ([1, 2, 1], MASK, "has the verifier id 3 more than once"),
        ([-1, 2, 2], MASK, "ids from -1 to 4"),
        ([1, 2, 5], MASK, "ids from 1 to 7, expected ones below the 6"),
        ([1, 2], MASK, r"\(2 tokens\) and `.*` \(3 of 6 tokens\) do not keep the same"),
        ([0, 2, 2], MASK, "do not keep the same tokens"),
        ([], [False] * 6, "has no tokens"),
        ([1, 2, 2], [0, 1, 0, 2, 1, 0], "values other than 0 and 1"),
        ([[1, 2, 2]], MASK, r"of shape \[1, 3\], expected a vector"),
        (["a", "b", "c"], MASK, "expected a vector"),
        ([1.0, 2.5, 2.0], MASK, "holds 2.5, expected whole numbers"),
        ([1.0, np.nan, 2.0], MASK, "holds nan, expected whole numbers"),
        (np.array([1, 2, 2**64 - 1], np.uint64), MASK, "expected whole numbers"),
        ([1, 2, 2], [0.0, 1.0, 0.5, 1.0, 1.0, 0.0], "holds 0.5"),
    ],
)
def test_maps_that_do_not_fit_are_refused(
    tmp_path: Path, d2t: list[Any], t2d: list[Any], reason: str
) -> None:
    files = write(tmp_path, np.array(d2t), np.array(t2d))

    with pytest.raises(SettingsError, match=reason) as error:
        VocabMap.load(*files)

    assert "build-vocab-map" in str(error.value.hint)


def test_a_map_that_is_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    files = write(tmp_path, np.array([1, 2, 2]), np.array([{"a": 1}], dtype=object))

    with pytest.raises(SettingsError, match="is not an array in NumPy's format"):
        VocabMap.load(*files)


def test_a_map_of_another_verifier_is_refused() -> None:
    with pytest.raises(SettingsError, match="covers 5 tokens, the verifier has 6"):
        VocabMap.full(5).check(6)


@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
    always=st.sets(st.integers(0, 39), max_size=4),
)
def test_the_most_frequent_tokens_are_kept_and_ties_go_to_the_lower_id(
    counts: list[int], share: float, always: set[int]
) -> None:
    vocab_size = len(counts)
    always = {i for i in always if i < vocab_size}
    size = max(len(always), 1, round(share * vocab_size))

    vocab_map = VocabMap.choose(np.array(counts), size, always=always)

    ranking = sorted(range(vocab_size), key=lambda i: (i not in always, -counts[i], i))
    kept = sorted(ranking[:size])
    assert vocab_map.kept_ids.tolist() == kept
    assert vocab_map.t2d.nonzero().flatten().tolist() == kept
    assert vocab_map.d2t.tolist() == [token_id - i for i, token_id in enumerate(kept)]


@pytest.mark.parametrize("size", [1, 6])
def test_a_size_that_cannot_be_chosen_names_the_bounds(size: int) -> None:
    with pytest.raises(SettingsError, match=rf"from 2, .* to 5, .* got `{size}`"):
        VocabMap.choose(np.ones(5, np.int64), size, always={0, 3})


def test_saved_maps_load_as_they_were(tmp_path: Path) -> None:
    vocab_map = VocabMap.choose(np.array([0, 5, 1, 5, 2]), 3)

    vocab_map.save(tmp_path / "d2t.npy", tmp_path / "t2d.npy")

    loaded = VocabMap.load(tmp_path / "d2t.npy", tmp_path / "t2d.npy")
    assert torch.equal(loaded.d2t, vocab_map.d2t)
    assert torch.equal(loaded.t2d, vocab_map.t2d)


def test_large_counts_are_ranked_exactly() -> None:
    # Trap: as float64 the two are equal, and the lower id is kept.
    counts = np.array([2**60, 2**60 + 1, 5])

    assert VocabMap.choose(counts, 1).kept_ids.tolist() == [1]
    assert VocabMap.choose(counts, 2, always=[2]).kept_ids.tolist() == [1, 2]
