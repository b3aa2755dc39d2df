"""Every setting of `speculators evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from speculators_cli.settings.base import (
    MODEL_NAME,
    DataFormat,
    Device,
    Folder,
    FormatVersion,
    LayerIdsSetting,
    Positional,
    Settings,
    TrustRemoteCode,
    VerifierDtype,
)
from speculators_cli.settings.vllm import (
    TensorParallelSize,
    VLLMArgs,
    VLLMPython,
    refuse_without_vllm,
)

MAX_DRAFT_TOKENS = 8


class EvaluatedDraftSettings(Settings):
    """The trained draft, its verifier, and a draft to compare it with."""

    checkpoint: Annotated[str, Positional("CHECKPOINT")] = Field(
        min_length=1,
        description="Checkpoint, save path of a run (its best checkpoint, else the latest), or "
        "folder or hub id of an export or of another tool's draft",
    )
    verifier_name_or_path: Annotated[str | None, MODEL_NAME] = Field(
        None,
        min_length=1,
        description="Hub id or folder of the verifier; default: read from the checkpoint",
    )
    target_layer_ids: LayerIdsSetting = Field(
        None,
        description="Verifier layers the draft was trained on, ascending; id k is the output after "
        "k layers; default: read from the checkpoint",
    )
    against: str | None = Field(
        None,
        min_length=1,
        description="Another draft to compare with, prompt by prompt; read as CHECKPOINT",
    )
    trust_remote_code: TrustRemoteCode = False


class PromptSettings(Settings):
    """What the verifier answers."""

    prompts: str | None = Field(
        None,
        min_length=1,
        description="JSONL, JSON or Parquet file, a folder of them, a data set on the hub, or one "
        "of mt-bench, gsm8k, humaneval, math500, alpaca, spec-bench",
    )
    max_prompts: int | None = Field(None, ge=1, description="Read only this many prompts")
    max_bad_rows: int | None = Field(
        None,
        ge=0,
        description="Maximum number of rows without a usable prompt to leave out; default: 1% of "
        "the input",
    )
    thinking: Literal["on", "off"] | None = Field(
        None, description="Thinking mode of the chat template; default: that of the template"
    )


class DraftingSettings(Settings):
    """How answers are drafted and verified."""

    num_speculative_tokens: int | None = Field(
        None,
        ge=1,
        le=MAX_DRAFT_TOKENS,
        description="Number of draft tokens per verifier pass; default: that of the checkpoint",
    )
    max_new_tokens: int = Field(256, ge=2, description="Maximum length of an answer, in tokens")
    temperature: float = Field(
        0.0, ge=0, description="Sampling temperature of the verifier; 0 is greedy"
    )
    seed: int = Field(0, ge=0, description="Random seed of the answers and of the intervals")


class EvaluationEngineSettings(Settings):
    """What runs the verifier."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="Engine that drafts and verifies; vllm counts accepted tokens and is timed with"
        " and without the draft, but has no counts by prompt",
    )
    endpoint: str | None = Field(
        None,
        min_length=1,
        description="URL of a running vLLM server that has the draft loaded, to measure instead",
    )
    concurrency: str = Field(
        "1,8,32",
        description="Numbers of requests at a time for which vLLM or the server is timed, "
        "separated by commas",
    )
    repeats: int = Field(3, ge=1, description="Timed runs over all prompts, for each of them")
    vllm_python: VLLMPython = None
    tensor_parallel_size: TensorParallelSize = 1
    vllm_args: VLLMArgs = ""
    dtype: VerifierDtype = Field(
        "auto",
        description="Precision of verifier and draft; auto is bfloat16 on GPU and float32 on CPU",
    )
    device: Device = "auto"
    batch_size: int | None = Field(
        None,
        ge=1,
        description="Maximum number of prompts drafted and verified together; default: 16 on CPU, "
        "64 on GPU, fewer where memory is short",
    )

    @property
    def is_served(self) -> bool:
        """Whether a serving engine drafts and verifies."""
        return self.engine == "vllm" or self.endpoint is not None

    @property
    def concurrencies(self) -> tuple[int, ...]:
        """`concurrency`, as numbers in order, without repeats."""
        return tuple(dict.fromkeys(int(part) for part in self.concurrency.split(",")))

    @field_validator("concurrency")
    @classmethod
    def _are_positive_numbers(cls, value: str) -> str:
        for part in value.split(","):
            if not part.strip().isdecimal() or int(part) < 1:
                raise ValueError(f"must be numbers from 1 on, separated by commas, got `{value}`")
        return value

    @model_validator(mode="after")
    def _engine_has_its_flags(self) -> Self:
        if self.engine != "vllm":
            refuse_without_vllm(self)
        if self.engine == "vllm" and self.endpoint is not None:
            raise ValueError("`--endpoint` and `--engine vllm` exclude each other")
        if self.is_served and self.batch_size is not None:
            raise ValueError("`--batch-size` is of the transformers engine")
        return self


class ResultSettings(Settings):
    """What is written beside the result, and what decides the exit code."""

    html: Path | None = Field(
        None, description="Write a page with charts and marked answers to this file"
    )
    diagnose: bool = Field(
        False,
        description="Change one thing at a time to find what lowers the acceptance length; also "
        "done if it is far below the simulated one of the checkpoint",
    )
    min_acceptance_length: float | None = Field(
        None, ge=1, description="Exit with code 1 if the acceptance length is lower"
    )


class SimulationSettings(Settings):
    """Estimate from samples, instead of generating answers."""

    simulate: Folder | None = Field(
        None,
        description="Folder of held-out samples; estimate the acceptance length with teacher "
        "forcing, without running the verifier",
    )
    data_format: DataFormat = "auto"
    data_format_version: FormatVersion = 1
    total_seq_len: int = Field(8192, ge=2, description="Length of a packed sequence, in tokens")


class EvaluateSettings(Settings):
    """All settings of `speculators evaluate`, in sections."""

    command = "evaluate"

    source: EvaluatedDraftSettings = Field(title="Checkpoint")
    prompts: PromptSettings = Field(default_factory=PromptSettings, title="Prompts")
    drafting: DraftingSettings = Field(default_factory=DraftingSettings, title="Drafting")
    engine: EvaluationEngineSettings = Field(
        default_factory=EvaluationEngineSettings, title="Engine"
    )
    result: ResultSettings = Field(default_factory=ResultSettings, title="Result")
    simulation: SimulationSettings = Field(default_factory=SimulationSettings, title="Simulation")

    @model_validator(mode="after")
    def _has_one_input(self) -> Self:
        if (self.prompts.prompts is None) == (self.simulation.simulate is None):
            raise ValueError("needs either `--prompts` or `--simulate`")
        in_process: dict[str, object] = {
            "--html": self.result.html,
            "--diagnose": self.result.diagnose or None,
            "--against": self.source.against,
        }
        if self.simulation.simulate is not None:
            in_process["--min-acceptance-length"] = self.result.min_acceptance_length
            _refuse(in_process, "needs `--prompts`")
            if self.engine.is_served:
                raise ValueError("`--simulate` runs no engine")
        if self.engine.is_served:
            _refuse(in_process, "needs the transformers engine")
        return self


def _refuse(values: Mapping[str, object], reason: str) -> None:
    for flag, value in values.items():
        if value is not None:
            raise ValueError(f"`{flag}` {reason}")
