"""Rotation, alone and where it lays out rows."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels.rotary import rotate
from speculators_cli.core.kernels.spans import Spans
from speculators_cli.core.models import layers
from tests.gradients import assert_same
from tests.tiny_drafts import lay_out, make_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (4, 12)])
def test_rotation_equals_the_plain_one(heads: int, head_dim: int, rng: torch.Generator) -> None:
    config = make_config(head_dim=head_dim)
    rotary = layers.RotaryEmbedding(config)
    positions = torch.tensor([3, 0, 8, 8, 1, 2, 5])
    x = torch.randn(7, heads, head_dim, generator=rng)

    def fast(x: Tensor) -> Tensor:
        return rotate(x, rotary(torch.arange(9)), positions)

    assert_same(fast, lambda x: layers.rotate(x, rotary(positions)), x)


def test_a_row_of_a_wider_tensor_is_turned_alike(rng: torch.Generator) -> None:
    rope = layers.RotaryEmbedding(make_config())(torch.arange(5))
    both = torch.randn(5, 2, 3, 8, generator=rng)

    own = rotate(both[:, 1], rope, torch.arange(5))

    torch.testing.assert_close(own, layers.rotate(both[:, 1], rope))


def test_rows_are_laid_out_while_they_turn(rng: torch.Generator) -> None:
    rotary = layers.RotaryEmbedding(make_config())
    rows = torch.tensor([1, 3, 4, 6])
    spans = Spans.of_rows((0, 5, 9), rows.numpy(), CPU)

    def fast(x: Tensor) -> Tensor:
        return rotate(x, rotary(torch.arange(9)), rows, spans=spans)

    def plain(x: Tensor) -> Tensor:
        return lay_out(layers.rotate(x, rotary(rows)), spans)

    assert_same(fast, plain, torch.randn(4, 3, 8, generator=rng))
