"""Where the hidden states of a transformers model pass: embedding, decoder layers, final norm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speculators_cli.core.errors import SettingsError

CACHE_SHARE = 0.5  # of the free memory of a GPU, for the keys and values of a batch
# Attention that a mask of its own limits, or that carries state from token to token.
PACKABLE_LAYERS = {"full_attention", "sliding_attention", "attention"}
# Some families have another norm, of their embeddings, beside the final one.
FINAL_NORMS = {"norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f"}


@dataclass(frozen=True)
class VerifierLayers:
    """The parts of a verifier that hidden states are taken from."""

    decoder: Any  # the model without its LM head
    layers: Sequence[nn.Module]
    norm: nn.Module

    @property
    def device(self) -> torch.device:
        """Device of the embedding, which takes the tokens."""
        weight: Tensor = self.decoder.get_input_embeddings().weight
        return weight.device

    @property
    def has_known_attention(self) -> bool:
        """Whether every layer attends to all earlier tokens, or to a sliding window of them."""
        config = self.decoder.config
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        return kinds <= PACKABLE_LAYERS and not getattr(config, "attention_chunk_size", None)

    @property
    def has_window(self) -> bool:
        """Whether a layer has a sliding window."""
        config = self.decoder.config
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            return "sliding_attention" in kinds
        return getattr(config, "sliding_window", None) is not None

    @property
    def has_experts(self) -> bool:
        """Whether layers are mixtures of experts, whose shapes depend on the routing."""
        return any("expert" in type(module).__name__.lower() for module in self.decoder.modules())

    def count_rows_that_fit(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Return how many sequences of this length have room for keys and values on the GPU.

        Independent of what else is in its memory, so that a run has the same batches again.
        """
        config = self.decoder.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)
        width = heads * (head_dim or config.hidden_size // config.num_attention_heads)
        bytes_per_token = 2 * len(self.layers) * width * dtype.itemsize
        memory = torch.cuda.get_device_properties(self.device).total_memory
        free = memory - sum(x.nbytes for x in self.decoder.parameters())
        return int(free * CACHE_SHARE / (bytes_per_token * num_tokens))

    def hook(
        self,
        layer_ids: Sequence[int],
        on_aux: Callable[[int, Tensor], None],
        on_last: Callable[[Tensor], None],
    ) -> None:
        """Call `on_aux(column, states)` with the output after k layers, and `on_last` at the norm.

        Args:
            layer_ids: One column each; id 0 is the input of the first layer, id n the input of the
                final norm.
            on_aux: Receives [1, tokens, hidden].
            on_last: Receives [1, tokens, hidden], before the final norm.
        """

        def after(column: int) -> Callable[..., None]:
            return lambda _, __, output: on_aux(column, _first(output))

        for column, layer_id in enumerate(layer_ids):
            if layer_id == len(self.layers):
                self.norm.register_forward_pre_hook(lambda _, given, c=column: on_aux(c, given[0]))
            elif layer_id == 0:
                self.layers[0].register_forward_pre_hook(
                    lambda _, given, c=column: on_aux(c, given[0])
                )
            else:
                self.layers[layer_id - 1].register_forward_hook(after(column))
        self.norm.register_forward_pre_hook(lambda _, given: on_last(given[0]))


def find_layers(model: Any, name: str) -> VerifierLayers:
    """Find the decoder layers and the final norm of a causal language model.

    Raises:
        SettingsError: The model has no such layout.
    """
    decoder = model.get_decoder()
    # Llama 4's causal language model is its own decoder, by its own account.
    decoder = getattr(decoder, "model", decoder)
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    named = {k: m for k, m in decoder.named_children() if "norm" in type(m).__name__.lower()}
    norms = [m for k, m in named.items() if len(named) == 1 or k in FINAL_NORMS]
    # Gemma 3n passes several states per token from layer to layer.
    has_one_state = not hasattr(getattr(decoder, "config", None), "altup_num_inputs")
    if decoder is model or len(lists) != 1 or len(norms) != 1 or not has_one_state:
        raise SettingsError(
            f"Hidden states of verifier `{name}` (`{type(model).__name__}`) cannot be taken: its "
            "decoder is not one list of layers and one final norm",
            hint="Pass `--engine vllm`",
        )
    return VerifierLayers(decoder, list(lists[0]), norms[0])


def _first(output: Any) -> Tensor:
    """Return the hidden states of a layer's output; some families return a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
