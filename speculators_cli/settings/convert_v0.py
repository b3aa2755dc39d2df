"""Every setting of `speculators convert-v0`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speculators_cli.settings.base import (
    MODEL_NAME,
    Folder,
    LayerIdsSetting,
    Positional,
    Settings,
    TrustRemoteCode,
)


class FilesSettings(Settings):
    """What is read and what is written."""

    v0_path: Annotated[Folder, Positional("V0_PATH")] = Field(
        description="Folder of v0 samples, searched recursively"
    )
    output_dir: Path = Field(description="Folder for the v1 samples, with the same file names")
    dtype: Literal["bfloat16", "float16"] | None = Field(
        None, description="Data type of the written hidden states; default: unchanged"
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Number of files converted in parallel; default: number of cores, at most 4",
    )
    dry_run: bool = Field(False, description="Print what would be converted, write nothing")
    delete_source: bool = Field(
        False, description="Delete each v0 file after its v1 file was written and read back"
    )

    @model_validator(mode="after")
    def _folders_differ(self) -> Self:
        source, output = self.v0_path.resolve(), self.output_dir.resolve()
        if output == source or source in output.parents:
            raise ValueError("`--output-dir` must lie outside the folder of v0 samples")
        return self


class VerifierSettings(Settings):
    """What is known of the verifier that the samples come from."""

    verifier_name_or_path: Annotated[str | None, MODEL_NAME] = Field(
        None, min_length=1, description="Hub id or folder of the verifier"
    )
    undo_norm: bool = Field(
        False,
        description="Write last hidden states from before the final norm, for readers that ignore "
        "`last_hidden_state_is_normed`",
    )
    target_layer_ids: LayerIdsSetting = Field(
        None,
        description="Verifier layers of the aux hidden states, ascending; id k is the output after "
        "k layers; default: read from the data",
    )
    trust_remote_code: TrustRemoteCode = False

    @model_validator(mode="after")
    def _norm_is_known(self) -> Self:
        if self.undo_norm and self.verifier_name_or_path is None:
            raise ValueError("`--undo-norm` needs `--verifier-name-or-path`")
        return self


class ConvertV0Settings(Settings):
    """All settings of `speculators convert-v0`, in sections."""

    command = "convert-v0"

    files: FilesSettings = Field(title="Files")
    verifier: VerifierSettings = Field(default_factory=VerifierSettings, title="Verifier")
