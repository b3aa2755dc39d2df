"""The heads of a DSpark draft: a bias by the token before, and a confidence."""

import torch
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.draft import DFlashDraft
from speculators_cli.core.algorithms.dflash.drafter import BlockDrafter
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.markov import MARKOV_HEADS, project


class ConfidenceHead(nn.Module):
    """Predicts the probability that a draft token is accepted."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size + config.markov_rank, 1)

    def forward(
        self,
        normed: Tensor,  # [..., hidden]
        embedded: Tensor,  # [..., rank]
    ) -> Tensor:
        """Return the logit of the probability; [...], float32."""
        return project(self.proj, torch.cat((normed, embedded), dim=-1)).squeeze(-1).float()


class DSparkDraft(DFlashDraft):
    """A DSpark draft: a DFlash backbone with a Markov head, and perhaps a confidence head."""

    config: DSparkConfig

    def __init__(self, config: DSparkConfig, embedding: Tensor, head: Tensor | None) -> None:
        super().__init__(config, embedding, head)
        self.markov_head = MARKOV_HEADS[config.markov_head_type](config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None


class DSparkDrafter(BlockDrafter):
    """Fills in a block in one pass, then chooses its tokens from left to right."""

    draft: DSparkDraft

    def compute_logits(self) -> Tensor:
        """Logits of the next tokens of each row; [rows, draft tokens, draft_vocab]."""
        markov, before, state = self.draft.markov_head, self.anchors, None
        logits = []
        for normed in self.fill_in().unbind(1):
            read, state = markov.step(markov.embed(before, normed.dtype), normed, state)
            logits.append(self.draft.logits(normed) + markov(read))
            before = self.kept_ids[logits[-1].argmax(-1)]
        return torch.stack(logits, dim=1)
