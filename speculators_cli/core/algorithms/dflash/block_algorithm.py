"""BlockAlgorithm: what algorithms that draft whole blocks have in common."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.draft_config_reader import find_assumed
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.mask_algorithm import MaskAlgorithm
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.kernels.anchor_spans import can_attend
from speculators_cli.settings.algorithms.dflash import BlockSettings

NUM_PROBE_TOKENS = 32

BlockConfigT = TypeVar("BlockConfigT", bound=DFlashConfig)
BlockSettingsT = TypeVar("BlockSettingsT", bound=BlockSettings)


class BlockAlgorithm(MaskAlgorithm[BlockConfigT, BlockSettingsT]):
    """An algorithm whose drafts fill in a block of mask tokens."""

    alignment = NEXT_TOKEN
    num_aux_layers = 5
    multiplies_in_float8 = True

    def find_assumed(self, content: Mapping[str, Any], config: BlockConfigT) -> Mapping[str, Any]:
        """Values missing from config.json that no tensor determines, with their defaults."""
        return find_assumed(content, config)

    def count_aux_layers(self, config: BlockConfigT, tensors: Mapping[str, Tensor]) -> int | None:
        """Verifier layers that `fc` reads; None if its shape does not fit the config."""
        fusion, size = tensors.get("fc.weight"), config.target_hidden_size
        if fusion is None or fusion.dim() != 2 or fusion.shape[1] % size:
            return None
        return fusion.shape[1] // size

    def checkpoint_name(self, tensor: str) -> str:
        """The name in a checkpoint."""
        return tensor.removeprefix("model.")

    def find_unread(self, config: BlockConfigT) -> frozenset[str]:
        """The verifier's LM head, saved with a draft of the full vocabulary."""
        return frozenset() if config.owns_head else frozenset({"lm_head.weight"})

    def check_samples(self, config: BlockConfigT, samples: SampleSource) -> None:
        """Refuse answers shorter than a block, and samples that have the mask token.

        Raises:
            DataError: The last tokens of a block would never be trained, or a known token would
                look as an unknown one.
        """
        longest = max((header.num_supervised_tokens for header in samples.headers), default=0)
        if longest < config.num_draft_tokens:
            raise DataError(
                f"A block proposes {config.num_draft_tokens} tokens, but no sample has more than "
                f"{longest} supervised ones: the last tokens of a block would never be trained",
                hint=f"Pass `--block-size {longest + config.first_slot}` or less, or other samples",
            )
        super().check_samples(config, samples)

    def find_unsupported(self, config: BlockConfigT, settings: BlockSettingsT) -> str | None:
        """Return the block that is too large for a tile of the attention."""
        del settings
        size, heads, kv_heads = config.block_size, config.num_heads, config.num_kv_heads
        if can_attend(size, heads, kv_heads):
            return None
        return f"blocks of {size} tokens with {heads // kv_heads} query heads per key head"

    def find_length_risk(self, config: BlockConfigT, num_draft_tokens: int) -> str | None:
        """With fewer or more masks, the tokens that are left change too."""
        if num_draft_tokens == config.num_draft_tokens or config.causal_block:
            return None
        return (
            f"The draft was trained to propose {config.num_draft_tokens} tokens, not "
            f"{num_draft_tokens}: all tokens of a block attend to each other, so the first ones "
            "change as well, and fewer may be accepted"
        )

    def complete(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """The shape of a fresh draft; without the verifier's files, its last token is the mask.

        Raises:
            SettingsError: Its layers are of another kind than engines compute.
        """
        if shape["arch"] != "qwen3":
            raise SettingsError(
                f"`--draft-arch` is `{shape['arch']}`, but {self.title} drafts have `qwen3` layers",
                hint="Pass `--draft-arch qwen3`, or leave it out",
            )
        return self.with_mask(shape)


def draw_probe(config: DFlashConfig) -> Iterator[Verified]:
    """Random tokens and hidden states of two verifier passes, of one row."""
    generator, num_new = torch.Generator().manual_seed(0), NUM_PROBE_TOKENS
    for first in (0, num_new):
        aux = torch.randn(
            1, num_new, config.num_aux_layers * config.target_hidden_size, generator=generator
        )
        tokens = torch.randint(config.vocab_size, (1, num_new), generator=generator)
        yield Verified(tokens, aux, [first], [num_new])
