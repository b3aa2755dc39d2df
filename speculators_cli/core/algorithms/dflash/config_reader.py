"""config.json of a trained draft, speculators or plain DFlash -> DFlashConfig."""

from collections.abc import Mapping
from typing import Any

from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.draft_config import is_speculators
from speculators_cli.core.algorithms.draft_config_reader import (
    CONVERT_HINT,
    read_defaults,
    read_num_tokens,
    read_shared,
    refuse_other_layers,
)
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.errors import CheckpointError
from speculators_cli.core.models.config_values import Values
from speculators_cli.core.models.decoder_config import FULL, SLIDING

ARCHITECTURE = "DFlashDraftModel"
OWN_PART = "dflash_config"
__all__ = ["ARCHITECTURE", "is_dflash", "read_block_config", "read_draft_config"]


def is_dflash(content: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of a DFlash draft, speculators or plain."""
    if is_speculators(content):
        return bool(content["speculators_model_type"] == DFlashConfig.algorithm)
    return content.get("architectures") == [ARCHITECTURE] or OWN_PART in content


def read_draft_config(
    content: Mapping[str, Any], overrides: Overrides, *, name: str
) -> DFlashConfig:
    """Read the config of a trained draft of any tool.

    Raises:
        CheckpointError: This package does not compute it, or a value is missing.
    """
    values = Values(content, name)
    if is_speculators(content):
        return _from_speculators(values, overrides)
    return _from_plain(values, overrides)


def _from_speculators(values: Values, overrides: Overrides) -> DFlashConfig:
    if values.switch("sample_from_anchor"):
        raise CheckpointError(
            f"`{values.name}` predicts from its anchor (`sample_from_anchor` is on), which engines "
            "do not serve as DFlash",
            hint=CONVERT_HINT,
        )
    return read_block_config(values, overrides, first_slot=DFlashConfig.first_slot)


def read_block_config(values: Values, overrides: Overrides, *, first_slot: int) -> DFlashConfig:
    """Read what drafts of blocks have in common, in the speculators format.

    Args:
        values: Of config.json.
        overrides: Values that replace those of config.json.
        first_slot: Of a block that predicts a token.

    Raises:
        CheckpointError: This package does not compute it, or a value is missing.
    """
    layers = values.part("transformer_layer_config")
    num_tokens = read_num_tokens(values)
    causal = layers.switch("is_causal")
    if causal is None:
        # Absent, blocks are bidirectional, with any kind of layer.
        causal = values.switch("sliding_window_non_causal") is False
    return _build(
        values,
        layers,
        overrides,
        block_size=values.size("block_size") or (num_tokens and num_tokens + first_slot),
        mask=values.token("mask_token_id"),
        layer_ids=values.layer_ids(DFlashConfig.layer_ids_key),
        causal=causal,
    )


def _from_plain(values: Values, overrides: Overrides) -> DFlashConfig:
    own = values.part(OWN_PART)
    causal = values.switch("is_causal")
    if causal is None:
        causal = own.switch("causal")
    if causal is None:
        # Without a switch, engines of this format compute windows causally.
        causal = _read_window(values) is not None
    return _build(
        values,
        values,
        overrides,
        block_size=values.size("block_size") or own.size("block_size"),
        mask=own.token("mask_token_id"),
        # This format counts the layer whose output is taken, not the layers passed.
        layer_ids=tuple(k + 1 for k in own.layer_ids("target_layer_ids")),
        causal=causal,
    )


def _build(
    values: Values,
    layers: Values,
    overrides: Overrides,
    *,
    block_size: int | None,
    mask: int | None,
    layer_ids: tuple[int, ...],
    causal: bool,
) -> DFlashConfig:
    refuse_other_layers(values, layers, checks_windows=False)
    if layers.text("model_type") != "qwen3":
        raise layers.error("model_type", "`qwen3`")
    if block_size is None or mask is None:
        key = "block_size" if block_size is None else "mask_token_id"
        raise CheckpointError(f"The config.json of `{values.name}` has no {key}", hint=CONVERT_HINT)
    if block_size < 2:
        raise values.error("block_size", "at least 2")
    family = read_defaults("qwen3")
    return DFlashConfig(
        **read_shared(values, layers, overrides, arch="qwen3", family=family, layer_ids=layer_ids),
        block_size=block_size,
        mask_token_id=mask,
        draft_window=_read_window(layers),
        causal_block=causal,
    )


def _read_window(layers: Values) -> int | None:
    """The window of all layers; None for full attention."""
    kinds = set(layers.texts("layer_types"))
    if not kinds or kinds == {FULL}:
        return None
    if kinds != {SLIDING}:
        raise CheckpointError(
            f"`{layers.name}` has layers with full attention and with windows, which this package "
            "does not compute in one draft",
            hint=CONVERT_HINT,
        )
    window = layers.size("sliding_window")
    if window is None:
        raise layers.error("sliding_window", "a number of tokens")
    return window
