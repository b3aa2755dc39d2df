"""Every setting of `speculators bench`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speculators_cli.settings.base import (
    DataFormat,
    Folders,
    FormatVersion,
    OffFlag,
    Settings,
    TrustRemoteCode,
)
from speculators_cli.settings.train import DraftArch

Shape = Literal["smollm2-135m", "llama-3.1-8b", "llama-3.3-70b", "qwen3-8b", "qwen3-32b"]


class BenchShapeSettings(Settings):
    """The verifier's shape, and the draft's; no weights are read."""

    verifier_name_or_path: str | None = Field(
        None, min_length=1, description="Hub id or folder of a verifier, in place of a shape"
    )
    shape: Shape = Field(
        "llama-3.1-8b",
        description="Shape of the verifier: smollm2-135m, llama-3.1-8b, llama-3.3-70b, qwen3-8b "
        "or qwen3-32b",
    )
    draft_vocab_size: int = Field(32000, ge=1, description="Tokens the draft can propose")
    full_vocab: bool = Field(False, description="Draft over the verifier's whole vocabulary")
    num_layers: int = Field(1, ge=1, description="Decoder layers of the draft")
    draft_arch: DraftArch = Field(DraftArch.LLAMA, description="Kind of the draft's decoder layers")
    trust_remote_code: TrustRemoteCode = False


class BenchStepSettings(Settings):
    """The training step."""

    total_seq_len: int = Field(8192, ge=16, description="Tokens in one packed sequence")
    supervised_fraction: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Share of the tokens that the loss counts, in synthetic samples",
    )
    ttt_steps: int = Field(3, ge=1, description="TTT steps")
    train_head: Annotated[bool, OffFlag("--freeze-head")] = Field(
        True, description="Train the draft's lm_head, or keep the verifier's rows"
    )
    noise_std: float = Field(0.05, ge=0, description="Noise on aux hidden states")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Packed sequences added up to one optimizer step"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute: auto (a GPU if there is one), cpu or cuda"
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Precision of the layers: auto is bfloat16 on a GPU, float32 on CPU"
    )
    kernels: Literal["auto", "plain", "fast"] = Field(
        "auto", description="How a step is computed: fast, plain, or auto: fast where it can run"
    )


class BenchSamplesSettings(Settings):
    """Samples from disk, in place of synthetic ones."""

    data_path: Folders = Field(
        (), description="Folder of samples to train on as `train` would; may be repeated"
    )
    data_format: DataFormat = "auto"
    data_format_version: FormatVersion = 1
    num_workers: int | None = Field(
        None, ge=0, description="Threads that read samples; default: by cores, at most 8"
    )
    prefetch_factor: int = Field(
        2,
        ge=1,
        description="Most packed sequences read ahead for each thread; one at first, more when "
        "reading falls behind",
    )


class BenchMeasureSettings(Settings):
    """How long to measure."""

    steps: int = Field(20, ge=2, description="Optimizer steps that are timed")
    warmup_steps: int = Field(3, ge=1, description="Optimizer steps before them")
    profile: bool = Field(
        True, description="Profile two steps more for the split by kind of kernel"
    )
    seed: int = Field(0, ge=0, description="Seed of weights and synthetic samples")


class BenchSettings(Settings):
    """All settings of `speculators bench`, in sections."""

    shape: BenchShapeSettings = Field(default_factory=BenchShapeSettings, title="Shape")
    step: BenchStepSettings = Field(default_factory=BenchStepSettings, title="Step")
    samples: BenchSamplesSettings = Field(default_factory=BenchSamplesSettings, title="Samples")
    measure: BenchMeasureSettings = Field(default_factory=BenchMeasureSettings, title="Measure")

    @model_validator(mode="after")
    def _nothing_given_is_ignored(self) -> Self:
        shape, samples = self.shape.model_fields_set, self.samples
        if self.shape.full_vocab and "draft_vocab_size" in shape:
            raise ValueError("`--full-vocab` and `--draft-vocab-size` cannot both be given")
        if self.shape.verifier_name_or_path is not None and "shape" in shape:
            raise ValueError("`--verifier-name-or-path` and `--shape` cannot both be given")
        if samples.data_path and "supervised_fraction" in self.step.model_fields_set:
            raise ValueError("`--supervised-fraction` is that of the samples in `--data-path`")
        return self
