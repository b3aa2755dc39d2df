"""Rehearsal: compiles the kernels of the first step while the run is still being built."""

import os
import threading
from concurrent.futures import Future

import torch
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.models.verifier import FrozenVerifier
from speculators_cli.core.progress import Progress
from speculators_cli.core.training.build import choose_compute_dtype, choose_train_kernels
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.optimizer_step import NoLog, OptimizerStep
from speculators_cli.core.training.placement import set_gradient_dtypes
from speculators_cli.core.training.weights import DraftWeights
from speculators_cli.settings.train import TrainSettings

META = torch.device("meta")  # tensors without memory
MAX_THREADS = 16


class Rehearsal:
    """One optimizer step without memory: kernels are compiled and loaded, not launched.

    What is compiled depends on the draft and the settings, not on the samples, so that a thread can
    compile while weights are read. Kernels that it misses are compiled in the first step.

    Args:
        settings: Of the run.
        inputs: Of the run.
        ranks: Of the run.
    """

    def __init__(self, settings: TrainSettings, inputs: Inputs, ranks: Ranks) -> None:
        self.settings, self.inputs, self.ranks = settings, inputs, ranks
        self._done: Future[None] = Future()
        if ranks.device.type == "cuda":
            threading.Thread(target=self._run, name="rehearsal", daemon=True).start()
        else:
            self._done.set_result(None)

    def wait(self, progress: Progress) -> None:
        """Wait until the kernels are compiled."""
        error = self._done.exception()
        if error is not None:
            progress.warn(
                f"Kernels are compiled in the first step, since its rehearsal failed: {error}"
            )

    def _run(self) -> None:
        try:
            self._rehearse()
        except Exception as error:  # noqa: BLE001 - told by `wait`
            self._done.set_exception(error)
        else:
            self._done.set_result(None)

    def _rehearse(self) -> None:
        config = self.inputs.draft_config(self.settings)
        kernels = choose_train_kernels(self.settings, config, self.ranks.device)
        if not kernels.are_fast:
            return
        # Triton is only available with a GPU.
        from speculators_cli.core.kernels.rehearsal import rehearsing

        settings = self.settings
        dtype = choose_compute_dtype(settings.distributed.compute_dtype, self.ranks.device)
        step = build_step(config, settings, self.inputs, dtype, in_float8=kernels.in_float8)
        num_addends = settings.optimizer.gradient_accumulation_steps * self.ranks.num_ranks
        set_gradient_dtypes(step.draft, dtype, num_addends=num_addends)
        batch = make_batch(config, settings.data.total_seq_len, dtype)
        num_threads = min(MAX_THREADS, (os.cpu_count() or 1) // self.ranks.num_local_ranks)
        with rehearsing(max(num_threads, 1), prepare_thread=self._start_device):
            step.run((batch,), NoLog(), epoch=0, lr=0.0)

    def _start_device(self) -> None:
        """Make the run's GPU that of this thread."""
        torch.cuda.set_device(self.ranks.device)


def build_step(
    config: DraftConfig,
    settings: TrainSettings,
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    in_float8: bool,
) -> OptimizerStep:
    """The step of a run, on the meta device."""
    vocab = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=META)
    norm = torch.empty(config.hidden_size, device=META)
    draft = ALGORITHMS[config.algorithm].build(
        config,
        FrozenVerifier(vocab, norm, vocab, inputs.verifier_config),
        inputs.vocab_map,
        settings.algorithm_settings,
        use_fast_kernels=True,
        seed=0,
    )
    draft.use_float8 = in_float8
    weights = DraftWeights(draft)
    return OptimizerStep(
        weights,
        Ranks(0, 1, 0, 1, META, None),
        Optimizer(weights, settings.optimizer, use_fast_kernels=True),
        compute_dtype=dtype,
        noise_std=settings.data.noise_std,
        seed=0,
    )


def make_batch(config: DraftConfig, total_seq_len: int, dtype: torch.dtype) -> Batch:
    """Two documents whose second halves are supervised, on the meta device."""
    half = max(total_seq_len // 2, 1)
    lengths = (half, total_seq_len - half)
    mask = torch.cat([torch.arange(length) >= length // 2 for length in lengths])
    num_targets = int(mask.sum())

    def states(num_rows: int, width: int) -> Tensor:
        return torch.empty(num_rows, width, dtype=dtype, device=META)

    numbers = torch.empty(total_seq_len, dtype=torch.int64, device=META)
    return Batch(
        input_ids=numbers,
        aux_hidden_states=states(total_seq_len, config.num_aux_layers * config.target_hidden_size),
        loss_mask=mask.to(META),
        document_ids=numbers,
        position_ids=numbers,
        targets=numbers[:num_targets],
        last_hidden_states=states(num_targets, config.target_hidden_size),
        is_normed=torch.empty(num_targets, dtype=torch.bool, device=META),
        host_mask=mask,
        lengths=lengths,
        sample_ids=(0, 1),
    )
