"""States of an engine whose logits are unknown are checked by the LM head."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.errors import MachineError
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.training.sample_check import check_captured
from tests.recorded_progress import RecordedProgress

HIDDEN, VOCAB, LENGTHS = 64, 37, (60, 50)


class Made:
    """Documents whose tokens the head predicts from states before the norm."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(VOCAB, HIDDEN, generator=generator)
        # A norm that reorders: one value outweighs the others.
        weight = torch.ones(HIDDEN)
        weight[0] = 1000.0
        config: Any = SimpleNamespace(
            rms_norm_eps=1e-6, is_norm_centred=False, logit_scale=1.0, logit_softcap=None
        )
        self.verifier = FrozenVerifier(head, weight, head, config)
        ids = torch.randint(VOCAB, (sum(LENGTHS),), generator=generator)
        rows = torch.cat([torch.arange(5, 60), torch.arange(63, 110)])
        self.packed = Packed(ids, LENGTHS, rows)
        self.normed = head[ids.roll(-1)][rows]
        self.last = self.normed / weight

    def check(self, last: torch.Tensor) -> RecordedProgress:
        progress = RecordedProgress()
        check_captured(self.packed, CapturedStates(last[:, :0], last), self.verifier, progress)
        return progress


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


def test_states_before_the_norm_pass(made: Made) -> None:
    assert made.check(made.last).warnings == []


def test_states_after_the_norm_are_refused(made: Made) -> None:
    with pytest.raises(MachineError, match=r"after the verifier's final norm: .* 100\.0% without"):
        made.check(made.normed)


def test_states_of_another_layer_are_a_warning(made: Made) -> None:
    # The head has the right token last.
    (warning,) = made.check(-made.last).warnings

    assert "predicts hardly any token" in str(warning)
