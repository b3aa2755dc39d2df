"""PEagleDrafter: proposes tokens in one pass over masks, as vLLM drafts with P-EAGLE."""

import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.drafter import Eagle3Drafter
from speculators_cli.core.models.row_memory import RowPositions


class PEagleDrafter(Eagle3Drafter):
    """Drafts for a batch of sequences, in the dtype of the verifier's hidden states.

    The last verified position predicts the first token, the masks after it the others. The next
    verified positions replace the masks' keys and values.
    """

    @torch.inference_mode()
    def propose(self) -> Tensor:
        """Draft after the last verified token of each row; [rows, draft tokens]."""
        return self.kept_ids[self.compute_logits().argmax(-1)]

    def compute_logits(self) -> Tensor:
        """Logits of the next tokens of each row; [rows, draft tokens, draft_vocab]."""
        normed = self.normed[:, None]
        num_masks = self.num_draft_tokens - 1
        if num_masks > 0:
            tokens = torch.zeros(
                len(self.ends), num_masks, dtype=torch.int64, device=self.kept_ids.device
            )
            fed_back = self.hidden[:, None].expand(-1, num_masks, -1)
            tokens, hidden = self.draft.next_inputs(tokens, fed_back)
            positions = RowPositions(tuple(self.ends), num_masks, self.kept_ids.device)
            masked, _ = self._step(tokens, hidden, positions)
            normed = torch.cat((normed, masked), dim=1)
        logits: Tensor = self.draft.lm_head(normed)
        return logits
