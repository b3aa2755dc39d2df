"""BlockDrafter: fills in a block after the verified tokens, as vLLM drafts with DFlash."""

from collections.abc import Sequence

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.attention import BlockSpans
from speculators_cli.core.algorithms.dflash.draft import Context, DFlashDraft
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.models.row_memory import RowPositions


class BlockDrafter:
    """Drafts for a batch of sequences, in the dtype of the verifier's hidden states.

    The context of a row grows with its verified positions; the anchor is its newest token, whose
    own hidden states the verifier has not computed. Nothing of a block is kept.

    Args:
        draft: In `eval()`; its block is the anchor and the tokens to draft. Its weights are cast.
        kept_ids: [draft_vocab], int64: the verifier ids of draft ids.
    """

    def __init__(self, draft: DFlashDraft, kept_ids: Tensor) -> None:
        self.draft = draft
        self.kept_ids = kept_ids
        self.num_draft_tokens = draft.config.num_draft_tokens
        self.start(0, 0)

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch."""
        self.num_positions = num_positions
        self.context: Context = ()  # slot j of a row holds position j; empty before the first read
        self.ends = [0] * num_rows  # of each row: number of verified positions
        # Of each row: its newest token.
        self.anchors = torch.zeros(num_rows, dtype=torch.int64, device=self.kept_ids.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""
        kept = torch.tensor(rows, dtype=torch.int64, device=self.anchors.device)
        self.context = [(keys[kept], values[kept]) for keys, values in self.context]
        self.ends = [self.ends[row] for row in rows]
        self.anchors = self.anchors[kept]

    @torch.inference_mode()
    def read(self, verified: Verified) -> None:
        """Take in newly verified positions."""
        self._cast(verified.aux.dtype)
        tokens, device = verified.tokens, self.anchors.device
        rows = range(len(self.ends)) if verified.row is None else [verified.row]
        ids = RowPositions(tuple(verified.firsts), tokens.shape[1], device, verified.row).ids
        self._store(
            self.draft.read_context(verified.aux.flatten(0, 1), ids.flatten()),
            torch.tensor(rows, device=device)[:, None],
            ids,
        )
        for place, row in enumerate(rows):
            num_new = verified.counts[place]
            self.ends[row] = verified.firsts[place] + num_new
            self.anchors[row] = tokens[place, num_new - 1]

    @torch.inference_mode()
    def propose(self) -> Tensor:
        """Draft a block after the last verified token of each row; [rows, draft tokens]."""
        return self.kept_ids[self.compute_logits().argmax(-1)]

    def compute_logits(self) -> Tensor:
        """Logits of the next tokens of each row; [rows, draft tokens, draft_vocab]."""
        return self.draft.logits(self.fill_in())

    def fill_in(self) -> Tensor:
        """What the LM head reads for each draft token; [rows, draft tokens, hidden]."""
        num_rows, device = len(self.ends), self.anchors.device
        bounds = tuple(row * self.num_positions for row in range(num_rows + 1))
        last = tuple(first + end - 1 for first, end in zip(bounds[:-1], self.ends, strict=True))
        normed = self.draft.fill_in(
            self.anchors,
            torch.tensor(self.ends, device=device),
            [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in self.context],
            # Rows are documents, of which only the verified positions are read.
            BlockSpans(tuple(range(num_rows + 1)), bounds, last),
            torch.tensor(last, device=device),
        )
        return normed[:, self.draft.config.first_slot :]

    def _store(
        self,
        new: Context,  # [rows*new, kv_heads, head_dim] of each layer
        rows: Tensor,  # [rows, 1], int64
        ids: Tensor,  # [rows, new], int64: positions
    ) -> None:
        """Write keys and values of new positions, over those that were not verified."""
        if not self.context:
            shape = (len(self.ends), self.num_positions)
            self.context = [
                (key.new_zeros(*shape, *key.shape[1:]), value.new_zeros(*shape, *value.shape[1:]))
                for key, value in new
            ]
        for (keys, values), (key, value) in zip(self.context, new, strict=True):
            keys[rows, ids] = key.unflatten(0, ids.shape)
            values[rows, ids] = value.unflatten(0, ids.shape)

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast weights once; layers would cast them in every step."""
        for parameter in self.draft.parameters():
            parameter.data = parameter.data.to(dtype)
