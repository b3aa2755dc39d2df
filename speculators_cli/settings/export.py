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
        description="A checkpoint, the save path of a run (its best, else latest checkpoint), or a "
        "folder or hub id of a speculators or EAGLE-3 draft",
    )
    verifier_name_or_path: Annotated[str | None, MODEL_NAME] = Field(
        None,
        min_length=1,
        description="Hub id or folder of the verifier to name in the export; default: the one in "
        "the checkpoint",
    )
    target_layer_ids: LayerIdsSetting = Field(
        None,
        description="Verifier layers the draft was trained on, ascending; id k is the output after "
        "k layers; default: what the checkpoint says, else early, middle and late",
    )
    trust_remote_code: TrustRemoteCode = False


class ExportFolderSettings(Settings):
    """What is written, and where."""

    output_dir: Path = Field(description="Folder to write, which appears whole or not at all")
    target: Literal["vllm", "sglang", "eagle"] = Field(
        "vllm", description="Format: vllm (speculators), sglang or eagle (plain EAGLE-3)"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="Type of the weights: bfloat16, float16 or float32"
    )
    num_speculative_tokens: int | None = Field(
        None, ge=1, description="Tokens drafted at once; default: the TTT steps of the training"
    )
    embeddings: Annotated[bool, OffFlag("--without-embeddings")] = Field(
        True, description="Write the embedding too; off: the engine shares the verifier's"
    )
    max_shard_size: str = Field("5GB", description="Largest weights file, such as 500MB or 5GB")
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence for the model card, such as apache-2.0; default: what the verifier's "
        "model card says, else unknown",
    )
    overwrite: bool = Field(False, description="Replace an earlier export in the output folder")
    verify: bool = Field(
        True, description="Check names, shapes and values, load the export again, compare logits"
    )
    push_to_hub: str | None = Field(
        None,
        min_length=1,
        description="Upload the finished folder to this repository of the hub, such as me/draft",
    )

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB)", value):
            raise ValueError(f"must be a whole number of KB, MB or GB, got `{value}`")
        return value


class ExportSettings(Settings):
    """All settings of `speculators export`, in sections."""

    source: DraftSourceSettings = Field(title="Checkpoint")
    export: ExportFolderSettings = Field(title="Export")
