"""Overrides: what the user states about a trained draft, and where its config is silent."""

from collections.abc import Callable
from dataclasses import dataclass

from speculators_cli.core.models.verifier_shape import VerifierShape


@dataclass(frozen=True)
class Overrides:
    """Values that replace those of a draft's config.json, and how to read its verifier's config."""

    verifier_name_or_path: str | None = None
    verifier_architectures: tuple[str, ...] | None = None
    target_layer_ids: tuple[int, ...] | None = None
    read_verifier: Callable[[str], VerifierShape] | None = None


NO_OVERRIDES = Overrides()
