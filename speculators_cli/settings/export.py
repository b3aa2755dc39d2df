"""Every setting of `speculators export`."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from speculators_cli.settings.base import (
    MODEL_NAME,
    LayerIdsSetting,
    OffFlag,
    Positional,
    Settings,
    TrustRemoteCode,
)


class DraftSourceSettings(Settings):
    """The trained draft, and what its own config does not say."""

    checkpoint: Annotated[str, Positional("CHECKPOINT")] = Field(
        min_length=1,
        description="Checkpoint, save path of a run (its best checkpoint, else the latest), or "
        "folder or hub id of a speculators or EAGLE-3 draft",
    )
    verifier_name_or_path: Annotated[str | None, MODEL_NAME] = Field(
        None,
        min_length=1,
        description="Hub id or folder of the verifier to record in the export; default: read from "
        "the checkpoint",
    )
    target_layer_ids: LayerIdsSetting = Field(
        None,
        description="Verifier layers the draft was trained on, ascending; id k is the output after "
        "k layers; default: read from the checkpoint, else an early, a middle and a "
        "late layer",
    )
    trust_remote_code: TrustRemoteCode = False


class ExportFolderSettings(Settings):
    """What is written, and where."""

    output_dir: Path = Field(description="Folder to write; it appears whole or not at all")
    target: Literal["vllm", "sglang", "eagle"] = Field(
        "vllm",
        description="Serving engine to export for; vllm is the speculators format, eagle is plain "
        "EAGLE-3",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Data type of the weights"
    )
    num_speculative_tokens: int | None = Field(
        None,
        ge=1,
        description="Number of draft tokens per verifier pass; default: TTT steps of the training",
    )
    embeddings: Annotated[bool, OffFlag("--without-embeddings")] = Field(
        True, description="Include the embedding; off: the engine shares the verifier's"
    )
    max_shard_size: str = Field(
        "5GB", description="Maximum size of a weights file, such as 500MB or 5GB"
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="License for the model card, such as apache-2.0; default: read from the "
        "verifier's model card, else unknown",
    )
    overwrite: bool = Field(False, description="Replace an earlier export in the output folder")
    verify: bool = Field(
        True, description="Reload the export and compare names, shapes, values and logits"
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Hub repository to upload the finished folder to, such as me/draft",
    )

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", value):
            raise ValueError(f"must be a whole number of KB, MB or GB, got `{value}`")
        return value


class ExportSettings(Settings):
    """All settings of `speculators export`, in sections."""

    command = "export"

    source: DraftSourceSettings = Field(title="Checkpoint")
    export: ExportFolderSettings = Field(title="Export")
