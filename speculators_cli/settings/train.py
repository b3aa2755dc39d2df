"""Every setting of `speculators train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from speculators_cli.settings.algorithms import ALGORITHM_SETTINGS, refuse_other_algorithms
from speculators_cli.settings.algorithms.dflash import DFlashSettings
from speculators_cli.settings.algorithms.dspark import DSparkSettings
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from speculators_cli.settings.base import (
    MODEL_NAME,
    REFUSED_ON_RESUME,
    WARNED_ON_RESUME,
    ComputeDtype,
    DataFormat,
    DataPaths,
    Device,
    Folders,
    FormatVersion,
    GemmDtype,
    Kernels,
    KeyOf,
    LayerIdsSetting,
    ListOf,
    MaxBadSamples,
    Settings,
    Sharding,
    TotalSeqLen,
    TrustRemoteCode,
    check_float8_products,
    fill_in_defaults,
    is_conversations,
    not_a_choice,
    path_error,
    refuse_unread,
)
from speculators_cli.settings.capture import CaptureSettings

LOGGER_NAMES = ("trackio", "wandb", "tensorboard")


class DraftArch(StrEnum):
    """Kinds of decoder layer a draft can have."""

    LLAMA = "llama"
    QWEN3 = "qwen3"


# Settings that `bench` has, too.
_ALGORITHM = KeyOf(ALGORITHM_SETTINGS)
Algorithm = Annotated[
    str,
    _ALGORITHM,
    AfterValidator(_ALGORITHM.check),
    Field(description="Speculative decoding algorithm"),
]
ArchSetting = Annotated[
    DraftArch, Field(description="Architecture of the draft model's decoder layers")
]
NumLayers = Annotated[int, Field(ge=1, description="Number of decoder layers of the draft model")]
NoiseStd = Annotated[
    float,
    Field(ge=0, description="Noise added to aux hidden states during training, uniform in [-x, x]"),
]
NumWorkers = Annotated[
    int | None,
    Field(
        ge=0, description="Number of threads that read samples; default: cores per rank, at most 8"
    ),
]
PrefetchFactor = Annotated[
    int,
    Field(
        ge=1,
        description="Maximum number of packed sequences prefetched per thread; starts at one and "
        "grows while training waits for data",
    ),
]


class RunSettings(Settings):
    """How long a run is, where it writes and how it is followed."""

    save_path: Path = Field(
        Path("./checkpoints"), description="Folder for checkpoints, one subfolder per epoch"
    )
    epochs: Annotated[int, WARNED_ON_RESUME] = Field(20, ge=1, description="Number of epochs")
    max_steps: Annotated[int | None, WARNED_ON_RESUME] = Field(
        None, ge=1, description="Stop after this many optimizer steps, even within an epoch"
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many epochs in a row without a better one: by the acceptance "
        "length on `--evaluate-prompts`, else by the validation; default: never",
    )
    resume_from_checkpoint: bool = Field(
        True,
        description="Resume from the latest checkpoint in the save path; off: start from scratch "
        "and replace old checkpoints once the first new one is saved",
    )
    logger: Annotated[str, ListOf(LOGGER_NAMES)] = Field(
        "", description="Metric loggers, separated by commas"
    )
    log_dir: Path = Field(Path("./logs"), description="Folder for logs")
    run_name: str | None = Field(
        None, description="Name of the run in the loggers; default: name of the save path"
    )
    log_every_steps: int = Field(
        10, ge=1, description="Number of optimizer steps between log lines"
    )
    seed: Annotated[int, REFUSED_ON_RESUME] = Field(
        0, ge=0, description="Random seed for weights, sample order and noise"
    )

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The loggers asked for, in order, without repeats."""
        return tuple(dict.fromkeys(name.strip() for name in self.logger.split(",") if name.strip()))

    def limit_steps(self, num_steps: int) -> int:
        """Optimizer steps of the run, where its epochs have `num_steps`."""
        return num_steps if self.max_steps is None else min(num_steps, self.max_steps)

    @field_validator("logger")
    @classmethod
    def _loggers_exist(cls, value: str) -> str:
        for name in filter(None, (part.strip() for part in value.split(","))):
            if name not in LOGGER_NAMES:
                raise not_a_choice(name, LOGGER_NAMES)
        return value

    @field_validator("run_name")
    @classmethod
    def _run_name_is_one_folder(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or value in {".", ".."} or "/" in value):
            raise ValueError(f"must be usable as the name of a folder, got `{value}`")
        return value


