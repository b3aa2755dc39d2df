"""What the config.json of trained drafts has in common, whatever the algorithm and the tool."""

from collections.abc import Callable, Mapping
from typing import Any

from speculators_cli.core.algorithms.draft_config import (
    LAYER_IDS_ASSUMED,
    PRODUCER,
    DraftConfig,
    is_speculators,
)
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values
from speculators_cli.core.models.decoder_config import FULL, SLIDING
from speculators_cli.core.models.rope import RopeError, read_rope

CONVERT_HINT = "Train it again with `speculators train`"
# Values that no tensor determines, and for which engines have a default.
_UNSEEN = ("rms_norm_eps", "max_position_embeddings")
_IDS_HINT = "Pass `--target-layer-ids` with the layers it was trained on"
_THETA_KEYS = ("rope_theta", "rotary_emb_base")


def find_assumed(content: Mapping[str, Any], config: DraftConfig) -> dict[str, Any]:
    """Values missing from config.json that no tensor determines, with their defaults."""
    layers = layers_of(content)
    found = {key: getattr(config, key) for key in _UNSEEN if layers.get(key) is None}
    rope = layers.get("rope_scaling") or layers.get("rope_parameters") or {}
    if all(x is None for x in (rope.get("rope_theta"), *map(layers.get, _THETA_KEYS))):
        found["rope_theta"] = config.rope_parameters["rope_theta"]
    return found


def layers_of(content: Mapping[str, Any]) -> Any:
    """The part of a config.json that describes the decoder layers."""
    return content["transformer_layer_config"] if is_speculators(content) else content


def read_shared(
    values: Values,
    layers: Values,
    overrides: Overrides,
    *,
    arch: str,
    family: Any,
    layer_ids: tuple[int, ...],
    choose_layer_ids: Callable[[int], tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """The fields that every `DraftConfig` has.

    Args:
        values: Of config.json.
        layers: Its part that describes the layers.
        overrides: Values that replace those of config.json.
        arch: Of the layers.
        family: Config of their family, with its defaults.
        layer_ids: Layers of the verifier in config.json; empty if it has none.
        choose_layer_ids: Those of a draft without, by the verifier's number of layers; None: they
            are required.

    Raises:
        CheckpointError: A value is missing, or this package does not support it.
    """
    name, sizes = values.name, read_sizes(layers, arch, family)
    verifier = values.part("speculators_config").part("verifier")
    verifier_name = overrides.verifier_name_or_path or verifier.text("name_or_path")
    if not verifier_name:
        raise CheckpointError(
            f"The config.json of `{name}` has no verifier", hint="Pass `--verifier-name-or-path`"
        )
    ids = overrides.target_layer_ids or layer_ids
    if not ids and choose_layer_ids is None:
        raise CheckpointError(
            f"The config.json of `{name}` has no layer ids of the verifier", hint=_IDS_HINT
        )
    are_ids_assumed = not ids or values.content.get(LAYER_IDS_ASSUMED) is True
    architectures = overrides.verifier_architectures or verifier.texts("architectures")
    if not ids or not architectures:
        assert overrides.read_verifier is not None, "configs without verifier values need a reader"
        shape = overrides.read_verifier(verifier_name)
        architectures = architectures or shape.architectures
        if not ids and choose_layer_ids is not None:
            ids = choose_layer_ids(shape.num_layers)
    if list(ids) != sorted(set(ids)) or ids[0] < 0:
        raise CheckpointError(
            f"`{name}` has the verifier layers {list(ids)}, which are not strictly ascending",
            hint=_IDS_HINT,
        )
    return {
        "arch": arch,
        "target_hidden_size": values.size("target_hidden_size") or sizes["hidden_size"],
        "rms_norm_eps": layers.number("rms_norm_eps") or family.rms_norm_eps,
        "rope_parameters": read_layers_rope(values, layers, sizes),
        "draft_vocab_size": values.size("draft_vocab_size") or sizes["vocab_size"],
        "target_layer_ids": ids,
        "are_layer_ids_assumed": overrides.target_layer_ids is None and are_ids_assumed,
        "verifier_name_or_path": verifier_name,
        "verifier_architectures": architectures,
        **sizes,
    }


def read_num_tokens(values: Values) -> int | None:
    """Draft tokens per verifier pass in the speculators format; None if there is no number."""
    methods = values.part("speculators_config").first_part("proposal_methods")
    return methods.size("speculative_tokens")


def read_defaults(model_type: str) -> Any:
    """The config of a family in transformers, with its defaults."""
    # It takes seconds to import, and a draft that is trained from scratch does not need it.
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type)


def read_sizes(layers: Values, arch: str, family: Any) -> dict[str, Any]:
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


def refuse_other_layers(values: Values, layers: Values, *, checks_windows: bool = True) -> None:
    """Refuse layers that this package does not support.

    Args:
        values: Of config.json.
        layers: Its part that describes the layers.
        checks_windows: Whether to refuse windows that `read_windows` does not read.

    Raises:
        CheckpointError: They are not those of llama or qwen3.
    """
    for part in (values, layers):
        for key in ("quantization_config", "compression_config"):
            if part.has(key):
                method = part.part(key).content.get("quant_method", "an unnamed method")
                raise CheckpointError(
                    f"`{values.name}` is quantised with `{method}`",
                    hint="Pass the draft before quantisation",
                )
    act = layers.text("hidden_act") or "silu"
    found: dict[str, tuple[object, object]] = {
        "hidden_act": ("silu" if act == "swish" else act, "silu"),
        **{key: (layers.switch(key) or False, False) for key in ("attention_bias", "mlp_bias")},
        "logit_scale": (layers.number("logit_scale") or 1.0, 1.0),
        "dual_chunk_attention_config": (layers.has("dual_chunk_attention_config"), False),
    }
    if checks_windows:
        # Engines read the layers' kinds only; without these, other tools differ in what it means.
        found["use_sliding_window"] = (_has_unclear_window(layers), False)
        found["layer_types"] = (_other_attention(layers), FULL)
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


def read_windows(layers: Values, num_layers: int) -> dict[str, Any]:
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


def read_layers_rope(values: Values, layers: Values, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The RoPE of the layers."""
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
