"""EAGLE-3 (arXiv 2503.01840), as an entry of the table of algorithms."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.eagle3.attention import is_joinable
from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.eagle3.config_reader import (
    has_plain_layers,
    is_eagle3,
    read_draft_config,
    ties_head,
)
from speculators_cli.core.algorithms.eagle3.contract import FORMATS
from speculators_cli.core.algorithms.eagle3.cost import Eagle3Cost
from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.algorithms.eagle3.drafter import Eagle3Drafter
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.layers_reader import find_assumed
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.attention import CausalMemory
from speculators_cli.core.models.losses import LOSSES
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings

NUM_PROBE_TOKENS = 32


class Eagle3(Algorithm[Eagle3Config, Eagle3Settings]):
    """The draft reads aux hidden states, then its own: one token per step."""

    name = "eagle3"
    settings_class = Eagle3Settings
    alignment = NEXT_TOKEN
    cost = Eagle3Cost()
    title = "EAGLE-3"
    card_settings: ClassVar = {
        "ttt_steps": "TTT steps",
        "ttt_step_loss_decay": "loss decay per TTT step",
    }
    export_formats = FORMATS

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of an EAGLE-3 draft, speculators or plain."""
        return is_eagle3(content)

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> Eagle3Config:
        """The config of a trained draft, from any tool."""
        return read_draft_config(content, overrides, name=name)

    def find_assumed(self, content: Mapping[str, Any], config: Eagle3Config) -> Mapping[str, Any]:
        """Values missing from config.json that no tensor determines, with their defaults."""
        return find_assumed(content, config)

    def ties_head(self, content: Mapping[str, Any], *, name: str) -> bool:
        """Whether a config.json ties the LM head to the embedding."""
        return ties_head(content, name)

    def count_aux_layers(self, config: Eagle3Config, tensors: Mapping[str, Tensor]) -> int | None:
        """Verifier layers that `fc` reads; None if its shape does not fit the config."""
        fusion, size = tensors.get("fc.weight"), config.target_hidden_size
        # A draft is never wider than its verifier; if it seems so, a size is wrong.
        if fusion is None or fusion.dim() != 2 or size < config.hidden_size:
            return None
        if fusion.shape[0] != config.hidden_size or fusion.shape[1] % size:
            return None
        return fusion.shape[1] // size

    def checkpoint_name(self, tensor: str) -> str:
        """The name in a checkpoint; plain drafts call the first layer `midlayer`."""
        return tensor.removeprefix("model.").replace("midlayer.", "layers.0.", 1)

    def find_unread(self, config: Eagle3Config) -> frozenset[str]:
        """Norm weights per layer, of upstream's first versions, that only the first layer reads."""
        return frozenset(f"layers.{i}.hidden_norm.weight" for i in range(1, config.num_layers))

    def fit_config(
        self, config: Eagle3Config, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Eagle3Config:
        """The config with the layers that an engine builds, where config.json gives their class."""
        has_qk_norm = any(key.endswith((".q_norm.weight", ".k_norm.weight")) for key in tensors)
        if config.has_qk_norm and not has_qk_norm and has_plain_layers(content):
            return replace(config, arch="llama")
        return config

    def build_config(self, settings: Eagle3Settings, shape: Mapping[str, Any]) -> Eagle3Config:
        """The config of a fresh draft."""
        switches = {name: getattr(settings, name) for name in SWITCHES}
        windows = choose_windows(settings, num_layers=shape["num_layers"])
        return Eagle3Config(**shape, **switches, **windows, ttt_steps=settings.ttt_steps)

    def adapt_config(self, config: Eagle3Config, settings: Eagle3Settings) -> Eagle3Config:
        """The config of a trained draft with other TTT steps and windows."""
        windows = choose_windows(settings, num_layers=config.num_layers)
        return replace(config, ttt_steps=settings.ttt_steps, **windows)

    def fixed_settings(self, config: Eagle3Config) -> dict[str, Any]:
        """Settings of the section that a trained draft fixes."""
        return {name: getattr(config, name) for name in SWITCHES}

    def kept_settings(self, config: Eagle3Config, settings: Eagle3Settings) -> dict[str, Any]:
        """The windows of a trained draft, which a run may change."""
        kept: dict[str, Any] = {"sliding_window": config.sliding_window}
        has_none = "sliding_window" in settings.model_fields_set and settings.sliding_window is None
        if not has_none:
            kept["full_attention_layers"] = config.full_attention_layers or None
        return kept

    def frozen_weights(self, settings: Eagle3Settings) -> frozenset[str]:
        """The LM head, if it is frozen."""
        return frozenset() if settings.train_head else frozenset({"lm_head.weight"})

    def find_unsupported(self, settings: Eagle3Settings) -> str | None:
        """Return the loss or the window without a fused kernel; every other part has one."""
        if not LOSSES[settings.loss].has_fused_kernel:
            return f"loss `{settings.loss}` has no fused kernel"
        window, num_steps = settings.sliding_window, settings.ttt_steps
        if not is_joinable(window, num_steps=num_steps):
            return f"a sliding window of {window} tokens is shorter than {num_steps} TTT steps"
        return None

    def build(
        self,
        config: Eagle3Config,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: Eagle3Settings,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> Eagle3Training:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""
        with verifier.head.device:
            draft = Eagle3Training(
                config,
                verifier,
                vocab_map,
                loss=LOSSES[settings.loss],
                loss_decay=settings.ttt_step_loss_decay,
                train_head=settings.train_head,
                use_fast_kernels=use_fast_kernels,
            )
        draft.initialise(seed)
        return draft

    def build_drafter(
        self,
        config: Eagle3Config,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> Eagle3Drafter:
        """A trained draft that proposes a chain of tokens."""
        del head
        draft = load_draft(config, weights, embedding)
        return Eagle3Drafter(draft, kept_ids.to(embedding.device), num_draft_tokens)

    @torch.inference_mode()
    def compute_probe_logits(
        self, config: Eagle3Config, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits of two steps over random tokens and hidden states; [rows, draft_vocab]."""
        draft = load_draft(config, weights, embedding)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (NUM_PROBE_TOKENS,), generator=generator)
        width = config.num_aux_layers * config.target_hidden_size
        hidden = draft.fuse(torch.randn(NUM_PROBE_TOKENS, width, generator=generator))
        positions = torch.arange(1, NUM_PROBE_TOKENS + 1)
        logits = []
        for step in range(2):
            memories = [CausalMemory(window) for window in config.windows]
            normed, hidden = draft.step(tokens.roll(-step), hidden, positions + step, memories)
            logits.append(draft.lm_head(normed))
        return torch.cat(logits)


def choose_windows(settings: Eagle3Settings, *, num_layers: int) -> dict[str, Any]:
    """The fields of a config that give each layer its window.

    Raises:
        SettingsError: Layers with full attention do not exist, or there is no window.
    """
    window, full = settings.sliding_window, settings.full_attention_layers or ()
    if full and window is None:
        raise SettingsError(
            "`--full-attention-layers` has no effect without `--sliding-window`",
            hint="Pass both, or neither for full attention in all layers",
        )
    if full and (full[-1] >= num_layers or len(full) == num_layers):
        given = ",".join(map(str, full))
        raise SettingsError(
            f"`--full-attention-layers` is `{given}`, expected some of the layers 0 to "
            f"{num_layers - 1}, not all",
            hint="Leave `--sliding-window` out for full attention in all layers",
        )
    return {"sliding_window": window, "full_attention_layers": full}


def load_draft(
    config: Eagle3Config, weights: Mapping[str, Tensor], embedding: Tensor
) -> Eagle3Draft:
    """A trained draft on the device of the verifier's embedding, in float32."""
    with embedding.device:
        draft = Eagle3Draft(config, embedding)
    draft.load_state_dict(dict(weights))
    return draft.eval()
