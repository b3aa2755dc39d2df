"""config.json of a trained draft, speculators or plain EAGLE-3 -> Eagle3Config."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from speculators_cli.core.algorithms.draft_config import (
    LAYER_IDS_ASSUMED,
    PRODUCER,
    DraftConfig,
    is_speculators,
)
from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.data_config import default_layer_ids
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values
from speculators_cli.core.models.decoder_config import FULL, SLIDING
from speculators_cli.core.models.rope import RopeError, read_rope

PLAIN_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# Families with the layers of llama if projections are separate tensors without bias.
LLAMA_LAYERS = ("llama", "mistral", "qwen2", "phi3")
DEFAULT_NUM_TOKENS = 3  # if config.json has no number of draft tokens
CONVERT_HINT = "Train it again with `speculators train`"
_IDS = Eagle3Config.layer_ids_key
# Values that no tensor determines, and for which engines have a default.
_UNSEEN = ("rms_norm_eps", "max_position_embeddings")
_THETA_KEYS = ("rope_theta", "rotary_emb_base")


def is_eagle3(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of an EAGLE-3 draft, speculators or plain."""
    if is_speculators(content):
        return bool(content["speculators_model_type"] == Eagle3Config.algorithm)
    return has_plain_layers(content) or "draft_vocab_size" in content


def read_draft_config(
    content: Mapping[str, Any], overrides: Overrides, *, name: str
) -> Eagle3Config:
    """Read the config of a trained draft of any tool.

    Args:
        content: Of its config.json.
        overrides: Values that replace those of config.json.
        name: The draft, for messages.

    Raises:
        CheckpointError: It is not an EAGLE-3 draft, or this package does not support it.
    """
    assert is_eagle3(content), "another algorithm reads other drafts"
    values = Values(content, name)
    if is_speculators(content):
        return _from_speculators(values, overrides)
    return _from_plain(values, overrides)


def has_plain_layers(content: Mapping[str, Any]) -> bool:
    """Whether the class in a plain config.json has llama layers, regardless of the model type."""
    architectures = content.get("architectures")
    if isinstance(architectures, list):
        architectures = next(iter(architectures), None)
    return architectures in PLAIN_ARCHITECTURES


def find_assumed(content: Mapping[str, Any], config: DraftConfig) -> dict[str, Any]:
    """Values missing from config.json that no tensor determines, with their defaults."""
    layers = _layers_of(content)
    found = {key: getattr(config, key) for key in _UNSEEN if layers.get(key) is None}
    rope = layers.get("rope_scaling") or layers.get("rope_parameters") or {}
    if all(x is None for x in (rope.get("rope_theta"), *map(layers.get, _THETA_KEYS))):
        found["rope_theta"] = config.rope_parameters["rope_theta"]
    return found


def ties_head(content: Mapping[str, Any], name: str) -> bool:
    """Whether a config.json ties the LM head to the embedding."""
    layers = _layers_of(content)
    return any(Values(part, name).switch("tie_word_embeddings") for part in (content, layers))


def _layers_of(content: Mapping[str, Any]) -> Any:
    """The part of a config.json that describes the decoder layers."""
    return content["transformer_layer_config"] if is_speculators(content) else content


def _from_speculators(values: Values, overrides: Overrides) -> Eagle3Config:
    for key in ("transformer_layer_config", "speculators_config"):
        if not values.has(key):
            raise CheckpointError(
                f"The config.json of `{values.name}` lacks `{key}`", hint="Download it again"
            )
    speculators = values.part("speculators_config")
    verifier = speculators.part("verifier")
    method = speculators.first_part("proposal_methods")
    flags = {key: values.switch(key) or False for key in SWITCHES}
    if "norm_before_residual" not in values.content:
        # The engine of this format has it on by default.
        flags["norm_before_residual"] = True
    return _build(
        values,
        values.part("transformer_layer_config"),
        overrides,
        flags=flags,
        num_tokens=method.size("speculative_tokens"),
        layer_ids=values.layer_ids(_IDS),
        verifier=(verifier.text("name_or_path"), verifier.texts("architectures")),
    )


