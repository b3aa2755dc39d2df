"""AheadLoader: batches whose hidden states are requested some steps before they are trained on."""

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.loader import BatchSource
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.engines.ahead_capturer import AheadCapturer
from speculators_cli.core.training.states import packed_of

STEPS_AHEAD = 2


class AheadLoader:
    """Requests the hidden states of the next steps, in the order of the plan.

    The number of requested steps is bounded, and with it the shared memory that their states take.

    Args:
        loader: Yields batches without hidden states.
        capturer: Computes them.
        samples: Of the batches, for messages.
        steps_ahead: Steps that are requested before the one that is yielded is used.
    """

    def __init__(
        self,
        loader: BatchSource,
        capturer: AheadCapturer,
        samples: SampleSource,
        *,
        steps_ahead: int = STEPS_AHEAD,
    ) -> None:
        self.loader = loader
        self._capturer = capturer
        self._samples = samples
        self._steps_ahead = steps_ahead

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps of an epoch."""
        return self.loader.steps_in(epoch)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Yield the batches of each optimizer step of an epoch, with tickets for their states."""
        waiting: deque[tuple[Batch, ...]] = deque()
        try:
            for step in self.loader.epoch(epoch, start_step):
                waiting.append(tuple(map(self._request, step)))
                if len(waiting) > self._steps_ahead:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for step in waiting:
                for batch in step:
                    if batch.verifier_input is not None and batch.verifier_input.ticket:
                        batch.verifier_input.ticket.cancel()

    def close(self) -> None:
        """Stop reading and computing."""
        self.loader.close()
        self._capturer.close()

    def _request(self, batch: Batch) -> Batch:
        given = batch.verifier_input
        if given is None:  # all states are cached
            return batch
        names = [f"sample `{self._samples.path(i)}`" for i in given.sample_ids]
        ticket = self._capturer.request(packed_of(batch), names)
        return replace(batch, verifier_input=replace(given, ticket=ticket))
