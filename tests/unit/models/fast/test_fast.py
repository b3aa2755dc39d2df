"""The fast path's own parts, through Triton's interpreter where there is no GPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.data.batch import collate
from speculators_cli.core.models import layers
from speculators_cli.core.models.attention import plain_attention
from speculators_cli.core.models.eagle3 import Eagle3Draft
from speculators_cli.core.models.fast.active_rows import find_active_rows
from speculators_cli.core.models.fast.joint_attention import joint_attention
from speculators_cli.core.models.fast.linear_kl import Targets, linear_kl
from speculators_cli.core.models.fast.rms_norm import rms_norm
from speculators_cli.core.models.fast.rotary import rotate
from speculators_cli.core.models.fast.shared import SharedRows, SharedWeight, gather
from speculators_cli.core.models.fast.spans import Spans
from speculators_cli.core.models.fast.swiglu import swiglu
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.models.ttt import scored_positions
from speculators_cli.core.models.verifier import FrozenVerifier
from tests.drafts import filled_draft, lay_out, make_config, make_sample, pack

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


def test_rows_are_laid_out_while_they_turn(rng: torch.Generator) -> None:
    rotary = layers.RotaryEmbedding(make_config())
    rows = torch.tensor([1, 3, 4, 6])
    spans = Spans.of_rows((0, 5, 9), rows.numpy(), CPU)

    def fast(x: Tensor) -> Tensor:
        return rotate(x, rotary(torch.arange(9)), rows, spans=spans)

    def plain(x: Tensor) -> Tensor:
        return lay_out(layers.rotate(x, rotary(rows)), spans)

    assert_same(fast, plain, torch.randn(4, 3, 8, generator=rng))


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


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("uses", ["both", "normed", "residual"])
def test_rms_norm_adds_and_gives_both_gradients(
    uses: str, adds: bool, rng: torch.Generator
) -> None:
    x, add = (torch.randn(5, 12, generator=rng) for _ in range(2))
    gain = 1 + torch.randn(12, generator=rng)

    def join(normed: Tensor, residual: Tensor) -> Tensor:
        parts = {"both": normed * 3 + residual, "normed": normed, "residual": residual * 2}
        return parts[uses]

    def fast(x: Tensor, add: Tensor, gain: Tensor) -> Tensor:
        return join(*rms_norm(x, gain, 1e-5, add=add if adds else None)) + 0 * (gain + add)

    def plain(x: Tensor, add: Tensor, gain: Tensor) -> Tensor:
        summed = x + add if adds else x
        return join(F.rms_norm(summed, (12,), gain, 1e-5), summed) + 0 * (gain + add)

    ours = gradients(fast, x, add, gain, rng=torch.Generator().manual_seed(1))
    theirs = gradients(plain, x, add, gain, rng=torch.Generator().manual_seed(1))
    for own, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-5)


def test_rms_norm_writes_where_it_is_told(rng: torch.Generator) -> None:
    x, gain = torch.randn(5, 12, generator=rng), 1 + torch.randn(12, generator=rng)
    room = torch.zeros(5, 2, 12)

    def fast(x: Tensor, gain: Tensor) -> Tensor:
        return rms_norm(x, gain, 1e-5, into=room[:, 1])[0]

    assert_same(fast, lambda x, gain: F.rms_norm(x, (12,), gain, 1e-5), x, gain)

    torch.testing.assert_close(room[:, 1], F.rms_norm(x, (12,), gain, 1e-5))
    assert not room[:, 0].any()


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
        laid_out = lay_out(query[rows], spans)
        return joint_attention(laid_out, [keys[0], *own_keys], [values[0], *own_values], spans)

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


def targets_of(verifier: FrozenVerifier, hidden: Tensor, *, is_kept: Tensor) -> Targets:
    return Targets(
        hidden=hidden,
        head=verifier.head,
        is_kept=is_kept,
        tokens=None,
        kept_ids=torch.arange(len(verifier.head)),
        logit_scale=verifier.config.logit_scale,
        softcap=verifier.config.logit_softcap,
    )


@pytest.mark.parametrize("chunk", [100, 2])
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 2.0}, {"logit_scale": 0.3}], ids=str)
def test_linear_kl_equals_the_plain_loss(
    options: dict[str, float], chunk: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators_cli.core.models.cost.MAX_ROWS", chunk)
    verifier = make_verifier(rng, **options)
    first, second, last = (torch.randn(5, 24, generator=rng) for _ in range(3))
    head = torch.randn(37, 24, generator=rng)
    # Two steps of five rows; target 2 was taken out.
    indices = torch.tensor([[-1, 0], [0, 1], [1, -1], [2, 3], [3, 4]])
    is_kept = torch.tensor([True, True, False, True, True])
    scored = torch.tensor([[0, 1], [1, 1], [1, 0], [0, 1], [1, 1]]).bool()
    bounds = {(0, 5): (0, 5), (0, 1): (0, 1), (1, 3): (0, 2), (3, 5): (2, 5)}
    weights = torch.tensor([0.5, 2.0])
    log_probs = verifier.logits(last, verifier.head).log_softmax(-1)[indices.clamp(min=0)]

    def fast(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
        shared = SharedWeight([head], torch.float32)
        stacked = torch.stack([first, second], dim=1)
        scores = linear_kl(
            stacked.detach(), [first, second], shared, indices,
            lambda start, stop: bounds[start, stop], weights,
            targets_of(verifier, last, is_kept=is_kept),
        )  # fmt: skip
        assert torch.equal(scores.scored, scored)
        agreed = (stacked @ head.T).argmax(-1) == log_probs.argmax(-1)
        assert torch.equal(scores.agreed, agreed & scored)
        return scores.loss

    def plain(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
        losses = kl_loss(torch.stack([first, second], dim=1) @ head.T, log_probs)
        return (losses.masked_fill(~scored, 0.0).sum(0) * weights).sum()

    leaves = [[x.clone().requires_grad_() for x in (first, second, head)] for _ in range(2)]
    losses = [compute(*own) for compute, own in zip((fast, plain), leaves, strict=True)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=RTOL, atol=ATOL)
    for own, exact in zip(*leaves, strict=True):
        assert exact.grad is not None
        assert exact.grad.abs().max() > 0
        torch.testing.assert_close(own.grad, exact.grad, rtol=RTOL, atol=ATOL)


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


MASKS = {
    "nothing": torch.zeros(24).bool(),
    "everything": torch.ones(24).bool(),
    "one-token": torch.arange(24) == 9,
    "first-of-a-document": (torch.arange(24) == 8) | (torch.arange(24) == 0),
    "two-turns": (torch.arange(24) % 8 >= 6) | (torch.arange(24) % 8 == 2),
    "last-turns": torch.arange(24) % 10 >= 6,
}


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_any_mask_gives_what_the_plain_path_gives(
    mask: str, num_layers: int, train_head: bool, rng: torch.Generator
) -> None:
    draft = fast_draft(rng, num_layers=num_layers, intermediate_size=16)
    draft.lm_head.requires_grad_(train_head)
    # A document begins with its sample's second token.
    parts = [F.pad(part, (1, 0)) for part in MASKS[mask].split((8, 11, 5))[:2]]
    samples = [replace(make_sample(len(p), draft.config, rng), loss_mask=p) for p in parts]
    batch = pack(*samples, total_seq_len=24)
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


def test_steps_that_read_past_the_end_alone_give_what_the_plain_path_gives(
    rng: torch.Generator,
) -> None:
    # The only supervised token is the sequence's last, in a document shorter than the TTT steps.
    draft = fast_draft(rng)
    silent, short = (make_sample(n, draft.config, rng) for n in (15, 2))
    batch = pack(
        replace(silent, loss_mask=torch.zeros(15).bool()),
        replace(short, loss_mask=torch.tensor([False, True])),
        total_seq_len=15,
    )
    found = []
    for is_fast in (True, False):
        draft.use_fast_kernels = is_fast
        draft.zero_grad()
        draft(batch).loss.backward()
        assert draft.fc.weight.grad is not None
        found.append(draft.fc.weight.grad.clone())

    assert found[1].abs().max() > 0
    torch.testing.assert_close(*found, rtol=RTOL, atol=ATOL)


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
        targets = rows.targets[:, step]
        positions = rows.rows[targets >= 0]
        assert positions.tolist() == scored[step].nonzero().flatten().tolist()
        assert torch.equal(batch.targets[targets[targets >= 0]], positions + step)
        assert torch.equal(rows.needed[rows.needed_rows[step]], rows.shifted_rows[step])
    for start, stop in ((0, 1), (2, 9), (0, len(rows.rows))):
        first, last = rows.targets_of(start, stop)
        within = rows.targets[start:stop]
        assert first <= within[within >= 0].min()
        assert within.max() < last


def test_rows_without_gaps_are_left_as_they_lie() -> None:
    spans = Spans.of_rows((0, 5, 9), torch.tensor([3, 4, 5, 6, 7, 8]).numpy(), CPU)

    assert spans.query_bounds == (0, 2, 6)
    assert spans.places is None
    assert spans.sources is None
