"""CapturedLayers: what vLLM's files of hidden states hold, and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from speculators_cli.core.reading import open_safetensors


class OtherTokensError(Exception):
    """A file has hidden states of other tokens than were asked for."""


@dataclass(frozen=True)
class CapturedLayers:
    """The layers whose states vLLM writes.

    Args:
        layer_ids: Aux layers; id k is the output after k layers.
        num_layers: Layers of the verifier.
    """

    layer_ids: Sequence[int]
    num_layers: int

    @property
    def ids(self) -> list[int]:
        """Layers in a file, ascending; the last one is before the final norm."""
        return sorted({*self.layer_ids, self.num_layers})

    @property
    def aux_columns(self) -> list[int]:
        """Where in a file the aux layers are, ascending."""
        return [self.ids.index(k) for k in sorted(set(self.layer_ids))]

    def read(self, file: Path, input_ids: Sequence[int]) -> Tensor:
        """Read and remove the file of a document; [tokens, ids, hidden].

        Raises:
            UnreadableError: The file is damaged.
            OtherTokensError: It is of other tokens.
        """
        with open_safetensors(file) as content:
            states = content.get_tensor("hidden_states").clone()
            token_ids = content.get_tensor("token_ids").tolist()
        file.unlink()
        if token_ids != list(input_ids) or states.shape[:2] != (len(input_ids), len(self.ids)):
            raise OtherTokensError(
                f"vLLM has computed hidden states of other tokens: {len(token_ids)} tokens, "
                f"states {list(states.shape)}, of {len(input_ids)} tokens"
            )
        return states
