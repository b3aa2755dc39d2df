"""TokenFolder: samples without hidden states, in shards of tokens; the verifier computes theirs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from speculators_cli.core.data.alignment import NEXT_TOKEN, Alignment
from speculators_cli.core.data.data_config import OUR_CONVENTION, DataConfig
from speculators_cli.core.data.folder import find_files, is_sample_name
from speculators_cli.core.data.sample import (
    ChangedSampleError,
    Problem,
    Sample,
    SampleHeader,
    SampleTokens,
)
from speculators_cli.core.data.shard_rows import ShardPlace, locate, read_row
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.token_shards import (
    MANIFEST_NAME,
    TokenRow,
    is_shard_name,
    read_shard,
)
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import Progress
from speculators_cli.core.reading import read_json_object, refusing

if TYPE_CHECKING:
    from speculators_cli.core.data.batch import Batch
    from speculators_cli.core.data.live_batch import LiveSample
    from speculators_cli.core.data.state_cache import Candidate, StateCache, StatesFormat


@dataclass(frozen=True)
class StatesShape:
    """Hidden states that the verifier computes while training."""

    hidden_size: int
    layer_ids: tuple[int, ...]  # of the aux hidden states


@dataclass(frozen=True)
class TokenEntry:
    """One row of a shard."""

    shard: ShardPlace
    name: str
    start: int  # its first token in the shard
    header: SampleHeader
    fingerprint: str  # of ids and loss mask


@dataclass(frozen=True)
class TokenFolder(SampleSource):
    """Rows of shards; ids are indices into `entries`.

    They are in the order that `generate-data` gives the samples made from them, so that packing
    and noise are the same.
    """

    entries: tuple[TokenEntry, ...]
    configs: tuple[DataConfig, ...] = ()
    alignment: Alignment = NEXT_TOKEN
    bad: tuple[Problem, ...] = ()
    cache: "StateCache | None" = None
    format = "tokens"
    is_live = True

    @cached_property
    def headers(self) -> Sequence[SampleHeader]:
        """Headers of the rows, with sizes of the hidden states that will be computed."""
        return [entry.header for entry in self.entries]

    @property
    def num_bytes(self) -> int:
        """Size of ids and masks."""
        return self.num_tokens * 5

    @cached_property
    def data_hash(self) -> str:
        """Return a hash of the names and lengths of all rows."""
        lines = [f"{x.name}\0{x.header.num_tokens}\n" for x in self.entries]
        return sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def content_hash(self) -> str:
        """Return a hash of the names and contents of all rows."""
        lines = [f"{x.name}\0{x.fingerprint}\n" for x in self.entries]
        return sha256("".join(lines).encode()).hexdigest()

    def path(self, sample_id: int) -> Path:
        """Return the shard of a row, followed by its name."""
        entry = self.entries[sample_id]
        return entry.shard.file / entry.name

    def read_row(self, sample_id: int) -> TokenRow:
        """Read ids and mask of a row.

        Raises:
            ChangedSampleError: The shard has changed since the scan.
        """
        entry = self.entries[sample_id]
        row = read_row(entry.shard, entry.start, entry.header.num_tokens, entry.name)
        if fingerprint_of(row) != entry.fingerprint:
            raise ChangedSampleError(
                entry.shard.file, "has different contents than at the start of the run"
            )
        return row

    def read(self, sample_id: int) -> Sample:
        """Read a row as a sample whose hidden states have a width of 0.

        Raises:
            ChangedSampleError: The shard has changed since the scan.
        """
        import torch

        from speculators_cli.core.data.live_batch import without_states

        row = self.read_row(sample_id)
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        return without_states(ids, torch.from_numpy(row.loss_mask))

    def collate(
        self, ids: Sequence[int], *, total_seq_len: int, pin_memory: bool, pads: bool
    ) -> "Batch":
        """Read and pack rows, with the input of the verifier.

        Raises:
            ChangedSampleError: A shard has changed since the scan.
        """
        from speculators_cli.core.data.live_batch import collate_live

        return collate_live(
            ids,
            [self._read_live(i, total_seq_len) for i in ids],
            total_seq_len=total_seq_len,
            alignment=self.alignment,
            pin_memory=pin_memory,
            pads=pads,
            states=None if self.cache is None else self.cache.states,
        )

    def _read_live(self, sample_id: int, total_seq_len: int) -> "LiveSample":
        """Read a row, with its hidden states if they are cached."""
        from speculators_cli.core.data.live_batch import LiveSample
        from speculators_cli.core.data.verifier_input import CacheSlot

        sample, entry = self.read(sample_id), self.entries[sample_id]
        num_tokens = self._count_used(entry, total_seq_len)
        file = None if self.cache is None else self.cache.file(entry.fingerprint, num_tokens)
        if self.cache is None or file is None:
            return LiveSample(sample)
        loss_mask = sample.loss_mask[:num_tokens].clone()
        loss_mask[: self.alignment.shift] = False  # tokens of no position
        slot = CacheSlot(file, sample.input_ids[:num_tokens], loss_mask)
        return LiveSample(self.cache.read(file, slot) or sample, slot)

    def _count_used(self, entry: TokenEntry, total_seq_len: int) -> int:
        """Return the tokens of a row that a packed sequence uses."""
        return min(entry.header.num_tokens, total_seq_len + self.alignment.shift)

    def list_candidates(self, states: "StatesFormat", total_seq_len: int) -> Iterator["Candidate"]:
        """Yield the rows that a cache may keep, with the sizes of their files."""
        from speculators_cli.core.data.state_cache import Candidate

        for entry in self.entries:
            num_tokens = self._count_used(entry, total_seq_len)
            num_targets = min(entry.header.num_supervised_tokens, num_tokens)
            num_bytes = states.count_bytes(num_tokens, num_targets)
            yield Candidate(entry.name, entry.fingerprint, num_bytes)

    def find_missing(self, cache: "StateCache", total_seq_len: int) -> Iterator[TokenEntry]:
        """Yield the rows that a cache is to keep, and does not have."""
        for entry in self.entries:
            file = cache.file(entry.fingerprint, self._count_used(entry, total_seq_len))
            if file is not None and not file.exists():
                yield entry

    def select(self, ids: Iterable[int]) -> "TokenFolder":
        """Select some of the rows, in the order of `ids`."""
        return replace(self, entries=tuple(self.entries[i] for i in ids))


def has_only_shards(folder: Path) -> bool:
    """Whether a folder has shards of tokens, and no samples with hidden states."""
    has_shards = False
    for _, file in find_files(folder):
        if is_sample_name(file.name):
            return False
        has_shards |= is_shard_name(file.name)
    return has_shards


def read_tokens(
    folders: Sequence[Path],
    *,
    shape: StatesShape,
    alignment: Alignment,
    progress: Progress,
    on_tokens: Callable[[SampleTokens], None] | None = None,
) -> TokenFolder:
    """Read the shards in folders, searched recursively.

    Args:
        folders: Each has shards, and their manifest.
        shape: Of the hidden states that will be computed.
        alignment: Which tokens of a row are targets.
        progress: Reports progress.
        on_tokens: Called with ids and mask of every row, in order.

    Raises:
        DataError: There are no shards, or one is damaged.
    """
    found = [file for folder in folders for _, file in find_files(folder)]
    shards = [file for file in found if is_shard_name(file.name)]
    shown = ", ".join(f"`{folder}`" for folder in folders)
    if not shards:
        raise DataError(
            f"{shown} holds no shards of tokens: no `tokens-*.safetensors` file was found",
            hint="Write them with `speculators generate-data --tokens-only`, or pass "
            "`--capture stored` for samples with hidden states",
        )
    entries: list[TokenEntry] = []
    with progress.task("Reading tokens", len(shards)) as task:
        for file in shards:
            entries += _read_entries(file, shape, alignment, on_tokens or _ignore)
            task.advance()
    configs = tuple(_read_origin(f, shape) for f in found if _is_manifest(f, shards))
    tokens = TokenFolder(tuple(entries), configs, alignment)
    if not entries or not tokens.lengths.any():
        raise DataError(
            f"No row of {shown} has two tokens or more", hint="Generate longer conversations"
        )
    return tokens


def fingerprint_of(row: TokenRow) -> str:
    """Return a hash of ids and mask of a row."""
    digest = blake2b(np.ascontiguousarray(row.input_ids, np.int32).tobytes(), digest_size=16)
    digest.update(np.packbits(row.loss_mask).tobytes())
    return digest.hexdigest()


def _ignore(_: SampleTokens) -> None:
    """Count nothing."""


def _read_entries(
    file: Path,
    shape: StatesShape,
    alignment: Alignment,
    on_tokens: Callable[[SampleTokens], None],
) -> Iterator[TokenEntry]:
    place, shard = locate(file), read_shard(file)
    starts = np.cumsum([0, *(len(row.input_ids) for row in shard.rows)]).tolist()
    # The order of the samples' files: `000123-turn2.pt` is before `000123.pt`.
    order = sorted(range(len(shard.rows)), key=lambda i: f"{shard.rows[i].name}.pt")
    for i in order:
        row = shard.rows[i]
        tokens = _tokens_of(row, shape)
        on_tokens(tokens)
        yield TokenEntry(place, row.name, starts[i], tokens.header(alignment), tokens.fingerprint)


def _tokens_of(row: TokenRow, shape: StatesShape) -> SampleTokens:
    return SampleTokens(
        row.input_ids.astype(np.int64),
        row.loss_mask,
        hidden_size=shape.hidden_size,
        num_aux_layers=len(shape.layer_ids),
        dtype="bfloat16",  # of no effect: batches get states in the verifier's
        is_normed=False,
        fingerprint=fingerprint_of(row),
    )


def _is_manifest(file: Path, shards: Sequence[Path]) -> bool:
    return file.name == MANIFEST_NAME and any(shard.parent == file.parent for shard in shards)


def _read_origin(file: Path, shape: StatesShape) -> DataConfig:
    """Return the verifier that tokens were rendered for; the layers are those of this run."""
    with refusing(DataError):
        verifier = read_json_object(file).get("verifier")
    return DataConfig(
        file=file,
        verifier=str(verifier) if verifier else None,
        layer_ids=shape.layer_ids,
        convention=OUR_CONVENTION,
        is_assumed=False,
        version=None,
    )
