"""Random numbers of positions and states, a function of seed, epoch and sample only."""

from dataclasses import replace
from hashlib import sha256
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.data.batch import Batch, drop_non_finite, rows_of
from speculators_cli.core.kernels.device import has_kernels, move


def drop_and_add_noise(batch: Batch, std: float, *, seed: int, epoch: int) -> tuple[Batch, Tensor]:
    """`drop_non_finite`, then `add_noise`; in place for a batch on a GPU."""
    if not (has_kernels(batch.aux_hidden_states) and find_spec("triton")):
        kept, is_broken = drop_non_finite(batch)
        return add_noise(kept, std, seed=seed, epoch=epoch), is_broken
    from speculators_cli.core.kernels.noise import mark_broken, perturb, zero_broken

    documents = batch.document_ids
    is_broken = torch.zeros(len(batch.lengths), dtype=torch.bool, device=documents.device)
    mark_broken(batch.aux_hidden_states, documents, is_broken)
    target_documents = documents[batch.targets]
    mark_broken(batch.last_hidden_states, target_documents, is_broken)
    zero_broken(batch.last_hidden_states, target_documents, is_broken)
    keys = [document_key(seed, epoch, sample_id) for sample_id in batch.sample_ids]
    perturb(
        batch.aux_hidden_states,
        documents,
        batch.position_ids,
        is_broken,
        move(torch.tensor(keys, dtype=torch.int64), documents.device),
        std,
    )
    loss_mask = batch.loss_mask & ~rows_of(is_broken, batch)
    return replace(batch, loss_mask=loss_mask), is_broken


def add_noise(batch: Batch, std: float, *, seed: int, epoch: int) -> Batch:
    """Add uniform noise in [-std, std] to the aux hidden states, not to the last hidden states.

    Each document has its own random generator, so its noise does not depend on packing, ranks or
    resuming. The numbers differ between devices.
    """
    if std == 0 or not batch.lengths:
        return batch
    aux = batch.aux_hidden_states
    generator = torch.Generator(aux.device)
    noise = torch.zeros_like(aux)
    start = 0
    for sample_id, length in zip(batch.sample_ids, batch.lengths, strict=True):
        generator.manual_seed(document_key(seed, epoch, sample_id))
        noise[start : start + length].uniform_(-std, std, generator=generator)
        start += length
    return replace(batch, aux_hidden_states=aux + noise)


def draw_numbers(batch: Batch, *, seed: int, epoch: int, purpose: str) -> NDArray[np.float64]:
    """A number in [0, 1) for each position of the documents of a batch, in order."""
    keys = (document_key(seed, epoch, sample_id, purpose=purpose) for sample_id in batch.sample_ids)
    numbers = [
        np.random.default_rng(key).random(length)
        for key, length in zip(keys, batch.lengths, strict=True)
    ]
    return np.concatenate(numbers) if numbers else np.zeros(0)


def document_key(seed: int, epoch: int, sample_id: int, *, purpose: str = "") -> int:
    """Return the seed of a document's random numbers: of its noise, or for another purpose."""
    digest = sha256(f"{purpose}{seed}/{epoch}/{sample_id}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
