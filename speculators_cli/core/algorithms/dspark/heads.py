"""The heads of a DSpark draft: a bias by the token before, and a confidence."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators_cli.core.algorithms.dflash.draft import DFlashDraft
from speculators_cli.core.algorithms.dflash.drafter import BlockDrafter
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.models.layers import Linear


class MarkovHead(nn.Module):
    """Adds to the logits of a token what the token before it makes of them, at low rank."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = Linear(config.markov_rank, config.draft_vocab_size)

    def embed(
        self,
        tokens: Tensor,  # [...], int64: verifier ids
        dtype: torch.dtype,
    ) -> Tensor:
        """Embed the tokens before; [..., rank]."""
        return F.embedding(tokens, self.markov_w1.weight).to(dtype)

    def forward(
        self,
        embedded: Tensor,  # [..., rank]
    ) -> Tensor:
        """Return what is added to the logits; [..., draft_vocab]."""
        bias: Tensor = self.markov_w2(embedded)
        return bias


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
        x = torch.cat((normed, embedded), dim=-1)
        weight, bias = self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)
        return F.linear(x, weight, bias).squeeze(-1).float()


class DSparkDraft(DFlashDraft):
    """A DSpark draft: a DFlash backbone with a Markov head, and perhaps a confidence head."""

    config: DSparkConfig

    def __init__(self, config: DSparkConfig, embedding: Tensor, head: Tensor | None) -> None:
        super().__init__(config, embedding, head)
        self.markov_head = MarkovHead(config)
        self.confidence_head = ConfidenceHead(config) if config.has_confidence else None


class DSparkDrafter(BlockDrafter):
    """Fills in a block in one pass, then chooses its tokens from left to right."""

    draft: DSparkDraft

    def compute_logits(self) -> Tensor:
        """Logits of the next tokens of each row; [rows, draft tokens, draft_vocab]."""
        markov, before, logits = self.draft.markov_head, self.anchors, []
        for own in super().compute_logits().unbind(1):
            logits.append(own + markov(markov.embed(before, own.dtype)))
            before = self.kept_ids[logits[-1].argmax(-1)]
        return torch.stack(logits, dim=1)
