"""simulate(settings): the acceptance length estimated from samples, with teacher forcing."""

import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch

from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.data.batch import drop_non_finite
from speculators_cli.core.data.data_config import resolve_layer_ids
from speculators_cli.core.data.loader import BatchLoader
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.sources import Request, open_samples
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.engines.devices import choose_device, choose_dtype
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.evaluation.checks import check_fit, read_source
from speculators_cli.core.models.verifier import (
    FrozenVerifier,
    load_frozen_verifier,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.place import Place
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.evaluate import EvaluateSettings

METRIC = "acceptance_rate"
MAX_READERS = 8


@dataclass(frozen=True)
class SimulationReport:
    """An estimate: the draft reads the tokens of samples, whatever it would have drafted."""

    draft: str
    verifier: str
    data_path: str
    num_samples: int
    num_chains: tuple[int, ...]  # places whose next k tokens are supervised
    num_agreed: tuple[int, ...]  # of these, all k tokens of the draft are the verifier's
    duration_seconds: float

    @property
    def acceptance_rates(self) -> tuple[float, ...]:
        """Fraction of chains whose first k tokens all agree."""
        pairs = zip(self.num_agreed, self.num_chains, strict=True)
        return tuple(agreed / max(chains, 1) for agreed, chains in pairs)

    @property
    def acceptance_length(self) -> float:
        """Simulated tokens per verifier pass, including the bonus token."""
        return 1.0 + sum(self.acceptance_rates)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `--json`."""
        return {
            "is_simulated": True,
            "draft": self.draft,
            "verifier": self.verifier,
            "data_path": self.data_path,
            "num_samples": self.num_samples,
            "num_speculative_tokens": len(self.num_chains),
            "num_chains": list(self.num_chains),
            "simulated_acceptance_length": self.acceptance_length,
            "simulated_acceptance_rates": list(self.acceptance_rates),
            "duration_seconds": self.duration_seconds,
        }


def simulate(settings: EvaluateSettings, *, progress: Progress = SILENT) -> SimulationReport:
    """Compare the draft's tokens with the verifier's in captured samples.

    Raises:
        SettingsError: A setting cannot be used, or the algorithm estimates no acceptance rate.
        DataError: The samples cannot be used, or are another verifier's.
        CheckpointError: The draft is incomplete, or is another verifier's.
        MachineError: There is no such device, or the hub cannot be reached.
    """
    started_at = time.perf_counter()
    given, data = settings.source, settings.simulation
    assert data.simulate is not None, "the settings require it"
    device = choose_device(settings.engine.device, Place())
    dtype = choose_dtype(settings.engine.dtype, device)
    source = read_source(given.checkpoint, given, "CHECKPOINT", progress)
    files = VerifierFiles(source.config.verifier_name_or_path)
    config = read_verifier_config(files, trust_remote_code=given.trust_remote_code)
    check_fit(source, config, files.read_vocab_size(config.modules), progress)
    wanted = Request(
        (data.simulate,),
        data_format=data.data_format,
        version=data.data_format_version,
        index_file=None,
        max_bad_samples=None,
        alignment=source.algorithm.alignment,
    )
    samples = open_samples(wanted, progress)
    check_samples(samples, source, data.total_seq_len, config.num_layers, progress)
    verifier = load_frozen_verifier(files, config, progress=progress).to(device)
    num_tokens = settings.drafting.num_speculative_tokens or source.config.num_draft_tokens
    draft = build_draft(source, verifier, num_tokens)
    loader = BatchLoader(
        samples,
        total_seq_len=data.total_seq_len,
        seed=0,
        global_batch=1,
        rank=0,
        num_ranks=1,
        num_epochs=1,
        max_steps=None,
        num_workers=min(MAX_READERS, os.cpu_count() or 1),
        prefetch_factor=2,
        pin_memory=device.type == "cuda",
        pads=device.type == "cuda",
    )
    counters = _sum_up(draft, loader, device, dtype, progress)
    ratio = next(ratio for ratio in draft.ratios if ratio.metric == METRIC)
    report = SimulationReport(
        draft=source.name,
        verifier=files.name_or_path,
        data_path=str(data.simulate),
        num_samples=len(samples),
        num_chains=tuple(map(int, counters[ratio.denominator])),
        num_agreed=tuple(map(int, counters[ratio.numerator])),
        duration_seconds=time.perf_counter() - started_at,
    )
    if report.num_chains[0] == 0:
        raise DataError(
            f"No token of the samples in `{data.simulate}` is supervised",
            hint="Pass samples of answers, or a higher `--total-seq-len`",
        )
    return report


def check_samples(
    samples: SampleSource,
    source: TrainedDraft,
    total_seq_len: int,
    num_verifier_layers: int,
    progress: Progress,
) -> None:
    """Check that samples are of the draft's verifier; warn if some are truncated.

    Raises:
        DataError: Sizes, token ids or layers differ.
    """
    config = source.config
    for word, found, expected in (
        ("hidden size", samples.hidden_size, config.target_hidden_size),
        ("aux layers", samples.num_aux_layers, config.num_aux_layers),
    ):
        if found != expected:
            raise DataError(
                f"The samples have {word} {found:,}, `{source.name}` {expected:,}",
                hint="Pass samples of the draft's verifier, captured with its layers",
            )
    if samples.max_token_id >= config.vocab_size:
        raise DataError(
            f"The samples have token ids up to {samples.max_token_id:,}, the verifier of "
            f"`{source.name}` has {config.vocab_size:,} tokens",
            hint="Pass samples of the draft's verifier",
        )
    layers = resolve_layer_ids(
        samples.configs,
        num_verifier_layers=num_verifier_layers,
        num_aux_layers=samples.num_aux_layers,
        data_format=samples.format,
        given=None,
    )
    if layers.ids != config.target_layer_ids and not layers.is_assumed:
        raise DataError(
            f"The samples have the verifier layers {list(layers.ids)}, `{source.name}` reads "
            f"{list(config.target_layer_ids)}",
            hint="Pass samples of those layers",
        )
    num_cut = int((samples.lengths > total_seq_len).sum())
    if num_cut:
        progress.warn(f"{num_cut:,} samples are truncated at `--total-seq-len`")


def build_draft(
    source: TrainedDraft, verifier: FrozenVerifier, num_draft_tokens: int
) -> DraftModel:  # fmt: skip
    """The draft as it is validated in training, with as many predictions as draft tokens.

    Raises:
        SettingsError: Its algorithm estimates no acceptance rate, or makes another number of
            predictions.
    """
    algorithm = source.algorithm
    config = source.config.with_num_draft_tokens(num_draft_tokens)
    own = algorithm.settings_class.model_validate(algorithm.fixed_settings(config))
    if source.embedding is not None:
        verifier = FrozenVerifier(
            source.embedding.to(verifier.head.device),
            verifier.norm_weight,
            verifier.head,
            verifier.config,
            norm_bias=verifier.norm_bias,
            head_bias=verifier.head_bias,
        )
    draft = algorithm.build(config, verifier, source.vocab_map, own, use_fast_kernels=False, seed=0)
    is_estimated = any(ratio.metric == METRIC for ratio in draft.ratios)
    if not is_estimated or len(draft.loss_weights) != num_draft_tokens:
        raise SettingsError(
            f"Algorithm `{algorithm.name}` has no estimate of the acceptance of "
            f"{num_draft_tokens} draft tokens",
            hint="Pass `--prompts` in place of `--simulate`",
        )
    draft.load_state_dict(dict(source.weights))
    return draft.eval()


@torch.inference_mode()
def _sum_up(
    draft: DraftModel,
    loader: BatchLoader,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> Mapping[str, list[float]]:
    """The counters of the draft over all samples."""
    totals: torch.Tensor | None = None
    with (
        closing(loader),
        progress.task("Simulating", loader.steps_in(0)) as task,
    ):
        for (batch,) in loader.epoch(0):
            finite, _ = drop_non_finite(batch.to(device).cast(dtype))
            sums = draft(finite).stacked()
            totals = sums if totals is None else totals + sums
            task.advance()
    assert totals is not None, "there are samples"
    return dict(zip(draft.counters, totals.tolist(), strict=True))
