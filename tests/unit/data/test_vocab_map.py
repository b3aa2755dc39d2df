"""VocabMap: two files that must agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError


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


def test_the_full_map_keeps_every_token() -> None:
    vocab_map = VocabMap.full(5)

    assert vocab_map.is_full
    assert vocab_map.kept_ids.tolist() == [0, 1, 2, 3, 4]


def test_the_kept_ids_stay_with_the_map_whatever_the_default_device() -> None:
    with torch.device("meta"):
        kept_ids = VocabMap(torch.tensor([1, 2], device="cpu"), torch.ones(4).bool()).kept_ids

    assert kept_ids.device.type == "cpu"


MASK = [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("d2t", "t2d", "reason"),
    [
        ([1, 3, 4], MASK, "expected ascending ones below the 6"),  # verifier ids, not offsets
        ([1, 2, 1], MASK, "expected ascending"),
        ([-1, 2, 2], MASK, "ids from -1 to 4"),
        ([1, 2], MASK, r"\(2 tokens\) and `.*` \(3 of 6 tokens\) do not keep the same"),
        ([0, 2, 2], MASK, "do not keep the same tokens"),
        ([], [False] * 6, "is not a vector of whole numbers"),
        ([1, 2, 2], [0, 1, 0, 2, 1, 0], "values other than 0 and 1"),
        ([[1, 2, 2]], MASK, "is not a vector"),
        ([1.0, 2.0, 2.0], MASK, "is not a vector of whole numbers"),
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

    with pytest.raises(SettingsError, match="cannot be read"):
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
