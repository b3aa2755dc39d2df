"""Where the hidden states of a training run come from."""

from typing import Literal

from pydantic import Field

from speculators_cli.settings.base import Settings


class CaptureSettings(Settings):
    """Hidden states that are stored, or computed by the verifier while training."""

    capture: Literal["auto", "stored", "online"] = Field(
        "auto",
        description="Source of the hidden states: stored in the samples, or computed online by the "
        "verifier in each step; auto is online for a folder with tokens only",
    )
    capture_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Precision of the verifier in online capture; auto is bfloat16 on GPU and "
        "float32 on CPU",
    )
