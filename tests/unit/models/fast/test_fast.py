"""The fast path's own parts, through Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.models import layers
from speculators_cli.core.models.attention import plain_attention
from speculators_cli.core.models.eagle3 import Eagle3Draft
from speculators_cli.core.models.fast.active_rows import find_active_rows
from speculators_cli.core.models.fast.joint_attention import joint_attention
from speculators_cli.core.models.fast.linear_kl import linear_kl
from speculators_cli.core.models.fast.rms_norm import rms_norm
from speculators_cli.core.models.fast.rotary import rotate
from speculators_cli.core.models.fast.shared import SharedRows, SharedWeight, gather
from speculators_cli.core.models.fast.spans import Spans
from speculators_cli.core.models.fast.swiglu import swiglu
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.models.ttt import scored_positions
from speculators_cli.core.models.verifier import FrozenVerifier
from tests.drafts import filled_draft, make_config, make_sample, pack

CPU = torch.device("cpu")
# Sums of tens of float32 terms, added in another order.
RTOL = ATOL = 1e-5


def gradients(
    compute: Callable[..., Tensor], *inputs: Tensor, rng: torch.Generator
) -> list[Tensor]:
    """What a function gives, and the gradients of its inputs for a random one of its output."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = compute(*leaves)
    out.backward(torch.randn(out.shape, generator=rng))
    found: list[Tensor] = [out.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


def assert_same(fast: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    ours = gradients(fast, *inputs, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, *inputs, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        assert exact.abs().max() > 0
        torch.testing.assert_close(own, exact, rtol=RTOL, atol=ATOL)


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


def test_swiglu_equals_its_definition(rng: torch.Generator) -> None:
    gate_up = torch.randn(5, 2 * 37, generator=rng)

    assert_same(swiglu, lambda x: F.silu(x[:, :37]) * x[:, 37:], gate_up)


def test_a_shared_weight_adds_up_its_uses(rng: torch.Generator) -> None:
    first, second, *x = (torch.randn(n, 6, generator=rng) for n in (4, 3, 5, 2, 5))

    def fast(first: Tensor, second: Tensor, *x: Tensor) -> Tensor:
        weight = SharedWeight([first, second], torch.float32)
        a, b, c = (weight.linear(part) for part in x)
        return torch.cat([b, weight.linear(x[0], add=a), c])

    def plain(first: Tensor, second: Tensor, *x: Tensor) -> Tensor:
        weight = torch.cat([first, second])
        a, b, c = (part @ weight.T for part in x)
        return torch.cat([b, a + x[0] @ weight.T, c])

    assert_same(fast, plain, first, second, *x)


def test_a_shared_weights_gradient_is_handed_over_without_a_copy(rng: torch.Generator) -> None:
    # A copy of every gradient would cost a pass over the optimizer's memory, and as much of it.
    weight = torch.randn(3, 4, generator=rng).requires_grad_()
    totals: list[int] = []
    other = SharedWeight([weight], torch.float32)
    out = other.linear(torch.randn(5, 4, generator=rng)).sum()
    add_product = other.gradient.add_product

    def watch(grad: Tensor, x: Tensor) -> None:
        add_product(grad, x)
        assert other.gradient.total is not None
        totals.append(other.gradient.total.data_ptr())

    other.gradient.add_product = watch  # type: ignore[method-assign]
    out.backward()

    assert weight.grad is not None
    assert totals == [weight.grad.data_ptr()]


def test_a_frozen_shared_weight_gets_no_gradient(rng: torch.Generator) -> None:
    weight, x = torch.randn(3, 4, generator=rng), torch.randn(5, 4, generator=rng)
    x.requires_grad_()

    shared = SharedWeight([weight], torch.float32)
    shared.linear(x).sum().backward()

    assert shared.gradient.total is None
    assert x.grad is not None


def test_a_gain_goes_into_the_weights(rng: torch.Generator) -> None:
    gain = 1 + torch.randn(6, generator=rng)
    first, second, x = (torch.randn(n, 6, generator=rng) for n in (4, 3, 5))

    def fast(gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return SharedWeight([first, second], torch.float32, gain=gain).linear(x)

    def plain(gain: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return (x * gain) @ torch.cat([first, second]).T

    assert_same(fast, plain, gain, first, second)


@pytest.mark.parametrize("uses", ["both", "normed", "residual"])
def test_rms_norm_adds_the_gradient_of_the_residual(uses: str, rng: torch.Generator) -> None:
    x, gain = torch.randn(5, 12, generator=rng), 1 + torch.randn(12, generator=rng)

    def join(normed: Tensor, residual: Tensor) -> Tensor:
        parts = {"both": normed * 3 + residual, "normed": normed, "residual": residual * 2}
        return parts[uses]

    def fast(x: Tensor, gain: Tensor) -> Tensor:
        return join(*rms_norm(x, gain, 1e-5)) + 0 * gain

    def plain(x: Tensor, gain: Tensor) -> Tensor:
        return join(F.rms_norm(x, (12,), gain, 1e-5), x) + 0 * gain

    ours = gradients(fast, x, gain, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, x, gain, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def test_a_shared_weights_gradient_adds_up_in_float32() -> None:
    # Trap: 300 products of one are 256 in bfloat16.
    weight = torch.zeros(1, 1).requires_grad_()
    shared = SharedWeight([weight], torch.bfloat16)

    outs = [shared.linear(torch.ones(1, 1, dtype=torch.bfloat16)) for _ in range(300)]
    torch.cat(outs).sum().backward()

    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.item() == 300


def test_shared_rows_add_up_what_is_read(rng: torch.Generator) -> None:
    rows = torch.randn(6, 3, generator=rng)
    places = [torch.tensor([1, 2, 4]), torch.tensor([2, 3, 5])]

    def fast(rows: Tensor) -> Tensor:
        shared = SharedRows(rows)
        return torch.cat([shared.read(), *(shared.read(at) for at in places)])

    assert_same(fast, lambda rows: torch.cat([rows, *(rows[at] for at in places)]), rows)


def test_what_is_read_past_the_end_gets_no_gradient(rng: torch.Generator) -> None:
    rows = torch.randn(4, 3, generator=rng).requires_grad_()

    out = SharedRows(rows).read(torch.tensor([2, 3, 3]), num_inside=2)
    out.backward(torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 3))

    assert rows.grad is not None
    assert rows.grad[:, 0].tolist() == [0, 0, 1, 2]


def test_gathered_rows_give_their_gradient_back(rng: torch.Generator) -> None:
    rows = torch.tensor([0, 3, 4])

    places = torch.tensor([0, -1, -1, 1, 2, -1])

    def fast(x: Tensor) -> Tensor:
        return gather(x, rows, places)

    assert_same(fast, lambda x: x[rows], torch.randn(6, 2, 3, generator=rng))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 8), (6, 2, 12), (3, 3, 8)])
def test_joint_attention_of_some_rows_equals_the_plain_one_of_all(
    num_steps: int, heads: int, kv_heads: int, head_dim: int, rng: torch.Generator
) -> None:
    bounds = (0, 5, 6, 13, 16)
    rows = torch.tensor([2, 4, 8, 9, 12])  # none of the second document, nor of the padding
    spans = Spans.of_rows(bounds, rows.numpy(), CPU)
    query = torch.randn(16, heads, head_dim, generator=rng)
    parts = [torch.randn(16, kv_heads, head_dim, generator=rng) for _ in range(2 * num_steps)]

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        keys, values = parts[:num_steps], parts[num_steps:]
        own_keys, own_values = ([x[rows] for x in xs[1:]] for xs in (keys, values))
        return joint_attention(query[rows], [keys[0], *own_keys], [values[0], *own_values], spans)

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts)[rows]

    assert_same(fast, plain, query, *parts)


def test_joint_attention_of_all_rows_equals_the_plain_one(rng: torch.Generator) -> None:
    bounds = (0, 5, 6, 13)
    parts = [torch.randn(13, 2, 8, generator=rng) for _ in range(4)]

    def fast(query: Tensor, *parts: Tensor) -> Tensor:
        return joint_attention(query, parts[:2], parts[2:], Spans.of_documents(bounds, CPU))

    def plain(query: Tensor, *parts: Tensor) -> Tensor:
        return plain_attention(query, bounds, *parts)

    assert_same(fast, plain, torch.randn(13, 4, 8, generator=rng), *parts)


def make_verifier(rng: torch.Generator, **changes: Any) -> FrozenVerifier:
    draft = filled_draft(make_config(), rng, kept_ids=torch.arange(0, 37, 2))
    config = replace(draft.verifier.config, **changes)
    return FrozenVerifier(
        draft.verifier.embedding, draft.verifier.norm_gain, draft.verifier.head, config
    )


@pytest.mark.parametrize("options", [{}, {"logit_softcap": 2.0}, {"logit_scale": 0.3}], ids=str)
def test_linear_kl_equals_the_plain_loss(options: dict[str, float], rng: torch.Generator) -> None:
    verifier = make_verifier(rng, **options)
    hidden, last = (torch.randn(n, 24, generator=rng) for n in (9, 4))
    head = torch.randn(37, 24, generator=rng)
    rows = torch.tensor([[0, 2, -1, 3], [-1, 5, 6, 8]])
    weights = torch.tensor([0.5, 2.0])
    target_log_probs = verifier.logits(last, verifier.head).log_softmax(-1)

    def fast(hidden: Tensor, head: Tensor) -> Tensor:
        shared = SharedWeight([head], torch.float32)
        scores = linear_kl(hidden, shared, rows, weights, last, verifier, verifier.head)
        assert torch.equal(scores.verifier_tokens, target_log_probs.argmax(-1).int())
        best = (hidden @ head.T).argmax(-1)
        assert torch.equal(scores.tokens[rows >= 0], best[rows[rows >= 0]].int())
        return scores.loss

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        losses = kl_loss((hidden @ head.T)[rows.clamp(min=0)], target_log_probs.expand(2, 4, 37))
        return (losses.masked_fill(rows < 0, 0.0).sum(-1) * weights).sum()

    leaves = [[x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2)]
    for compute, own in zip((fast, plain), leaves, strict=True):
        compute(*own).backward()
    torch.testing.assert_close(fast(hidden, head), plain(hidden, head), rtol=RTOL, atol=ATOL)
    for own, exact in zip(*leaves, strict=True):
        assert exact.grad is not None
        assert exact.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, exact.grad, rtol=RTOL, atol=ATOL)


