"""Every setting of `speculators bench`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speculators_cli.settings.algorithms import refuse_other_algorithms
from speculators_cli.settings.algorithms.dflash import DFlashSettings
from speculators_cli.settings.algorithms.dspark import DSparkSettings
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from speculators_cli.settings.base import (
    ComputeDtype,
    ComputeInFloat8,
    DataFormat,
    Device,
    Folders,
    FormatVersion,
    GemmDtype,
    Kernels,
    Settings,
    Sharding,
    TotalSeqLen,
    TrustRemoteCode,
    check_float8_products,
    fill_in_defaults,
    refuse_unread,
)
from speculators_cli.settings.train import (
    Algorithm,
    ArchSetting,
    DraftArch,
    NoiseStd,
    NumLayers,
    NumWorkers,
    PrefetchFactor,
)

Shape = Literal["smollm2-135m", "llama-3.1-8b", "llama-3.3-70b", "qwen3-8b", "qwen3-32b"]


class BenchShapeSettings(Settings):
    """The verifier's shape, and the draft's; no weights are read."""

    verifier_name_or_path: str | None = Field(
        None,
        min_length=1,
        description="Hub id or folder of a verifier, used instead of a predefined shape",
    )
    shape: Shape = Field(
        "llama-3.1-8b",
        description="Predefined shape of a verifier",
    )
    draft_vocab_size: int = Field(32000, ge=1, description="Size of the draft vocabulary")
    full_vocab: bool = Field(False, description="Use the verifier's full vocabulary")
    num_layers: NumLayers = 1
    draft_arch: ArchSetting = DraftArch.LLAMA
    algorithm: Algorithm = "eagle3"
    trust_remote_code: TrustRemoteCode = False


class BenchStepSettings(Settings):
    """The training step."""

    total_seq_len: Annotated[TotalSeqLen, Field(ge=16)] = 8192
    supervised_fraction: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Fraction of supervised tokens in synthetic samples",
    )
    num_documents: int | None = Field(
        None,
        ge=1,
        description="Number of documents of equal length in a synthetic packed sequence; default: "
        "six of several lengths",
    )
    noise_std: NoiseStd = 0.05
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Number of packed sequences accumulated in one optimizer step"
    )
    capture: bool = Field(
        False,
        description="Compute the hidden states in each step with a verifier of random weights, as "
        "`train --capture online`",
    )
    capture_compute_dtype: ComputeInFloat8 = "auto"
    disk_dir: Path | None = Field(
        None,
        description="Folder on whose disk hidden states could be stored, to compare with capture: "
        "its speed is measured with a scratch file",
    )
    device: Device = "auto"
    compute_dtype: ComputeDtype = "auto"
    gemm_dtype: GemmDtype = "auto"
    kernels: Kernels = "auto"
    sharding: Sharding = "auto"

    @property
    def captures_in_float8(self) -> bool:
        """Whether the verifier's layers multiply in float8."""
        return self.capture_compute_dtype == "float8"

    @model_validator(mode="after")
    def _there_is_capture(self) -> Self:
        if not self.capture:
            refuse_unread(self, ["capture_compute_dtype", "disk_dir"], "without `--capture`")
        return self

    @model_validator(mode="after")
    def _float8_has_fast_kernels(self) -> Self:
        check_float8_products(
            self.gemm_dtype, compute_dtype=self.compute_dtype, kernels=self.kernels
        )
        return self


class BenchSamplesSettings(Settings):
    """Samples from disk, in place of synthetic ones."""

    data_path: Folders = Field(
        (),
        description="Folder of samples to train on instead of synthetic ones; may be repeated",
    )
    data_format: DataFormat = "auto"
    data_format_version: FormatVersion = 1
    num_workers: NumWorkers = None
    prefetch_factor: PrefetchFactor = 2


class BenchMeasureSettings(Settings):
    """How long to measure."""

    steps: int = Field(20, ge=2, description="Number of timed optimizer steps")
    warmup_steps: int = Field(
        3, ge=1, description="Number of optimizer steps before the timed ones"
    )
    profile: bool = Field(
        True, description="Profile two more steps to split the time by kind of kernel"
    )
    seed: int = Field(0, ge=0, description="Random seed for weights and synthetic samples")


class BenchSettings(Settings):
    """All settings of `speculators bench`, in sections."""

    command = "bench"

    shape: BenchShapeSettings = Field(default_factory=BenchShapeSettings, title="Shape")
    eagle3: Eagle3Settings = Field(default_factory=Eagle3Settings, title="EAGLE-3")
    dflash: DFlashSettings = Field(default_factory=DFlashSettings, title="DFlash")
    dspark: DSparkSettings = Field(default_factory=DSparkSettings, title="DSpark")
    peagle: PEagleSettings = Field(default_factory=PEagleSettings, title="P-EAGLE")
    step: BenchStepSettings = Field(default_factory=BenchStepSettings, title="Step")
    samples: BenchSamplesSettings = Field(default_factory=BenchSamplesSettings, title="Samples")
    measure: BenchMeasureSettings = Field(default_factory=BenchMeasureSettings, title="Measure")

    @property
    def algorithm_settings(self) -> Settings:
        """The section that has the name of the algorithm."""
        section: Settings = getattr(self, self.shape.algorithm)
        return section

    @model_validator(mode="after")
    def _algorithm_has_its_defaults(self) -> Self:
        fill_in_defaults(self, self.algorithm_settings.defaults)
        return self

    @model_validator(mode="after")
    def _nothing_given_is_ignored(self) -> Self:
        refuse_other_algorithms(self, self.shape.algorithm)
        shape, samples = self.shape.model_fields_set, self.samples
        if self.shape.full_vocab and "draft_vocab_size" in shape:
            raise ValueError("`--full-vocab` and `--draft-vocab-size` cannot both be given")
        if self.shape.verifier_name_or_path is not None and "shape" in shape:
            raise ValueError("`--verifier-name-or-path` and `--shape` cannot both be given")
        if samples.data_path and "supervised_fraction" in self.step.model_fields_set:
            raise ValueError("`--supervised-fraction` is that of the samples in `--data-path`")
        if samples.data_path and self.step.num_documents is not None:
            raise ValueError("`--num-documents` is that of the samples in `--data-path`")
        if (self.step.num_documents or 1) > self.step.total_seq_len // 4:
            raise ValueError(
                "`--num-documents`: a document needs 4 tokens of `--total-seq-len` at least"
            )
        return self
