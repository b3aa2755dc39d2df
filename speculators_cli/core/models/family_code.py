"""A verifier's model family in transformers: its config, and a small model for measurements."""

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from speculators_cli.core.models.family import LAYER_KEYS, TEXT_KEYS, Family, parts_of

# Keys that require packages, kernels or dtypes that are not needed to read three tensors.
UNUSED_KEYS = (
    "quantization_config",
    "compression_config",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
)
# Keys that may affect the final norm or the logits: never dropped, even if the class rejects them.
_READ_KEYS = re.compile(
    r"(^|_)(eps|epsilon|logits?|lm_head|norm|bias|scale|scaling|scales|multiplier|mup|tie|softcap\w*"
    r"|hidden_size|dim_model_base|d_model|n_embd|vocab_size)(_|$)"
)
# A class rejects widths that its default number of heads does not divide.
_KEPT_KEYS = {"model_type", "architectures", "num_attention_heads"}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SMALL_VOCAB = 64  # rows of embedding and LM head of the small model
_MAX_REPAIRS = 32
_SILENT = 100  # above every level of logging


def read_family(name: str, content: Mapping[str, Any], *, trust_remote_code: bool) -> Family:
    """Build a config from the content of config.json, without unused keys."""
    kept = _without(content, UNUSED_KEYS)
    kind = str(kept.get("model_type"))
    left_out: frozenset[str] = frozenset()
    config, problem = None, None
    try:
        if trust_remote_code and "auto_map" in kept:
            config = AutoConfig.from_pretrained(name, trust_remote_code=True)
        elif kind in CONFIG_MAPPING:
            with quietly():
                config, left_out = _repair(CONFIG_MAPPING[kind], kept)
        elif "auto_map" in kept:
            problem = "requires custom code"
        else:
            version = transformers.__version__
            problem = f"is of a type that transformers {version} does not support"
    except Exception as error:  # noqa: BLE001 - third-party code, on any content
        problem = f"has an invalid config: {_first_line(error)}"
    return Family(
        name,
        content,
        configs=list(_nested(config)),
        is_supported=kind in CONFIG_MAPPING,
        problem=problem,
        left_out=left_out,
        trust_remote_code=trust_remote_code,
    )


def _nested(config: PreTrainedConfig | None) -> Iterator[PreTrainedConfig]:
    """Yield a config and its nested parts down to the text model's."""
    while config is not None:
        yield config
        inner = (vars(config).get(key) for key in TEXT_KEYS)
        config = next((value for value in inner if isinstance(value, PreTrainedConfig)), None)


def _repair(config_class: Any, content: dict[str, Any]) -> tuple[PreTrainedConfig, frozenset[str]]:
    """Build the config, without keys that its class rejects and that are not needed."""
    left_out: set[str] = set()
    for _ in range(_MAX_REPAIRS):
        try:
            config: PreTrainedConfig = config_class.from_dict(copy.deepcopy(content))
        except StrictDataclassError as error:
            refused = _find_refused(str(error), content) - left_out
            if not refused:
                raise
            left_out |= refused
            content = _without(content, refused)
        else:
            return config, frozenset(left_out)
    raise ValueError("too many keys that cannot be used")


def _find_refused(message: str, content: Mapping[str, Any]) -> set[str]:
    """Find the keys to drop: those in the message, else lists, else all that set no width."""
    values = {k: v for p in parts_of(content) for k, v in p.items() if not isinstance(v, dict)}
    unread = {key for key in values if not _READ_KEYS.search(key)} - _KEPT_KEYS
    named = set(re.findall(r"[Ff]ield '(\w+)'", message))
    return (named & unread if named else {k for k in unread if isinstance(values[k], list)}) or (
        set() if named else unread
    )


def _without(content: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in content.items()
        if key not in keys
    }


def model_classes(family: Family) -> Iterator[tuple[Any, PreTrainedConfig]]:
    """Yield classes of the family's own model with the config of each, best match first."""
    config = family.config
    assert config is not None, "callers check for a config"
    if family.trust_remote_code and "auto_map" in family.content:
        yield AutoModelForCausalLM, config
        return
    configs = family.configs
    of_class: dict[Any, PreTrainedConfig] = {type(part): part for part in reversed(configs)}
    found: dict[Any, PreTrainedConfig] = {}
    for name in family.content.get("architectures") or ():
        model_class: Any = getattr(transformers, str(name), None)
        part = of_class.get(getattr(model_class, "config_class", None))
        if part is not None:
            found[model_class] = part
    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        for part in configs:
            if type(part) in mapping:
                model_class = mapping[type(part)]
                # A class that is registered for a whole config may still take its text part.
                found.setdefault(model_class, of_class.get(model_class.config_class, part))
    yield from found.items()


def build_small(
    model_class: Any,
    config: PreTrainedConfig,
    *,
    num_layers: int,
    device: str = "cpu",
    keep_rope: bool = True,
) -> Any:
    """Build the family's model with few layers and a small vocabulary, not initialized.

    Args:
        model_class: The class of the model.
        config: Its config.
        num_layers: Number of decoder layers.
        device: Device of the weights.
        keep_rope: Use the RoPE of the config, which may be of an unknown type; else default RoPE.
    """
    small = copy.deepcopy(config)
    _shrink(small, num_layers)
    if not keep_rope:
        _make_rope_plain(small)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    with no_init_weights(), torch.device(device), quietly():
        if model_class is AutoModelForCausalLM:
            model: Any = model_class.from_config(small, trust_remote_code=True, **options)
        else:
            model = model_class._from_config(small, **options)  # noqa: SLF001
    model.tie_weights()
    return model.eval()


def _shrink(config: PreTrainedConfig, num_layers: int) -> None:
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            _shrink(value, num_layers)
    given = getattr(config, "num_hidden_layers", None)
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and value and len(value) == given and key != "hidden_sizes":
            setattr(config, key, value[:num_layers])
        elif key in LAYER_KEYS and isinstance(value, int):
            setattr(config, key, num_layers)
        elif key.endswith("vocab_size") and isinstance(value, int):
            setattr(config, key, min(value, SMALL_VOCAB))
        elif key.endswith(("token_id", "token_index")):
            setattr(config, key, _small_ids(value))


def _make_rope_plain(config: PreTrainedConfig) -> None:
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            _make_rope_plain(value)
    found, plain = getattr(config, "rope_parameters", None), dict(PLAIN_ROPE)
    kinds = found if isinstance(found, dict) else {}
    if kinds and all(isinstance(rope, dict) for rope in kinds.values()):
        plain = {kind: dict(PLAIN_ROPE) for kind in kinds}
    if found is not None:
        config.rope_parameters = plain


def _small_ids(ids: Any) -> Any:
    if isinstance(ids, list):
        return [_small_ids(i) for i in ids]
    return min(ids, SMALL_VOCAB - 1) if isinstance(ids, int) else ids


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the logging of transformers for a config that is only measured."""
    level = logging.get_verbosity()
    logging.set_verbosity(_SILENT)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
