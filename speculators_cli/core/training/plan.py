"""plan(settings): time, memory and disk estimates of a run, from headers and sizes only."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.cost import find_gpu
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.loader import BatchLoader
from speculators_cli.core.data.packing import PackingPlan
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.files import check_output_dir, find_existing
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES
from speculators_cli.core.training.build import (
    Kernels,
    build_loader,
    choose_compute_dtype,
    choose_train_kernels,
    count_steps,
)
from speculators_cli.core.training.capture_plan import CapturePlan, plan_capture
from speculators_cli.core.training.distributed import Ranks, count_shards, start_ranks
from speculators_cli.core.training.inputs import Inputs, read_inputs
from speculators_cli.core.training.warm_start import read_warm_start
from speculators_cli.settings.train import TrainSettings


@dataclass(frozen=True)
class TrainPlan:
    """Estimates for `speculators train`; None means unknown on this machine.

    Time and memory are estimated only for the fast kernels in bfloat16.
    """

    num_samples: int
    num_validation_samples: int
    tokens_per_epoch: int
    supervised_fraction: float
    steps_per_epoch: int
    total_steps: int
    num_ranks: int
    num_shards: int  # of weights and optimizer state; 1: whole on each rank
    device: str
    target_layer_ids: tuple[int, ...]
    are_layer_ids_assumed: bool  # a guess that was not confirmed
    num_parameters: int  # of the draft, including its lm_head
    useful_tflop_per_step: float  # of one rank
    seconds: float | None  # training steps, and the capture in them
    memory_bytes_per_gpu: int | None  # peak
    memory_terms_bytes: dict[str, int] | None  # breakdown of the peak
    gpu_memory_bytes: int | None
    host_prefetch_bytes: int  # of each rank's memory: prefetched hidden states, at most
    capture: CapturePlan | None  # None if hidden states are stored
    data_bytes: int  # read in each epoch
    bytes_per_second: float | None  # from disk, over all ranks
    checkpoint_bytes: int  # each
    host_copy_bytes: int  # of rank 0's memory: a checkpoint that is being written
    num_checkpoints: int  # kept after the run
    free_bytes: int  # on the disk of the save path

    def to_json(self) -> Mapping[str, Any]:
        """The fields."""
        return asdict(self)


def plan(
    settings: TrainSettings, *, num_ranks: int | None = None, progress: Progress = SILENT
) -> TrainPlan:
    """Read headers, pack an epoch, and estimate; loads no weights.

    Nothing is written but a scratch file of a moment, to measure the disk for online capture.

    Args:
        settings: Settings of the run.
        num_ranks: Number of processes of the run; None: as many as run now.
        progress: Receives the progress of reading.

    Raises:
        SettingsError: A setting or one of its paths cannot be used.
        DataError: The samples cannot be used.
        MachineError: The hub cannot be reached, or the device is missing or does not support the
            requested kernels.
    """
    check_output_dir(settings.run.save_path, flag="--save-path")
    with start_ranks(settings.distributed.device, settings.distributed.timeout_seconds) as ranks:
        if num_ranks is not None:
            ranks = replace(ranks, num_ranks=num_ranks, num_local_ranks=num_ranks)
        settings, source = read_warm_start(settings, progress)
        inputs = read_inputs(
            settings, source=source, num_ranks=ranks.num_ranks, index_file=None, progress=progress
        )
        config = inputs.draft_config(settings)
        return _estimate(settings, config, inputs, ranks)


def _estimate(
    settings: TrainSettings, config: DraftConfig, inputs: Inputs, ranks: Ranks
) -> TrainPlan:
    samples = inputs.samples
    per_rank = settings.optimizer.gradient_accumulation_steps
    global_batch = per_rank * ranks.num_ranks
    loader = build_loader(settings, samples, ranks, global_batch)
    packed = loader.pack(0)
    total_steps = count_steps(settings, loader)
    cost = ALGORITHMS[config.algorithm].cost
    lengths = np.minimum(samples.lengths, settings.data.total_seq_len)
    targets = samples.most_targets(settings.data.total_seq_len)
    work = [
        cost.expect_work(config, settings.algorithm_settings, lengths[ids], targets[ids])
        for ids in map(list, packed.sequences)
    ]
    num_steps = max(packed.num_steps, 1) * ranks.num_ranks  # of all ranks
    flops_per_step = sum(part.flops for part in work) / num_steps
    other_flops = sum(part.other_flops for part in work) / num_steps
    parameters = config.count_parameters()
    trained = cost.count_trained(config, settings.algorithm_settings)
    is_cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else "cpu"
    kernels = _modelled_kernels(settings, config, ranks.device)
    # What products in float8 take has no model.
    gpu = None if kernels is None or kernels.in_float8 else find_gpu(device)
    seconds = None
    if gpu is not None:
        all_flops = flops_per_step + other_flops
        seconds = total_steps * cost.estimate_seconds(all_flops, trained, gpu)
    capture = None
    if inputs.is_live:
        capture = plan_capture(settings, inputs, ranks, packed, total_steps, seconds, gpu)
        if seconds is not None and capture.seconds is not None:
            # Other GPUs capture during the steps.
            is_apart = settings.capture.is_apart
            seconds = max(seconds, capture.seconds) if is_apart else seconds + capture.seconds
    data_bytes = samples.num_bytes
    epochs = total_steps / max(packed.num_steps, 1)
    num_shards = count_shards(ranks, settings.distributed.sharding, trained)
    has_whole_verifier = inputs.needs_whole_verifier(settings)
    memory = cost.estimate_memory(
        config,
        settings.algorithm_settings,
        work,
        total_seq_len=settings.data.total_seq_len,
        num_accumulated=per_rank,
        num_ranks=ranks.num_ranks,
        num_shards=num_shards,
        has_whole_head=has_whole_verifier,
        in_float8=kernels is not None and kernels.in_float8,
    )
    if has_whole_verifier:
        whole = CaptureCost(inputs.verifier_config, in_float8=settings.capture.in_float8)
        memory = whole.add_memory(
            memory,
            total_seq_len=settings.data.total_seq_len,
            num_shards=ranks.num_local_ranks if settings.capture.shard_verifier else 1,
        )
    tokens = sum(part.num_positions for part in work)
    # float32 weights and two moments of what is trained; the embedding in its own dtype.
    checkpoint_bytes = 4 * parameters + 8 * trained + 2 * config.vocab_size * config.hidden_size
    return TrainPlan(
        num_samples=len(samples),
        num_validation_samples=len(inputs.validation_samples),
        tokens_per_epoch=tokens,
        supervised_fraction=sum(part.num_targets for part in work) / max(tokens, 1),
        steps_per_epoch=packed.num_steps,
        total_steps=total_steps,
        num_ranks=ranks.num_ranks,
        num_shards=num_shards,
        device=device,
        target_layer_ids=config.target_layer_ids,
        are_layer_ids_assumed=config.are_layer_ids_assumed,
        num_parameters=parameters,
        useful_tflop_per_step=flops_per_step / 1e12,
        seconds=seconds,
        memory_bytes_per_gpu=None if kernels is None else sum(memory.values()),
        memory_terms_bytes=None if kernels is None else dict(memory),
        gpu_memory_bytes=torch.cuda.mem_get_info()[1] if is_cuda else None,
        host_prefetch_bytes=_count_prefetched_bytes(settings, samples, loader),
        capture=capture,
        data_bytes=data_bytes,
        bytes_per_second=data_bytes * epochs / seconds if seconds else None,
        checkpoint_bytes=checkpoint_bytes,
        host_copy_bytes=checkpoint_bytes,
        num_checkpoints=_count_checkpoints(settings, packed, total_steps),
        free_bytes=shutil.disk_usage(find_existing(settings.run.save_path)).free,
    )


def _count_prefetched_bytes(
    settings: TrainSettings, samples: SampleSource, loader: BatchLoader
) -> int:
    """Size of the hidden states of prefetched batches; those in float8 stay in float8."""
    if samples.is_live:
        return 0
    total_seq_len, packed = settings.data.total_seq_len, loader.pack(0)
    targets = samples.most_targets(total_seq_len)
    rows = total_seq_len * samples.num_aux_layers
    rows += max((int(targets[list(ids)].sum()) for ids in packed.sequences), default=0)
    are_float8 = {ITEM_BYTES[header.dtype] == 1 for header in samples.headers}
    # A batch with samples of both kinds has memory for each.
    sizes = {True: 1, False: ITEM_BYTES[samples.dtype]}
    item_bytes = sum(sizes[is_float8] for is_float8 in are_float8)
    return (loader.max_ahead + 1) * rows * samples.hidden_size * item_bytes


def _modelled_kernels(
    settings: TrainSettings, config: DraftConfig, device: torch.device
) -> Kernels | None:
    """How a step is computed, if its memory is modelled: by fast kernels in bfloat16."""
    kernels = choose_train_kernels(settings, config, device)
    dtype = choose_compute_dtype(settings.distributed.compute_dtype, device)
    return kernels if kernels.are_fast and dtype == torch.bfloat16 else None


def _count_checkpoints(settings: TrainSettings, packed: PackingPlan, total_steps: int) -> int:
    """Checkpoints on disk at the end of the run."""
    per_epoch = max(packed.num_steps, 1)
    num_saved = -(-total_steps // per_epoch)
    every = settings.checkpoints.checkpoint_every_steps
    if every is not None:
        in_mid_epoch = (step % per_epoch != 0 for step in range(every, total_steps, every))
        num_saved += sum(in_mid_epoch)
    keep = settings.checkpoints.keep_checkpoints
    # The latest ones and the best.
    return num_saved if keep is None else min(num_saved, keep + 1)
