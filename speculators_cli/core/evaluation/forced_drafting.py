"""Drafting after every token of given answers, whatever was drafted before.

The verifier's hidden states are computed once. So drafts, or variants of one, are compared on the
very same tokens, and a change of the verifier's answers cannot hide or imitate a difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Drafter, Verified
from speculators_cli.core.engines.row_verifier import RowVerifier
from speculators_cli.core.evaluation.draft_and_verify import Answer

MAX_ANSWERS, MAX_PLACES = 32, 64  # drafted after, of each answer


@dataclass(frozen=True, eq=False)
class Forced:
    """One prompt with its answer, and the verifier's hidden states of its tokens."""

    num_prompt_tokens: int
    tokens: Tensor  # [seq_len], int64
    aux: Tensor  # [seq_len, aux*hidden], of all layers that are hooked


def force_answers(
    rows: RowVerifier, pairs: Sequence[tuple[Sequence[int], Answer]], num_draft_tokens: int
) -> list[Forced]:
    """Compute the hidden states of prompts with their answers, those long enough to draft.

    Args:
        rows: The verifier; it returns the states of all layers that may be needed.
        pairs: Token ids of prompts, and the answers to them.
        num_draft_tokens: Tokens of a chain, which must be compared whole.
    """
    chosen = [pair for pair in pairs if len(pair[1].tokens) > num_draft_tokens + 1][:MAX_ANSWERS]
    forced = []
    for ids, answer in chosen:
        stop = len(ids) + MAX_PLACES + num_draft_tokens
        tokens = [*ids, *answer.tokens][:stop]
        rows.start(1, len(tokens))
        aux = rows.read(0, tokens).aux[0]
        forced.append(Forced(len(ids), torch.tensor(tokens, device=aux.device), aux))
    return forced


def draft_everywhere(
    drafter: Drafter, forced: Sequence[Forced], select: Callable[[Tensor], Tensor]
) -> list[Answer]:
    """Draft a chain after every token of each answer, and count the tokens that are the answer's.

    Args:
        drafter: The draft.
        forced: Prompts with their answers.
        select: Returns the hidden states that the draft reads, of those that are hooked.

    Returns:
        The counts of each answer; its tokens are left out.
    """
    length = drafter.num_draft_tokens
    longest = max(len(one.tokens) for one in forced)
    drafter.start(len(forced), longest + length)
    counts: list[list[int]] = [[] for _ in forced]
    for row, one in enumerate(forced):
        start = one.num_prompt_tokens
        following, aux = one.tokens[None, 1 : start + 1], select(one.aux[None, :start])
        drafter.read(Verified(following, aux, [0], [start], row=row))
    for step in range(MAX_PLACES):
        # The last known token of each row; a row that has ended repeats its last place.
        ends = [min(one.num_prompt_tokens + step, len(one.tokens) - length - 1) for one in forced]
        if step > 0:
            tokens = torch.stack([one.tokens[[end]] for one, end in zip(forced, ends, strict=True)])
            aux = torch.stack([one.aux[[end - 1]] for one, end in zip(forced, ends, strict=True)])
            firsts = [end - 1 for end in ends]
            drafter.read(Verified(tokens, select(aux), firsts, [1] * len(forced)))
        chains = drafter.propose().tolist()
        is_open = False
        for one, end, chain, found in zip(forced, ends, chains, counts, strict=True):
            if one.num_prompt_tokens + step == end:
                is_open = True
                found.append(_count_equal(chain, one.tokens[end + 1 : end + 1 + length].tolist()))
        if not is_open:
            break
    return [
        Answer(one.num_prompt_tokens, (), (), tuple(found), (None,) * len(found))
        for one, found in zip(forced, counts, strict=True)
    ]


def _count_equal(drafted: Sequence[int], own: Sequence[int]) -> int:
    count = 0
    for a, b in zip(drafted, own, strict=True):
        if a != b:
            break
        count += 1
    return count
