"""Noise on aux hidden states: a function of seed, epoch and sample, wherever it is computed."""

from dataclasses import replace
from hashlib import sha256

import torch

from speculators_cli.core.data.batch import Batch


def add_noise(batch: Batch, std: float, *, seed: int, epoch: int) -> Batch:
    """Add noise, uniform in [-std, std], to the aux hidden states; last hidden states stay.

    Each document draws from a generator of its own, so its noise does not depend on what it is
    packed with, nor on ranks or resuming. Devices draw different numbers.
    """
    if std == 0 or not batch.lengths:
        return batch
    aux = batch.aux_hidden_states
    generator = torch.Generator(aux.device)
    noise = torch.empty_like(aux)
    start = 0
    for sample_id, length in zip(batch.sample_ids, batch.lengths, strict=True):
        key = sha256(f"{seed}/{epoch}/{sample_id}".encode()).digest()
        generator.manual_seed(int.from_bytes(key[:7], "little"))
        noise[start : start + length].uniform_(-std, std, generator=generator)
        start += length
    noise[start:] = 0
    return replace(batch, aux_hidden_states=aux + noise)
