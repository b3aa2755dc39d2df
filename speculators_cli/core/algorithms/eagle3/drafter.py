"""Eagle3Drafter: proposes a greedy chain of tokens with KV caches, as vLLM drafts with EAGLE-3."""

import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.models.attention import CausalMemory


class Eagle3Drafter:
    """Drafts for one sequence at a time.

    Position p reads the verifier's aux hidden states of token p and the embedding of token p+1, and
    predicts token p+2. Further tokens of a chain come from the draft's own hidden states and
    tokens; their keys and values are dropped once the chain is complete.

    Args:
        draft: In `eval()`.
        kept_ids: [draft_vocab], int64: the verifier ids of draft ids.
        num_draft_tokens: Tokens of a chain.
    """

    def __init__(self, draft: Eagle3Draft, kept_ids: Tensor, num_draft_tokens: int) -> None:
        self.draft = draft
        self.kept_ids = kept_ids
        self.num_draft_tokens = num_draft_tokens
        self.start()

    def start(self) -> None:
        """Begin a new sequence."""
        self.memories = [CausalMemory(window) for window in self.draft.config.windows]
        self.num_positions = 0

    @torch.inference_mode()
    def propose(
        self,
        tokens: Tensor,  # [new], int64: the verified tokens after those positions
        aux_hidden_states: tuple[Tensor, ...],  # [new, hidden] each, of positions not yet seen
    ) -> list[int]:
        """Process newly verified positions, then draft a chain after the last of `tokens`."""
        fused = self.draft.fuse(torch.cat(aux_hidden_states, dim=-1))
        normed, hidden = self._step(tokens, fused)
        self.num_positions += len(tokens)
        chain = [self._choose(normed)]
        for num_drafted in range(self.num_draft_tokens - 1):
            last = tokens.new_tensor(chain[-1:])
            normed, hidden = self._step(last, hidden[-1:], num_drafted)
            chain.append(self._choose(normed))
        for memory in self.memories:
            memory.cut(self.num_positions)
        return chain

    def _step(self, tokens: Tensor, hidden: Tensor, num_drafted: int = 0) -> tuple[Tensor, Tensor]:
        # Training counts positions from 1.
        first = self.num_positions + num_drafted + 1
        positions = torch.arange(first, first + len(tokens), device=tokens.device)
        return self.draft.step(tokens, hidden, positions, self.memories)

    def _choose(self, normed: Tensor) -> int:
        """The best token after the last position, as a verifier id."""
        best = self.draft.lm_head(normed[-1:]).argmax(-1)
        return int(self.kept_ids[best])
