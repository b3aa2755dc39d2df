"""SampleSource: samples by their ids, from any origin."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.data_config import DataConfig
from speculators_cli.core.data.packing import plan_epoch
from speculators_cli.core.data.sample import Problem, Sample, SampleHeader
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES

if TYPE_CHECKING:
    from speculators_cli.core.data.batch import Batch

SourceT = TypeVar("SourceT", bound="SampleSource")
SPLIT_SEED = 0  # the split is the same in every run on the same samples


class SampleSource(ABC):
    """Samples with the same hidden size and number of aux layers; ids start at 0.

    Attributes:
        alignment: Which rows of a sample are positions.
        format: The name of their data format.
        bad: Skipped invalid samples.
        configs: Recorded origins of the samples.
    """

    alignment: Alignment
    format: str
    bad: tuple[Problem, ...]
    configs: tuple[DataConfig, ...]
    is_live = False  # whether hidden states are computed while training, not stored

    @property
    @abstractmethod
    def headers(self) -> Sequence[SampleHeader]:
        """Return the properties of each sample that do not need its hidden states."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Return the number of bytes read in an epoch."""

    @property
    @abstractmethod
    def data_hash(self) -> str:
        """Return a hash of the names and sizes of all samples."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """Return a hash of the names, sizes and contents of all samples."""

    @abstractmethod
    def path(self, sample_id: int) -> Path:
        """Return the path of a sample, for messages; samples captured together share the parent."""

    @abstractmethod
    def read(self, sample_id: int) -> Sample:
        """Read a sample; its hidden states may be read on use.

        Raises:
            ChangedSampleError: It has changed since the source was opened.
        """

    @abstractmethod
    def select(self, ids: Iterable[int]) -> Self:
        """Select some of the samples, in the order of `ids`."""

    def collate(
        self,
        ids: Sequence[int],
        *,
        total_seq_len: int,
        pin_memory: bool,
        pads: bool,  # noqa: ARG002 - for sources whose batches have more than positions
    ) -> "Batch":
        """Read and pack samples, one at a time, since each keeps its file open.

        Raises:
            ChangedSampleError: One has changed since the source was opened.
        """
        import torch

        from speculators_cli.core.data.batch import collate

        return collate(
            ids,
            map(self.read, ids),
            total_seq_len=total_seq_len,
            num_aux_layers=self.num_aux_layers,
            hidden_size=self.hidden_size,
            dtype=getattr(torch, self.dtype),
            alignment=self.alignment,
            pin_memory=pin_memory,
        )

    def write_index(self, file: Path) -> None:  # noqa: B027 - most have nothing to cache
        """Cache the properties of the samples, if reading them again is slow."""

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the samples' verifier."""
        return self.headers[0].hidden_size

    @property
    def num_aux_layers(self) -> int:
        """Number of aux layers per sample."""
        return self.headers[0].num_aux_layers

    @property
    def max_token_id(self) -> int:
        """Return the highest input id of all samples."""
        return max(header.max_token_id for header in self.headers)

    @cached_property
    def dtype(self) -> str:
        """Return the most common dtype of the hidden states; others are cast to it once."""
        common = Counter(header.dtype for header in self.headers).most_common(1)[0][0]
        # float8 values are meaningless without their scales, which are other tensors.
        return "bfloat16" if ITEM_BYTES[common] == 1 else common

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of positions of each sample; [samples]."""
        return np.array(
            [self.alignment.count_positions(header.num_tokens) for header in self.headers],
            dtype=np.int64,
        )

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all samples."""
        return sum(header.num_tokens for header in self.headers)

    @property
    def num_supervised_tokens(self) -> int:
        """Return the number of targets of all samples."""
        return sum(header.num_supervised_tokens for header in self.headers)

    def most_targets(self, total_seq_len: int) -> NDArray[np.int64]:
        """Return an upper bound of each sample's targets in `total_seq_len` positions; [samples].

        Headers have the number of targets and the first one: a truncated sample has at most the
        positions from the first one on.
        """
        counts = np.array([header.num_supervised_tokens for header in self.headers], dtype=np.int64)
        first = np.array([self.alignment.place(header.first_target) for header in self.headers])
        room = np.minimum(self.lengths, total_seq_len) - first
        return np.where(counts > 0, np.minimum(counts, room).clip(min=0), 0)

    def count_without_target(self, total_seq_len: int) -> int:
        """Return the number of samples without targets in the first `total_seq_len` positions."""
        return int((self.most_targets(total_seq_len) == 0).sum())

    def count_sequences(self, total_seq_len: int) -> int:
        """Return the number of packed sequences of `total_seq_len` positions for the samples."""
        packing = plan_epoch(
            self.lengths, total_seq_len=total_seq_len, seed=0, epoch=0, global_batch=1
        )
        return packing.num_steps


def split(samples: SourceT, train_ratio: float) -> tuple[SourceT, SourceT]:
    """Split into train and validation at random, with a separate generator.

    At least one sample is for training, and at least one for validation, unless the ratio is 1.
    """
    num_samples = len(samples)
    num_train = round(train_ratio * num_samples)
    if train_ratio < 1 and num_samples > 1:
        num_train = min(num_train, num_samples - 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(num_samples)
    cut = max(num_train, 1)
    return samples.select(sorted(order[:cut])), samples.select(sorted(order[cut:]))


def spread_evenly(num_items: int, most: int) -> list[int]:
    """Return `most` or all indices, evenly spaced and deterministic."""
    indices: list[int] = np.linspace(0, num_items - 1, min(most, num_items)).astype(int).tolist()
    return indices
