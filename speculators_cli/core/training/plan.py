"""plan(settings): what a run will take, from headers and sizes alone."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from speculators_cli.core.data.dataset import Dataset
from speculators_cli.core.data.packing import PackingPlan, plan_epoch
from speculators_cli.core.files import check_output_dir, find_existing
from speculators_cli.core.models.config import Eagle3Config
from speculators_cli.core.models.cost import (
    RowCounts,
    count_flops,
    count_parameters,
    count_trained,
    estimate_memory,
    estimate_seconds,
    find_gpu,
)
from speculators_cli.core.models.kernels import use_fast_kernels
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.distributed import Ranks, start_ranks
from speculators_cli.core.training.inputs import read_inputs
from speculators_cli.core.training.run import choose_compute_dtype
from speculators_cli.core.training.warm_start import read_warm_start
from speculators_cli.settings.train import TrainSettings


@dataclass(frozen=True)
class TrainPlan:
    """What `speculators train` would do; None is unknown on this machine.

    Time and memory are known of the fast kernels in bfloat16 alone.
    """

    num_samples: int
    num_validation_samples: int
    tokens_per_epoch: int
    supervised_fraction: float
    steps_per_epoch: int
    total_steps: int
    num_ranks: int
    device: str
    target_layer_ids: tuple[int, ...]
    are_layer_ids_assumed: bool  # a guess that nobody confirmed
    num_parameters: int  # of the draft, its lm_head among them
    useful_tflop_per_step: float  # of one rank
    seconds: float | None  # training steps alone
    memory_bytes_per_gpu: int | None  # peak
    gpu_memory_bytes: int | None
    data_bytes: int  # read in each epoch
    bytes_per_second: float | None  # from disk, over all ranks
    checkpoint_bytes: int  # each
    num_checkpoints: int  # kept at the end
    free_bytes: int  # on the disk of the save path

    def to_json(self) -> Mapping[str, Any]:
        """The fields."""
        return asdict(self)


def plan(settings: TrainSettings, *, num_ranks: int | None, progress: Progress) -> TrainPlan:
    """Read headers, pack an epoch, and estimate; no weights are loaded, nothing is written.

    Args:
        settings: Of the run.
        num_ranks: Processes that will share it; None: as many as there are now.
        progress: Who hears of the reading.

    Raises:
        SettingsError: A setting or a path it names cannot be used.
        DataError: The samples cannot be used.
        MachineError: The hub cannot be reached, or the device is not there, or takes no kernels
            that were asked for.
    """
    check_output_dir(settings.run.save_path, flag="--save-path")
    with start_ranks(settings.distributed) as ranks:
        if num_ranks is not None:
            ranks = replace(ranks, num_ranks=num_ranks, num_local_ranks=num_ranks)
        settings, source = read_warm_start(settings)
        inputs = read_inputs(
            settings, source=source, num_ranks=ranks.num_ranks, index_file=None, progress=progress
        )
        config = inputs.draft_config(settings)
        return _estimate(settings, config, inputs.samples, len(inputs.validation_samples), ranks)


def _estimate(
    settings: TrainSettings,
    config: Eagle3Config,
    samples: Dataset,
    num_validation_samples: int,
    ranks: Ranks,
) -> TrainPlan:
    per_rank = settings.optimizer.gradient_accumulation_steps
    global_batch = per_rank * ranks.num_ranks
    packed = plan_epoch(
        samples.lengths,
        total_seq_len=settings.data.total_seq_len,
        seed=settings.run.seed,
        epoch=0,
        global_batch=global_batch,
    )
    total_steps = packed.num_steps * settings.run.epochs
    total_steps = min(total_steps, settings.run.max_steps or total_steps)
    rows = [_count_rows(sequence, samples, settings) for sequence in packed.sequences]
    train_head = settings.eagle3.train_head
    flops = sum(count_flops(config, row, train_head=train_head) for row in rows)
    flops_per_step = flops / max(packed.num_steps, 1) / ranks.num_ranks
    parameters = count_parameters(config)
    trained = count_trained(config, train_head=train_head)
    is_cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name() if is_cuda else "cpu"
    is_modelled = _runs_fast_in_bfloat16(settings, config, ranks.device)
    gpu = find_gpu(device) if is_modelled else None
    seconds = total_steps * estimate_seconds(flops_per_step, trained, gpu) if gpu else None
    data_bytes = sum(entry.stamp.num_bytes for entry in samples.entries)
    epochs = total_steps / max(packed.num_steps, 1)
    shards = {"shard": ranks.num_ranks, "replicate": 1, "auto": ranks.num_local_ranks}
    memory = estimate_memory(
        config,
        total_seq_len=settings.data.total_seq_len,
        num_active=max(row.num_active for row in rows),
        num_targets=max(row.num_targets for row in rows),
        train_head=train_head,
        num_accumulated=per_rank,
        num_shards=shards[settings.distributed.sharding],
    )
    tokens = sum(row.num_positions for row in rows)
    return TrainPlan(
        num_samples=len(samples),
        num_validation_samples=num_validation_samples,
        tokens_per_epoch=tokens,
        supervised_fraction=sum(row.num_targets for row in rows) / max(tokens, 1),
        steps_per_epoch=packed.num_steps,
        total_steps=total_steps,
        num_ranks=ranks.num_ranks,
        device=device,
        target_layer_ids=config.target_layer_ids,
        are_layer_ids_assumed=config.are_layer_ids_assumed,
        num_parameters=parameters,
        useful_tflop_per_step=flops_per_step / 1e12,
        seconds=seconds,
        memory_bytes_per_gpu=memory if is_modelled else None,
        gpu_memory_bytes=torch.cuda.mem_get_info()[1] if is_cuda else None,
        data_bytes=data_bytes,
        bytes_per_second=data_bytes * epochs / seconds if seconds else None,
        # float32 weights and two moments of what is trained; the embedding in its own dtype.
        checkpoint_bytes=4 * parameters + 8 * trained + 2 * config.vocab_size * config.hidden_size,
        num_checkpoints=_count_checkpoints(settings, packed, total_steps),
        free_bytes=shutil.disk_usage(find_existing(settings.run.save_path)).free,
    )


def _runs_fast_in_bfloat16(
    settings: TrainSettings, config: Eagle3Config, device: torch.device
) -> bool:
    dtype = choose_compute_dtype(settings, device)
    is_fast = use_fast_kernels(
        settings.distributed.kernels, device, dtype, head_dim=config.head_dim
    )
    return is_fast and dtype == torch.bfloat16


def _count_rows(sequence: tuple[int, ...], samples: Dataset, settings: TrainSettings) -> RowCounts:
    """What headers tell: how many positions are supervised, not which."""
    total_seq_len = settings.data.total_seq_len
    headers = [samples.entries[sample_id].header for sample_id in sequence]
    lengths = np.array([min(header.num_tokens - 1, total_seq_len) for header in headers])
    # Of a sample that is cut, at most what follows its first target.
    room = [
        lengths[i] - header.first_target + 1 if header.has_target(total_seq_len) else 0
        for i, header in enumerate(headers)
    ]
    targets = np.minimum([header.num_supervised_tokens for header in headers], room)
    # One turn a document: a few positions before its first supervised one are active too.
    active = np.minimum(targets + settings.eagle3.ttt_steps - 1, lengths) * (targets > 0)
    # As if supervised positions lay evenly over the document.
    all_pairs = lengths * (lengths + 1) / 2
    pairs = all_pairs * active / np.maximum(lengths, 1)
    return RowCounts(
        num_positions=int(lengths.sum()),
        num_active=int(active.sum()),
        num_needed=int(active.sum()),
        num_targets=int(targets.sum()),
        num_pairs=int(pairs.sum()),
        num_all_pairs=int(all_pairs.sum()),
    )


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
