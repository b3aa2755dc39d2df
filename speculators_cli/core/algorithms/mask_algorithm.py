"""MaskAlgorithm: what algorithms with a mask token have in common."""

from collections.abc import Mapping
from typing import Any, TypeVar

from speculators_cli.core.algorithms.algorithm import Algorithm
from speculators_cli.core.algorithms.draft_config import MaskConfig
from speculators_cli.core.data.source import SampleSource, spread_evenly
from speculators_cli.core.errors import DataError
from speculators_cli.core.models.mask_token import choose_mask_token
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.settings.algorithms.mask import MaskSettings

NUM_READ = 32  # samples in which the mask token is looked for

MaskConfigT = TypeVar("MaskConfigT", bound=MaskConfig)
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

    def check_samples(self, config: MaskConfigT, samples: SampleSource) -> None:
        """Refuse samples that have the mask token; a few are read.

        Raises:
            DataError: A known token would look as an unknown one.
        """
        mask = config.mask_token_id
        if samples.max_token_id < mask:
            return
        for i in spread_evenly(len(samples), NUM_READ):
            if bool((samples.read(i).input_ids == mask).any()):
                raise DataError(
                    f"`{samples.path(i)}` has token {mask}, which is the mask token of the draft: "
                    "it would look as an unknown token",
                    hint="Pass `--mask-token-id` with a token that no sample has",
                )

    def with_mask(self, shape: Mapping[str, Any]) -> dict[str, Any]:
        """The shape of a fresh draft; without the verifier's files, its last token is the mask."""
        return {"mask_token_id": shape["vocab_size"] - 1, **shape}
