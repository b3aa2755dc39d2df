"""Which samples of a run the cache of hidden states keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.state_cache import StateCache, StatesFormat, choose_cached
from speculators_cli.core.data.tokens import TokenFolder
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.settings.train import TrainSettings


@dataclass(frozen=True)
class CacheChoice:
    """The chosen samples, and the sizes of all."""

    states: StatesFormat
    chosen: frozenset[str]  # fingerprints
    sizes: Mapping[str, int]  # bytes by fingerprint

    @property
    def num_bytes(self) -> int:
        """Size of the whole cache."""
        return sum(self.sizes[x] for x in self.chosen)

    def find_share(self, samples: SampleSource) -> float:
        """The share of the tokens of samples that are kept."""
        if not isinstance(samples, TokenFolder):
            return 0.0
        kept = sum(x.header.num_tokens for x in samples.entries if x.fingerprint in self.chosen)
        return kept / max(samples.num_tokens, 1)

    def count_missing_bytes(self, cache: StateCache, inputs: Inputs, total_seq_len: int) -> int:
        """Size of the files that are still to be written."""
        missing = {
            entry.fingerprint
            for source in live_sources(inputs)
            for entry in source.find_missing(cache, total_seq_len)
        }
        return sum(self.sizes[x] for x in missing)


def live_sources(inputs: Inputs) -> list[TokenFolder]:
    """The samples whose states are computed, those for validation first."""
    return [x for x in (inputs.validation_samples, inputs.samples) if isinstance(x, TokenFolder)]


def choose_cache(settings: TrainSettings, inputs: Inputs, *, dtype: torch.dtype) -> CacheChoice:
    """Choose the samples of lowest hash, as many as the cache holds.

    Args:
        settings: Of the run.
        inputs: Its samples and layers.
        dtype: Of the verifier.
    """
    given = settings.capture
    states = StatesFormat(
        len(inputs.layer_ids.ids), inputs.verifier_config.hidden_size, dtype, given.cache_dtype
    )
    listed = [
        list(source.list_candidates(states, settings.data.total_seq_len))
        for source in live_sources(inputs)
    ]
    chosen = choose_cached(listed, seed=settings.run.seed, num_bytes=given.cache_size)
    return CacheChoice(states, chosen, {x.fingerprint: x.num_bytes for g in listed for x in g})
