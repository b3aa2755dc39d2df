"""DFlash (arXiv 2602.06036), as an entry of the table of algorithms."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.block_algorithm import (
    NUM_PROBE_TOKENS,
    BlockAlgorithm,
    draw_probe,
)
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.config_reader import is_dflash, read_draft_config
from speculators_cli.core.algorithms.dflash.contract import FORMATS
from speculators_cli.core.algorithms.dflash.cost import DFlashCost
from speculators_cli.core.algorithms.dflash.draft import DFlashDraft
from speculators_cli.core.algorithms.dflash.drafter import BlockDrafter
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.losses import LOSSES
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.algorithms.dflash import DFlashSettings

SHAPE = ("block_size", "mask_token_id", "draft_window", "causal_block")


class DFlash(BlockAlgorithm[DFlashConfig, DFlashSettings]):
    """The draft fills in all tokens of a block at once, reading hidden states in every layer."""

    name = "dflash"
    settings_class = DFlashSettings
    cost = DFlashCost()
    title = "DFlash"
    card_settings: ClassVar = {
        "block_size": "tokens per block",
        "num_anchors": "blocks per packed sequence",
        "block_loss": "loss",
        "block_loss_weights": "loss weights",
    }
    export_formats = FORMATS

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of a DFlash draft, speculators or plain."""
        return is_dflash(content)

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> DFlashConfig:
        """The config of a trained draft, from any tool."""
        return read_draft_config(content, overrides, name=name)

    def build_config(self, settings: DFlashSettings, shape: Mapping[str, Any]) -> DFlashConfig:
        """The config of a fresh draft; without the verifier's files, its last token is the mask.

        Raises:
            SettingsError: Its layers are of another kind than engines compute.
        """
        return DFlashConfig(
            **self.complete(shape),
            block_size=settings.block_size,
            draft_window=settings.draft_window,
            causal_block=settings.causal_block,
        )

    def fixed_settings(self, config: DFlashConfig) -> dict[str, Any]:
        """Settings of the section that a trained draft fixes."""
        return {name: getattr(config, name) for name in SHAPE}

    def build(
        self,
        config: DFlashConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: DFlashSettings,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> DFlashTraining:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""
        is_fixed = settings.block_loss_weights == "decay"
        with verifier.head.device:
            draft = DFlashTraining(
                config,
                verifier,
                vocab_map,
                loss=LOSSES[settings.block_loss],
                weights=LossWeights(
                    gamma=settings.block_loss_gamma if is_fixed else None,
                    alpha=None if is_fixed else settings.dpace_alpha,
                ),
                num_anchors=settings.num_anchors,
                use_fast_kernels=use_fast_kernels,
            )
        draft.initialise(seed)
        return draft

    def build_drafter(
        self,
        config: DFlashConfig,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> BlockDrafter:
        """A trained draft that fills in a block of this many tokens after the anchor."""
        sized = config.with_num_draft_tokens(num_draft_tokens)
        draft = load_draft(sized, weights, embedding, head)
        return BlockDrafter(draft, kept_ids.to(embedding.device))

    @torch.inference_mode()
    def compute_probe_logits(
        self, config: DFlashConfig, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits of two blocks over random tokens and hidden states; [rows, draft_vocab]."""
        # Of the verifier's head, which is not at hand, a draft without its own needs any.
        draft = load_draft(config, weights, embedding, embedding)
        drafter = BlockDrafter(draft, torch.arange(config.draft_vocab_size))
        drafter.start(1, 2 * NUM_PROBE_TOKENS)
        logits = []
        for verified in draw_probe(config):
            drafter.read(verified)
            logits.append(drafter.compute_logits()[0])
        return torch.cat(logits)


def load_draft(
    config: DFlashConfig,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor | None,
) -> DFlashDraft:
    """A trained draft on the device of the verifier's embedding, in float32."""
    with embedding.device:
        draft = DFlashDraft(config, embedding, head)
    draft.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name in config.tensor_shapes()}
    )
    return draft.eval()
