"""HookedModel: a model of transformers that returns logits and aux hidden states of a batch."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speculators_cli.core.engines.verifier_layers import VerifierLayers, find_layers


@dataclass(frozen=True)
class RowOutput:
    """Output of one forward pass."""

    logits: Tensor  # [rows, new, vocab]; of a sequence that begins: [1, 1, vocab], of its last
    aux: Tensor  # [rows, new, aux*hidden]


class HookedModel:
    """A causal language model of transformers, with hooks for the states of its aux layers.

    Args:
        model: Of transformers.
        layer_ids: Aux layers, ascending; id k is the output after k layers.
        name: Of the verifier, for error messages.

    Raises:
        SettingsError: The model has another layout than decoder layers and a final norm.
    """

    def __init__(self, model: Any, layer_ids: Sequence[int], *, name: str) -> None:
        self.model = model
        self.parts: VerifierLayers = find_layers(model, name)
        self._layer_ids = tuple(layer_ids)
        self._columns = tuple(range(len(layer_ids)))  # that are returned
        self._aux: list[Tensor | None] = [None] * len(layer_ids)
        self.parts.hook(layer_ids, self._keep, lambda _: None)
        names = inspect.signature(model.forward).parameters
        self._takes_num_logits = "logits_to_keep" in names

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.parts.device

    @torch.inference_mode()
    def run(self, tokens: Tensor, positions: Tensor | None, num_logits: int) -> RowOutput:
        """Run one forward pass, with logits of the last tokens."""
        given: dict[str, Any] = {} if positions is None else {"position_ids": positions}
        if self._takes_num_logits:
            given["logits_to_keep"] = num_logits
        out = self.model(input_ids=tokens, use_cache=False, **given)
        aux = [states for states in (self._aux[i] for i in self._columns) if states is not None]
        assert len(aux) == len(self._columns), "every hook has run"
        states = torch.cat([x.to(self.device) for x in aux], dim=-1)
        return RowOutput(out.logits[:, -num_logits:], states)

    def select_layers(self, layer_ids: Sequence[int]) -> None:
        """Return aux hidden states of only these layers from now on."""
        self._columns = tuple(self._layer_ids.index(layer_id) for layer_id in layer_ids)

    def _keep(self, column: int, states: Tensor) -> None:
        self._aux[column] = states
