"""BatchLoader: what it gives, what it reads before it is asked, and what it never reads."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from threading import Event

import pytest
import torch

from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.folder import SampleFolder
from speculators_cli.core.data.index import Entry, FileStamp
from speculators_cli.core.data.loader import BatchLoader
from speculators_cli.core.data.packing import Packed, plan_epoch
from speculators_cli.core.data.sample import Sample, SampleHeader
from speculators_cli.core.errors import DataError

HIDDEN, NUM_AUX, SEQ_LEN = 5, 2, 16
PATIENCE_SECONDS = 10.0  # with a thread that never does what it should


@dataclass(frozen=True, kw_only=True)
class Samples(SampleFolder):
    """Samples made up when they are read; reads are remembered and can be held up."""

    begun: tuple[Event, ...]  # of each sample, set when its read begins
    reads: list[int] = field(default_factory=list)
    waits_for: dict[int, Event] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)

    def read(self, sample_id: int) -> Sample:
        self.reads.append(sample_id)
        self.begun[sample_id].set()
        if sample_id in self.waits_for:
            assert self.waits_for[sample_id].wait(PATIENCE_SECONDS)
        if sample_id in self.broken:
            raise DataError(f"{sample_id} is broken", hint="Mend it")
        num_tokens = self.entries[sample_id].header.num_tokens
        generator = torch.Generator().manual_seed(sample_id)
        last, *aux = torch.randn(1 + NUM_AUX, num_tokens, HIDDEN, generator=generator)
        ids = torch.arange(num_tokens)
        return Sample(ids, ids > 2, tuple(aux), last, is_normed=False)


def make_samples(*nums_tokens: int) -> Samples:
    def entry(num_tokens: int) -> Entry:
        header = SampleHeader(
            num_tokens, num_tokens, HIDDEN, NUM_AUX, "float32", False, num_tokens, 1
        )
        return Entry(Path("made-up"), "made-up", FileStamp(0, 0, 0, ""), header, "")

    entries = tuple(map(entry, nums_tokens))
    return Samples(entries=entries, format="v1", begun=tuple(Event() for _ in entries))


def make_long_samples(number: int) -> Samples:
    """Samples of which each fills a packed sequence."""
    return make_samples(*[SEQ_LEN + 1] * number)


@pytest.fixture
def opened() -> Iterator[list[BatchLoader]]:
    """Loaders that are closed in the end."""
    loaders: list[BatchLoader] = []
    yield loaders
    for loader in loaders:
        loader.close()


def make_loader(
    opened: list[BatchLoader],
    samples: Samples,
    *,
    num_epochs: int,
    num_workers: int,
    max_steps: int | None = None,
    prefetch_factor: int = 2,
    global_batch: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
    pads: bool = True,
) -> BatchLoader:
    loader = BatchLoader(
        samples,
        total_seq_len=SEQ_LEN,
        seed=0,
        global_batch=global_batch,
        rank=rank,
        num_ranks=num_ranks,
        num_epochs=num_epochs,
        max_steps=max_steps,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        pin_memory=False,
        pads=pads,
    )
    opened.append(loader)
    return loader


def make_batch(samples: Samples, sequence: Packed) -> Batch:
    return collate(
        sequence,
        [samples.read(sample_id) for sample_id in sequence],
        total_seq_len=SEQ_LEN,
        num_aux_layers=NUM_AUX,
        hidden_size=HIDDEN,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(("pads", "length"), [(True, SEQ_LEN), (False, 4 + 6)])
def test_only_where_asked_a_sequence_is_longer_than_its_samples(
    pads: bool, length: int, opened: list[BatchLoader]
) -> None:
    loader = make_loader(opened, make_samples(5, 7), num_epochs=1, num_workers=0, pads=pads)

    ((batch,),) = loader.epoch(0)

    assert len(batch.input_ids) == length
    assert sum(batch.lengths) == 10


def settle(loader: BatchLoader) -> None:
    """Wait until all that was to be read ahead has been read."""
    assert not wait(loader.pending, timeout=PATIENCE_SECONDS).not_done


def order_of(loader: BatchLoader, epoch: int) -> list[int]:
    """The samples of an epoch, where each fills a packed sequence."""
    return [sample_id for (sample_id,) in loader.pack(epoch).sequences]


def assert_same(steps: Sequence[tuple[Batch, ...]], expected: Sequence[tuple[Batch, ...]]) -> None:
    assert [len(step) for step in steps] == [len(step) for step in expected]
    for step, expected_step in zip(steps, expected, strict=True):
        for batch, other in zip(step, expected_step, strict=True):
            assert batch.sample_ids == other.sample_ids
            for name in ("input_ids", "aux_hidden_states", "last_hidden_states", "loss_mask"):
                assert torch.equal(getattr(batch, name), getattr(other, name))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("max_steps", [None, 6])
@pytest.mark.parametrize(("epoch", "start_step"), [(0, 0), (0, 2), (1, 3)])
def test_a_rank_gets_its_part_of_each_step_of_the_plan(
    epoch: int, start_step: int, max_steps: int | None, num_workers: int, opened: list[BatchLoader]
) -> None:
    # Four steps an epoch. Who goes on after the last step or epoch still gets what comes next.
    samples = make_samples(*range(3, 25))
    loader = make_loader(
        opened,
        samples,
        num_epochs=3,
        max_steps=max_steps,
        num_workers=num_workers,
        global_batch=4,
        rank=1,
        num_ranks=2,
    )

    later = map(loader.epoch, range(epoch + 1, 4))
    steps = [*loader.epoch(epoch, start_step), *chain.from_iterable(later)]

    plans = [
        plan_epoch(samples.lengths, total_seq_len=SEQ_LEN, seed=0, epoch=e, global_batch=4)
        for e in range(4)
    ]
    assert [plan.num_steps for plan in plans] == [4] * 4
    whole = [sequence for plan in plans for sequence in plan.sequences]
    mine = [make_batch(samples, sequence) for sequence in whole[1::2]]
    expected = list(zip(mine[::2], mine[1::2], strict=True))
    assert_same(steps, expected[4 * epoch + start_step :])


def test_other_places_than_the_next_give_their_own_batches(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(6)

    def read(num_workers: int) -> list[tuple[Batch, ...]]:
        loader = make_loader(opened, samples, num_epochs=9, num_workers=num_workers)
        abandoned, other = loader.epoch(0), loader.epoch(4, 2)
        steps = [next(abandoned), next(abandoned)]
        steps += [next(other), next(abandoned), next(other)]
        return [*steps, *loader.epoch(1, 3), *loader.epoch(0, 4)]

    expected = read(0)
    steps = read(2)

    assert_same(steps, expected)


def test_the_next_epoch_has_been_read_when_an_epoch_ends(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(5)
    loader = make_loader(opened, samples, num_epochs=2, num_workers=2, prefetch_factor=1)

    list(loader.epoch(0))
    settle(loader)

    assert Counter(samples.reads) == Counter(order_of(loader, 0) + order_of(loader, 1)[:2])


def test_what_was_read_ahead_is_not_read_again(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(5)
    loader = make_loader(opened, samples, num_epochs=3, num_workers=2)

    for epoch in range(3):
        list(loader.epoch(epoch))

    assert Counter(samples.reads) == dict.fromkeys(range(5), 3)


def test_between_validations_nothing_waits_in_memory(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(5)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=3)

    for num_validations in (1, 2):
        list(loader.epoch(0))

        assert not loader.pending
        assert Counter(samples.reads) == dict.fromkeys(range(5), num_validations)


@pytest.mark.parametrize("max_steps", [2, 3, 4])
def test_reading_ahead_ends_with_the_last_step(max_steps: int, opened: list[BatchLoader]) -> None:
    # Three steps of two packed sequences are an epoch.
    samples = make_long_samples(6)
    loader = make_loader(
        opened, samples, num_epochs=3, max_steps=max_steps, num_workers=4, global_batch=2
    )
    of_the_run = (order_of(loader, 0) + order_of(loader, 1))[: 2 * max_steps]
    steps = chain.from_iterable(map(loader.epoch, range(3)))

    for _ in islice(steps, max_steps - 1):
        pass
    settle(loader)
    num_ahead = len(loader.pending)
    next(steps)
    settle(loader)

    assert num_ahead == 2
    assert Counter(samples.reads) == Counter(of_the_run)


def test_batches_that_are_ready_keep_reading_ahead_as_it_began(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(9)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2, prefetch_factor=3)
    steps = loader.epoch(0)

    for num_given in range(1, 6):
        next(steps)
        settle(loader)

        # One for each thread.
        assert len(samples.reads) == num_given + 2


def test_each_late_batch_deepens_reading_ahead_up_to_its_bound(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(24)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2, prefetch_factor=2)
    order, steps = order_of(loader, 0), loader.epoch(0)
    # Late ones, and how many are ahead when they are asked for. Their reads end once another read
    # has begun, the one that asking for them begins.
    late = {1: 2, 6: 3, 11: 4, 16: 4}
    for place, num_ahead in late.items():
        samples.waits_for[order[place]] = samples.begun[order[place + num_ahead]]

    depths = {}
    for place in range(18):
        if place in late:
            depths[place] = len(loader.pending)
        else:
            wait(loader.pending[:1])
        next(steps)

    assert depths == late


def test_a_broken_sample_is_told_of_when_its_batch_is_asked_for(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(5)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2)
    broken = order_of(loader, 0)[2]
    samples.broken.add(broken)
    steps = loader.epoch(0)

    next(steps)
    settle(loader)
    next(steps)

    with pytest.raises(DataError, match=f"{broken} is broken"):
        next(steps)


def test_closing_begins_no_read_and_waits_for_none(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(9)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2)
    order, may_end = order_of(loader, 0), Event()
    # The second is late, so that three are ahead of two threads.
    samples.waits_for[order[1]] = samples.begun[order[3]]
    samples.waits_for.update({order[3]: may_end, order[4]: may_end})
    for _ in islice(loader.epoch(0), 3):
        pass
    assert samples.begun[order[4]].wait(PATIENCE_SECONDS)

    loader.close()
    readers = [t for t in threading.enumerate() if t.name.startswith("reader")]
    are_reading = [reader.is_alive() for reader in readers]
    may_end.set()
    for reader in readers:
        reader.join(PATIENCE_SECONDS)

    assert any(are_reading)
    assert not any(reader.is_alive() for reader in readers)
    assert sorted(samples.reads) == sorted(order[:5])


def test_reading_may_start_before_a_batch_is_requested(opened: list[BatchLoader]) -> None:
    samples = make_long_samples(9)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2)

    loader.read_ahead_from(0, 4)
    settle(loader)
    read = list(samples.reads)
    batches = list(loader.epoch(0, 4))

    assert sorted(read) == sorted(order_of(loader, 0)[4 : 4 + len(read)])
    assert len(read) >= 2
    assert [batch.sample_ids[0] for (batch,) in batches] == order_of(loader, 0)[4:]
    assert Counter(samples.reads) == Counter(order_of(loader, 0)[4:])


@pytest.mark.parametrize(("epoch", "step"), [(0, 9), (1, 0), (0, 5)])
def test_nothing_is_read_ahead_of_a_run_that_is_over(
    epoch: int, step: int, opened: list[BatchLoader]
) -> None:
    samples = make_long_samples(9)
    loader = make_loader(opened, samples, num_epochs=1, num_workers=2, max_steps=5)

    loader.read_ahead_from(epoch, step)

    assert loader.pending == ()
    assert samples.reads == []
