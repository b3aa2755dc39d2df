"""config.json of a trained draft, speculators or plain EAGLE-3 -> Eagle3Config."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.draft_config import is_speculators
from speculators_cli.core.algorithms.draft_config_reader import (
    layers_of,
    read_defaults,
    read_num_tokens,
    read_shared,
    read_windows,
    refuse_other_layers,
)
from speculators_cli.core.algorithms.eagle3.config import SWITCHES, Eagle3Config
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.data_config import default_layer_ids
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values

PLAIN_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
# Families with the layers of llama if projections are separate tensors without bias.
LLAMA_LAYERS = ("llama", "mistral", "qwen2", "phi3")
# Keys of a mask token in plain drafts of P-EAGLE, in the order of engines.
MASK_KEYS = ("mask_token_id", "pard_token", "ptd_token_id")
DEFAULT_NUM_TOKENS = 3  # if config.json has no number of draft tokens
_IDS = Eagle3Config.layer_ids_key


def is_eagle3(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of an EAGLE-3 draft, speculators or plain."""
    if is_speculators(content):
        return bool(content["speculators_model_type"] == Eagle3Config.algorithm)
    return is_plain(content) and not has_mask(content)


def is_plain(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a plain draft of EAGLE-3 or P-EAGLE."""
    return has_plain_layers(content) or "draft_vocab_size" in content


def has_mask(content: Mapping[str, Any]) -> bool:
    """Whether a config.json has a mask token, which only drafts of P-EAGLE read."""
    return any(content.get(key) is not None for key in MASK_KEYS)


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
    # The engine of this format has it on by default.
    return read_eagle_config(Values(content, name), overrides, residual_after_norm=True)


def read_eagle_config(
    values: Values, overrides: Overrides, *, residual_after_norm: bool
) -> Eagle3Config:
    """Read what drafts of EAGLE-3 and P-EAGLE have in common, in the speculators format or plain.

    Args:
        values: Of config.json.
        overrides: Values that replace those of config.json.
        residual_after_norm: `norm_before_residual` of the speculators format, where it is missing.

    Raises:
        CheckpointError: This package does not support it, or a value is missing.
    """
    if is_speculators(values.content):
        return _from_speculators(values, overrides, residual_after_norm=residual_after_norm)
    return _from_plain(values, overrides)


def has_plain_layers(content: Mapping[str, Any]) -> bool:
    """Whether the class in a plain config.json has llama layers, regardless of the model type."""
    architectures = content.get("architectures")
    if isinstance(architectures, list):
        architectures = next(iter(architectures), None)
    return architectures in PLAIN_ARCHITECTURES


def ties_head(content: Mapping[str, Any], name: str) -> bool:
    """Whether a config.json ties the LM head to the embedding."""
    layers = layers_of(content)
    return any(Values(part, name).switch("tie_word_embeddings") for part in (content, layers))


def _from_speculators(
    values: Values, overrides: Overrides, *, residual_after_norm: bool
) -> Eagle3Config:
    for key in ("transformer_layer_config", "speculators_config"):
        if not values.has(key):
            raise CheckpointError(
                f"The config.json of `{values.name}` lacks `{key}`", hint="Download it again"
            )
    flags = {key: values.switch(key) or False for key in SWITCHES}
    if "norm_before_residual" not in values.content:
        flags["norm_before_residual"] = residual_after_norm
    return _build(
        values,
        values.part("transformer_layer_config"),
        overrides,
        flags=flags,
        layer_ids=values.layer_ids(_IDS),
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
        layer_ids=layer_ids,
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
    layer_ids: tuple[int, ...],
) -> Eagle3Config:
    refuse_other_layers(values, layers)
    arch, family = _find_family(layers)
    shared = read_shared(
        values,
        layers,
        overrides,
        arch=arch,
        family=family,
        layer_ids=layer_ids,
        choose_layer_ids=default_layer_ids,
    )
    return Eagle3Config(
        **shared,
        **read_windows(layers, shared["num_layers"]),
        **flags,
        ttt_steps=read_num_tokens(values) or DEFAULT_NUM_TOKENS,
    )


def _find_family(layers: Values) -> tuple[str, Any]:
    """The architecture of the decoder layers, and a config with the family's defaults."""
    model_type = layers.text("model_type") or "llama"
    if model_type == "qwen3":
        return "qwen3", read_defaults(model_type)
    if model_type in LLAMA_LAYERS:
        return "llama", read_defaults(model_type)
    if has_plain_layers(layers.content):
        # The layers have the class of llama; the type is the verifier's.
        return "llama", read_defaults("llama")
    expected = ", ".join(f"`{kind}`" for kind in (*LLAMA_LAYERS, "qwen3"))
    raise CheckpointError(
        f"`{layers.name}` has decoder layers of type `{model_type}`, expected one of {expected}",
        hint="Pass a draft with such layers",
    )
