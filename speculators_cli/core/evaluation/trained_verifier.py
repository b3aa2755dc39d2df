"""The verifier that a draft was trained with, in place of the one that it is evaluated with."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.evaluation.diagnosis import Cause, sample_rows, weigh
from speculators_cli.core.evaluation.draft_and_verify import Answer, draft_and_verify
from speculators_cli.core.evaluation.forced_drafting import MAX_ANSWERS
from speculators_cli.core.evaluation.measurement import Work
from speculators_cli.core.evaluation.verifier import LoadedVerifier
from speculators_cli.core.progress import Progress

# Of the embeddings of one model at two precisions, relative to their size: rounding to 4 bits with
# a scale per row changes rows of normal values by 0.12.
MOST_ROUNDING = 0.25


def find_trained_verifier(source: TrainedDraft, used: str) -> str | None:
    """Name or path of the verifier of a draft's training; None if it is unknown, or the one used.

    Args:
        source: The draft.
        used: Name or path of the verifier that it is evaluated with.
    """
    name = source.recorded_verifier
    if source.checkpoint is not None:
        name = source.checkpoint.state.settings.get("draft", {}).get("verifier_name_or_path", name)
    if name is None or Path(name).resolve() == Path(used).resolve():
        return None
    return str(name)


def weigh_trained_verifier(
    trained: LoadedVerifier,
    drafter: Drafter,
    used: LoadedVerifier,
    answers: Sequence[Answer],
    work: Work,
    *,
    seed: int,
    progress: Progress,
) -> Cause:
    """Draft and verify answers to the first prompts with the verifier of the training.

    Its answers are its own, so the gain includes what the draft loses where they differ.

    Args:
        trained: The verifier of the training; its rows return the states that the draft reads.
        drafter: The draft, with the embedding and LM head of `trained`.
        used: The verifier that the draft is evaluated with.
        answers: To all prompts, drafted and verified with `used`.
        work: How answers are generated.
        seed: Of the interval.
        progress: Reports finished answers.
    """
    pairs = [pair for pair in zip(work.prompts, answers, strict=True) if pair[1].num_accepted]
    prompts, base = zip(*pairs[:MAX_ANSWERS], strict=True)
    found = draft_and_verify(
        trained.rows,
        drafter,
        prompts,
        work.sampling,
        end_ids=trained.tokens.end_ids,
        batch_size=work.batch_size,
        progress=progress,
    ).answers
    is_same_model = _distance(trained.embedding, used.embedding) < MOST_ROUNDING
    name = "quantized verifier" if is_same_model else "other verifier"
    change = f"verifier `{trained.name}`, of the training"
    return weigh(name, change, found, base, seed=seed)


def _distance(a: Tensor, b: Tensor) -> float:
    """Difference of two embeddings, relative to the size of the first."""
    first, second = sample_rows(a), sample_rows(b)
    return float((first - second).norm() / first.norm())
