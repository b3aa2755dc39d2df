"""The noise kernels, through Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from speculators_cli.core.kernels.noise import mark_broken, perturb, zero_broken

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(
    documents: list[int], *, broken: tuple[int, ...] = (), states: Tensor | None = None
) -> Tensor:
    """Noise at std 0.5 over rows of these documents, whose keys are 1,000, 1,001 ..."""
    ids = torch.tensor(documents)
    positions = torch.tensor([documents[:i].count(d) + 1 for i, d in enumerate(documents)])
    found = torch.zeros(len(ids), 37) if states is None else states.clone()
    is_broken = torch.tensor([d in broken for d in range(3)])
    keys = 1000 * torch.arange(1, 4)
    states = found.to(DEVICE)
    perturb(
        states,
        ids.to(DEVICE),
        positions.to(DEVICE),
        is_broken.to(DEVICE),
        keys.to(DEVICE),
        0.5,
    )
    return states.cpu()


def test_numbers_follow_from_document_and_position_alone() -> None:
    together, alone = run([0, 0, 1, 1, 1, -1]), run([1, 1, 1])

    assert torch.equal(together[2:5], alone)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    assert not torch.allclose(together[2], together[3], atol=0.1)
    assert not together[5].any()


def test_noise_is_uniform_within_its_bounds() -> None:
    noise = run([0] * 60)

    assert noise.abs().max() <= 0.5
    assert noise.abs().max() > 0.49
    # 2,220 draws: mean and standard deviation are met within a few percent of the bound.
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)
    assert len(noise.unique()) > 2200


def test_a_broken_document_is_zeroed() -> None:
    states = torch.full((4, 37), 7.0)
    states[1, 3] = float("nan")
    states[0, 5] = float("inf")

    noisy = run([0, 0, 1, -1], broken=(0,), states=states)

    assert not noisy[:2].any()
    assert ((noisy[2] - 7).abs() <= 0.5).all()
    assert torch.equal(noisy[3], states[3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 4099])
def test_a_document_with_one_broken_value_is_found(value: float, column: int) -> None:
    # float16's largest value: finite, however many there are.
    states = torch.full((4, 4100), 65504.0, dtype=torch.float16)
    states[1, column] = value
    states[3] = value  # padding
    is_broken = torch.zeros(3, dtype=torch.bool, device=DEVICE)

    mark_broken(states.to(DEVICE), torch.tensor([0, 1, 2, -1], device=DEVICE), is_broken)

    assert is_broken.tolist() == [False, True, False]


def test_rows_of_a_broken_document_are_zeroed() -> None:
    states = torch.full((4, 1030), 7.0, device=DEVICE)
    states[1] = float("nan")
    documents = torch.tensor([0, 1, 2, -1], device=DEVICE)

    zero_broken(states, documents, torch.tensor([False, True, False], device=DEVICE))

    assert states[:, 0].tolist() == [7, 0, 7, 7]
    assert states[:, -1].tolist() == [7, 0, 7, 7]