def test_chunks_of_targets_add_up(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier = make_verifier(rng)
    hidden, last = (torch.randn(n, 24, generator=rng) for n in (11, 11))
    rows = torch.arange(11)[None]

    def run() -> list[Tensor]:
        head = verifier.head.clone().requires_grad_()
        leaf = hidden.clone().requires_grad_()
        shared = SharedWeight([head], torch.float32)
        scores = linear_kl(leaf, shared, rows, torch.ones(1), last, verifier, verifier.head)
        scores.loss.backward()
        assert leaf.grad is not None
        assert head.grad is not None
        return [scores.losses, leaf.grad, head.grad]

    whole = run()
    monkeypatch.setattr("speculators_cli.core.models.cost.MAX_TARGETS", 4)
    chunked = run()

    for own, exact in zip(chunked, whole, strict=True):
        torch.testing.assert_close(own, exact, rtol=RTOL, atol=ATOL)


def test_a_multiple_of_the_loss_is_refused(rng: torch.Generator) -> None:
    # Its gradients were made for the loss itself.
    draft = fast_draft(rng)
    batch = pack(make_sample(9, draft.config, rng))

    with pytest.raises(RuntimeError):
        (2 * draft(batch).loss).backward()


def fast_draft(rng: torch.Generator, **changes: Any) -> Eagle3Draft:
    draft = filled_draft(make_config(**changes), rng, kept_ids=torch.arange(0, 37, 2))
    draft.use_fast_kernels = True
    return draft


def masked(batch: Batch, mask: Tensor) -> Batch:
    return replace(batch, loss_mask=mask, host_mask=mask)


MASKS = {
    "nothing": torch.zeros(24).bool(),
    "everything": torch.ones(24).bool(),
    "one-token": torch.arange(24) == 9,
    "first-of-a-document": (torch.arange(24) == 8) | (torch.arange(24) == 0),
    "two-turns": (torch.arange(24) % 8 >= 6) | (torch.arange(24) % 8 == 2),
}


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_any_mask_gives_what_the_plain_path_gives(
    mask: str, num_layers: int, train_head: bool, rng: torch.Generator
) -> None:
    draft = fast_draft(rng, num_layers=num_layers, intermediate_size=16)
    draft.lm_head.requires_grad_(train_head)
    samples = [make_sample(n, draft.config, rng) for n in (9, 12)]
    batch = masked(pack(*samples, total_seq_len=24), MASKS[mask])
    weights = torch.tensor([1.0, 0.5, 0.25])
    found = []
    for is_fast in (True, False):
        draft.use_fast_kernels = is_fast
        draft.zero_grad()
        sums = draft(batch, weights)
        sums.loss.backward()
        grads = {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}
        found.append((sums, grads))

    (fast, own), (plain, exact) = found
    torch.testing.assert_close(fast.stacked(), plain.stacked(), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(fast.loss, plain.loss, rtol=RTOL, atol=ATOL)
    for name, grad in exact.items():
        mine = own[name]
        # Where only one key is seen, the exact gradient of a query is 0, and rounding's some 1e-7.
        assert (mine - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


def test_a_batch_without_documents_gives_zeros(rng: torch.Generator) -> None:
    # A rank's last step may have nothing to read; the others wait for its gradients.
    draft = fast_draft(rng)
    batch = collate([], [], total_seq_len=8, num_aux_layers=3, hidden_size=24, dtype=torch.float32)

    sums = draft(batch)
    sums.loss.backward()

    assert sums.loss == 0
    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_validation_counts_as_the_plain_path(rng: torch.Generator) -> None:
    draft = fast_draft(rng).eval()
    batch = pack(make_sample(20, draft.config, rng))

    with torch.no_grad():
        fast = draft(batch)
        draft.use_fast_kernels = False
        plain = draft(batch)

    assert plain.num_agreed.sum() > 0
    torch.testing.assert_close(fast.stacked(), plain.stacked(), rtol=RTOL, atol=ATOL)


def test_a_document_taken_out_on_the_device_is_not_scored(rng: torch.Generator) -> None:
    draft = fast_draft(rng)
    batch = pack(*(make_sample(n, draft.config, rng) for n in (9, 12)), total_seq_len=24)
    dropped = replace(batch, loss_mask=batch.loss_mask & (batch.document_ids != 0))

    sums = draft(dropped)
    draft.use_fast_kernels = False

    assert sums.num_scored.sum() > 0
    torch.testing.assert_close(sums.stacked(), draft(dropped).stacked(), rtol=RTOL, atol=ATOL)


def test_active_rows_are_those_that_reach_a_loss(rng: torch.Generator) -> None:
    config = make_config(ttt_steps=4)
    batch = pack(*(make_sample(n, config, rng) for n in (9, 12, 2)), total_seq_len=24)

    rows = find_active_rows(batch, 4)

    scored = scored_positions(batch.loss_mask, batch.document_ids, 4)
    assert rows.rows.tolist() == scored.any(0).nonzero().flatten().tolist()
    assert 0 < len(rows.rows) < 24
    for step in range(4):
        scorers = rows.target_rows[step]
        positions = rows.rows[scorers[scorers >= 0]]
        assert positions.tolist() == scored[step].nonzero().flatten().tolist()
        assert torch.equal(rows.targets[scorers >= 0], positions + step)
        assert torch.equal(rows.needed[rows.needed_rows[step]], rows.shifted_rows[step])
