"""Sizes of a verifier, from its config.json only, which determine a draft's shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.family import Family, check_sizes
from speculators_cli.core.models.plain_family import find_plain
from speculators_cli.core.models.repo_files import CONFIG_NAME, RepoFiles
from speculators_cli.core.models.rope import choose_rope
from speculators_cli.core.models.verifier_files import VerifierFiles

# Defaults for families without attention, or without a limit of positions.
DEFAULT_HEAD_DIM = 64
DEFAULT_MAX_POSITIONS = 131072


@dataclass(frozen=True, kw_only=True)
class VerifierShape:
    """Sizes of the verifier, from its config.json, which determine a draft's shape."""

    name_or_path: str
    architectures: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: Mapping[str, Any]  # as supported by a draft
    max_position_embeddings: int
    is_tied: bool  # whether the LM head is the embedding
    rope_left_out: str | None = None  # what a draft does not support of its RoPE


def read_verifier_shape(files: VerifierFiles, *, trust_remote_code: bool) -> VerifierShape:
    """Read the sizes in the verifier's config.json.

    Raises:
        SettingsError: The folder or its config.json cannot be used.
        MachineError: The hub is unreachable or denies access.
    """
    return VerifierShape(**read_sizes(open_family(files, trust_remote_code=trust_remote_code)))


def hint_of(family: Family) -> str:
    """Return the hint for an unsupported family; starts with a verb."""
    if "auto_map" in family.content and not family.trust_remote_code:
        return "Pass `--trust-remote-code` if you trust the code"
    if family.config is None and family.is_supported:
        return "Correct its config.json, or download the verifier again"
    if family.config is None:
        return "Run `pip install -U transformers`, or choose a supported verifier"
    return "Choose a verifier of a family in `docs/reference/verifiers.md`"


def open_family(files: RepoFiles, *, trust_remote_code: bool) -> Family:
    """Read config.json.

    Raises:
        SettingsError: It is missing, cannot be read, or does not describe a model.
        MachineError: The hub is unreachable or denies access.
    """
    content = files.read_json(CONFIG_NAME)
    check_sizes(files.name_or_path, content)
    plain = find_plain(files.name_or_path, content)
    if plain is not None:
        return plain
    # It takes seconds to import.
    from speculators_cli.core.models.family_code import read_family

    return read_family(files.name_or_path, content, trust_remote_code=trust_remote_code)


def given_tie(family: Family) -> bool | None:
    """Whether config.json ties the LM head; None where it is missing or contradictory."""
    parts = (family.content, family.text_content)
    given = {tie for part in parts if (tie := part.get("tie_word_embeddings")) is not None}
    return bool(given.pop()) if len(given) == 1 else None


def _count(family: Family, *keys: str) -> int | None:
    value = family.value(*keys)
    # Some families have one size per layer.
    counts = value if isinstance(value, list | tuple) else [value]
    return next((x for x in counts if isinstance(x, int) and x > 0), None)


def _architectures(family: Family) -> tuple[str, ...]:
    given = family.content.get("architectures")
    listed = given if isinstance(given, list) else [given]
    return tuple(name for name in listed if isinstance(name, str))


def read_sizes(family: Family) -> dict[str, Any]:
    """Return the fields of `VerifierShape`, with common values for missing ones.

    Raises:
        SettingsError: The config has no hidden size or no number of layers.
    """
    hidden = _count(family, "hidden_size", "d_model", "n_embd", "model_dim", "dim")
    num_layers = _count(
        family,
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"),
    )
    for key, found in (("hidden_size", hidden), ("num_hidden_layers", num_layers)):
        if found is None:
            raise SettingsError(
                f"The config of verifier `{family.name}` has no usable `{key}`",
                hint=hint_of(family),
            )
    assert hidden is not None, "checked above"
    assert num_layers is not None, "checked above"
    head_dim = _count(family, "head_dim")
    heads = _count(family, "num_attention_heads", "n_head", "n_heads", "num_heads")
    heads = heads or max(hidden // (head_dim or DEFAULT_HEAD_DIM), 1)
    kv_heads = _count(family, "num_key_value_heads", "n_head_kv", "num_kv_heads") or heads
    positions = _count(
        family, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length"
    )
    positions = positions or DEFAULT_MAX_POSITIONS
    head_dim = head_dim or max(hidden // heads, 2)
    odd = None
    if head_dim % 2:
        # RoPE rotates pairs. A draft may have another head size than the verifier.
        even = max(head_dim - 1, 2)
        odd = f"has an odd `head_dim`, {head_dim}, and the heads of the draft have {even}"
        head_dim = even
    rope = choose_rope(family.rope, head_dim=head_dim, max_position_embeddings=positions)
    eps = family.value("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps")
    is_tied = given_tie(family)
    return {
        "name_or_path": family.name,
        "architectures": _architectures(family),
        "hidden_size": hidden,
        "intermediate_size": _count(family, "intermediate_size", "n_inner") or 4 * hidden,
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads if heads % kv_heads == 0 else heads,
        "head_dim": head_dim,
        "rms_norm_eps": eps if isinstance(eps, float) else 1e-6,
        "rope_parameters": rope.parameters,
        "rope_left_out": odd or rope.left_out,
        "max_position_embeddings": positions,
        "is_tied": bool(family.value("tie_word_embeddings") if is_tied is None else is_tied),
    }
