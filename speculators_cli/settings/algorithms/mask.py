"""MaskSettings: what algorithms with a mask token have in common."""

from typing import Annotated

from pydantic import Field

from speculators_cli.settings.base import REFUSED_ON_RESUME, Settings


class MaskSettings(Settings):
    """The token that drafts read in place of an unknown one."""

    mask_token_id: Annotated[int | None, REFUSED_ON_RESUME] = Field(
        None,
        ge=0,
        description="Verifier token that stands for an unknown token; default: one that the "
        "tokenizer does not use",
    )
