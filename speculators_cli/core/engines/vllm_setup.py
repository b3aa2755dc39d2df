"""VLLMSetup: which verifier vLLM loads, and how it is started."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VLLMSetup:
    """What every engine of vLLM for a verifier has in common.

    Args:
        verifier: Its folder or hub id.
        dtype: Of weights and computations, as vLLM calls it.
        python: The interpreter of an environment with vLLM; ours if None.
        tensor_parallel_size: GPUs that a layer is split over.
        args: More flags of the engine, from `parse_vllm_args`.
        trust_remote_code: Whether custom code from the verifier's repository may run.
        gpus: It sees only these, as in `CUDA_VISIBLE_DEVICES`; None: those that we see.
    """

    verifier: str
    dtype: str
    python: Path | None = None
    tensor_parallel_size: int = 1
    args: Sequence[str] = ()
    trust_remote_code: bool = False
    gpus: Sequence[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables of its process."""
        return {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}

    @property
    def flags(self) -> list[str]:
        """The flags of the engine."""
        return [
            *self.args,
            *("--model", self.verifier),
            *("--dtype", self.dtype),
            *("--tensor-parallel-size", str(self.tensor_parallel_size)),
            *(["--trust-remote-code"] if self.trust_remote_code else []),
        ]
