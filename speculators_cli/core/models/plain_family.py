"""Families whose config.json says, under the keys of Llama, all that training needs to know.

For others, the family's own code in transformers is asked, which takes seconds to import. Tests
compare what is read here with what is measured there.
"""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.models.family import TEXT_KEYS, Family
from speculators_cli.core.models.readout import Readout
from speculators_cli.core.models.rope import gather_rope

# Their causal language models by `model_type`: an RMSNorm and one linear LM head after the layers.
PLAIN = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
)
ROPE_TYPES = ("default", "llama3", "linear")
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor"),
    *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def find_plain(name: str, content: Mapping[str, Any]) -> Family | None:
    """Return the family if its config.json needs no class to be read.

    Args:
        name: Of the verifier.
        content: Of its config.json.
    """
    architecture = PLAIN.get(str(content.get("model_type")))
    if architecture is None or content.get("architectures") != [architecture]:
        return None
    if any(key in content for key in ("auto_map", *TEXT_KEYS)):
        return None
    if not (_has_sizes(content) and _has_plain_rope(content)):
        return None
    eps, tie = content.get("rms_norm_eps"), content.get("tie_word_embeddings")
    if not (isinstance(eps, float) and 0 < eps < 1 and isinstance(tie, bool)):
        return None
    # What a class assumes where they are missing is not for all of its models.
    if "eos_token_id" not in content:
        return None
    return Family(name, content, configs=(), is_supported=True, is_plain=True)


def plain_readout(family: Family) -> Readout:
    """Return how a plain family computes logits."""
    return Readout(
        embedding="model.embed_tokens",
        norm="model.norm",
        head="lm_head",
        is_tied=family.content["tie_word_embeddings"],
        is_centred=False,
        eps=family.content["rms_norm_eps"],
        offset=0.0,
        scale=1.0,
        softcap=None,
    )


def _has_sizes(content: Mapping[str, Any]) -> bool:
    if not all(_is_count(content.get(key)) for key in SIZES):
        return False
    heads = content["num_attention_heads"]
    if content["hidden_size"] % heads or heads % content["num_key_value_heads"]:
        return False
    # Qwen3 does not divide the hidden size.
    needs_head_dim = content["model_type"] == "qwen3"
    return _is_count(content["head_dim"]) if "head_dim" in content else not needs_head_dim


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _has_plain_rope(content: Mapping[str, Any]) -> bool:
    if "partial_rotary_factor" in content:
        return False
    rope = gather_rope(content)
    if not isinstance(rope, Mapping) or not set(rope) <= ROPE_KEYS:
        return False
    is_given = rope["rope_theta"] in (content.get("rope_theta"), _theta_inside(content))
    return is_given and rope["rope_type"] in ROPE_TYPES


def _theta_inside(content: Mapping[str, Any]) -> object:
    """Return the theta among the RoPE parameters, where newer configs have it."""
    rope = content.get("rope_parameters")
    return rope.get("rope_theta") if isinstance(rope, Mapping) else None
