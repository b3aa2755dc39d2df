"""Synthetic packed sequences of documents, each with two turns."""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.batch import Batch, collate
from speculators_cli.core.data.live_batch import LiveSample, collate_live, without_states
from speculators_cli.core.data.sample import Sample

# Fractions of a packed sequence for its six documents; the last one fills the rest.
SHARES = (0.28125, 0.21875, 0.171875, 0.140625, 0.109375)


class SyntheticLoader:
    """Repeats the same few sequences, from pinned memory.

    Args:
        config: Of the draft.
        alignment: Which rows of a sample are positions.
        total_seq_len: Tokens in one packed sequence.
        supervised_fraction: Fraction of each document's tokens that are supervised.
        per_step: Packed sequences per optimizer step.
        dtype: Of the hidden states.
        pin_memory: Whether to pin the memory for copies to a GPU.
        seed: Of ids, states and the order of documents.
        is_live: Whether the sequences have no hidden states, which are then computed.
        num_documents: Documents of equal length in a sequence; None: six of several lengths.
    """

    def __init__(
        self,
        config: DraftConfig,
        alignment: Alignment,
        *,
        total_seq_len: int,
        supervised_fraction: float,
        per_step: int,
        dtype: torch.dtype,
        pin_memory: bool,
        seed: int,
        is_live: bool = False,
        num_documents: int | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.per_step = per_step

        def mask(num_positions: int) -> Tensor:
            unread = torch.zeros(alignment.shift, dtype=torch.bool)
            return torch.cat((unread, _two_turns(num_positions, supervised_fraction)))

        self.batches = []
        # Two in different order, so that the number of active rows can vary.
        for _ in range(2):
            lengths = document_lengths(total_seq_len, num_documents, generator)
            samples = [
                _sample(length + alignment.shift, config, mask(length), dtype, generator)
                for length in lengths
            ]
            if is_live:
                self.batches.append(
                    collate_live(
                        range(len(samples)),
                        [LiveSample(without_states(x.input_ids, x.loss_mask)) for x in samples],
                        total_seq_len=total_seq_len,
                        alignment=alignment,
                        pin_memory=pin_memory,
                        pads=pin_memory,
                    )
                )
                continue
            self.batches.append(
                collate(
                    range(len(samples)),
                    samples,
                    total_seq_len=total_seq_len,
                    num_aux_layers=config.num_aux_layers,
                    hidden_size=config.target_hidden_size,
                    dtype=dtype,
                    alignment=alignment,
                    pin_memory=pin_memory,
                )
            )

    def steps_in(self, epoch: int) -> int:
        """More steps than any run has."""
        del epoch
        return 2**62

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        """Batches of optimizer steps, endlessly."""
        del epoch
        for step in count(start_step * self.per_step, self.per_step):
            yield tuple(
                self.batches[index % len(self.batches)]
                for index in range(step, step + self.per_step)
            )

    def close(self) -> None:
        """Do nothing: there are no files to close."""


def document_lengths(
    total_seq_len: int, num_documents: int | None, generator: torch.Generator
) -> Sequence[int]:
    """Lengths of the documents in a sequence, in random order; they fill it."""
    shares = SHARES if num_documents is None else (1 / num_documents,) * (num_documents - 1)
    lengths = [round(share * total_seq_len) for share in shares]
    lengths.append(total_seq_len - sum(lengths))
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return [lengths[index] for index in order]


def _sample(
    num_tokens: int,
    config: DraftConfig,
    loss_mask: Tensor,  # [num_tokens], bool
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Sample:
    """A sample of random tokens and states."""

    def states(*shape: int) -> Tensor:
        # A few rows, repeated: a packed sequence of an 8B verifier has 134 million numbers.
        few = torch.randn(min(shape[0], 64), *shape[1:], generator=generator).to(dtype)
        return few.repeat(-(-shape[0] // len(few)), *(1 for _ in shape[1:]))[: shape[0]]

    size = config.target_hidden_size
    return Sample(
        input_ids=torch.randint(1, config.vocab_size, (num_tokens,), generator=generator),
        loss_mask=loss_mask,
        aux_hidden_states=tuple(states(num_tokens, size) for _ in range(config.num_aux_layers)),
        last_hidden_states=states(num_tokens, size),
        is_normed=False,
    )


def _two_turns(num_positions: int, supervised_fraction: float) -> Tensor:
    """Prompt, answer, prompt, answer; answers are supervised, each half of the fraction."""
    mask = torch.zeros(num_positions, dtype=torch.bool)
    for turn in mask.chunk(2):
        num_supervised = round(supervised_fraction * len(turn))
        turn[len(turn) - num_supervised :] = True
    return mask
