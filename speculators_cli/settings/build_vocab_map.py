"""Every setting of `speculators build-vocab-map`."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from speculators_cli.settings.base import (
    DataFormat,
    Folders,
    FormatVersion,
    MaxBadSamples,
    Settings,
    TrustRemoteCode,
    missing_path,
    path_error,
)


class CountSettings(Settings):
    """Where the counts of tokens come from."""

    token_freq_path: tuple[Path, ...] = Field(
        (),
        description="File of token counts, used instead of samples; may be repeated, counts are "
        "summed",
    )
    data_path: Folders = Field(
        (),
        description="Folder of samples, searched recursively; may be repeated; default: data",
    )
    data_format: DataFormat = "auto"
    data_format_version: FormatVersion = 1
    all_tokens: bool = Field(False, description="Count all tokens, not only supervised ones")
    max_bad_samples: MaxBadSamples = None

    @model_validator(mode="after")
    def _one_source_that_exists(self) -> Self:
        if self.token_freq_path and self.data_path:
            raise ValueError("`--token-freq-path` and `--data-path` cannot both be given")
        for file in self.token_freq_path:
            if not file.exists():
                raise missing_path(file, flag="--token-freq-path")
            if file.is_dir():
                raise path_error(
                    file,
                    "is a folder",
                    hint=f"Pass the file in it, such as `{file / 'token_freq.pt'}`",
                    flag="--token-freq-path",
                )
        if not self.token_freq_path and not self.folders[0].is_dir():
            raise missing_path(
                self.folders[0],
                hint="Pass `--data-path` or `--token-freq-path`",
                flag="--data-path",
            )
        return self

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders of samples: those given, or `data`."""
        return self.data_path or (Path("./data"),)


class VocabularySettings(Settings):
    """The verifier's vocabulary, and how much of it the draft keeps."""

    verifier_name_or_path: str | None = Field(
        None, min_length=1, description="Hub id or folder of the verifier"
    )
    target_vocab_size: int | None = Field(
        None,
        ge=1,
        le=2**24,
        description="Size of the verifier vocabulary, used instead of the verifier",
    )
    draft_vocab_size: int = Field(32000, ge=1, description="Size of the draft vocabulary")
    keep_special: bool = Field(
        True,
        description="Always keep the verifier's end-of-sequence tokens and the control tokens of "
        "its chat template",
    )
    mass_samples: int = Field(
        16,
        ge=0,
        description="Number of samples to measure the verifier's probability mass within the draft "
        "vocabulary; 0 disables it",
    )
    trust_remote_code: TrustRemoteCode = False

    @model_validator(mode="after")
    def _size_is_known(self) -> Self:
        if (self.verifier_name_or_path is None) == (self.target_vocab_size is None):
            raise ValueError(
                "One of `--verifier-name-or-path` and `--target-vocab-size` must be given"
            )
        return self


class MapFilesSettings(Settings):
    """Where the maps go."""

    output_dir: Path = Field(
        Path(),
        description="Folder for d2t.npy, t2d.npy and token_freq.pt; existing files are replaced",
    )


class BuildVocabMapSettings(Settings):
    """All settings of `speculators build-vocab-map`, in sections."""

    command = "build-vocab-map"

    vocabulary: VocabularySettings = Field(default_factory=VocabularySettings, title="Vocabulary")
    counts: CountSettings = Field(default_factory=CountSettings, title="Counts")
    files: MapFilesSettings = Field(default_factory=MapFilesSettings, title="Files")
