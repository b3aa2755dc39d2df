"""Every setting of `speculators inspect-data`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from speculators_cli.settings.base import Folder, Positional, Settings, TotalSeqLen, TrustRemoteCode


class InspectSettings(Settings):
    """What is looked at, and how closely."""

    data_path: Annotated[Folder, Positional("DATA_PATH")] = Field(
        description="Folder of samples, searched recursively"
    )
    samples: int = Field(
        64,
        ge=0,
        description="Number of samples whose hidden states are checked; ids and masks are checked "
        "in all",
    )
    verify: bool = Field(False, description="Read every byte and compare checksums")
    show: int | None = Field(
        None,
        ge=0,
        description="Print the text of this sample, counted from 0 in the order of file names",
    )
    html: Path | None = Field(
        None, description="Write the report as one self-contained HTML page with plots"
    )
    verifier_name_or_path: str | None = Field(
        None,
        min_length=1,
        description="Hub id or folder of the verifier, whose LM head is compared with the samples",
    )
    total_seq_len: TotalSeqLen = 8192
    tokens_per_second: float = Field(
        120_000.0,
        gt=0,
        description="Throughput assumed for the epoch estimates; the default is about that of one "
        "H100 with an 8B verifier",
    )
    trust_remote_code: TrustRemoteCode = False


class InspectDataSettings(Settings):
    """All settings of `speculators inspect-data`, in sections."""

    command = "inspect-data"

    inspect: InspectSettings = Field(title="Inspect")
