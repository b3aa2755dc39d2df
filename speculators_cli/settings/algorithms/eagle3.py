"""Settings of EAGLE-3."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from speculators_cli.settings.base import (
    REFUSED_ON_RESUME,
    WARNED_ON_RESUME,
    LayerIdsSetting,
    OffFlag,
    Settings,
)


def _or_none(value: int | None) -> int | None:
    return value or None


class EagleSettings(Settings):
    """What EAGLE-3 and P-EAGLE have in common."""

    ttt_steps: Annotated[int, WARNED_ON_RESUME] = Field(
        3, ge=1, description="Number of TTT (training-time test) steps: draft tokens in training"
    )
    ttt_step_loss_decay: Annotated[float, WARNED_ON_RESUME] = Field(
        1.0, gt=0, description="Per-step loss decay: TTT step k is weighted by decay^k"
    )
    loss: Annotated[Literal["kl"], WARNED_ON_RESUME] = Field(
        "kl", description="Loss between the verifier's and the draft's distributions"
    )
    norm_before_residual: Annotated[bool, REFUSED_ON_RESUME] = Field(
        True, description="Take the first layer's residual after its norm; off: before"
    )
    norm_before_fc: Annotated[bool, REFUSED_ON_RESUME] = Field(
        False, description="Normalize the concatenated aux hidden states"
    )
    sliding_window: Annotated[int | None, AfterValidator(_or_none), REFUSED_ON_RESUME] = Field(
        None,
        ge=0,
        description="Sliding window of the draft's attention, in tokens, the query's own included; "
        "0 is full attention; default: full attention, or as in the draft that training starts "
        "from",
    )
    full_attention_layers: Annotated[LayerIdsSetting, REFUSED_ON_RESUME] = Field(
        None,
        description="Decoder layers of the draft without the sliding window, ascending from 0; "
        "vLLM serves only drafts whose layers are all of one kind; default: none, or as in the "
        "draft that training starts from",
    )
    train_head: Annotated[bool, REFUSED_ON_RESUME, OffFlag("--freeze-head")] = Field(
        True, description="Train the draft's LM head; off: keep it frozen at the verifier's weights"
    )


class Eagle3Settings(EagleSettings):
    """What is special to EAGLE-3, beside the settings that it shares with P-EAGLE."""

    fc_norm: Annotated[bool, REFUSED_ON_RESUME] = Field(
        False, description="Normalize the aux hidden states of each layer separately"
    )
    norm_output: Annotated[bool, REFUSED_ON_RESUME] = Field(
        False, description="Feed normalized hidden states to the next TTT step"
    )

    @model_validator(mode="after")
    def _one_norm_before_fc(self) -> Self:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("`norm_before_fc` and `fc_norm` cannot both be on")
        return self
