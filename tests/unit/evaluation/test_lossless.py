"""Drafted answers are the verifier's own: token by token, or in distribution."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.hooked_model import RowOutput
from speculators_cli.core.engines.row_verifier import open_rows
from speculators_cli.core.evaluation.draft_and_verify import draft_and_verify
from speculators_cli.core.progress import SILENT
from tests.tiny_families import SERVED, VOCAB, build_model

NO_END: frozenset[int] = frozenset()


class Reciter:
    """Proposes the verifier's own answers, with an error in some chains."""

    num_draft_tokens = 4

    def __init__(self, answers: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self.answers = answers

    def start(self, num_rows: int, num_positions: int) -> None:  # noqa: ARG002
        self.expected: list[tuple[int, ...]] = [()] * num_rows
        self.num_known = [0] * num_rows
        self.num_chains = 0

    def keep(self, rows: Sequence[int]) -> None:
        self.expected = [self.expected[row] for row in rows]
        self.num_known = [self.num_known[row] for row in rows]

    def read(self, verified: Verified) -> None:
        if verified.row is None:
            for row, count in enumerate(verified.counts):
                self.num_known[row] += count
            return
        following = tuple(verified.tokens[0].tolist())
        self.expected[verified.row] = self.answers[following[:-1]]
        self.num_known[verified.row] = 1

    def propose(self) -> Tensor:
        return torch.tensor([self._chain(row) for row in range(len(self.expected))])

    def _chain(self, row: int) -> list[int]:
        known = self.num_known[row]
        chain = [*self.expected[row][known : known + 4], 0, 0, 0, 0][:4]
        self.num_chains += 1
        if self.num_chains % 6 < 4:
            wrong = self.num_chains % 6
            chain[wrong] = (chain[wrong] + 1) % VOCAB
        return chain


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", SERVED)
def test_answers_do_not_depend_on_the_draft_or_the_batch(family: str, temperature: float) -> None:
    rows = open_rows(build_model(family), (1, 2, 4), name=family)
    lengths = (30, 3, 17, 1, 22, 9)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(torch.randint(VOCAB, (n,), generator=generator).tolist(), seed=n) for n in lengths
    ]
    sampling = Sampling(max_new_tokens=19, temperature=temperature)

    alone = [
        draft_and_verify(
            rows, None, [prompt], sampling, end_ids=NO_END, batch_size=1, progress=SILENT
        ).answers[0]
        for prompt in prompts
    ]
    reciter = Reciter(
        {tuple(p.ids[1:]): answer.tokens for p, answer in zip(prompts, alone, strict=True)}
    )
    found = draft_and_verify(
        rows, reciter, prompts, sampling, end_ids=NO_END, batch_size=4, progress=SILENT
    ).answers

    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone]
    assert [len(answer.tokens) for answer in found] == [19] * len(lengths)
    assert len({token for answer in found for token in answer.tokens}) > 5
    assert {0, 1, 2, 3, 4} <= {count for answer in found for count in answer.num_accepted}
    for answer in found:
        assert len(answer.refused_for) == len(answer.num_accepted)
        assert answer.is_accepted.count(True) <= sum(answer.num_accepted)


class Table:
    """A verifier whose next token depends on the last one only."""

    device = torch.device("cpu")

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [vocab, vocab]

    def select_layers(self, layer_ids: Sequence[int]) -> None:
        pass

    def limit_rows(self, num_positions: int) -> None:
        pass

    def start(self, num_rows: int, num_positions: int) -> None:
        pass

    def keep(self, rows: Sequence[int]) -> None:
        pass

    def read(self, row: int, tokens: Sequence[int]) -> RowOutput:  # noqa: ARG002
        return RowOutput(self.logits[tokens[-1]][None, None], torch.zeros(1, len(tokens), 1))

    def extend(self, tokens: Tensor, firsts: Sequence[int]) -> RowOutput:  # noqa: ARG002
        return RowOutput(self.logits[tokens], torch.zeros(*tokens.shape, 1))


class Follower:
    """Proposes the token that follows most often after each, by a table of its own."""

    num_draft_tokens = 2

    def __init__(self, following: Tensor) -> None:
        self.following = following  # [vocab], int64

    def start(self, num_rows: int, num_positions: int) -> None:  # noqa: ARG002
        self.last = torch.zeros(num_rows, dtype=torch.int64)

    def keep(self, rows: Sequence[int]) -> None:
        self.last = self.last[list(rows)]

    def read(self, verified: Verified) -> None:
        for i, count in enumerate(verified.counts):
            row = i if verified.row is None else verified.row
            self.last[row] = verified.tokens[i, count - 1]

    def propose(self) -> Tensor:
        first = self.following[self.last]
        return torch.stack((first, self.following[first]), dim=1)


def test_sampled_answers_have_the_exact_distribution() -> None:
    """Chi-square of 20,000 answers of 4 tokens over 3, against the product of probabilities."""
    num_draws, temperature = 20_000, 0.7
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p = (logits / temperature).softmax(-1)

    found = draft_and_verify(
        Table(logits),
        Follower(torch.tensor([1, 2, 0])),
        [Prompt([0], seed) for seed in range(num_draws)],
        Sampling(max_new_tokens=4, temperature=temperature),
        end_ids=NO_END,
        batch_size=1000,
        progress=SILENT,
    ).answers

    counts = Counter(answer.tokens for answer in found)
    chi_square = 0.0
    for tokens in product(range(3), repeat=4):
        pairs = zip((0, *tokens), tokens, strict=False)
        expected = num_draws * torch.stack([p[a, b] for a, b in pairs]).prod().item()
        chi_square += (counts[tokens] - expected) ** 2 / expected
    assert len(found) == num_draws
    # 80 degrees of freedom: mean 80, standard deviation 12.6; above 130 once in some 3,000 seeds.
    assert chi_square < 130
    # Accepted with the verifier's own probability of the proposed token.
    first = [answer.num_accepted[0] > 0 for answer in found]
    expected_rate = sum(p[0, a] * p[a, (a + 1) % 3] for a in range(3))
    # 20,000 draws: a standard deviation of at most 0.0036.
    assert sum(first) / num_draws == pytest.approx(float(expected_rate), abs=0.015)
