"""P-EAGLE (arXiv 2602.01469), as an entry of the table of algorithms."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from speculators_cli.core.algorithms.eagle3.eagle_algorithm import EagleAlgorithm, choose_windows
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.mask_algorithm import MaskAlgorithm
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.algorithms.peagle.config import MASK_HIDDEN, PEagleConfig
from speculators_cli.core.algorithms.peagle.config_reader import is_peagle, read_draft_config
from speculators_cli.core.algorithms.peagle.contract import FORMATS
from speculators_cli.core.algorithms.peagle.cost import PEagleCost
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.algorithms.peagle.draft import PEagleDraft
from speculators_cli.core.algorithms.peagle.drafter import PEagleDrafter
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.settings.algorithms.peagle import PEagleSettings

NORMS = ("norm_before_residual", "norm_before_fc")


class PEagle(
    MaskAlgorithm[PEagleConfig, PEagleSettings], EagleAlgorithm[PEagleConfig, PEagleSettings]
):
    """EAGLE-3 whose later steps read a mask: all tokens in one pass."""

    name = "peagle"
    settings_class = PEagleSettings
    cost = PEagleCost()
    title = "P-EAGLE"
    card_settings: ClassVar = {
        **EagleAlgorithm.card_settings,
        "down_sample_ratio": "positions that a TTT step keeps of those of the step before",
    }
    export_formats = FORMATS
    fixed_names = (*NORMS, "mask_token_id")
    draft_class = PEagleDraft
    training_class = PEagleTraining
    drafter_class = PEagleDrafter

    def recognises(self, content: Mapping[str, Any]) -> bool:
        """Whether the content of a config.json is of a P-EAGLE draft, speculators or plain."""
        return is_peagle(content)

    def read_config(
        self, content: Mapping[str, Any], overrides: Overrides, *, name: str
    ) -> PEagleConfig:
        """The config of a trained draft, from any tool."""
        return read_draft_config(content, overrides, name=name)

    def checkpoint_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """The mask's hidden states of any tool in one shape; other tensors as they are."""
        return tensor.reshape(1, 1, -1) if name == MASK_HIDDEN else tensor

    def build_config(self, settings: PEagleSettings, shape: Mapping[str, Any]) -> PEagleConfig:
        """The config of a fresh draft; without the verifier's files, its last token is the mask.

        Raises:
            SettingsError: No step reads a mask, or the windows are those of no layers.
        """
        refuse_one_step(settings)
        return PEagleConfig(
            **self.with_mask(shape),
            **{name: getattr(settings, name) for name in NORMS},
            **choose_windows(settings, num_layers=shape["num_layers"]),
            fc_norm=False,
            norm_output=False,
            ttt_steps=settings.ttt_steps,
        )

    def build(
        self,
        config: PEagleConfig,
        verifier: FrozenVerifier,
        vocab_map: VocabMap,
        settings: PEagleSettings,
        *,
        use_fast_kernels: bool,
        seed: int,
    ) -> Eagle3Training:
        """A fresh draft on the device of the verifier's frozen parts, ready to train."""
        draft = super().build(
            config, verifier, vocab_map, settings, use_fast_kernels=use_fast_kernels, seed=seed
        )
        assert isinstance(draft, PEagleTraining)
        draft.sampling = DepthSampling.of(settings)
        return draft

    def adapt_config(self, config: PEagleConfig, settings: PEagleSettings) -> PEagleConfig:
        """The config of a trained draft with other TTT steps and windows."""
        refuse_one_step(settings)
        return super().adapt_config(config, settings)


def refuse_one_step(settings: PEagleSettings) -> None:
    """Refuse a draft whose mask is never read.

    Raises:
        SettingsError: It has one TTT step.
    """
    if settings.ttt_steps < 2:
        raise SettingsError(
            "`--ttt-steps` is `1`, but step 0 of a P-EAGLE draft reads no mask",
            hint="Pass `--ttt-steps 2` or more, or train with `--algorithm eagle3`",
        )
