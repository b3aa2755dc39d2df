"""DSpark (arXiv 2607.05147), as an entry of the table of algorithms."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.block_algorithm import (
    NUM_PROBE_TOKENS,
    BlockAlgorithm,
    draw_probe,
)
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.config_reader import read_draft_config
from speculators_cli.core.algorithms.dspark.contract import FORMATS
from speculators_cli.core.algorithms.dspark.cost import DSparkCost
from speculators_cli.core.algorithms.dspark.heads import DSparkDraft, DSparkDrafter
from speculators_cli.core.algorithms.dspark.training import DSparkTraining, LossParts
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.algorithms.dspark import DSparkSettings


class DSpark(BlockAlgorithm[DSparkConfig, DSparkSettings]):
    """DFlash whose tokens are chosen from left to right, each by the token before it."""

    name = "dspark"
    settings_class = DSparkSettings
    cost = DSparkCost()
    title = "DSpark"
    card_settings: ClassVar = {
        "block_size": "tokens per block",
        "num_anchors": "blocks per packed sequence",
        "markov_rank": "rank of the Markov head",
    }
    export_formats = FORMATS

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of a DSpark draft, in the speculators format."""
        return content.get("speculators_model_type") == self.name

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> DSparkConfig:
        """The config of a trained draft, from any tool."""
        return read_draft_config(content, overrides, name=name)

    def build_config(self, settings: DSparkSettings, shape: Mapping[str, Any]) -> DSparkConfig:
        """The config of a fresh draft; without the verifier's files, its last token is the mask.

        Raises:
            SettingsError: Its layers are of another kind than engines compute.
        """
        return DSparkConfig(
            **self.complete(shape),
            block_size=settings.block_size,
            draft_window=settings.draft_window,
            causal_block=settings.draft_window is not None,
            markov_rank=settings.markov_rank,
            markov_head_type=settings.markov_head_type,
            has_confidence=settings.confidence_head,
        )

    def adopt(self, config: DraftConfig, settings: DSparkSettings) -> DSparkConfig | None:
        """The config of a DSpark draft that starts from a DFlash draft."""
        if type(config) is not DFlashConfig:
            return None
        if config.causal_block != (config.draft_window is not None):
            raise SettingsError(
                "The DFlash draft has blocks of another causality than DSpark: causal with a "
                "window, bidirectional without one",
                hint="Start from another draft",
            )
        shared = {field.name: getattr(config, field.name) for field in fields(config)}
        shared["block_size"] = settings.block_size
        return DSparkConfig(
            **shared,
            markov_rank=settings.markov_rank,
            markov_head_type=settings.markov_head_type,
            has_confidence=settings.confidence_head,
        )

    def fixed_settings(self, config: DSparkConfig) -> dict[str, Any]:
        """Settings of the section that a trained draft fixes."""
        names = (
            "block_size", "mask_token_id", "draft_window", "markov_rank", "markov_head_type",
        )  # fmt: skip
        shape = {name: getattr(config, name) for name in names}
        return shape | {"confidence_head": config.has_confidence}

    def build(
        self,
        config: DSparkConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: DSparkSettings,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> DSparkTraining:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""
        with verifier.head.device:
            draft = DSparkTraining(
                config,
                verifier,
                vocab_map,
                parts=LossParts(settings.ce_weight, settings.l1_weight, settings.confidence_weight),
                weights=LossWeights(gamma=settings.block_loss_gamma),
                num_anchors=settings.num_anchors,
                use_fast_kernels=use_fast_kernels,
            )
        draft.initialise(seed)
        return draft

    def build_drafter(
        self,
        config: DSparkConfig,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> DSparkDrafter:
        """A trained draft that fills in a block of this many tokens after the anchor."""
        sized = config.with_num_draft_tokens(num_draft_tokens)
        draft = load_draft(sized, weights, embedding, head)
        return DSparkDrafter(draft, kept_ids.to(embedding.device))

    @torch.inference_mode()
    def compute_probe_logits(
        self, config: DSparkConfig, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits of a block over random tokens and hidden states; [rows, draft_vocab]."""
        draft = load_draft(config, weights, embedding, embedding)
        drafter = DSparkDrafter(draft, torch.arange(config.draft_vocab_size))
        drafter.start(1, NUM_PROBE_TOKENS)
        verified = next(draw_probe(config))
        drafter.read(verified)
        normed, tokens = drafter.fill_in()[0], verified.tokens[0]
        # Tokens before that do not depend on rounding.
        before = tokens[torch.arange(len(normed)) % len(tokens)]
        embedded = draft.markov_head.embed(before, normed.dtype)
        read = draft.markov_head.steps(embedded, normed)
        logits: Tensor = draft.logits(normed) + draft.markov_head(read)
        if draft.confidence_head is None:
            return logits
        confidence = draft.confidence_head(normed, embedded)
        return torch.cat((logits, confidence[:, None]), dim=-1)


def load_draft(
    config: DSparkConfig,
    weights: Mapping[str, Tensor],
    embedding: Tensor,
    head: Tensor | None,
) -> DSparkDraft:
    """A trained draft on the device of the verifier's embedding, in float32."""
    with embedding.device:
        draft = DSparkDraft(config, embedding, head)
    draft.load_state_dict(dict(weights))
    return draft.eval()
