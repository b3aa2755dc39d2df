"""Estimates of online capture for `--plan`."""

from dataclasses import dataclass

from speculators_cli.core.algorithms.cost import Gpu
from speculators_cli.core.data.disk_speed import DiskSpeed, measure_disk
from speculators_cli.core.data.packing import PackingPlan
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.engines.devices import choose_dtype
from speculators_cli.core.training.cache_choice import choose_cache
from speculators_cli.core.training.capture_options import (
    Cached,
    CaptureOption,
    CaptureTimes,
    compare_options,
    find_best,
)
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.settings.train import TrainSettings


@dataclass(frozen=True)
class CapturePlan:
    """Estimates for online capture, and for its alternatives; None means unknown."""

    useful_tflop_per_step: float  # of one rank, without cached samples
    seconds: float | None  # in the whole run
    seconds_if_all_were_stored: float | None  # of the whole run: one capture, then all its steps
    stored_bytes: int  # disk space that this needs, in bfloat16
    cached_share: float  # of the samples' tokens
    cache_bytes: int
    verifier_bytes_per_gpu: int  # weights of its layers
    disk: DiskSpeed | None  # of the cache, else of the samples; None: it cannot be measured
    options: tuple[CaptureOption, ...]  # none if the disk or the GPU is unknown
    best_option: str | None


def plan_capture(
    settings: TrainSettings,
    inputs: Inputs,
    ranks: Ranks,
    packed: PackingPlan,
    total_steps: int,
    step_seconds: float | None,
    gpu: Gpu | None,
) -> CapturePlan:
    """Estimate the capture of a run, from the lengths of its documents.

    Args:
        settings: Of the run.
        inputs: Its samples and verifier.
        ranks: That share the capture.
        packed: Sequences of an epoch.
        total_steps: Of the run.
        step_seconds: Of the run's steps without capture.
        gpu: None if its speed is unknown.
    """
    samples = inputs.samples
    cost = CaptureCost(inputs.verifier_config, in_float8=settings.capture.in_float8)
    shift = samples.alignment.shift
    lengths = [min(n, settings.data.total_seq_len) + shift for n in samples.lengths.tolist() if n]
    flops = cost.count_flops(lengths)
    epochs = total_steps / max(packed.num_steps, 1)
    cached_share, cache_bytes = 0.0, 0
    if settings.capture.cache_dir is not None:
        dtype = choose_dtype(settings.capture.capture_dtype, ranks.device)
        choice = choose_cache(settings, inputs, dtype=dtype)
        cached_share, cache_bytes = choice.find_share(samples), choice.num_bytes
    # Cached samples are computed once; validation samples are computed after each epoch.
    validation = [
        min(n, settings.data.total_seq_len) + shift for n in inputs.validation_samples.lengths
    ]
    per_epoch = flops + cost.count_flops(validation)
    needed = per_epoch * (1 + max(epochs - 1, 0) * (1 - cached_share))
    seconds, stored, is_apart = None, None, settings.capture.is_apart
    disk = measure_disk(settings.capture.cache_dir or settings.data.data_path[0])
    options: tuple[CaptureOption, ...] = ()
    counts = (samples.num_tokens, samples.num_supervised_tokens, samples.num_aux_layers)
    stored_bytes = {
        "stored": cost.count_stored_bytes(*counts),
        "stored in float8": cost.count_stored_bytes(*counts, is_float8=True),
    }
    if gpu is not None:
        num_gpus = settings.capture.capture_gpus if is_apart else ranks.num_ranks
        seconds = cost.estimate_seconds(needed, gpu.flops) / num_gpus
        once = cost.estimate_seconds(per_epoch, gpu.flops) / num_gpus
        stored = None if step_seconds is None else step_seconds + once
        if step_seconds is not None and disk is not None and epochs:
            cached = Cached(cached_share, cache_bytes) if settings.capture.cache_dir else None
            times = CaptureTimes(step_seconds, once, epochs, is_apart=is_apart)
            options = compare_options(times, disk, stored_bytes, cached)
    return CapturePlan(
        useful_tflop_per_step=flops / max(packed.num_steps, 1) / ranks.num_ranks / 1e12,
        seconds=seconds,
        seconds_if_all_were_stored=stored,
        stored_bytes=stored_bytes["stored"],
        cached_share=cached_share,
        cache_bytes=cache_bytes,
        verifier_bytes_per_gpu=cost.num_layer_bytes
        // (settings.capture.capture_gpus if is_apart else 1),
        disk=disk,
        options=options,
        best_option=find_best(options),
    )
