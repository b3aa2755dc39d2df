"""Cost models of a training step, for plans and benchmarks: operations, memory and time."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.settings.base import Settings

ConfigT = TypeVar("ConfigT", bound=DraftConfig)
SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True)
class Work:
    """The work of a step for one packed sequence."""

    num_positions: int  # of documents
    num_targets: int  # supervised
    num_active: int  # rows whose activations are needed in the backward pass
    flops: float  # of forward and backward: those that the loss and its gradients need
    other_flops: float = 0.0  # that take as long as what the kernels compute beside them


@dataclass(frozen=True)
class Gpu:
    """Values from the data sheet of a GPU."""

    flops: float  # per second, dense bfloat16
    bandwidth: float  # bytes per second


GPUS = {  # by a word in the device's name
    "H100": Gpu(989e12, 3.35e12),
    "H200": Gpu(989e12, 4.8e12),
    "B200": Gpu(2250e12, 8.0e12),
    "A100": Gpu(312e12, 2.0e12),
    "L40S": Gpu(362e12, 0.864e12),
}


def find_gpu(device_name: str) -> Gpu | None:
    """The GPU of this name, if its data sheet is known."""
    return next((gpu for word, gpu in GPUS.items() if word in device_name), None)


class CostModel(ABC, Generic[ConfigT, SettingsT]):
    """The cost of a training step of one algorithm."""

    @abstractmethod
    def count_work(
        self,
        config: ConfigT,
        settings: SettingsT,
        loss_mask: Tensor,  # [seq_len], bool, on the CPU
        lengths: Sequence[int],  # of documents
    ) -> Work:
        """The work of one packed sequence, from its masks."""

    @abstractmethod
    def expect_work(
        self,
        config: ConfigT,
        settings: SettingsT,
        lengths: NDArray[np.int64],  # [documents]: positions of each
        num_targets: NDArray[np.int64],  # [documents]: supervised positions of each
    ) -> Work:
        """The same from headers only: how many positions are supervised, not which."""

    @abstractmethod
    def count_trained(self, config: ConfigT, settings: SettingsT) -> int:
        """Weights that the optimizer updates."""

    @abstractmethod
    def estimate_memory(
        self,
        config: ConfigT,
        settings: SettingsT,
        work: Sequence[Work],
        *,
        total_seq_len: int,
        num_accumulated: int = 1,
        num_ranks: int = 1,
        num_shards: int = 1,
        has_whole_head: bool = False,
        in_float8: bool = False,
    ) -> Mapping[str, int]:
        """Bytes on a GPU at the peak of a step with the fast kernels, by purpose.

        Args:
            config: Of the draft.
            settings: The algorithm's section.
            work: Of the packed sequences; the largest determines the peak.
            total_seq_len: Positions in one packed sequence.
            num_accumulated: Packed sequences per optimizer step.
            num_ranks: Processes that share a step.
            num_shards: GPUs that the weights are sharded across.
            has_whole_head: Whether all rows of the verifier's LM head stay on the GPU, and not only
                those of the draft vocabulary.
            in_float8: Whether matrix products are in float8; else all is in bfloat16.
        """

    @abstractmethod
    def estimate_seconds(self, flops: float, num_trained: int, gpu: Gpu) -> float:
        """Seconds of an optimizer step with this many operations, the others included."""


def count_verifier_bytes(config: DraftConfig, *, has_whole_head: bool) -> int:
    """Bytes of the verifier's embedding and LM head, its rows of the draft vocabulary apart."""
    num_rows = config.vocab_size + config.draft_vocab_size
    if has_whole_head and config.draft_vocab_size < config.vocab_size:
        num_rows += config.vocab_size
    return 2 * num_rows * config.target_hidden_size
