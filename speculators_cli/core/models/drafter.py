"""Drafter: proposes a greedy chain of tokens with KV caches, as vLLM drafts with EAGLE-3."""

import torch
from torch import Tensor

from speculators_cli.core.models.attention import AttentionMemory, CausalMemory
from speculators_cli.core.models.eagle3 import Eagle3Draft


class Drafter:
    """Drafts for one sequence after the other.

    Position p reads the verifier's aux hidden states of token p and the embedding of token p+1, and
    predicts token p+2. Further tokens of a chain come from the draft's own hidden states and
    tokens; their keys and values are forgotten once the chain is complete.

    Args:
        draft: In `eval()`.
        num_draft_tokens: Tokens of a chain.
    """

    def __init__(self, draft: Eagle3Draft, num_draft_tokens: int) -> None:
        self.draft = draft
        self.num_draft_tokens = num_draft_tokens
        self.start()

    def start(self) -> None:
        """Begin a new sequence."""
        self.memories = [CausalMemory() for _ in self.draft.layers]
        self.num_positions = 0

    @torch.inference_mode()
    def propose(
        self,
        tokens: Tensor,  # [new], int64: the verified tokens after those positions
        aux_hidden_states: tuple[Tensor, ...],  # [new, hidden] each, of positions not yet seen
    ) -> list[int]:
        """Take in newly verified positions, then draft a chain after the last of `tokens`."""
        hidden = self.draft.fuse(torch.cat(aux_hidden_states, dim=-1))
        hidden = self._decode(tokens, hidden)
        self.num_positions += len(tokens)
        chain: list[int] = []
        hidden = hidden[-1:]
        for step in range(self.num_draft_tokens):
            if step > 0:
                hidden = self._decode(tokens.new_tensor(chain[-1:]), hidden, step - 1)
            normed = self.draft.norm(hidden)
            best = self.draft.lm_head(normed).argmax(-1)
            chain.append(int(self.draft.kept_ids[best]))
            hidden = normed if self.draft.config.norm_output else hidden
        for memory in self.memories:
            memory.cut(self.num_positions)
        return chain

    def _decode(self, tokens: Tensor, hidden: Tensor, num_drafted: int = 0) -> Tensor:
        # Training counts positions from 1.
        first = self.num_positions + num_drafted + 1
        positions = torch.arange(first, first + len(tokens), device=tokens.device)
        embedded = self.draft.embed(tokens, hidden.dtype)
        memories: list[AttentionMemory] = list(self.memories)
        return self.draft.decode(embedded, hidden, positions, memories)
