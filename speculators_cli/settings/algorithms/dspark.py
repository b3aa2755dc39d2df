"""Settings of DSpark."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from speculators_cli.settings.algorithms.dflash import BlockSettings
from speculators_cli.settings.base import REFUSED_ON_RESUME, WARNED_ON_RESUME, refuse_unread

MarkovHeadType = Literal["vanilla", "gated", "rnn"]
MARKOV_HEAD_TYPES: tuple[str, ...] = get_args(MarkovHeadType)


class DSparkSettings(BlockSettings):
    """What is special to DSpark, beside the settings of blocks that it shares with DFlash."""

    markov_rank: Annotated[int, REFUSED_ON_RESUME] = Field(
        256, ge=1, description="Rank of the Markov head, a bias by the token before"
    )
    markov_head_type: Annotated[MarkovHeadType, REFUSED_ON_RESUME] = Field(
        "vanilla",
        description="Markov head: the token before alone, gated by the hidden state, or with a "
        "recurrent state over the block; vLLM serves vanilla ones only",
    )
    confidence_head: Annotated[bool, REFUSED_ON_RESUME] = Field(
        True, description="Predict for each draft token how probably it is accepted"
    )
    ce_weight: Annotated[float, WARNED_ON_RESUME] = Field(
        0.1, ge=0, description="Weight of the cross-entropy with the verifier's token"
    )
    l1_weight: Annotated[float, WARNED_ON_RESUME] = Field(
        0.9, ge=0, description="Weight of the L1 distance from the verifier's distribution"
    )
    confidence_weight: Annotated[float, WARNED_ON_RESUME] = Field(
        1.0, ge=0, description="Weight of the loss of the confidence head"
    )

    @model_validator(mode="after")
    def _the_weighted_head_is_there(self) -> Self:
        if not self.confidence_head:
            refuse_unread(self, ["confidence_weight"], "without `--confidence-head`")
        return self
