"""The fast step, against the plain one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.data.batch import collate
from tests.gradients import ATOL, RTOL, assert_float8_is_near, assert_float8_is_off
from tests.tiny_drafts import WIDE, filled_draft, make_config, make_sample, pack

LENGTHS = (5, 7, 3)  # two documents, and padding
POSITIONS = torch.arange(sum(LENGTHS))
MASKS = {
    "nothing": POSITIONS < 0,
    "everything": POSITIONS >= 0,
    "one-token": POSITIONS == 7,
    "first-of-a-document": (POSITIONS == 5) | (POSITIONS == 0),
    "two-turns": (POSITIONS % 6 >= 4) | (POSITIONS % 6 == 1),
    "last-turns": POSITIONS % 6 >= 3,
}
# Each mask with two layers, every other one with one, and with a trained and a frozen head.
CASES = [
    (mask, num_layers, (num_layers + index // 2) % 2 == 0)
    for index, mask in enumerate(MASKS)
    for num_layers in (2, 1)[: 1 + (index + 1) % 2]
]


def fast_draft(rng: torch.Generator, **changes: Any) -> Eagle3Training:
    draft = filled_draft(make_config(**changes), rng, kept_ids=torch.arange(0, 37, 2))
    draft.use_fast_kernels = True
    return draft


@pytest.mark.parametrize(("mask", "num_layers", "train_head"), CASES)
def test_any_mask_gives_what_the_plain_path_gives(
    mask: str, num_layers: int, train_head: bool, rng: torch.Generator
) -> None:
    draft = fast_draft(rng, num_layers=num_layers, intermediate_size=16)
    draft.lm_head.requires_grad_(train_head)
    # A document begins with its sample's second token.
    parts = [F.pad(part, (1, 0)) for part in MASKS[mask].split(LENGTHS)[:2]]
    samples = [replace(make_sample(len(p), draft.config, rng), loss_mask=p) for p in parts]
    batch = pack(*samples, total_seq_len=sum(LENGTHS))
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


# The shortest, one that hides keys in a layer only, and one that hides none.
@pytest.mark.parametrize(("window", "full_layers"), [(3, ()), (5, (0,)), (64, ())])
def test_a_window_gives_what_the_plain_path_gives(
    window: int, full_layers: tuple[int, ...], rng: torch.Generator
) -> None:
    draft = fast_draft(rng, num_layers=2, sliding_window=window, full_attention_layers=full_layers)
    batch = pack(*(make_sample(n, draft.config, rng) for n in (10, 6)), total_seq_len=15)
    found = []
    for is_fast in (True, False):
        draft.use_fast_kernels = is_fast
        draft.zero_grad()
        sums = draft(batch)
        sums.loss.backward()
        grads = {n: p.grad for n, p in draft.named_parameters() if p.grad is not None}
        found.append((sums, grads))

    (fast, own), (plain, exact) = found
    torch.testing.assert_close(fast.stacked(), plain.stacked(), rtol=RTOL, atol=ATOL)
    assert own.keys() == exact.keys()
    for name, grad in exact.items():
        assert (own[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


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

    assert plain.counters["num_agreed"].sum() > 0
    torch.testing.assert_close(fast.stacked(), plain.stacked(), rtol=RTOL, atol=ATOL)


def wide_draft(rng: torch.Generator, **changes: Any) -> Eagle3Training:
    """A draft whose sizes are multiples of 16, as the products in float8 need them."""
    draft = filled_draft(make_config(**WIDE, **changes), rng, kept_ids=torch.arange(0, 64, 2))
    draft.use_fast_kernels = True
    return draft


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_step_in_float8_has_nearly_the_same_loss_and_gradients(
    num_layers: int, rng: torch.Generator
) -> None:
    draft = wide_draft(rng, num_layers=num_layers)
    batch = pack(*(make_sample(n, draft.config, rng) for n in (6, 8)), total_seq_len=13)

    assert_float8_is_near(draft, batch)


def test_validation_is_not_in_float8(rng: torch.Generator) -> None:
    draft = wide_draft(rng).eval()
    batch = pack(make_sample(20, draft.config, rng))

    assert_float8_is_off(draft, batch)


def test_a_batch_without_documents_gives_zeros_in_float8(rng: torch.Generator) -> None:
    draft = wide_draft(rng)
    draft.use_float8 = True
    batch = collate([], [], total_seq_len=8, num_aux_layers=3, hidden_size=48, dtype=torch.float32)

    draft(batch).loss.backward()

    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_document_taken_out_on_the_device_is_not_scored(rng: torch.Generator) -> None:
    draft = fast_draft(rng)
    batch = pack(*(make_sample(n, draft.config, rng) for n in (9, 12)), total_seq_len=24)
    dropped = replace(batch, loss_mask=batch.loss_mask & (batch.document_ids != 0))

    sums = draft(dropped)
    draft.use_fast_kernels = False

    assert sums.counters["num_scored"].sum() > 0
    torch.testing.assert_close(sums.stacked(), draft(dropped).stacked(), rtol=RTOL, atol=ATOL)


def test_a_multiple_of_the_loss_is_refused(rng: torch.Generator) -> None:
    # Its gradients were made for the loss itself.
    draft = fast_draft(rng)
    batch = pack(make_sample(9, draft.config, rng))

    with pytest.raises(RuntimeError):
        (2 * draft(batch).loss).backward()
