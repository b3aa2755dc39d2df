"""Eagle3Drafter: proposes a greedy chain of tokens with KV caches, as vLLM drafts with EAGLE-3."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.models.row_memory import RowMemory, RowPositions


class Eagle3Drafter:
    """Drafts for a batch of sequences, in the dtype of the verifier's hidden states.

    Position p reads the verifier's aux hidden states of token p and the embedding of token p+1, and
    predicts token p+2. Further tokens of a chain come from the draft's own hidden states and
    tokens; the next verified positions replace their keys and values.

    Args:
        draft: In `eval()`; its weights are cast.
        kept_ids: [draft_vocab], int64: the verifier ids of draft ids.
        num_draft_tokens: Tokens of a chain.
    """

    def __init__(self, draft: Eagle3Draft, kept_ids: Tensor, num_draft_tokens: int) -> None:
        self.draft = draft
        self.kept_ids = kept_ids
        self.num_draft_tokens = num_draft_tokens
        self.start(0, 0)

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch."""
        self.memories = [
            RowMemory(num_rows, num_positions, window) for window in self.draft.config.windows
        ]
        self.ends = [0] * num_rows  # of each row: number of verified positions
        size, device = self.draft.config.hidden_size, self.kept_ids.device
        # Of the last verified position of each row: input of the LM head, and of the next step.
        self.normed, self.hidden = (torch.zeros(num_rows, size, device=device) for _ in range(2))

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""
        for memory in self.memories:
            memory.keep(rows)
        self.ends = [self.ends[row] for row in rows]
        kept = torch.tensor(rows, dtype=torch.int64, device=self.normed.device)
        self.normed, self.hidden = self.normed[kept], self.hidden[kept]

    @torch.inference_mode()
    def read(self, verified: Verified) -> None:
        """Take in newly verified positions."""
        dtype = verified.aux.dtype
        if self.hidden.dtype != dtype:
            self._cast(dtype)
        tokens, row = verified.tokens, verified.row
        positions = RowPositions(
            tuple(verified.firsts), tokens.shape[1], self.normed.device, verified.row
        )
        normed, hidden = self._step(tokens, self.draft.fuse(verified.aux), positions)
        counts = torch.tensor(verified.counts, device=normed.device)
        last = (torch.arange(len(counts), device=normed.device), counts - 1)
        ends = [a + b for a, b in zip(verified.firsts, verified.counts, strict=True)]
        if row is None:
            self.ends, self.normed, self.hidden = ends, normed[last], hidden[last]
        else:
            self.ends[row], self.normed[row], self.hidden[row] = ends[0], normed[last], hidden[last]

    @torch.inference_mode()
    def propose(self) -> Tensor:
        """Draft a chain after the last verified token of each row; [rows, draft tokens]."""
        normed, hidden = self.normed, self.hidden
        chain = [self._choose(normed)]
        for num_drafted in range(self.num_draft_tokens - 1):
            firsts = tuple(end + num_drafted for end in self.ends)
            positions = RowPositions(firsts, 1, normed.device)
            steps = self._step(chain[-1][:, None], hidden[:, None], positions)
            normed, hidden = (x[:, 0] for x in steps)
            chain.append(self._choose(normed))
        return torch.stack(chain, dim=1)

    def _step(
        self, tokens: Tensor, hidden: Tensor, positions: RowPositions
    ) -> tuple[Tensor, Tensor]:
        """Run the draft over `[rows, new]`; the input of the LM head, and of the next step."""
        # Training counts positions from 1.
        flat = self.draft.step(
            tokens.flatten(),
            hidden.flatten(0, 1),
            positions.ids.flatten() + 1,
            [memory.at(positions) for memory in self.memories],
        )
        normed, fed_back = (x.unflatten(0, tokens.shape) for x in flat)
        return normed, fed_back

    def _choose(self, normed: Tensor) -> Tensor:
        """The best token of each row, as a verifier id; [rows]."""
        return self.kept_ids[self.draft.lm_head(normed).argmax(-1)]

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast weights once; layers would cast them in every step."""
        for parameter in self.draft.parameters():
            parameter.data = parameter.data.to(dtype)
        self.normed, self.hidden = self.normed.to(dtype), self.hidden.to(dtype)
