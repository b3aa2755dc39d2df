"""Counting tokens, and files of counts."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from speculators_cli.core.data import token_counts
from speculators_cli.core.data.sample import SampleTokens
from speculators_cli.core.data.token_counts import TokenCounts, read_token_freq, write_token_freq
from speculators_cli.core.errors import DataError, SettingsError


def make_tokens(ids: list[int], mask: list[int]) -> SampleTokens:
    return SampleTokens(
        np.array(ids, np.int64),
        np.array(mask, np.bool_),
        hidden_size=4,
        num_aux_layers=3,
        dtype="bfloat16",
        is_normed=False,
        fingerprint="",
    )


@pytest.mark.parametrize("held_back", [1, 1000])
def test_supervised_tokens_are_counted_but_never_the_first(
    monkeypatch: pytest.MonkeyPatch, held_back: int
) -> None:
    monkeypatch.setattr(token_counts, "HELD_BACK_TOKENS", held_back)
    counts = TokenCounts(6)

    counts.add(make_tokens([5, 1, 2, 2], [1, 1, 0, 1]))
    counts.add(make_tokens([], []))
    counts.add(make_tokens([3, 2], [0, 1]))

    assert counts.total().tolist() == [0, 1, 2, 0, 0, 0]


def test_all_tokens_are_counted_when_asked_for() -> None:
    counts = TokenCounts(6, all_tokens=True)

    counts.add(make_tokens([5, 1, 2, 2], [1, 1, 0, 1]))

    assert counts.total().tolist() == [0, 1, 2, 0, 0, 1]


def test_an_id_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises(DataError, match="token ids up to 6 or more, the verifier has 6 tokens"):
        TokenCounts(6).add(make_tokens([1, 6], [0, 0]))


def test_files_of_counts_are_added_up(tmp_path: Path) -> None:
    write_token_freq(np.array([0, 3, 0, 7]), tmp_path / "ours.pt")
    torch.save(Counter({3: 1, 0: 2}), tmp_path / "counter.pt")

    counts = read_token_freq([tmp_path / "ours.pt", tmp_path / "counter.pt"], 5)

    assert torch.load(tmp_path / "ours.pt", weights_only=True) == {1: 3, 3: 7}
    assert counts.tolist() == [2, 3, 0, 8, 0]


def test_a_table_of_a_whole_vocabulary_is_read(tmp_path: Path) -> None:
    torch.save(dict.fromkeys(range(262_144), 70_000), tmp_path / "all.pt")

    counts = read_token_freq([tmp_path / "all.pt"], 262_144)

    assert (counts == 70_000).all()


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("hostile-was-run",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"input_ids": 3}, "is not a table of token counts"),
        ({1: 2.5}, "is not a table of token counts"),
        ({1: -2}, "is not a table of token counts"),
        ({True: 2}, "is not a table of token counts"),
        ([1, 2], "is not a table of token counts"),
        ({9: 2}, "counts token 9, the verifier has 5 tokens"),
        ({-1: 2}, "counts token -1"),
        ({1: Hostile()}, "would run `posix.mkdir`"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "freq.pt")

    with pytest.raises(SettingsError, match=reason):
        read_token_freq([Path("freq.pt")], 5)

    assert not Path("hostile-was-run").exists()


def test_counts_that_an_int64_cannot_hold_are_refused(tmp_path: Path) -> None:
    # Trap: int64 sums wrap to negative counts without a word.
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    torch.save({1: 2**62, 2: 2**62 - 1}, files[0])
    torch.save({1: 1}, files[1])

    assert read_token_freq(files[:1], 5).tolist() == [0, 2**62, 2**62 - 1, 0, 0]
    with pytest.raises(SettingsError, match=r"exceeds 9,223,372,036,854,775,807 .*b.pt"):
        read_token_freq(files, 5)


@pytest.mark.parametrize("count", [2**63, 2**64, 10**30])
def test_one_count_that_an_int64_cannot_hold_is_refused(tmp_path: Path, count: int) -> None:
    torch.save({1: count}, tmp_path / "a.pt")

    with pytest.raises(SettingsError, match="the sum of the counts exceeds"):
        read_token_freq([tmp_path / "a.pt"], 5)


def test_a_fifo_in_place_of_counts_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pt")

    with pytest.raises(SettingsError, match="cannot be read: a FIFO, not a file"):
        read_token_freq([tmp_path / "a.pt"], 5)
