"""TokenFolder: shards of tokens as samples, whose hidden states are computed later."""

from pathlib import Path

import numpy as np
import pytest
import torch

from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.sample import ChangedSampleError, Sample
from speculators_cli.core.data.sources import Request, choose_capture, open_samples
from speculators_cli.core.data.token_shards import TokenRow, shard_name, write_shard
from speculators_cli.core.data.tokens import StatesShape, TokenFolder, read_tokens
from speculators_cli.core.errors import DataError
from speculators_cli.core.preparation.vocabulary import build_vocab_map
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.build_vocab_map import BuildVocabMapSettings
from tests.tiny_run import VOCAB
from tests.token_files import make_rows, make_shard, write_tokens

SHAPE = StatesShape(hidden_size=5, layer_ids=(2, 4))


def read(folder: Path) -> TokenFolder:
    return read_tokens([folder], shape=SHAPE, alignment=NEXT_TOKEN, progress=SilentProgress())


def states_of(row: TokenRow) -> Sample:
    """The sample of a row, with states that depend on token and place."""
    count = len(row.input_ids)
    own = (
        torch.arange(count)[:, None]
        + 100 * torch.from_numpy(row.input_ids.astype(np.int64))[:, None]
    )
    columns = own.float() * torch.arange(1, 6)
    return Sample(
        torch.from_numpy(row.input_ids.astype(np.int64)),
        torch.from_numpy(row.loss_mask),
        (columns + 0.25, columns + 0.5),
        columns,
        is_normed=False,
    )


def test_rows_have_the_order_of_the_samples_files(tmp_path: Path) -> None:
    names = ["000000", "000001-turn1", "000001-turn2", "000002", "000002-turn10"]
    rows = [
        TokenRow(name, row.input_ids, row.loss_mask)
        for name, row in zip(names, make_rows(5), strict=True)
    ]

    found = read(write_tokens(tmp_path / "tokens", rows, make_rows(2, first=9)))

    files = sorted(f"{name}.pt" for name in names)
    assert [entry.name for entry in found.entries] == [
        *(name.removesuffix(".pt") for name in files), "000009", "000010",
    ]  # fmt: skip
    for entry, i in zip(found.entries, range(7), strict=True):
        assert len(found.read_row(i).input_ids) == entry.header.num_tokens
    by_name = {row.name: row.input_ids.tolist() for row in rows}
    assert found.read_row(1).input_ids.tolist() == by_name[found.entries[1].name]


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("total_seq_len", [64, 40])  # the second one truncates
def test_states_at_the_planned_rows_are_those_that_a_stored_batch_has(
    tmp_path: Path, pads: bool, total_seq_len: int
) -> None:
    rows = make_rows(3, shortest=12, longest=22)
    found = read(write_tokens(tmp_path / "tokens", rows))
    stored = collate(
        range(3),
        map(states_of, rows),
        total_seq_len=total_seq_len,
        num_aux_layers=2,
        hidden_size=5,
        dtype=torch.float32,
    )

    live = found.collate(range(3), total_seq_len=total_seq_len, pin_memory=False, pads=pads)

    given = live.verifier_input
    assert given is not None
    lengths = given.lengths[:3]
    cut = [
        Sample(s.input_ids[:n], s.loss_mask[:n], tuple(a[:n] for a in s.aux_hidden_states),
               s.last_hidden_states[:n], is_normed=False)
        for s, n in zip(map(states_of, rows), lengths, strict=True)
    ]  # fmt: skip
    aux = torch.cat([torch.cat([a[:] for a in s.aux_hidden_states], dim=1) for s in cut])
    last = torch.cat([s.last_hidden_states[:] for s in cut])
    positions = len(given.aux_rows)
    assert (
        positions
        == sum(live.lengths)
        == min(total_seq_len, sum(len(r.input_ids) - 1 for r in rows))
    )
    torch.testing.assert_close(
        aux[given.aux_rows], stored.aux_hidden_states[:positions], rtol=0, atol=0
    )
    torch.testing.assert_close(last[given.last_rows], stored.last_hidden_states, rtol=0, atol=0)
    assert torch.equal(given.input_ids[: sum(lengths)], torch.cat([s.input_ids for s in cut]))
    assert given.is_padded == pads
    assert len(given.input_ids) == (256 if pads else sum(lengths)) == sum(given.lengths)
    assert same_but_states(live, stored)


