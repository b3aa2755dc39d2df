"""SGLang."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.export.engine_rope import EngineRope
from speculators_cli.core.export.targets.target import Target
from speculators_cli.core.export.targets.vllm import longrope_length, vllm_rope


class Sglang(Target):
    """Serves drafts by flags of its own server, which this package does not start."""

    name = "sglang"
    engine = "SGLang"

    def build_config(self, config: DraftConfig, dtype: str) -> dict[str, Any]:
        """Contents of config.json, with a RoPE that does not depend on the length at hand."""
        content = super().build_config(config, dtype)
        layers = content.get("transformer_layer_config", content)
        layers["rope_parameters"] = _fixed_rope(config)
        return content

    def applied_rope(self, layers: Mapping[str, Any]) -> EngineRope:
        """The RoPE that the engine applies."""
        return sglang_rope(layers)

    def card_text(self, config: DraftConfig, draft_dir: Path) -> str:  # noqa: ARG002
        """The flags of the server."""
        return (
            f"With SGLang: `--speculative-algorithm {self.format_of(config).method} "
            "--speculative-draft-model-path` and this folder."
        )


def sglang_rope(layers: Mapping[str, Any]) -> EngineRope:
    """The RoPE that SGLang applies: that of vLLM, except for these keys.

    Raises:
        ValueError: It would refuse the RoPE, or choose one by the lengths at hand.
    """
    rope, length = dict(layers["rope_parameters"]), layers["max_position_embeddings"]
    kind = rope.get("rope_type", "default")
    if kind == "dynamic" and "alpha" not in rope:
        rope["max_trained_positions"] = length / rope["factor"]
    if kind == "yarn":
        rope.pop("attention_factor", None)
        applied = vllm_rope({**layers, "rope_parameters": rope})
        return EngineRope(applied.frequencies, applied.scale * rope.get("attn_factor", 1.0))
    if kind == "longrope":
        is_long = length > rope["original_max_position_embeddings"]
        if is_long and rope["short_factor"] != rope["long_factor"]:
            raise ValueError("`short_factor` is applied to short sequences")
    return vllm_rope({**layers, "rope_parameters": rope})


def _fixed_rope(config: DraftConfig) -> dict[str, Any]:
    """The RoPE of the training, where the engine would choose another by the length at hand."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] == "dynamic":
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    if longrope_length(config) is not None:
        rope["short_factor"] = rope["long_factor"]
        if "long_mscale" in rope:
            rope["short_mscale"] = rope["long_mscale"]
    return rope
