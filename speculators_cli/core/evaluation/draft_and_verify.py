"""Draft and verify as in a serving engine, with counts of accepted tokens.

The draft proposes a chain for each row of a batch; one verifier pass checks all chains; of each,
the longest prefix equal to the verifier's own choices is accepted, and the verifier adds one bonus
token. Counts follow vLLM: all accepted tokens of a pass count, even beyond the end of the answer.

At a temperature, the draft still proposes its most probable tokens, vLLM's default. As a
distribution q, such a proposal x has q(x) = 1, so rejection sampling accepts it with probability
p(x), and else draws from p without x. Drawing a token from p, and accepting x if it is that token,
is the same. The random number of each draw belongs to a prompt and a place in its answer, so an
answer does not depend on the draft.

A row whose answer ends goes to the next prompt. Rows are dropped once no prompts are left.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Drafter, Verified
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.row_verifier import RowVerifier
from speculators_cli.core.engines.sampling import choose_tokens, uniforms_of
from speculators_cli.core.progress import Progress


@dataclass(frozen=True)
class Answer:
    """One answer, with its accepted tokens."""

    num_prompt_tokens: int
    tokens: tuple[int, ...]
    is_accepted: tuple[bool, ...]  # of each token: accepted draft token, or the verifier's own
    num_accepted: tuple[int, ...]  # draft tokens accepted per pass
    refused_for: tuple[int | None, ...]  # per pass: the verifier's token in place of a draft token


@dataclass(frozen=True)
class PassTimes:
    """Time of the verifier passes of a batch; reading prompts is left out."""

    num_passes: int  # of the whole batch
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class DraftedAnswers:
    """Answers to all prompts."""

    answers: tuple[Answer, ...]
    times: PassTimes


def draft_and_verify(
    verifier: RowVerifier,
    drafter: Drafter | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    end_ids: frozenset[int],
    batch_size: int,
    progress: Progress,
) -> DraftedAnswers:
    """Generate answers, each up to an end token or the maximum length.

    Args:
        verifier: The verifier.
        drafter: The draft; None: the verifier generates one token per pass.
        prompts: Token ids and seeds.
        sampling: How tokens are chosen; `top_p` must be 1.
        end_ids: The verifier's end tokens.
        batch_size: Maximum number of rows.
        progress: Reports finished answers.
    """
    assert sampling.top_p == 1, "engines restrict the verifier's distribution in other ways"
    batch = _Batch(verifier, drafter, prompts, sampling, end_ids)
    description = "Generating without draft" if drafter is None else "Drafting and verifying"
    with progress.task(description, len(prompts)) as task:
        limit = verifier.limit_rows(batch.num_positions) or batch_size
        batch.start(min(batch_size, len(prompts), limit))
        task.advance(batch.num_finished)
        while batch.rows:
            num_before = batch.num_finished
            batch.step()
            task.advance(batch.num_finished - num_before)
    return DraftedAnswers(tuple(batch.answers[i] for i in range(len(prompts))), batch.clock.times)


@dataclass
class _Row:
    """An answer in progress."""

    index: int  # of the prompt
    prompt: Prompt
    uniforms: Tensor | None  # [tokens], float64: random numbers of the answer
    tokens: list[int] = field(default_factory=list)
    is_accepted: list[bool] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    refused_for: list[int | None] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Position of the last token, which the verifier has not computed yet."""
        return len(self.prompt.ids) + len(self.tokens) - 1

    def add(self, own: Sequence[int], count: int) -> None:
        """Add the tokens of a pass that accepted `count` draft tokens."""
        is_refused = count + 1 < len(own)
        self.num_accepted.append(count)
        self.refused_for.append(own[count] if is_refused else None)
        self.tokens += own[: count + 1]
        self.is_accepted += [True] * count + [False]

    def is_finished(self, end_ids: frozenset[int], max_new_tokens: int) -> bool:
        """Whether the answer is complete."""
        return len(self.tokens) >= max_new_tokens or any(x in end_ids for x in self.tokens)

    def finish(self, end_ids: frozenset[int], max_new_tokens: int) -> Answer:
        """Return the answer, up to and including its first end token."""
        before_end = sum(1 for _ in takewhile(lambda token: token not in end_ids, self.tokens))
        length = min(before_end + 1, len(self.tokens), max_new_tokens)
        return Answer(
            len(self.prompt.ids),
            tuple(self.tokens[:length]),
            tuple(self.is_accepted[:length]),
            tuple(self.num_accepted),
            tuple(self.refused_for),
        )


