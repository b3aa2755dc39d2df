"""train(settings): training, with an evaluation on prompts after each epoch if there are any."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.errors import DataError, MachineError
from speculators_cli.core.files import format_bytes
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.core.training import run
from speculators_cli.core.training.build import choose_compute_dtype
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import Inputs
from speculators_cli.core.training.prompt_evaluation import EvaluateDraft
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.start_up import StartUp
from speculators_cli.settings.evaluate import PromptSettings
from speculators_cli.settings.train import TrainSettings

PROMPTS_HINT = "Correct the prompts of `--evaluate-prompts`, or lower `--evaluate-max-new-tokens`"
MEMORY_HINT = (
    "Leave out `--evaluate-prompts`, which loads the whole verifier on every rank beside the "
    "training, and run `speculators evaluate` on the checkpoints"
)


def train(
    settings: TrainSettings,
    *,
    progress: Progress = SILENT,
    dry_run: bool = False,
    start_up: StartUp | None = None,
) -> TrainReport:
    """Train a draft model, from scratch or from the latest checkpoint in the save path.

    Args:
        settings: All settings of the run.
        progress: Reports progress.
        dry_run: Build everything, run one step, write nothing.
        start_up: Timer of the start; None: it begins here.

    Raises:
        SettingsError: A setting or one of its paths cannot be used; nothing was written.
        DataError: The samples or prompts cannot be used.
        CheckpointError: The save path contains files that cannot be resumed or replaced.
        MachineError: The disk, memory, device or hub failed.
        DivergedError: Gradients were not finite for too many consecutive steps.
        StoppedError: A signal stopped the run; its state is saved, if there is one.
    """
    has_prompts = settings.evaluation.evaluate_prompts is not None
    return run.train(
        settings,
        progress=progress,
        dry_run=dry_run,
        open_evaluation=open_evaluation if has_prompts else None,
        start_up=start_up,
    )


def open_evaluation(
    settings: TrainSettings, inputs: Inputs, ranks: Ranks, progress: Progress
) -> EvaluateDraft:
    """Load the verifier on this rank's device, and read this rank's prompts."""
    # Importing what runs the whole verifier takes seconds, and most runs do without.
    from speculators_cli.core.evaluation.repeated import Share, open_repeated

    given, config = settings.evaluation, inputs.draft_config(settings)
    verifier = f"verifier `{inputs.verifier_files.name_or_path}`"
    with memory_explained(ranks.device, f"Loading {verifier}"):
        try:
            evaluation = open_repeated(
                inputs.verifier_files,
                inputs.verifier_config,
                PromptSettings(
                    prompts=given.evaluate_prompts, max_prompts=given.evaluate_max_prompts
                ),
                Share(ranks.rank, ranks.num_ranks),
                layer_ids=config.target_layer_ids,
                num_draft_tokens=config.num_draft_tokens,
                max_new_tokens=given.evaluate_max_new_tokens,
                dtype=choose_compute_dtype(settings.distributed.compute_dtype, ranks.device),
                device=ranks.device,
                memory_hint=MEMORY_HINT,
                trust_remote_code=settings.draft.trust_remote_code,
                progress=progress,
            )
        except DataError as error:
            raise DataError(error.message, hint=PROMPTS_HINT) from None

    def evaluate(draft: TrainedDraft) -> Sequence[int]:
        with memory_explained(ranks.device, f"Evaluating with {verifier}"):
            return evaluation.count_accepted(draft)

    return evaluate


@contextmanager
def memory_explained(device: torch.device, what: str) -> Iterator[None]:
    """Name what did not fit beside the training.

    Raises:
        MachineError: Memory is short.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise MachineError(
            f"{what} needs more GPU memory than the training leaves: {format_bytes(free)} of "
            f"{format_bytes(total)} are free",
            hint=MEMORY_HINT,
        ) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise MachineError(
            f"{what} needs more memory than the training leaves", hint=MEMORY_HINT
        ) from None
