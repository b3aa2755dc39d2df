"""A verifier's model family: its config.json, and what its class in transformers makes of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.rope import gather_rope

TEXT_KEYS = (
    "text_config",
    "llm_config",
    "language_config",
    "language_model_config",
    "thinker_config",
    "decoder",
    "generator",
)
LAYER_KEYS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "depth",
    "depths",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
WIDTH_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "d_model",
    "n_embd",
)
MAX_WIDTH = 1_000_000  # no draft of a wider verifier fits on a device
MAX_LAYERS = 10_000  # more mean a damaged config: some classes build a list of them


@dataclass(frozen=True)
class Family:
    """A verifier's config, both as parsed by its class and as in its config.json.

    Args:
        name: Name of the verifier, for error messages.
        content: The content of config.json.
        configs: The config built by the class of its `model_type`, and its nested parts down to the
            text model's, which is last; empty if there is no such class, or it was not needed.
        is_supported: Whether transformers supports its `model_type`.
        problem: Why there is no config; completes a sentence about the verifier.
        left_out: Keys that the class rejects and that affect neither final norm nor logits.
        trust_remote_code: Whether custom code from the verifier's repository may run.
    """

    name: str
    content: Mapping[str, Any]
    configs: Sequence[Any]
    is_supported: bool
    problem: str | None = None
    left_out: frozenset[str] = frozenset()
    trust_remote_code: bool = False
    is_plain: bool = False  # one of `plain_family.py`

    @property
    def config(self) -> Any:
        """Return the config of the class of its `model_type`, or None."""
        return next(iter(self.configs), None)

    @property
    def text_content(self) -> Mapping[str, Any]:
        """Return the part of config.json that describes the text model."""
        content = self.content
        while key := next((k for k in TEXT_KEYS if isinstance(content.get(k), dict)), None):
            content = content[key]
        return content

    @property
    def rope(self) -> Any:
        """Return the text model's RoPE parameters, of any form."""
        if self.config is not None and not self.left_out:
            return getattr(self.configs[-1], "rope_parameters", None)
        return gather_rope(self.text_content)

    def value(self, *keys: str) -> Any:
        """Return the text model's value of the first of these keys that has one, or None."""
        config, content = next(reversed(self.configs), None), self.text_content
        for key in keys:
            is_raw = config is None or key in self.left_out
            found = content.get(key) if is_raw else _attribute(config, key, content.get(key))
            if found is not None:
                return found
        return None


def _attribute(config: Any, key: str, default: Any) -> Any:
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers has a value per layer, and raises for all of them
        return default


def check_sizes(name: str, content: Mapping[str, Any]) -> None:
    """Refuse sizes that no verifier has.

    Raises:
        SettingsError: There are some.
    """
    limits = dict.fromkeys(LAYER_KEYS, MAX_LAYERS) | dict.fromkeys(WIDTH_KEYS, MAX_WIDTH)
    for part in parts_of(content):
        for key, limit in limits.items():
            value = part.get(key)
            if isinstance(value, int) and not 0 <= value <= limit:
                raise SettingsError(
                    f"The config of verifier `{name}` has `{key}` {value:,}, expected 0 to "
                    f"{limit:,}",
                    hint="Download the verifier again",
                )


def parts_of(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the content of a config.json and every object in it."""
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from parts_of(value)
