"""Planted mistakes of an engine are caught at the first packed sequence."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.state_checks import check_head, check_layers
from speculators_cli.core.engines.transformers_engine import TransformersEngine, load_model
from speculators_cli.core.errors import MachineError
from speculators_cli.core.models.verifier import (
    FrozenVerifier,
    load_frozen_verifier,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles

LAYER_IDS = (2, 4, 5)
HIDDEN = 128
LENGTHS = (40, 25)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    model = load_model(str(VERIFIER_DIR), dtype=torch.float32, device=torch.device("cpu"))
    return TransformersEngine(model, LAYER_IDS, end_ids=frozenset({1}), name="it")


@pytest.fixture(scope="module")
def verifier() -> FrozenVerifier:
    files = VerifierFiles(str(VERIFIER_DIR))
    config = read_verifier_config(files, trust_remote_code=False)
    return load_frozen_verifier(files, config)


@pytest.fixture(scope="module")
def packed() -> Packed:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 2000, (sum(LENGTHS),), generator=rng)
    return Packed(ids, LENGTHS, torch.arange(5, sum(LENGTHS)))


@pytest.fixture
def states(engine: TransformersEngine, packed: Packed) -> CapturedStates:
    found = engine.capture(packed)
    return CapturedStates(found.aux.clone(), found.last.clone())


def layer(states: CapturedStates, column: int) -> Tensor:
    """The states of an aux layer, to be written into."""
    return states.aux[:, column * HIDDEN : (column + 1) * HIDDEN]


def test_right_states_pass(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed, states: CapturedStates
) -> None:
    check_layers(states, LAYER_IDS)

    # Rounding may move the top-1 token where two are nearly equal.
    assert check_head(packed, states, verifier, engine.logits) >= 0.97


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_layer_of_zeros_is_caught(states: CapturedStates, column: int) -> None:
    layer(states, column).zero_()

    with pytest.raises(MachineError, match=f"layer {LAYER_IDS[column]} are zero") as raised:
        check_layers(states, LAYER_IDS)

    assert raised.value.hint


def test_a_layer_that_is_the_same_for_all_tokens_is_caught(states: CapturedStates) -> None:
    layer(states, 1).copy_(layer(states, 1)[3].clone().expand(len(states.aux), -1))

    with pytest.raises(MachineError, match="layer 4 are the same for all tokens"):
        check_layers(states, LAYER_IDS)


@pytest.mark.parametrize(("copied", "onto"), [(0, 1), (0, 2), (2, 1)])
def test_a_layer_that_is_a_copy_of_another_is_caught(
    states: CapturedStates, copied: int, onto: int
) -> None:
    layer(states, onto).copy_(layer(states, copied).clone())
    first, second = sorted((LAYER_IDS[copied], LAYER_IDS[onto]))

    with pytest.raises(MachineError, match=f"layers {first} and {second} are equal"):
        check_layers(states, LAYER_IDS)


def test_a_single_token_has_nothing_to_be_constant_over() -> None:
    aux = torch.randn(1, 3 * HIDDEN, generator=torch.Generator().manual_seed(0))

    check_layers(CapturedStates(aux, torch.zeros(0, HIDDEN)), LAYER_IDS)


def test_states_of_another_layer_in_place_of_the_last_are_caught(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed, states: CapturedStates
) -> None:
    early = replace(states, last=layer(states, 0)[packed.rows])

    with pytest.raises(MachineError, match="predicts the verifier's own token at"):
        check_head(packed, early, verifier, engine.logits)


def test_states_of_other_tokens_are_caught(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed, states: CapturedStates
) -> None:
    shifted = replace(states, last=states.last.roll(1, dims=0))

    with pytest.raises(MachineError, match="expected nearly all"):
        check_head(packed, shifted, verifier, engine.logits)


def test_a_norm_with_other_weights_is_caught(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed, states: CapturedStates
) -> None:
    other = FrozenVerifier(
        verifier.embedding,
        verifier.norm_weight * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0)),
        verifier.head,
        verifier.config,
    )

    with pytest.raises(MachineError, match="predicts the verifier's own token at"):
        check_head(packed, states, other, engine.logits)


def test_an_embedding_of_another_verifier_is_caught(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed, states: CapturedStates
) -> None:
    head = verifier.head.roll(1, dims=0)
    other = FrozenVerifier(head, verifier.norm_weight, head, verifier.config)

    with pytest.raises(MachineError, match="predicts the verifier's own token at"):
        check_head(packed, states, other, engine.logits)


def test_states_that_have_the_norm_already_are_caught_where_it_matters(
    engine: TransformersEngine, packed: Packed, states: CapturedStates
) -> None:
    """The embedded verifier's norm is too even: one with a spread of weights takes its place."""
    files = VerifierFiles(str(VERIFIER_DIR))
    config = read_verifier_config(files, trust_remote_code=False)
    own = load_frozen_verifier(files, config)
    spread = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).exp()
    other = FrozenVerifier(own.embedding, own.norm_weight * spread, own.head / spread, config)
    never = torch.zeros(len(states.last), dtype=torch.bool)
    normed = replace(states, last=other.normed(states.last, never))
    assert check_head(packed, states, other, engine.logits) >= 0.97

    with pytest.raises(MachineError, match="predicts the verifier's own token at"):
        check_head(packed, normed, other, engine.logits)


def test_the_first_document_with_last_states_is_checked(
    engine: TransformersEngine, verifier: FrozenVerifier, packed: Packed
) -> None:
    asked: list[int] = []

    def logits_of(ids: Tensor) -> Tensor:
        asked.append(len(ids))
        return engine.logits(ids)

    later = Packed(packed.input_ids, LENGTHS, torch.arange(45, sum(LENGTHS)))

    agreement: Any = check_head(later, engine.capture(later), verifier, logits_of)

    assert asked == [25]
    assert agreement >= 0.95
