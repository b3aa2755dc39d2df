"""collate(), drop_non_finite() and add_noise()."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from speculators_cli.core.data.batch import Batch, collate, drop_non_finite
from speculators_cli.core.data.noise import add_noise
from speculators_cli.core.data.sample import Sample

HIDDEN, NUM_AUX = 5, 2


def make_sample(num_tokens: int, *, first_id: int = 0, is_normed: bool = False) -> Sample:
    """A sample whose values tell where they come from."""
    rows = torch.arange(num_tokens, dtype=torch.float32)[:, None].expand(-1, HIDDEN) + first_id
    return Sample(
        input_ids=torch.arange(num_tokens) + first_id,
        loss_mask=torch.arange(num_tokens) % 2 == 1,
        aux_hidden_states=tuple(rows + 1000 * (layer + 1) for layer in range(NUM_AUX)),
        last_hidden_states=rows + 9000,
        is_normed=is_normed,
    )


def pack(*samples: Sample, total_seq_len: int = 12, first_sample_id: int = 0) -> Batch:
    ids = range(first_sample_id, first_sample_id + len(samples))
    return collate(
        list(ids),
        samples,
        total_seq_len=total_seq_len,
        num_aux_layers=NUM_AUX,
        hidden_size=HIDDEN,
        dtype=torch.float32,
    )


def test_ids_last_states_and_mask_are_shifted_against_the_aux_states() -> None:
    # Trap: shifting ids and targets but not the mask.
    batch = pack(make_sample(5), total_seq_len=4)

    assert batch.input_ids.tolist() == [1, 2, 3, 4]
    assert batch.loss_mask.tolist() == [True, False, True, False]
    assert batch.targets.tolist() == [0, 2]
    assert batch.last_hidden_states[:, 0].tolist() == [9001, 9003]
    assert batch.aux_hidden_states[:, 0].tolist() == [1000, 1001, 1002, 1003]
    assert batch.aux_hidden_states[:, HIDDEN].tolist() == [2000, 2001, 2002, 2003]
    assert batch.position_ids.tolist() == [1, 2, 3, 4]


def test_documents_are_packed_end_to_end_and_padded() -> None:
    batch = pack(make_sample(4), make_sample(5, first_id=50, is_normed=True))

    assert batch.document_ids.tolist() == [0] * 3 + [1] * 4 + [-1] * 5
    assert batch.lengths == (3, 4)
    assert batch.position_ids.tolist() == [1, 2, 3, 1, 2, 3, 4, 0, 0, 0, 0, 0]
    assert batch.targets.tolist() == [0, 2, 3, 5]
    assert batch.is_normed.tolist() == [False] * 2 + [True] * 2
    assert batch.last_hidden_states[:, 0].tolist() == [9001, 9003, 9051, 9053]
    assert not batch.aux_hidden_states[7:].any()
    assert not batch.loss_mask[7:].any()


def test_a_sample_that_is_too_long_is_cut_at_its_end() -> None:
    batch = pack(make_sample(30), total_seq_len=6)

    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.aux_hidden_states[:, 0].tolist() == [1000, 1001, 1002, 1003, 1004, 1005]


def test_last_states_are_cast_row_by_row() -> None:
    sample = make_sample(5)
    half = replace(sample, last_hidden_states=sample.last_hidden_states[:].half() / 64)

    batch = pack(half)

    assert batch.last_hidden_states.dtype == torch.float32
    assert (batch.last_hidden_states[:, 0] * 64).tolist() == [9000, 9000]  # float16 keeps 11 bits


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("field", "row"), [("aux_hidden_states", 4), ("last_hidden_states", 3)])
def test_a_broken_document_is_taken_out_alone(value: float, field: str, row: int) -> None:
    batch = pack(make_sample(4), make_sample(5), make_sample(3))
    states = getattr(batch, field).clone()
    states[row, 1] = value

    kept, is_broken = drop_non_finite(replace(batch, **{field: states}))

    assert is_broken.tolist() == [False, True, False]
    assert not kept.loss_mask[3:7].any()
    assert torch.equal(kept.loss_mask[:3], batch.loss_mask[:3])
    assert torch.equal(kept.aux_hidden_states[7:], batch.aux_hidden_states[7:])
    assert kept.aux_hidden_states.isfinite().all()
    assert kept.last_hidden_states.isfinite().all()


def test_an_empty_sequence_is_all_padding() -> None:
    batch = pack()

    kept, is_broken = drop_non_finite(batch)

    assert is_broken.shape == (0,)
    assert (kept.document_ids == -1).all()


def test_noise_is_a_function_of_seed_epoch_and_sample_alone() -> None:
    first, second = make_sample(4), make_sample(6)
    together = pack(first, second)
    alone = pack(second, first_sample_id=1)

    noisy = add_noise(together, 0.5, seed=1, epoch=2).aux_hidden_states - together.aux_hidden_states
    lone = add_noise(alone, 0.5, seed=1, epoch=2).aux_hidden_states - alone.aux_hidden_states
    later = add_noise(alone, 0.5, seed=1, epoch=3).aux_hidden_states - alone.aux_hidden_states

    # Differences of numbers near 2000: float32 keeps about 1e-4 of them.
    torch.testing.assert_close(noisy[3:8], lone[:5], rtol=0, atol=5e-4)
    assert not torch.allclose(lone[:5], later[:5], atol=1e-2)


def test_noise_is_uniform_within_its_bounds_and_on_aux_states_alone() -> None:
    sample = make_sample(200)
    zeros = tuple(torch.zeros(200, HIDDEN) for _ in range(NUM_AUX))
    batch = pack(replace(sample, aux_hidden_states=zeros), total_seq_len=200)

    noisy = add_noise(batch, 0.05, seed=0, epoch=0)

    noise = noisy.aux_hidden_states[:199]
    assert noise.abs().max() <= 0.05
    assert noise.abs().max() > 0.049
    # 1,990 draws: the standard deviation 0.05/sqrt(3) is met within 5 %.
    assert noise.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.05)
    assert not noisy.aux_hidden_states[199:].any()
    assert torch.equal(noisy.last_hidden_states, batch.last_hidden_states)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_a_reader_copies_on_its_own_thread() -> None:
    # A team of torch's threads behind each reader halves the speed of training on two cores.
    sample = make_sample(20_001)

    def count_threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(count_threads).result()
        batch = pool.submit(pack, sample, total_seq_len=30_000).result()
        after = pool.submit(count_threads).result()

    assert batch.lengths == (20_000,)
    assert after == before