class DataSettings(Settings):
    """Which samples are read, and how they become batches."""

    data_path: DataPaths = Field(
        (Path("./data"),),
        min_length=1,
        validate_default=True,
        description="Folder of samples or of shards of tokens, searched recursively; may be "
        "repeated; or a JSONL, JSON or Parquet file of conversations, for online capture",
    )
    val_data_path: Folders = Field(
        (),
        description="Folder of validation samples, used instead of a split of the data path; may be"
        " repeated",
    )
    data_format: Annotated[DataFormat, WARNED_ON_RESUME] = "auto"
    data_format_version: Annotated[FormatVersion, WARNED_ON_RESUME] = 1
    train_data_ratio: Annotated[float, REFUSED_ON_RESUME] = Field(
        0.9,
        gt=0,
        le=1,
        description="Fraction of samples used for training; the rest is used for validation",
    )
    total_seq_len: Annotated[TotalSeqLen, REFUSED_ON_RESUME] = 8192
    noise_std: Annotated[NoiseStd, WARNED_ON_RESUME] = 0.05
    num_workers: NumWorkers = None
    prefetch_factor: PrefetchFactor = 2
    max_bad_samples: MaxBadSamples = None
    check_samples: bool = Field(
        True,
        description="Check a few samples against the verifier's LM head before training; hidden "
        "states that do not match are an error",
    )
    allow_changed_data: bool = Field(
        False,
        description="Resume even if the samples differ from those the run began with, or are "
        "packed in another order",
    )

    @model_validator(mode="after")
    def _one_thing_chooses_validation_samples(self) -> Self:
        if self.val_data_path and self.train_data_ratio < 1:
            refuse_unread(self, ["train_data_ratio"], "with `--val-data-path`")
        return self

    @property
    def conversations(self) -> Path | None:
        """The file of conversations, if the data path is one."""
        return self.data_path[0] if is_conversations(self.data_path[0]) else None

    @field_validator("data_path")
    @classmethod
    def _conversations_are_alone(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        files = [path for path in value if is_conversations(path)]
        if files and len(value) > 1:
            raise ValueError(f"a file of conversations, `{files[0]}`, must be the only one")
        return value


class DraftSettings(Settings):
    """The verifier, and the shape of the draft model trained for it."""

    verifier_name_or_path: Annotated[str, MODEL_NAME, WARNED_ON_RESUME] = Field(
        min_length=1, description="Hub id or folder of the verifier"
    )
    num_layers: Annotated[NumLayers, REFUSED_ON_RESUME] = 1
    from_checkpoint: Annotated[str | None, WARNED_ON_RESUME] = Field(
        None,
        min_length=1,
        description="Initialize from a trained draft model: a checkpoint, or a folder or hub id of "
        "a speculators or EAGLE-3 draft; its shape and vocabulary are kept",
    )
    full_vocab: Annotated[bool, REFUSED_ON_RESUME] = Field(
        False, description="Use the verifier's full vocabulary; d2t and t2d are not read"
    )
    draft_vocab_size: int | None = Field(
        None,
        ge=1,
        description="Size of the draft vocabulary of a run that is given conversations: their most "
        "frequent supervised tokens; default: d2t and t2d are read",
    )
    d2t_path: Path = Field(
        Path("d2t.npy"),
        validate_default=True,
        description="Draft-to-target map: offset from each draft token id to its verifier token id",
    )
    t2d_path: Path = Field(
        Path("t2d.npy"),
        validate_default=True,
        description="Target-to-draft map: which verifier tokens are in the draft vocabulary",
    )
    algorithm: Annotated[Algorithm, REFUSED_ON_RESUME] = "eagle3"
    draft_arch: Annotated[ArchSetting, REFUSED_ON_RESUME] = DraftArch.LLAMA
    target_layer_ids: Annotated[LayerIdsSetting, REFUSED_ON_RESUME] = Field(
        None,
        description="Verifier layers of the aux hidden states, ascending; id k is the output after "
        "k layers; default: read from the data",
    )
    trust_remote_code: TrustRemoteCode = False

    @field_validator("d2t_path", "t2d_path")
    @classmethod
    def _map_exists(cls, value: Path, info: ValidationInfo) -> Path:
        others = ("full_vocab", "from_checkpoint", "draft_vocab_size")
        if any(info.data.get(name) for name in others):
            return value
        if value.is_dir():
            inside = value / ("d2t.npy" if info.field_name == "d2t_path" else "t2d.npy")
            raise path_error(value, "is a folder", hint=f"Pass the file in it, such as `{inside}`")
        if not value.is_file():
            raise path_error(
                value,
                "does not exist",
                hint="Make both maps with `speculators build-vocab-map`, or pass `--full-vocab`, "
                "or `--draft-vocab-size` with conversations",
            )
        return value


class OptimizerSettings(Settings):
    """AdamW."""

    lr: Annotated[float, WARNED_ON_RESUME] = Field(1e-4, gt=0, description="Peak learning rate")
    weight_decay: Annotated[float, WARNED_ON_RESUME] = Field(
        0.01, ge=0, description="Weight decay; norm weights are excluded"
    )
    max_grad_norm: Annotated[float, WARNED_ON_RESUME] = Field(
        1.0, gt=0, description="Gradient clipping norm"
    )
    gradient_accumulation_steps: Annotated[int, WARNED_ON_RESUME] = Field(
        1, ge=1, description="Number of packed sequences accumulated per rank in one optimizer step"
    )
    max_skipped_steps: int = Field(
        10, ge=1, description="Stop after this many consecutive steps with non-finite gradients"
    )


class ScheduleSettings(Settings):
    """How the learning rate moves over the run."""

    scheduler: Annotated[Literal["linear", "cosine", "none"], WARNED_ON_RESUME] = Field(
        "linear",
        description="Learning-rate schedule: linear and cosine decay to zero after warmup, none is "
        "constant without warmup",
    )
    warmup_ratio: Annotated[float, WARNED_ON_RESUME] = Field(
        0.01, ge=0, lt=1, description="Fraction of steps used for warmup"
    )

    @model_validator(mode="after")
    def _a_warmup_is_scheduled(self) -> Self:
        if self.scheduler == "none":
            refuse_unread(self, ["warmup_ratio"], "with `--scheduler none`")
        return self


class CheckpointSettings(Settings):
    """When checkpoints are saved, and which are kept."""

    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        description="Save a checkpoint every so many optimizer steps too; default: only after each "
        "epoch",
    )
    keep_checkpoints: int | None = Field(
        None, ge=1, description="Number of latest checkpoints to keep beside the best; default: all"
    )


