"""Settings of P-EAGLE."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from speculators_cli.settings.algorithms.eagle3 import EagleSettings
from speculators_cli.settings.base import REFUSED_ON_RESUME, MaskTokenId


class PEagleSettings(EagleSettings):
    """What is special to P-EAGLE, beside the settings that it shares with EAGLE-3."""

    # Defaults where no value is given, also of settings in other sections.
    defaults: ClassVar[Mapping[str, object]] = {"num_layers": 4, "ttt_steps": 5}

    mask_token_id: Annotated[MaskTokenId, REFUSED_ON_RESUME] = None
