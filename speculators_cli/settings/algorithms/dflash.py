"""Settings of DFlash."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from speculators_cli.settings.algorithms.mask import MaskSettings
from speculators_cli.settings.base import REFUSED_ON_RESUME, WARNED_ON_RESUME, refuse_unread


class BlockSettings(MaskSettings):
    """What drafts of blocks have in common."""

    # Defaults of settings in other sections, where no value is given.
    defaults: ClassVar[Mapping[str, object]] = {
        "num_layers": 5,
        "draft_arch": "qwen3",
        "noise_std": 0.0,
    }

    block_size: Annotated[int, REFUSED_ON_RESUME] = Field(
        8,
        ge=2,
        description="Number of tokens in a block; DFlash proposes one fewer, DSpark all",
    )
    num_anchors: Annotated[int, WARNED_ON_RESUME] = Field(
        512,
        ge=1,
        description="Maximum number of anchors per packed sequence: positions after which a block "
        "is trained; of P-EAGLE, positions that are trained beyond the first TTT step",
    )
    block_loss_gamma: Annotated[float, WARNED_ON_RESUME] = Field(
        4.0, gt=0, description="Fixed decay: draft token k is weighted by exp(-k/gamma), k from 0"
    )
    draft_window: Annotated[int | None, REFUSED_ON_RESUME] = Field(
        None,
        ge=1,
        description="Sliding window of the draft's attention, in tokens; default: full attention",
    )


class DFlashSettings(BlockSettings):
    """What is special to DFlash."""

    block_loss: Annotated[Literal["kl", "ce", "tv"], WARNED_ON_RESUME] = Field(
        "kl",
        description="Loss of a draft token: KL divergence from the verifier's distribution, "
        "cross-entropy with the verifier's token, or total variation distance",
    )
    block_loss_weights: Annotated[Literal["decay", "dpace"], WARNED_ON_RESUME] = Field(
        "decay",
        description="Weights of the draft tokens in the loss: fixed decay, or by the probability "
        "that the tokens before are accepted (D-PACE, for cross-entropy only)",
    )
    dpace_alpha: Annotated[float, WARNED_ON_RESUME] = Field(
        0.5, ge=0, le=1, description="D-PACE: smoothing of the draft's probabilities towards 1"
    )
    causal_block: Annotated[bool, REFUSED_ON_RESUME] = Field(
        False, description="Let a block's tokens attend only to those before them in the block"
    )

    @model_validator(mode="after")
    def _weights_fit_the_loss(self) -> Self:
        if self.block_loss_weights == "dpace" and self.block_loss != "ce":
            raise ValueError("`--block-loss-weights dpace` needs `--block-loss ce`")
        if self.block_loss_weights == "decay":
            refuse_unread(self, ["dpace_alpha"], "without `--block-loss-weights dpace`")
        else:
            refuse_unread(self, ["block_loss_gamma"], "with `--block-loss-weights dpace`")
        return self