def _from_plain(values: Values, overrides: Overrides) -> Eagle3Config:
    eagle = values.part("eagle_config")
    if eagle.switch("use_aux_hidden_state") is False:
        raise CheckpointError(
            f"`{values.name}` reads no aux hidden states (`use_aux_hidden_state` is off)",
            hint="Pass an EAGLE-3 draft",
        )
    layer_ids = values.layer_ids(_IDS)
    if not layer_ids:
        # SGLang, which reads this key, counts the layer, not the layers passed.
        layer_ids = tuple(k + 1 for k in eagle.layer_ids(_IDS))
    return _build(
        values,
        values,
        overrides,
        flags={key: _read_flag(values, eagle, key) for key in SWITCHES},
        num_tokens=None,
        layer_ids=layer_ids,
        verifier=(None, ()),
    )


def _read_flag(values: Values, eagle: Values, key: str) -> bool:
    """A switch at the top of a plain config or in `eagle_config`; engines read either."""
    alias = {"fc_norm": "use_aux_norm"}.get(key, key)
    found = {values.switch(key), eagle.switch(key), values.switch(alias)} - {None}
    if len(found) > 1:
        raise CheckpointError(
            f"The config.json of `{values.name}` has `{key}` both on and off",
            hint=f"Correct `{key}` in it: engines read one or the other",
        )
    return bool(found and found.pop())


def _build(
    values: Values,
    layers: Values,
    overrides: Overrides,
    *,
    flags: Mapping[str, Any],
    num_tokens: int | None,
    layer_ids: tuple[int, ...],
    verifier: tuple[str | None, tuple[str, ...]],
) -> Eagle3Config:
    name = values.name
    verifier_name = overrides.verifier_name_or_path or verifier[0]
    _refuse_other_layers(values, layers)
    arch, family = _find_family(layers)
    sizes = _read_sizes(layers, arch, family)
    if not verifier_name:
        raise CheckpointError(
            f"The config.json of `{name}` has no verifier",
            hint="Pass `--verifier-name-or-path`",
        )
    ids = overrides.target_layer_ids or layer_ids
    are_ids_assumed = values.content.get(LAYER_IDS_ASSUMED) is True
    is_assumed = overrides.target_layer_ids is None and (are_ids_assumed or not ids)
    architectures = overrides.verifier_architectures or verifier[1]
    if not ids or not architectures:
        assert overrides.read_verifier is not None, "configs without verifier values need a reader"
        shape = overrides.read_verifier(verifier_name)
        ids = ids or default_layer_ids(shape.num_layers)
        architectures = architectures or shape.architectures
    if list(ids) != sorted(set(ids)) or ids[0] < 0:
        raise CheckpointError(
            f"`{name}` has the verifier layers {list(ids)}, which engines sort: they are not "
            "strictly ascending",
            hint="Pass `--target-layer-ids` with the layers it was trained on",
        )
    return Eagle3Config(
        arch=arch,
        target_hidden_size=values.size("target_hidden_size") or sizes["hidden_size"],
        rms_norm_eps=layers.number("rms_norm_eps") or family.rms_norm_eps,
        rope_parameters=_rope(values, layers, sizes),
        draft_vocab_size=values.size("draft_vocab_size") or sizes["vocab_size"],
        target_layer_ids=ids,
        are_layer_ids_assumed=is_assumed,
        ttt_steps=num_tokens or DEFAULT_NUM_TOKENS,
        verifier_name_or_path=verifier_name,
        verifier_architectures=architectures,
        **_read_windows(layers, sizes["num_layers"]),
        **sizes,
        **flags,
    )


def _find_family(layers: Values) -> tuple[str, Any]:
    """The architecture of the decoder layers, and a config with the family's defaults."""
    model_type = layers.text("model_type") or "llama"
    if model_type == "qwen3":
        return "qwen3", AutoConfig.for_model(model_type)
    if model_type in LLAMA_LAYERS:
        return "llama", AutoConfig.for_model(model_type)
    if has_plain_layers(layers.content):
        # The layers have the class of llama; the type is the verifier's.
        return "llama", AutoConfig.for_model("llama")
    expected = ", ".join(f"`{kind}`" for kind in (*LLAMA_LAYERS, "qwen3"))
    raise CheckpointError(
        f"`{layers.name}` has decoder layers of type `{model_type}`, expected one of {expected}",
        hint="Pass a draft with such layers",
    )


