"""EagleAlgorithm: what EAGLE-3 and P-EAGLE have in common."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config_reader import find_assumed
from speculators_cli.core.algorithms.eagle3.attention import is_joinable
from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.eagle3.config_reader import has_plain_layers, ties_head
from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft
from speculators_cli.core.algorithms.eagle3.drafter import Eagle3Drafter
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.attention import CausalMemory
from speculators_cli.core.models.losses import LOSSES
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.algorithms.eagle3 import EagleSettings

NUM_PROBE_TOKENS = 32

EagleConfigT = TypeVar("EagleConfigT", bound=Eagle3Config)
EagleSettingsT = TypeVar("EagleSettingsT", bound=EagleSettings)


class EagleAlgorithm(Algorithm[EagleConfigT, EagleSettingsT]):
    """An algorithm whose first layer reads embeddings beside hidden states."""

    alignment = NEXT_TOKEN
    multiplies_in_float8 = True
    card_settings: ClassVar = {
        "ttt_steps": "TTT steps",
        "ttt_step_loss_decay": "loss decay per TTT step",
    }
    fixed_names: ClassVar[tuple[str, ...]] = SWITCHES  # settings that a trained draft fixes
    draft_class: ClassVar[type[Eagle3Draft]] = Eagle3Draft
    training_class: ClassVar[type[Eagle3Training]] = Eagle3Training
    drafter_class: ClassVar[type[Eagle3Drafter]] = Eagle3Drafter

    def find_assumed(self, content: Mapping[str, Any], config: EagleConfigT) -> Mapping[str, Any]:
        """Values missing from config.json that no tensor determines, with their defaults."""
        return find_assumed(content, config)

    def ties_head(self, content: Mapping[str, Any], *, name: str) -> bool:
        """Whether a config.json ties the LM head to the embedding."""
        return ties_head(content, name)

    def count_aux_layers(self, config: EagleConfigT, tensors: Mapping[str, Tensor]) -> int | None:
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

    def find_unread(self, config: EagleConfigT) -> frozenset[str]:
        """Norm weights per layer, of upstream's first versions, that only the first layer reads."""
        return frozenset(f"layers.{i}.hidden_norm.weight" for i in range(1, config.num_layers))

    def fit_config(
        self, config: EagleConfigT, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> EagleConfigT:
        """The config with the layers that an engine builds, where config.json gives their class."""
        has_qk_norm = any(key.endswith((".q_norm.weight", ".k_norm.weight")) for key in tensors)
        if config.has_qk_norm and not has_qk_norm and has_plain_layers(content):
            return replace(config, arch="llama")
        return config

    def adapt_config(self, config: EagleConfigT, settings: EagleSettingsT) -> EagleConfigT:
        """The config of a trained draft with other TTT steps and windows."""
        windows = choose_windows(settings, num_layers=config.num_layers)
        return replace(config, ttt_steps=settings.ttt_steps, **windows)

    def fixed_settings(self, config: EagleConfigT) -> dict[str, Any]:
        """Settings of the section that a trained draft fixes."""
        return {name: getattr(config, name) for name in self.fixed_names}

    def kept_settings(self, config: EagleConfigT, settings: EagleSettingsT) -> dict[str, Any]:
        """The windows of a trained draft, which a run may change."""
        kept: dict[str, Any] = {"sliding_window": config.sliding_window}
        has_none = "sliding_window" in settings.model_fields_set and settings.sliding_window is None
        if not has_none:
            kept["full_attention_layers"] = config.full_attention_layers or None
        return kept

    def frozen_weights(self, settings: EagleSettingsT) -> frozenset[str]:
        """The LM head, if it is frozen."""
        return frozenset() if settings.train_head else frozenset({"lm_head.weight"})

    def find_unsupported(self, config: EagleConfigT, settings: EagleSettingsT) -> str | None:
        """Return the loss or the window without a fused kernel; every other part has one."""
        del config
        if not LOSSES[settings.loss].has_fused_kernel:
            return f"loss `{settings.loss}` has no fused kernel"
        window, num_steps = settings.sliding_window, settings.ttt_steps
        if not is_joinable(window, num_steps=num_steps):
            return f"a sliding window of {window} tokens is shorter than {num_steps} TTT steps"
        return None

    def build(
        self,
        config: EagleConfigT,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: EagleSettingsT,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> Eagle3Training:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""
        with verifier.head.device:
            draft = self.training_class(
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

    def load_draft(
        self, config: EagleConfigT, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Eagle3Draft:
        """A trained draft on the device of the verifier's embedding, in float32."""
        with embedding.device:
            draft = self.draft_class(config, embedding)
        draft.load_state_dict(dict(weights))
        return draft.eval()

    def build_drafter(
        self,
        config: EagleConfigT,
        weights: Mapping[str, Tensor],
        embedding: Tensor,
        kept_ids: Tensor,
        *,
        num_draft_tokens: int,
        head: Tensor | None = None,
    ) -> Eagle3Drafter:
        """A trained draft that proposes a chain of tokens."""
        del head
        draft = self.load_draft(config, weights, embedding)
        return self.drafter_class(draft, kept_ids.to(embedding.device), num_draft_tokens)

    @torch.inference_mode()
    def compute_probe_logits(
        self, config: EagleConfigT, weights: Mapping[str, Tensor], embedding: Tensor
    ) -> Tensor:
        """Logits of two steps over random tokens and hidden states; [rows, draft_vocab]."""
        draft = self.load_draft(config, weights, embedding)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (NUM_PROBE_TOKENS,), generator=generator)
        width = config.num_aux_layers * config.target_hidden_size
        hidden = draft.fuse(torch.randn(NUM_PROBE_TOKENS, width, generator=generator))
        positions = torch.arange(1, NUM_PROBE_TOKENS + 1)
        logits = []
        for step in range(2):
            if step > 0:
                tokens, hidden = draft.next_inputs(tokens.roll(-1), hidden)
            memories = [CausalMemory(window) for window in config.windows]
            normed, hidden = draft.step(tokens, hidden, positions + step, memories)
            logits.append(draft.lm_head(normed))
        return torch.cat(logits)


def choose_windows(settings: EagleSettings, *, num_layers: int) -> dict[str, Any]:
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
