"""Every setting of `speculators generate-data`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from speculators_cli.settings.base import (
    MODEL_NAME,
    ComputeInFloat8,
    Device,
    LayerIdsSetting,
    Positional,
    Settings,
    TrustRemoteCode,
    VerifierDtype,
    flag_of,
)
from speculators_cli.settings.train import Algorithm
from speculators_cli.settings.vllm import (
    TensorParallelSize,
    VLLMArgs,
    VLLMPython,
    refuse_without_vllm,
)


class InputSettings(Settings):
    """What is read, and where the result is written."""

    prompts: Annotated[str, Positional("PROMPTS")] = Field(
        min_length=1,
        description="JSONL, JSON or Parquet file, a folder of them, or the name of a data set on "
        "the hub",
    )
    split: str = Field("", description="Split of the hub data set; default: its training split")
    max_conversations: int | None = Field(
        None, ge=1, description="Read only this many rows of the input"
    )
    max_bad_rows: int | None = Field(
        None,
        ge=0,
        description="Maximum number of unreadable rows to leave out; default: 1% of the input",
    )
    output_dir: Path = Field(
        Path("./data"), description="Folder for tokens and samples; an interrupted run is continued"
    )
    shard_size: int = Field(
        512,
        ge=1,
        description="Conversations per shard, the unit that is resumed and given to ranks",
    )


class VerifierSettings(Settings):
    """The model whose answers and hidden states are captured."""

    verifier_name_or_path: Annotated[str, MODEL_NAME] = Field(
        min_length=1, description="Hub id or folder of the verifier"
    )
    algorithm: Annotated[
        Algorithm,
        Field(description="Algorithm of the draft; it decides the default of the target layer ids"),
    ] = "eagle3"
    target_layer_ids: LayerIdsSetting = Field(
        None,
        description="Verifier layers of the aux hidden states, ascending; id k is the output after "
        "k layers; default: 2, n/2 and n-3 of n layers, or five evenly spaced ones from 2 to n-2 "
        "for DFlash and DSpark",
    )
    dtype: VerifierDtype = "auto"
    trust_remote_code: TrustRemoteCode = False


class TokenSettings(Settings):
    """How answers are generated, and which tokens are kept."""

    regenerate: bool = Field(
        False, description="Have the verifier answer the prompts; answers in the input are replaced"
    )
    temperature: float = Field(
        0.0, ge=0, description="Sampling temperature of the answers; 0 is greedy"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Sample from the most probable tokens with this total mass"
    )
    max_new_tokens: int = Field(2048, ge=1, description="Maximum length of an answer, in tokens")
    seed: int = Field(0, ge=0, description="Random seed of the answers")
    thinking: Literal["on", "off"] | None = Field(
        None, description="Thinking mode of the chat template; default: that of the template"
    )
    skip_truncated_answers: bool = Field(
        False, description="Leave out answers that reach the maximum length without an end token"
    )
    total_seq_len: int = Field(
        8192, ge=2, description="Maximum length of a row, in tokens; longer ones are truncated"
    )
    tokens_only: bool = Field(
        False, description="Write ids and loss masks only, for `train --capture online`"
    )
    show_masks: int | None = Field(
        None, ge=1, description="Print this many rows with their supervised part marked, then exit"
    )

    @model_validator(mode="after")
    def _sampling_is_used(self) -> Self:
        if not self.regenerate:
            given = self.model_fields_set & {"temperature", "top_p", "max_new_tokens"}
            if given:
                flags = ", ".join(f"`{flag_of(name)}`" for name in sorted(given))
                raise ValueError(f"{flags} needs `--regenerate`")
        return self


class StorageSettings(Settings):
    """How hidden states are stored."""

    storage_dtype: Literal["auto", "bfloat16", "float8"] = Field(
        "auto",
        description="Precision of stored hidden states; float8 is e4m3 with a scale per token and "
        "layer; auto is the precision of the verifier",
    )
    all_last_states: bool = Field(
        False,
        description="Store the last hidden states of all tokens, not only of supervised ones",
    )
    writers: int = Field(4, ge=1, description="Threads that write samples")


class EngineSettings(Settings):
    """What runs the verifier."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="Engine that runs the verifier"
    )
    device: Device = "auto"
    compute_dtype: ComputeInFloat8 = "auto"
    device_map: str | None = Field(
        None,
        min_length=1,
        description="Placement of the layers on several GPUs by transformers, such as auto",
    )
    capture_tokens: int = Field(8192, ge=256, description="Tokens per forward pass of the capture")
    endpoint: str | None = Field(
        None,
        min_length=1,
        description="URL of a running OpenAI-compatible server that answers the prompts",
    )
    concurrency: int = Field(32, ge=1, description="Requests sent to the server at the same time")
    vllm_python: VLLMPython = None
    tensor_parallel_size: TensorParallelSize = 1
    vllm_args: VLLMArgs = ""

    @property
    def in_float8(self) -> bool:
        """Whether the verifier's layers multiply in float8."""
        return self.compute_dtype == "float8"

    @model_validator(mode="after")
    def _engine_has_its_flags(self) -> Self:
        if self.engine == "vllm":
            if self.device_map is not None or self.compute_dtype != "auto":
                raise ValueError(
                    "`--device-map` and `--compute-dtype` need `--engine transformers`"
                )
        else:
            refuse_without_vllm(self)
        return self


class GenerateDataSettings(Settings):
    """All settings of `speculators generate-data`, in sections."""

    command = "generate-data"

    input: InputSettings = Field(title="Input")
    verifier: VerifierSettings = Field(title="Verifier")
    tokens: TokenSettings = Field(default_factory=TokenSettings, title="Tokens")
    storage: StorageSettings = Field(default_factory=StorageSettings, title="Storage")
    engine: EngineSettings = Field(default_factory=EngineSettings, title="Engine")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.engine.endpoint is not None and not self.tokens.regenerate:
            raise ValueError("`--endpoint` needs `--regenerate`")
        return self
