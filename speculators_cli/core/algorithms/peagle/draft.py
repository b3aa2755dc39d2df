"""The P-EAGLE draft (arXiv 2602.01469), as vLLM runs it."""

import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.algorithms.peagle.config import PEagleConfig


class PEagleDraft(Eagle3Draft):
    """An EAGLE-3 draft whose later steps read a mask, so that one pass computes all of them.

    Args:
        config: Of the draft.
        embedding: The verifier's, [vocab, hidden]; frozen, and not a parameter of the draft.
    """

    config: PEagleConfig

    def __init__(self, config: PEagleConfig, embedding: Tensor) -> None:
        super().__init__(config, embedding)
        width = config.num_aux_layers * config.target_hidden_size
        # In place of the verifier's aux hidden states.
        self.mask_hidden = nn.Parameter(torch.zeros(1, 1, width))

    def next_inputs(
        self,
        tokens: Tensor,  # [seq_len], int64
        fed_back: Tensor,  # [seq_len, hidden]
    ) -> tuple[Tensor, Tensor]:
        """The mask token and the mask's hidden states, at every position."""
        masked = self.fuse(self.mask_hidden[0].to(fed_back.dtype))
        return torch.full_like(tokens, self.config.mask_token_id), masked.expand_as(fed_back)

    def embed_mask(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The mask's embedding, [1, hidden], and its aux hidden states, [1, aux*hidden]."""
        token = torch.tensor([self.config.mask_token_id], device=self.embedding.device)
        return self.embed(token, dtype), self.mask_hidden[0].to(dtype)
