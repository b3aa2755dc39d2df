"""Draft and verify as in a serving engine, with counts of accepted tokens.

The draft proposes a chain; one verifier pass checks it; the longest prefix equal to the verifier's
own choices is accepted, and the verifier adds one bonus token. Greedy, one prompt at a time. Counts
follow vLLM: all accepted tokens of a pass count, even beyond the end of the answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.models.verifier_model import VerifierModel
from speculators_cli.core.progress import Progress


@dataclass(frozen=True)
class Answer:
    """One answer, with its accepted tokens."""

    tokens: tuple[int, ...]
    is_accepted: tuple[bool, ...]  # of each token: accepted draft token, or the verifier's own
    num_accepted: tuple[int, ...]  # draft tokens accepted per pass


@dataclass(frozen=True)
class EvaluationReport:
    """Counts over all prompts."""

    num_draft_tokens: int  # per chain
    num_passes: int  # verifier passes that checked a chain
    num_accepted: tuple[int, ...]  # passes that accepted draft token k and all before it
    answers: tuple[Answer, ...]
    num_different: int  # answers that differ from the verifier's own
    duration_seconds: float

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Fraction of passes that accepted token k."""
        return tuple(count / max(self.num_passes, 1) for count in self.num_accepted)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verifier pass, including the bonus token."""
        return 1.0 + sum(self.num_accepted) / max(self.num_passes, 1)

    @property
    def is_lossless(self) -> bool:
        """Whether every answer equals the verifier's own, token by token."""
        return self.num_different == 0


def evaluate(
    verifier: VerifierModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    progress: Progress,
) -> EvaluationReport:
    """Draft and verify answers to prompts, and compare each with the verifier's own."""
    started_at = time.perf_counter()
    answers, num_different = [], 0
    with progress.task("Drafting and verifying", len(prompts)) as task:
        for prompt in prompts:
            answer = draft_and_verify(verifier, drafter, prompt, max_new_tokens)
            num_different += answer.tokens != answer_without_draft(verifier, prompt, max_new_tokens)
            answers.append(answer)
            task.advance()
    passes = [count for answer in answers for count in answer.num_accepted]
    return EvaluationReport(
        num_draft_tokens=drafter.num_draft_tokens,
        num_passes=len(passes),
        num_accepted=tuple(
            sum(count > k for count in passes) for k in range(drafter.num_draft_tokens)
        ),
        answers=tuple(answers),
        num_different=num_different,
        duration_seconds=time.perf_counter() - started_at,
    )


def draft_and_verify(
    verifier: VerifierModel, drafter: Drafter, prompt: Sequence[int], max_new_tokens: int
) -> Answer:
    """Generate one greedy answer, up to an end token or `max_new_tokens`."""
    device = verifier.model.device
    cache = verifier.new_cache()
    drafter.start()
    out = verifier.run(torch.tensor(prompt, device=device), cache)
    first = int(out.logits[-1].argmax())
    tokens, is_accepted, num_accepted = [first], [False], []
    following = torch.tensor([*prompt[1:], first], device=device)
    aux = out.aux_hidden_states
    while not _is_finished(tokens, verifier.end_ids, max_new_tokens):
        chain = drafter.propose(following, aux)
        out = verifier.run(torch.tensor([tokens[-1], *chain], device=device), cache)
        own = out.logits.argmax(-1).tolist()
        pairs = zip(chain, own, strict=False)
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_accepted.append(count)
        tokens += own[: count + 1]
        is_accepted += [True] * count + [False]
        if count < len(chain):
            cache.crop(count - len(chain))  # drops the rejected draft tokens
        following = torch.tensor(own[: count + 1], device=device)
        aux = tuple(states[: count + 1] for states in out.aux_hidden_states)
    length = _length(tokens, verifier.end_ids, max_new_tokens)
    return Answer(tuple(tokens[:length]), tuple(is_accepted[:length]), tuple(num_accepted))


def answer_without_draft(
    verifier: VerifierModel, prompt: Sequence[int], max_new_tokens: int
) -> tuple[int, ...]:
    """Generate the verifier's own greedy answer, one token per pass."""
    device = verifier.model.device
    cache = verifier.new_cache()
    out = verifier.run(torch.tensor(prompt, device=device), cache)
    tokens = [int(out.logits[-1].argmax())]
    while not _is_finished(tokens, verifier.end_ids, max_new_tokens):
        out = verifier.run(torch.tensor(tokens[-1:], device=device), cache)
        tokens.append(int(out.logits[-1].argmax()))
    return tuple(tokens)


def _length(tokens: Sequence[int], end_ids: frozenset[int], max_new_tokens: int) -> int:
    """Return the length of an answer, up to and including its first end token."""
    before_end = sum(1 for _ in takewhile(lambda token: token not in end_ids, tokens))
    return min(before_end + 1, len(tokens), max_new_tokens)


def _is_finished(tokens: Sequence[int], end_ids: frozenset[int], max_new_tokens: int) -> bool:
    return len(tokens) >= max_new_tokens or any(token in end_ids for token in tokens)
