"""Settings of P-EAGLE."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from speculators_cli.settings.algorithms.eagle3 import EagleSettings
from speculators_cli.settings.algorithms.mask import MaskSettings
from speculators_cli.settings.base import WARNED_ON_RESUME


class PEagleSettings(EagleSettings, MaskSettings):
    """What is special to P-EAGLE, beside the settings that it shares with EAGLE-3."""

    # Defaults where no value is given, also of settings in other sections.
    defaults: ClassVar[Mapping[str, object]] = {"num_layers": 4, "ttt_steps": 5}

    down_sample_ratio: Annotated[float, WARNED_ON_RESUME] = Field(
        0.7,
        gt=0,
        le=1,
        description="COD sampling: fraction of the positions that each TTT step after the first "
        "keeps of the step before; 1 trains all positions at all steps",
    )
    down_sample_ratio_min: Annotated[float, WARNED_ON_RESUME] = Field(
        0.2,
        ge=0,
        le=1,
        description="COD sampling: smallest fraction of all positions that a TTT step keeps",
    )
    num_anchors: Annotated[int | None, WARNED_ON_RESUME] = Field(
        None,
        ge=1,
        description="Maximum number of positions per packed sequence that are trained beyond the "
        "first TTT step",
    )

    @model_validator(mode="after")
    def _smallest_fraction_is_smaller(self) -> Self:
        if self.down_sample_ratio_min > self.down_sample_ratio:
            raise ValueError(
                f"`--down-sample-ratio-min` is `{self.down_sample_ratio_min:g}`, above "
                f"`--down-sample-ratio`, which is `{self.down_sample_ratio:g}`"
            )
        return self
