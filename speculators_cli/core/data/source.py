"""SampleSource: samples by their ids, wherever they come from."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.data_config import DataConfig
from speculators_cli.core.data.packing import plan_epoch
from speculators_cli.core.data.sample import Problem, Sample, SampleHeader
from speculators_cli.core.torch_file.structure import ITEM_BYTES

SourceT = TypeVar("SourceT", bound="SampleSource")
SPLIT_SEED = 0  # the split is the same in every run on the same samples


class SampleSource(ABC):
    """Samples of one hidden size and number of aux layers; ids count from 0.

    Attributes:
        alignment: Which rows of a sample are positions.
        format: The name of their data format.
        bad: What was left out as broken.
        configs: What is stated about where they come from.
    """

    alignment: Alignment
    format: str
    bad: tuple[Problem, ...]
    configs: tuple[DataConfig, ...]

    @property
    @abstractmethod
    def headers(self) -> Sequence[SampleHeader]:
        """What is known of each sample before it is read."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that are read in an epoch."""

    @property
    @abstractmethod
    def data_hash(self) -> str:
        """Changes with the name or size of any sample, and with nothing else."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """Changes with the name, size or contents of any sample."""

    @abstractmethod
    def path(self, sample_id: int) -> Path:
        """Where a sample lies, for messages; samples of one parent were captured together."""

    @abstractmethod
    def read(self, sample_id: int) -> Sample:
        """Read a sample; its hidden states may be read when they are used.

        Raises:
            ChangedSampleError: It is not as it was when the source was opened.
        """

    @abstractmethod
    def select(self, ids: Iterable[int]) -> Self:
        """Some of the samples, in the order of `ids`."""

    def write_index(self, file: Path) -> None:  # noqa: B027 - most have nothing to cache
        """Cache what was read of the samples, where reading it again takes time."""

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the verifier the samples come from."""
        return self.headers[0].hidden_size

    @property
    def num_aux_layers(self) -> int:
        """Aux layers in each sample."""
        return self.headers[0].num_aux_layers

    @property
    def max_token_id(self) -> int:
        """The highest input id of all samples."""
        return max(header.max_token_id for header in self.headers)

    @cached_property
    def dtype(self) -> str:
        """The most common type of the hidden states; others are cast to it once."""
        common = Counter(header.dtype for header in self.headers).most_common(1)[0][0]
        # One byte alone is no value: its scale is another tensor's.
        return "bfloat16" if ITEM_BYTES[common] == 1 else common

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Positions of each sample; [samples]."""
        return np.array(
            [self.alignment.count_positions(header.num_tokens) for header in self.headers],
            dtype=np.int64,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(header.num_tokens for header in self.headers)

    @property
    def num_supervised_tokens(self) -> int:
        """Targets of all samples."""
        return sum(header.num_supervised_tokens for header in self.headers)

    def most_targets(self, total_seq_len: int) -> NDArray[np.int64]:
        """Targets of each sample at most, once it is cut to so many positions; [samples].

        Headers count targets and place the first one: of a sample that is cut, at most what follows
        that one.
        """
        counts = np.array([header.num_supervised_tokens for header in self.headers], dtype=np.int64)
        first = np.array([self.alignment.place(header.first_target) for header in self.headers])
        room = np.minimum(self.lengths, total_seq_len) - first
        return np.where(counts > 0, np.minimum(counts, room).clip(min=0), 0)

    def count_without_target(self, total_seq_len: int) -> int:
        """Samples without a target, once they are cut to so many positions."""
        return int((self.most_targets(total_seq_len) == 0).sum())

    def count_sequences(self, total_seq_len: int) -> int:
        """Packed sequences of `total_seq_len` positions that the samples make."""
        plan = plan_epoch(
            self.lengths, total_seq_len=total_seq_len, seed=0, epoch=0, global_batch=1
        )
        return plan.num_steps


def split(samples: SourceT, train_ratio: float) -> tuple[SourceT, SourceT]:
    """Split at random, by a generator of its own, into train and validation.

    One sample at least stays for training; at least one validates, unless the ratio is 1.
    """
    num_samples = len(samples)
    num_train = round(train_ratio * num_samples)
    if train_ratio < 1 and num_samples > 1:
        num_train = min(num_train, num_samples - 1)
    order = np.random.default_rng(SPLIT_SEED).permutation(num_samples)
    cut = max(num_train, 1)
    return samples.select(sorted(order[:cut])), samples.select(sorted(order[cut:]))


def spread_evenly(num_items: int, most: int) -> list[int]:
    """Indices of `most` items or all of them, evenly spread; always the same ones."""
    indices: list[int] = np.linspace(0, num_items - 1, min(most, num_items)).astype(int).tolist()
    return indices
