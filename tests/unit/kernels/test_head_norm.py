"""Norm of heads and rotation together, against one after the other."""

import pytest
import torch
from torch import Tensor

from speculators_cli.core.kernels import head_norm
from speculators_cli.core.kernels.head_norm import HeadGroups, HeadNorm, Rope
from speculators_cli.core.models.layers import rotate
from tests.gradients import RTOL

GROUPS = {
    "one": HeadGroups(4, 4, 1),
    "two": HeadGroups(6, 2, 2),
    "apart": HeadGroups(2, 2, 3, gap=2),
}


@pytest.mark.parametrize("num_programs", [2, 100])
@pytest.mark.parametrize("head_dim", [8, 12, 10])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_norm_and_rotation_equal_one_after_the_other(
    groups: HeadGroups,
    head_dim: int,
    num_programs: int,
    rng: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_norm, "NUM_PROGRAMS", num_programs)
    angles = torch.rand(6, 1, head_dim // 2, generator=rng) * 7
    rope = tuple(torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
    weights = torch.randn(groups.num_groups, head_dim, generator=rng)
    norm = HeadNorm(groups, weights, 1e-5, (rope[0], rope[1]), torch.tensor([3, 0, 5, 5, 1]))
    num_heads = sum(groups.sizes) + groups.gap * groups.num_groups
    # Rows of more than these heads, as a product of stacked weights gives them.
    both = torch.randn(5, 2 * num_heads * head_dim, generator=rng)
    x = both[:, num_heads * head_dim :]

    found = norm.apply(x)

    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    wanted = apply_plainly(leaves[0], leaves[1], norm)
    grads = [torch.randn(part.shape, generator=rng) for part in wanted]
    exact = torch.autograd.grad(wanted, leaves, grads)
    for own, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, plain, rtol=RTOL, atol=RTOL)
    grad, is_own = place(grads, groups, num_heads)
    grad_weights = norm.differentiate(x, grad)
    torch.testing.assert_close(grad_weights, exact[1], rtol=RTOL, atol=RTOL)
    own_grad, plain_grad = (part.view(5, num_heads, -1)[:, is_own] for part in (grad, exact[0]))
    assert plain_grad.abs().min() > 0
    torch.testing.assert_close(own_grad, plain_grad, rtol=RTOL, atol=RTOL)
    assert (grad.view(5, num_heads, -1)[:, ~is_own] == 1).all()


def apply_plainly(x: Tensor, weights: Tensor, norm: HeadNorm) -> list[Tensor]:
    heads = x.view(len(x), -1, weights.shape[1])
    rope: Rope = (norm.rope[0][norm.positions], norm.rope[1][norm.positions])
    start, parts = 0, []
    for size, weight in zip(norm.groups.sizes, weights, strict=True):
        own = heads[:, start : start + size]
        normed = torch.nn.functional.rms_norm(own, weight.shape, weight, norm.eps)
        parts.append(rotate(normed, rope))
        start += size + norm.groups.gap
    return parts


def place(grads: list[Tensor], groups: HeadGroups, num_heads: int) -> tuple[Tensor, Tensor]:
    """Gradients where their heads are, ones elsewhere; and which heads are theirs."""
    out = torch.ones(len(grads[0]), num_heads, grads[0].shape[2])
    is_own = torch.zeros(num_heads, dtype=torch.bool)
    start = 0
    for grad in grads:
        here = slice(start, start + grad.shape[1])
        out[:, here], is_own[here] = grad, True
        start += grad.shape[1] + groups.gap
    return out.flatten(1), is_own
