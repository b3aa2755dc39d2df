"""TrainState: the state of a run except for its tensors, and its validation on reading."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Self

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic.dataclasses import dataclass

CHECKPOINT_NAME = re.compile(r"\d+|step-\d+")  # an epoch, or a step within one
MOST = 10**12  # largest value of any counter

Count = Annotated[int, Field(ge=0, le=MOST)]


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder name is that of a checkpoint of `train`."""
    return CHECKPOINT_NAME.fullmatch(name) is not None


def _check_best(best: dict[str, Any] | None) -> dict[str, Any] | None:
    if best is None:
        return None
    if not (isinstance(best.get("name"), str) and best["name"].isdecimal()):
        raise ValueError(f"`name` must be an epoch, got `{best.get('name')}`")
    for key, value in best.items():
        if key != "name" and not (value is None or isinstance(value, int | float)):
            raise ValueError(f"`{key}` must be a number, got `{value}`")
    return best


@dataclass(frozen=True, config=ConfigDict(strict=True))
class TrainState:
    """The state of a run except for its tensors."""

    step: Count  # optimizer steps done
    epoch: Count  # the epoch of the next step
    step_in_epoch: Count
    run_id: str
    started_at: FiniteFloat  # seconds since 1970
    global_batch: Annotated[int, Field(ge=1, le=MOST)]  # packed sequences per step, over all ranks
    num_ranks: Annotated[int, Field(ge=1, le=MOST)]
    data_hash: str
    vocab_map_hash: str
    settings: dict[str, dict[str, Any]]
    # Name and metrics of the best checkpoint.
    best: Annotated[dict[str, Any] | None, AfterValidator(_check_best)]
    num_skipped_steps: Count
    metrics: dict[str, float]  # of the last validation
    # Missing in states saved by earlier versions.
    generation: Count = (
        0  # number of earlier runs in the same save path, each of which counted them
    )
    content_hash: str | None = None  # of the samples
    verifier_hash: str | None = None  # of the verifier's frozen weights
    # What hidden states were computed by while training; None if they are stored.
    engine: dict[str, str] | None = None
    # Whether samples and packing were the same from the first step on.
    has_same_data: bool = False
    packing: str | None = None  # fingerprint of the packing of the first epoch

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Parse the state saved in a checkpoint; unknown keys of newer versions are ignored.

        Raises:
            ValueError: A value is missing or invalid.
        """
        known = {field.name for field in fields(cls)}
        try:
            state = cls(**{key: value for key, value in content.items() if key in known})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            reason = first["msg"].replace("Input should be", "must be")
            raise ValueError(f"`{place}` {reason[0].lower()}{reason[1:]}") from None
        if state.step_in_epoch > state.step or state.epoch > state.step:
            raise ValueError(
                f"step {state.step:,} cannot be in epoch {state.epoch:,} at its step "
                f"{state.step_in_epoch:,}"
            )
        return state
