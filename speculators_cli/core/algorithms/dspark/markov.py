r"""Markov heads: what the token before adds to the logits of a token, at low rank.

With the embedding :math:`e_s` of the token before prediction s, and :math:`h_s`, which the LM head
reads, the bias is :math:`W_2 r_s` with (arXiv 2607.05147)

- vanilla: :math:`r_s = e_s`
- gated: :math:`r_s = \sigma(G [h_s; e_s] + b) \odot e_s`
- rnn: a state :math:`z`, from 0; :math:`g, c, o = J [z_{s-1}; e_s; h_s] + b`,
  :math:`z_s = \sigma(g) z_{s-1} + (1 - \sigma(g)) \tanh(c)`, :math:`r_s = \tanh(o)`
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.models.layers import Linear


class MarkovHead(nn.Module):
    """The vanilla head; the others change what its second matrix reads."""

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

    def step(
        self,
        embedded: Tensor,  # [..., rank]: the token before this prediction
        normed: Tensor,  # [..., hidden]
        state: Tensor | None,  # [..., rank]: of the prediction before; None for the first
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the second matrix reads for one prediction, [..., rank], and the state."""
        del normed, state
        return embedded, None

    def steps(
        self,
        embedded: Tensor,  # [..., predictions, rank]
        normed: Tensor,  # [..., predictions, hidden]
    ) -> Tensor:
        """Return what the second matrix reads for all predictions; [..., predictions, rank]."""
        return self.step(embedded, normed, None)[0]

    def forward(
        self,
        read: Tensor,  # [..., rank]
    ) -> Tensor:
        """Return what is added to the logits; [..., draft_vocab]."""
        bias: Tensor = self.markov_w2(read)
        return bias


class GatedMarkovHead(MarkovHead):
    """A gate on each dimension of the embedding."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.gate_proj = nn.Linear(config.hidden_size + rank, rank)

    def step(
        self, embedded: Tensor, normed: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gated embedding; there is no state."""
        del state
        gate = project(self.gate_proj, torch.cat((normed, embedded), dim=-1)).sigmoid()
        return gate * embedded, None


class RecurrentMarkovHead(MarkovHead):
    """A state that remembers the tokens of the block."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        rank = config.markov_rank
        self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def step(
        self, embedded: Tensor, normed: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and the next state."""
        state = torch.zeros_like(embedded) if state is None else state
        joint = project(self.joint_proj, torch.cat((state, embedded, normed), dim=-1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return output.tanh(), gate * state + (1.0 - gate) * candidate.tanh()

    def steps(self, embedded: Tensor, normed: Tensor) -> Tensor:
        """Return the outputs of all predictions, from left to right."""
        outputs, state = [], None
        for own, hidden in zip(embedded.unbind(-2), normed.unbind(-2), strict=True):
            output, state = self.step(own, hidden, state)
            outputs.append(output)
        return torch.stack(outputs, dim=-2)


MARKOV_HEADS: dict[str, type[MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RecurrentMarkovHead,
}


def project(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer with a bias in the dtype of its input; [..., out_features]."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
