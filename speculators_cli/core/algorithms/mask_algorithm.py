"""MaskAlgorithm: what algorithms with a mask token have in common."""

from collections.abc import Mapping
from typing import Any, TypeVar

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.models.mask_token import choose_mask_token
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.algorithms.mask import MaskSettings

MaskConfigT = TypeVar("MaskConfigT", bound=DraftConfig)
MaskSettingsT = TypeVar("MaskSettingsT", bound=MaskSettings)


class MaskAlgorithm(Algorithm[MaskConfigT, MaskSettingsT]):
    """An algorithm whose drafts read a mask in place of unknown tokens."""

    def choose_values(
        self,
        settings: MaskSettingsT,
        files: VerifierFiles,
        vocab_size: int,
        *,
        trust_remote_code: bool,
    ) -> Mapping[str, Any]:
        """The mask token."""
        token = choose_mask_token(
            settings.mask_token_id, files, vocab_size, trust_remote_code=trust_remote_code
        )
        return {"mask_token_id": token}

    def with_mask(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """The shape of a fresh draft; without the verifier's files, its last token is the mask."""
        return {"mask_token_id": shape["vocab_size"] - 1, **shape}