def same_but_states(one: Batch, other: Batch) -> bool:
    names = ("input_ids", "loss_mask", "document_ids", "position_ids", "targets", "is_normed")
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in names) and (
        one.lengths,
        one.sample_ids,
    ) == (other.lengths, other.sample_ids)


def test_an_empty_sequence_has_an_input_without_tokens(tmp_path: Path) -> None:
    found = read(write_tokens(tmp_path / "tokens", make_rows(2)))

    batch = found.collate((), total_seq_len=1, pin_memory=False, pads=False)

    assert batch.verifier_input is not None
    assert (batch.lengths, len(batch.verifier_input.input_ids)) == ((), 0)


def test_a_shard_that_changes_is_refused_when_its_row_is_read(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens", make_rows(3))
    found = read(folder)
    rows = make_rows(3)
    rows[1].input_ids[4] += 1

    write_shard(make_shard(rows), folder / shard_name(0))

    assert found.read_row(0).name == "000000"
    with pytest.raises(ChangedSampleError, match="different contents"):
        found.read_row(1)
    write_shard(make_shard(rows[:2]), folder / shard_name(0))
    with pytest.raises(ChangedSampleError, match="different size"):
        found.read_row(0)


def test_hashes_change_with_one_id_and_with_one_mask(tmp_path: Path) -> None:
    before = read(write_tokens(tmp_path / "a", make_rows(3)))
    changed, masked = make_rows(3), make_rows(3)
    changed[1].input_ids[4] += 1
    masked[2].loss_mask[5] = False

    others = [read(write_tokens(tmp_path / n, x)) for n, x in (("b", changed), ("c", masked))]

    assert [x.data_hash == before.data_hash for x in others] == [True, True]
    assert len({x.content_hash for x in (before, *others)}) == 3


def request(folder: Path, *more: Path, capture: str = "auto") -> Request:
    return Request(
        (folder, *more),
        data_format="auto",
        version=1,
        index_file=None,
        max_bad_samples=None,
        alignment=NEXT_TOKEN,
        capture=choose_capture(capture, (folder, *more)),  # type: ignore[arg-type]
        live=SHAPE,
    )


def test_the_contents_of_a_folder_decide_whether_its_samples_are_live(
    tmp_path: Path, data_dir: Path
) -> None:
    tokens = write_tokens(tmp_path / "tokens", make_rows(3))
    write_tokens(data_dir / "tokens", make_rows(4))  # as `generate-data` leaves them

    found = {
        (folder.name, capture): open_samples(
            request(folder, capture=capture), SilentProgress()
        ).is_live
        for folder, capture in (
            (tokens, "auto"), (tokens, "online"), (data_dir, "auto"), (data_dir, "stored"),
            (data_dir, "online"),
        )
    }  # fmt: skip

    assert found == {
        ("tokens", "auto"): True,
        ("tokens", "online"): True,
        ("copied", "auto"): False,
        ("copied", "stored"): False,
        ("copied", "online"): True,
    }


def test_tokens_beside_samples_are_not_silently_ignored(tmp_path: Path, data_dir: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", make_rows(3))

    with pytest.raises(DataError, match="holds tokens without hidden states"):
        open_samples(request(data_dir, tokens), SilentProgress())
    with pytest.raises(DataError, match="holds no shards of tokens"):
        open_samples(request(data_dir, capture="online"), SilentProgress())


def test_the_vocabulary_counted_from_tokens_is_that_of_samples(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    samples.mkdir()
    for row in make_rows(12):
        whole = torch.randn(4, len(row.input_ids), 24)
        torch.save(
            {"input_ids": torch.from_numpy(row.input_ids).long(),
             "loss_mask": torch.from_numpy(row.loss_mask).long(), "hidden_states": list(whole)},
            samples / f"{row.name}.pt",
        )  # fmt: skip
    tokens = write_tokens(tmp_path / "tokens", make_rows(12))

    reports = [
        build_vocab_map(
            BuildVocabMapSettings.model_validate(
                {
                    "vocabulary": {"target_vocab_size": VOCAB, "draft_vocab_size": 19},
                    "counts": {"data_path": (folder,)},
                    "files": {"output_dir": tmp_path / f"map-{folder.name}"},
                }
            )
        )
        for folder in (samples, tokens)
    ]

    assert reports[0].num_counted_tokens == reports[1].num_counted_tokens > 100
    maps = [np.load(report.d2t_path).tolist() for report in reports]
    assert maps[0] == maps[1]