class PromptEvaluationSettings(Settings):
    """A small evaluation after each epoch, as by `speculators evaluate`."""

    evaluate_prompts: Annotated[str | None, WARNED_ON_RESUME] = Field(
        None,
        min_length=1,
        description="Prompts to evaluate the draft on after each epoch, as of `evaluate --prompts`;"
        " the best checkpoint is then chosen by the acceptance length on them",
    )
    evaluate_max_prompts: Annotated[int, WARNED_ON_RESUME] = Field(
        32, ge=1, description="Read only this many of these prompts; all ranks share them"
    )
    evaluate_max_new_tokens: Annotated[int, WARNED_ON_RESUME] = Field(
        128, ge=2, description="Maximum length of an answer to them, in tokens"
    )

    @model_validator(mode="after")
    def _there_are_prompts(self) -> Self:
        if self.evaluate_prompts is None:
            refuse_unread(self, type(self).model_fields, "without `--evaluate-prompts`")
        return self


class DistributedSettings(Settings):
    """Devices and ranks."""

    device: Device = "auto"
    compute_dtype: Annotated[ComputeDtype, WARNED_ON_RESUME] = "auto"
    gemm_dtype: Annotated[GemmDtype, WARNED_ON_RESUME] = "auto"
    kernels: Kernels = "auto"
    sharding: Sharding = "auto"
    timeout_seconds: int = Field(1800, ge=1, description="Timeout of collectives, in seconds")

    @model_validator(mode="after")
    def _float8_has_fast_kernels(self) -> Self:
        check_float8_products(
            self.gemm_dtype, compute_dtype=self.compute_dtype, kernels=self.kernels
        )
        return self