class _Batch:
    """Rows that are drafted and verified together."""

    def __init__(
        self,
        verifier: RowVerifier,
        drafter: Drafter | None,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        end_ids: frozenset[int],
    ) -> None:
        self.verifier, self.drafter, self.sampling = verifier, drafter, sampling
        self.end_ids = end_ids
        self.waiting = deque(enumerate(prompts))
        self.rows: list[_Row] = []
        self.answers: dict[int, Answer] = {}
        self.clock = _Clock()
        self.num_draft_tokens = 0 if drafter is None else drafter.num_draft_tokens
        # A last pass may begin one token before the end of an answer.
        self.num_spare = self.num_draft_tokens + 1
        longest = max(len(prompt.ids) for prompt in prompts)
        self.num_positions = longest + sampling.max_new_tokens + self.num_spare

    @property
    def num_finished(self) -> int:
        """Complete answers."""
        return len(self.answers)

    def start(self, num_rows: int) -> None:
        """Begin the first rows."""
        self.verifier.start(num_rows, self.num_positions)
        if self.drafter is not None:
            self.drafter.start(num_rows, self.num_positions)
        self._begin(range(num_rows))

    @torch.inference_mode()
    def step(self) -> None:
        """Draft and verify one chain of each row."""
        firsts = [row.first for row in self.rows]
        tokens = torch.tensor([row.tokens[-1:] for row in self.rows], device=self.verifier.device)
        if self.drafter is not None:
            with self.clock.drafting():
                tokens = torch.cat((tokens, self.drafter.propose()), dim=1)
        with self.clock.verifying():
            out = self.verifier.extend(tokens, firsts)
            own = self._choose(self.rows, out.logits)
            # To the CPU once: which tokens are accepted, and the tokens.
            chosen, drafted = own.tolist(), tokens[:, 1:].tolist()
        counts = [_count_equal(a, b) for a, b in zip(drafted, chosen, strict=True)]
        for row, tokens_of_row, count in zip(self.rows, chosen, counts, strict=True):
            row.add(tokens_of_row, count)
        if self.drafter is not None:
            with self.clock.drafting():
                self.drafter.read(Verified(own, out.aux, firsts, [count + 1 for count in counts]))
        self._begin(
            index
            for index, row in enumerate(self.rows)
            if row.is_finished(self.end_ids, self.sampling.max_new_tokens)
        )

    def _begin(self, indices: Iterable[int]) -> None:
        """Give rows that are free to the next prompts; drop them if there are none."""
        dropped = set()
        for index in indices:
            if index < len(self.rows):
                self._finish(self.rows[index])
            row = self._next_row(index)
            if row is None:
                dropped.add(index)
            elif index < len(self.rows):
                self.rows[index] = row
            else:
                self.rows.append(row)
        if dropped:
            kept = [index for index in range(len(self.rows)) if index not in dropped]
            self.rows = [self.rows[index] for index in kept]
            self.verifier.keep(kept)
            if self.drafter is not None:
                self.drafter.keep(kept)

    def _next_row(self, place: int) -> _Row | None:
        """Read the next prompt whose answer does not end with its first token."""
        while self.waiting:
            row = self._read(place, *self.waiting.popleft())
            if not row.is_finished(self.end_ids, self.sampling.max_new_tokens):
                return row
            self._finish(row)
        return None

    @torch.inference_mode()
    def _read(self, place: int, index: int, prompt: Prompt) -> _Row:
        """Compute a prompt, and the first token of its answer."""
        row = _Row(index, prompt, self._draw(prompt))
        out = self.verifier.read(place, prompt.ids)
        first = int(self._choose([row], out.logits)[0, 0])
        row.tokens.append(first)
        row.is_accepted.append(False)
        if self.drafter is not None:
            following = torch.tensor([[*prompt.ids[1:], first]], device=out.aux.device)
            count = len(prompt.ids)
            self.drafter.read(Verified(following, out.aux, [0], [count], row=place))
        return row

    def _finish(self, row: _Row) -> None:
        self.answers[row.index] = row.finish(self.end_ids, self.sampling.max_new_tokens)

    def _draw(self, prompt: Prompt) -> Tensor | None:
        if self.sampling.temperature == 0:
            return None
        return uniforms_of([prompt], self.sampling.max_new_tokens + self.num_spare)[0]

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Choose the verifier's tokens; [rows, new], int64."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        num_new = logits.shape[1]
        drawn = [row.uniforms for row in rows if row.uniforms is not None]
        starts = [len(row.tokens) for row in rows]
        uniforms = torch.cat([x[n : n + num_new] for x, n in zip(drawn, starts, strict=True)])
        flat = choose_tokens(logits.flatten(0, 1), uniforms.to(logits.device), self.sampling)
        chosen: Tensor = flat.unflatten(0, logits.shape[:2])
        return chosen


class _Clock:
    """Sums up the time of drafting and of verifying; waits for the device."""

    def __init__(self) -> None:
        self._draft_seconds = 0.0
        self._verify_seconds = 0.0
        self._num_passes = 0

    @property
    def times(self) -> PassTimes:
        """The sums."""
        return PassTimes(self._num_passes, self._draft_seconds, self._verify_seconds)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Count the time of the block as drafting."""
        started_at = time.perf_counter()
        yield
        wait_for_device()
        self._draft_seconds += time.perf_counter() - started_at

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Count the time of the block as one verifier pass."""
        started_at = time.perf_counter()
        yield
        wait_for_device()
        self._verify_seconds += time.perf_counter() - started_at
        self._num_passes += 1


def wait_for_device() -> None:
    """Wait until a GPU has computed everything; a CPU is never behind."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _count_equal(drafted: Sequence[int], own: Sequence[int]) -> int:
    """Number of leading tokens that are equal."""
    pairs = zip(drafted, own, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
