"""Which positions the TTT steps score, and what they count."""

import torch

from speculators_cli.core.algorithms.objective import scored_positions, shifted, sum_steps

#                          document 0 ........  document 1 ....  padding
DOCUMENT_IDS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1])
LOSS_MASK = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0]).bool()


def test_a_step_scores_supervised_targets_of_its_own_document_only() -> None:
    scored = scored_positions(LOSS_MASK, DOCUMENT_IDS, 3)

    for step in range(3):
        for i in range(len(LOSS_MASK)):
            j = i + step
            expected = (
                j < len(LOSS_MASK)
                and bool(LOSS_MASK[j])
                and DOCUMENT_IDS[i] == DOCUMENT_IDS[j]
                and DOCUMENT_IDS[i] >= 0
            )
            assert bool(scored[step, i]) == expected, (step, i)


def test_padding_is_never_scored_even_where_its_mask_is_set() -> None:
    scored = scored_positions(torch.ones(11, dtype=torch.bool), DOCUMENT_IDS, 2)

    assert scored[0].sum() == 9
    assert scored[1].sum() == 7


def test_more_steps_than_tokens_score_nothing() -> None:
    scored = scored_positions(torch.tensor([True, True]), torch.tensor([0, 0]), 5)

    assert scored.sum(-1).tolist() == [2, 1, 0, 0, 0]


def test_shifted_moves_rows_forward_and_repeats_the_last() -> None:
    assert shifted(torch.tensor([3, 5, 7, 9]), 2).tolist() == [7, 9, 9, 9]


def test_sums_equal_a_count_by_hand() -> None:
    scored = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).bool()
    agreed = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    losses = torch.arange(15.0).view(3, 5)

    sums = sum_steps(losses, agreed, scored)

    assert sums.counters["losses"].tolist() == [0 + 1 + 2 + 4, 5 + 6 + 8 + 9, 10 + 11 + 12 + 13]
    assert sums.counters["num_scored"].tolist() == [4, 4, 4]
    assert sums.counters["num_agreed"].tolist() == [3, 3, 3]
    # Chains: all of steps 0..k scored. Step 1: positions 0, 1, 4. Step 2: positions 0, 1.
    assert sums.counters["num_chains"].tolist() == [4, 3, 2]
    # Open: all earlier steps of the chain agreed. Position 1 broke at step 0, 4 at step 1.
    assert sums.counters["num_open_chains"].tolist() == [4, 2, 1]
    assert sums.counters["num_agreed_chains"].tolist() == [3, 1, 0]


def test_a_masked_position_gets_no_gradient() -> None:
    losses = torch.ones(2, 3, requires_grad=True)
    scored = torch.tensor([[True, False, True], [False, True, False]])

    sum_steps(losses, torch.zeros(2, 3).bool(), scored).counters["losses"].sum().backward()

    assert losses.grad is not None
    assert torch.equal(losses.grad.bool(), scored)