def _read_sizes(layers: Values, arch: str, family: PreTrainedConfig) -> dict[str, Any]:
    """Sizes under the names of `Eagle3Config`; missing ones have the family's default."""
    keys = {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    sizes: dict[str, Any] = {
        own: layers.size(key) or getattr(family, key) for own, key in keys.items()
    }
    heads = sizes["num_heads"]
    kv_heads, head_dim = heads, sizes["hidden_size"] // heads
    if arch == "qwen3":
        head_dim = family.head_dim
        kv_heads = heads if "num_key_value_heads" in layers.content else family.num_key_value_heads
    sizes["num_kv_heads"] = layers.size("num_key_value_heads") or kv_heads
    sizes["head_dim"] = layers.size("head_dim") or head_dim
    if sizes["head_dim"] == 0:
        raise layers.error("num_attention_heads", f"at most {sizes['hidden_size']:,}")
    return sizes


def _refuse_other_layers(values: Values, layers: Values) -> None:
    """Refuse layers that this package does not support."""
    for part in (values, layers):
        for key in ("quantization_config", "compression_config"):
            if part.has(key):
                method = part.part(key).content.get("quant_method", "an unnamed method")
                raise CheckpointError(
                    f"`{values.name}` is quantised with `{method}`",
                    hint="Pass the draft before quantisation",
                )
    act = layers.text("hidden_act") or "silu"
    found = {
        "hidden_act": ("silu" if act == "swish" else act, "silu"),
        **{key: (layers.switch(key) or False, False) for key in ("attention_bias", "mlp_bias")},
        # Engines read the layers' kinds only; without these, other tools differ in what it means.
        "use_sliding_window": (_has_unclear_window(layers), False),
        "layer_types": (_other_attention(layers), "full_attention"),
        "logit_scale": (layers.number("logit_scale") or 1.0, 1.0),
        "dual_chunk_attention_config": (layers.has("dual_chunk_attention_config"), False),
    }
    for key, (value, expected) in found.items():
        if value != expected:
            raise CheckpointError(
                f"`{values.name}` has `{key}` `{value}`, but only `{expected}` is supported",
                hint=CONVERT_HINT,
            )


def _has_unclear_window(layers: Values) -> bool:
    return bool(layers.switch("use_sliding_window")) and not layers.has("layer_types")


def _other_attention(layers: Values) -> str:
    kinds = layers.texts("layer_types")
    return next((kind for kind in kinds if kind not in (FULL, SLIDING)), FULL)


def _read_windows(layers: Values, num_layers: int) -> dict[str, Any]:
    """The windows of the layers, as engines read them: without kinds of layers there are none."""
    kinds = layers.texts("layer_types")
    if SLIDING not in kinds:
        return {}
    if len(kinds) != num_layers:
        raise layers.error("layer_types", f"one value for each of {num_layers} layers")
    window = layers.size("sliding_window")
    if window is None:
        raise layers.error("sliding_window", f"a size, since it has layers of type `{SLIDING}`")
    full = tuple(index for index, kind in enumerate(kinds) if kind == FULL)
    return {"sliding_window": window, "full_attention_layers": full}


def _rope(values: Values, layers: Values, sizes: Mapping[str, int]) -> dict[str, Any]:
    content = dict(layers.content)
    producer, rope = values.content.get("producer"), content.get("rope_parameters")
    if isinstance(producer, dict) and producer.get("name") == PRODUCER and isinstance(rope, dict):
        # Earlier versions wrote the verifier's `alpha` but trained without it.
        content["rope_parameters"] = {key: x for key, x in rope.items() if key != "alpha"}
    try:
        return read_rope(
            content,
            head_dim=sizes["head_dim"],
            max_position_embeddings=sizes["max_position_embeddings"],
        )
    except RopeError as error:
        raise CheckpointError(
            f"The RoPE of `{layers.name}` is not supported: it {error}",
            hint=CONVERT_HINT,
        ) from None
