"""Every setting of `speculators inspect-data`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from speculators_cli.settings.base import Folder, Positional, Settings, TrustRemoteCode


class InspectSettings(Settings):
    """What is looked at, and how closely."""

    data_path: Annotated[Folder, Positional("DATA_PATH")] = Field(
        description="Folder of samples, searched recursively"
    )
    samples: int = Field(
        64, ge=0, description="Samples whose hidden states are looked at; ids and masks are of all"
    )
    verify: bool = Field(False, description="Read every byte and compare it with its checksum")
    show: int | None = Field(
        None, ge=0, description="Write the text of this sample, counted from 0, as the files sort"
    )
    html: Path | None = Field(
        None, description="Write the report as a page with plots, all in one file"
    )
    verifier_name_or_path: str | None = Field(
        None,
        min_length=1,
        description="Hub id or folder of the verifier; asked whether it predicts the samples",
    )
    total_seq_len: int = Field(8192, ge=2, description="Tokens in one packed sequence")
    tokens_per_second: float = Field(
        120_000.0,
        gt=0,
        description="Speed of training that the time and disk rate of an epoch are told for; one "
        "H100 trains a draft for an 8B verifier at about the default",
    )
    trust_remote_code: TrustRemoteCode = False


class InspectDataSettings(Settings):
    """All settings of `speculators inspect-data`, in sections."""

    inspect: InspectSettings = Field(title="Inspect")
