"""config.json of a trained draft, speculators or plain EAGLE-3 -> Eagle3Config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from speculators_cli.core.data.data_config import default_layer_ids
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config import LAYER_IDS_ASSUMED, Eagle3Config
from speculators_cli.core.models.rope import RopeError, read_rope
from speculators_cli.core.models.verifier import VerifierConfig

PLAIN_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
DEFAULT_NUM_TOKENS = 3  # where a draft does not say how many it was trained to propose
CONVERT_HINT = "Train it again with `speculators train`, which has no such option"


@dataclass(frozen=True)
class Given:
    """What the user said of a draft, and how to ask its verifier for the rest."""

    verifier_name_or_path: str | None = None
    verifier_architectures: tuple[str, ...] | None = None
    target_layer_ids: tuple[int, ...] | None = None
    ask_verifier: Callable[[str], VerifierConfig] | None = None


def read_draft_config(content: Mapping[str, Any], given: Given, *, name: str) -> Eagle3Config:
    """The config of a trained draft, whoever wrote it.

    Args:
        content: Of its config.json.
        given: Values that win over it or stand in where it says nothing.
        name: The draft's, for messages.

    Raises:
        CheckpointError: It is no EAGLE-3 draft, or one whose mathematics this package lacks.
    """
    if content.get("speculators_model_type") is not None:
        return _from_speculators(content, given, name)
    architectures = content.get("architectures") or [None]
    if architectures[0] in PLAIN_ARCHITECTURES or "draft_vocab_size" in content:
        return _from_plain(content, given, name)
    raise CheckpointError(
        f"`{name}` is no EAGLE-3 draft: its config.json has neither `speculators_model_type` nor "
        f"`draft_vocab_size`, but architecture `{architectures[0]}`",
        hint="Name a checkpoint of `speculators train`, a speculators or an EAGLE-3 checkpoint",
    )


def _from_speculators(content: Mapping[str, Any], given: Given, name: str) -> Eagle3Config:
    kind = content["speculators_model_type"]
    if kind != "eagle3":
        raise CheckpointError(
            f"`{name}` is a draft of algorithm `{kind}`, expected `eagle3`",
            hint="Name an EAGLE-3 draft",
        )
    try:
        layers = content["transformer_layer_config"]
        speculators = content["speculators_config"]
        verifier = speculators.get("verifier") or {}
        methods = speculators.get("proposal_methods") or [{}]
        num_tokens = methods[0].get("speculative_tokens") or DEFAULT_NUM_TOKENS
        flags = {
            # Absent, the engine that reads this format takes it as on.
            "norm_before_residual": content.get("norm_before_residual", True),
            **{
                key: content.get(key, False) for key in ("norm_before_fc", "fc_norm", "norm_output")
            },
        }
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"The config.json of `{name}` lacks `{error.args[0]}`", hint="Download it again"
        ) from None
    return _build(
        layers,
        given,
        name,
        flags=flags,
        num_tokens=num_tokens,
        layer_ids=content.get("eagle_aux_hidden_state_layer_ids"),
        are_ids_assumed=content.get(LAYER_IDS_ASSUMED) is True,
        draft_vocab_size=content.get("draft_vocab_size"),
        target_hidden_size=content.get("target_hidden_size"),
        verifier=(verifier.get("name_or_path"), verifier.get("architectures")),
    )


def _from_plain(content: Mapping[str, Any], given: Given, name: str) -> Eagle3Config:
    eagle = content.get("eagle_config") or {}
    nested = eagle.get("eagle_aux_hidden_state_layer_ids")
    layer_ids = content.get("eagle_aux_hidden_state_layer_ids")
    if layer_ids is None and nested is not None:
        # The engine that this key is for counts the layer, not the layers passed.
        layer_ids = [k + 1 for k in nested]
    keys = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
    return _build(
        content,
        given,
        name,
        flags={key: content.get(key, eagle.get(key, False)) for key in keys},
        num_tokens=DEFAULT_NUM_TOKENS,
        layer_ids=layer_ids,
        are_ids_assumed=content.get(LAYER_IDS_ASSUMED) is True,
        draft_vocab_size=content.get("draft_vocab_size"),
        target_hidden_size=content.get("target_hidden_size"),
        verifier=(None, None),
    )


def _build(
    layers: Mapping[str, Any],
    given: Given,
    name: str,
    *,
    flags: Mapping[str, bool],
    num_tokens: int,
    layer_ids: list[int] | None,
    are_ids_assumed: bool,
    draft_vocab_size: int | None,
    target_hidden_size: int | None,
    verifier: tuple[str | None, list[str] | None],
) -> Eagle3Config:
    arch = layers.get("model_type", "llama")
    config = _read_layers(layers, arch, name)
    verifier_name = given.verifier_name_or_path or verifier[0]
    if not verifier_name:
        raise CheckpointError(
            f"`{name}` does not say which verifier it drafts for",
            hint="Pass `--verifier-name-or-path`",
        )
    ids = given.target_layer_ids or tuple(layer_ids or ())
    is_assumed = given.target_layer_ids is None and (are_ids_assumed or not ids)
    architectures = given.verifier_architectures or tuple(verifier[1] or ())
    if not ids or not architectures:
        assert given.ask_verifier is not None, "a reader of unfinished configs can ask"
        asked = given.ask_verifier(verifier_name)
        ids = ids or default_layer_ids(asked.num_layers)
        architectures = architectures or asked.architectures
    if list(ids) != sorted(set(ids)) or ids[0] < 0:
        raise CheckpointError(
            f"`{name}` reads the verifier layers {list(ids)}, which engines sort: they are not "
            "strictly ascending",
            hint="Pass `--target-layer-ids` if you know which layers it was trained on",
        )
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return Eagle3Config(
        arch=arch,
        hidden_size=config.hidden_size,
        target_hidden_size=target_hidden_size or config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=_rope(layers, config, name, head_dim),
        max_position_embeddings=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        draft_vocab_size=draft_vocab_size or config.vocab_size,
        target_layer_ids=ids,
        are_layer_ids_assumed=is_assumed,
        ttt_steps=num_tokens,
        verifier_name_or_path=verifier_name,
        verifier_architectures=architectures,
        **flags,
    )


def _read_layers(layers: Mapping[str, Any], arch: str, name: str) -> Any:
    """The decoder layers' config; what is not written has the default of its family."""
    if arch not in ("llama", "qwen3"):
        raise CheckpointError(
            f"`{name}` has decoder layers of type `{arch}`, expected `llama` or `qwen3`",
            hint="Name a draft with such layers",
        )
    left_out = ("model_type", "architectures", "eagle_config", "auto_map")
    kept = {key: value for key, value in layers.items() if key not in left_out}
    try:
        config: Any = AutoConfig.for_model(arch, **kept)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The decoder layers that `{name}` describes cannot be: {reason}",
            hint="Download it again",
        ) from None
    unlike = {
        "hidden_act": (config.hidden_act, "silu"),
        "attention_bias": (getattr(config, "attention_bias", False), False),
        "mlp_bias": (getattr(config, "mlp_bias", False), False),
    }
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        unlike["layer_types"] = ("sliding_attention", "full_attention")
    for key, (found, expected) in unlike.items():
        if found != expected:
            raise CheckpointError(
                f"`{name}` has `{key}` `{found}`, this package computes `{expected}`",
                hint=CONVERT_HINT,
            )
    return config


def _rope(layers: Mapping[str, Any], config: Any, name: str, head_dim: int) -> dict[str, Any]:
    try:
        return read_rope(
            layers,
            head_dim=head_dim,
            max_position_embeddings=config.max_position_embeddings,
        )
    except RopeError as error:
        raise CheckpointError(
            f"The RoPE of `{name}` is not one that this package computes: it {error}",
            hint=CONVERT_HINT,
        ) from None
