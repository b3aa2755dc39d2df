"""LiveStates: batches get the verifier's states, whatever the input is padded to."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.state_cache import StateCache, StatesFormat
from speculators_cli.core.data.tokens import TokenFolder
from speculators_cli.core.engines.host_states import Storage
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.training.cache_writer import CacheWriter
from speculators_cli.core.training.live_capture import share_weights
from speculators_cli.core.training.states import LiveStates, StoredStates
from tests.tiny_run import HIDDEN, LAYER_IDS, capture_sample, write_verifier
from tests.token_files import make_rows, write_tokens
from tests.unit.data.test_tokens import read

# Packed documents are other matrices: float32 rounds 9 layers of sums of 40 numbers differently.
RTOL, ATOL = 1e-4, 1e-4
SEQ_LEN = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_verifier(tmp_path_factory.mktemp("verifier") / "verifier")


@pytest.fixture(params=[False, True], ids=["each", "packed"])
def engine(model: Any, request: pytest.FixtureRequest) -> TransformersEngine:
    return TransformersEngine(
        deepcopy(model), LAYER_IDS, end_ids=frozenset(), name="tiny", packs_documents=request.param
    )


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFolder:
    return read(write_tokens(tmp_path / "tokens", make_rows(4, shortest=8, longest=20)))


def expected(model: Any, tokens: TokenFolder, ids: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Aux and supervised last states of each document alone, at its positions."""
    aux, last = [], []
    for i in ids:
        row = tokens.read_row(i)
        sample = capture_sample(model, torch.from_numpy(row.input_ids).long())
        *layers, final = sample["hidden_states"]
        aux.append(torch.cat(layers, dim=1)[:-1])
        last.append(final[1:][torch.from_numpy(row.loss_mask[1:])])
    return torch.cat(aux), torch.cat(last)


@pytest.mark.parametrize("pads", [False, True])
def test_states_are_those_of_each_document_alone(
    pads: bool, engine: TransformersEngine, model: Any, tokens: TokenFolder
) -> None:
    ids = (2, 0, 3)
    aux, last = expected(model, tokens, ids)
    batch = tokens.collate(ids, total_seq_len=SEQ_LEN, pin_memory=False, pads=pads)

    filled = LiveStates(engine, weights_bytes=0).fill(batch)

    assert filled.verifier_input is None
    assert filled.aux_hidden_states.shape == (SEQ_LEN, 3 * HIDDEN)
    torch.testing.assert_close(filled.aux_hidden_states[: len(aux)], aux, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(filled.last_hidden_states, last, rtol=RTOL, atol=ATOL)
    assert not filled.aux_hidden_states[len(aux) :].any()
    assert len(aux) < SEQ_LEN
    # Trained on: no tensor of inference mode.
    weight = torch.ones(3 * HIDDEN, requires_grad=True)
    (filled.aux_hidden_states * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("pads", [False, True])
def test_an_empty_sequence_has_no_states(
    pads: bool, engine: TransformersEngine, tokens: TokenFolder
) -> None:
    batch = tokens.collate((), total_seq_len=1, pin_memory=False, pads=pads)

    filled = LiveStates(engine, weights_bytes=0).fill(batch)

    assert filled.aux_hidden_states.tolist() == [[0.0] * 3 * HIDDEN]
    assert filled.last_hidden_states.shape == (0, HIDDEN)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("kept", [(2,), (0, 3), (2, 0, 3)])
def test_cached_documents_keep_their_places_among_computed_ones(
    pads: bool,
    kept: tuple[int, ...],
    engine: TransformersEngine,
    model: Any,
    tokens: TokenFolder,
    tmp_path: Path,
) -> None:
    ids = (2, 0, 3)
    aux, last = expected(model, tokens, ids)
    cache = StateCache(
        tmp_path / "cache",
        "engine",
        frozenset(tokens.entries[i].fingerprint for i in kept),
        StatesFormat(3, HIDDEN, torch.float32, None),
    )
    tokens = replace(tokens, cache=cache)
    writer = CacheWriter(Storage(None, has_all_last_states=False))
    filler = LiveStates(engine, weights_bytes=0, writer=writer)
    how: dict[str, Any] = {"total_seq_len": SEQ_LEN, "pin_memory": False, "pads": pads}
    first = filler.fill(tokens.collate(ids, **how))
    filler.close()

    batch = tokens.collate(ids, **how)

    given = batch.verifier_input
    assert (given is None) == (len(kept) == 3)
    if given is not None:
        assert len(given.num_positions) == 3 - len(kept)
    second = LiveStates(engine, weights_bytes=0).fill(batch)
    for found in (first, second):
        assert same_shapes(found, first)
        torch.testing.assert_close(found.aux_hidden_states[: len(aux)], aux, rtol=RTOL, atol=ATOL)
        torch.testing.assert_close(found.last_hidden_states, last, rtol=RTOL, atol=ATOL)
        assert not found.aux_hidden_states[len(aux) :].any()


def same_shapes(one: Batch, other: Batch) -> bool:
    names = ("aux_hidden_states", "last_hidden_states", "input_ids", "targets")
    return all(getattr(one, n).shape == getattr(other, n).shape for n in names)


def test_time_is_counted_once_and_stored_states_take_none(
    engine: TransformersEngine, tokens: TokenFolder
) -> None:
    filler = LiveStates(engine, weights_bytes=0)
    batch = tokens.collate((0, 1), total_seq_len=SEQ_LEN, pin_memory=False, pads=False)

    stored = StoredStates()
    assert stored.fill(batch) is batch
    assert stored.take_seconds() is None
    filler.fill(filler.fill(batch))

    seconds = filler.take_seconds()
    assert seconds is not None
    assert 0 < seconds < 30
    assert filler.take_seconds() == 0


def test_ranks_that_share_weights_compute_for_each_batch(
    engine: TransformersEngine, tokens: TokenFolder
) -> None:
    joined: list[None] = []
    filler = LiveStates(engine, weights_bytes=0, join=lambda: joined.append(None))
    batch = tokens.collate((0,), total_seq_len=SEQ_LEN, pin_memory=False, pads=False)

    filled = filler.fill(batch)
    assert not joined
    filler.fill(filled)

    assert len(joined) == 1


def test_embedding_and_head_are_shared_only_where_they_are_equal(model: Any) -> None:
    embedding = model.get_input_embeddings().weight.detach().clone()
    other = model.get_output_embeddings().weight.detach().clone()
    other[3, 5] += 1e-3
    frozen: Any = SimpleNamespace(
        embedding=embedding, head=other, norm_weight=torch.ones(HIDDEN), config=None,
        norm_bias=None, head_bias=None,
    )  # fmt: skip

    shared = share_weights(frozen, model)

    assert shared.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert not shared.embedding.requires_grad
    assert shared.head is other