class TrainSettings(Settings):
    """All settings of a training run, in sections."""

    command = "train"

    draft: DraftSettings = Field(title="Draft model")
    run: RunSettings = Field(default_factory=RunSettings, title="Run")
    data: DataSettings = Field(default_factory=DataSettings, title="Data")
    capture: CaptureSettings = Field(default_factory=CaptureSettings, title="Capture")
    eagle3: Eagle3Settings = Field(default_factory=Eagle3Settings, title="EAGLE-3")
    dflash: DFlashSettings = Field(default_factory=DFlashSettings, title="DFlash")
    dspark: DSparkSettings = Field(default_factory=DSparkSettings, title="DSpark")
    peagle: PEagleSettings = Field(default_factory=PEagleSettings, title="P-EAGLE")
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, title="Optimizer")
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings, title="Schedule")
    checkpoints: CheckpointSettings = Field(default_factory=CheckpointSettings, title="Checkpoints")
    evaluation: PromptEvaluationSettings = Field(
        default_factory=PromptEvaluationSettings, title="Evaluation"
    )
    distributed: DistributedSettings = Field(
        default_factory=DistributedSettings, title="Distributed"
    )

    @model_validator(mode="after")
    def _conversations_are_captured(self) -> Self:
        if self.data.conversations is not None and self.capture.capture == "stored":
            raise ValueError(
                "`--capture stored` needs samples: a file of conversations has no hidden states"
            )
        return self

    @model_validator(mode="after")
    def _vocabulary_has_one_source(self) -> Self:
        draft = self.draft
        if draft.draft_vocab_size is None:
            return self
        if draft.full_vocab or draft.from_checkpoint is not None:
            flag = "--full-vocab" if draft.full_vocab else "--from-checkpoint"
            raise ValueError(f"`--draft-vocab-size` and `{flag}` cannot both be given")
        if self.data.conversations is None:
            raise ValueError(
                "`--draft-vocab-size` needs a file of conversations as data path: for samples or "
                "tokens, make both maps with `speculators build-vocab-map`"
            )
        return self

    @property
    def algorithm_settings(self) -> Settings:
        """The section that has the name of the algorithm."""
        section: Settings = getattr(self, self.draft.algorithm)
        return section

    @model_validator(mode="after")
    def _nothing_given_is_for_another_algorithm(self) -> Self:
        # Without `--algorithm`, a draft to start from has one, which is known later.
        if self.draft.from_checkpoint is None or "algorithm" in self.draft.model_fields_set:
            refuse_other_algorithms(self, self.draft.algorithm)
        return self

    @model_validator(mode="after")
    def _algorithm_has_its_defaults(self) -> Self:
        fill_in_defaults(self, self.algorithm_settings.defaults)
        return self
