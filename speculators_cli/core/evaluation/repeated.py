"""RepeatedEvaluation: a draft in training, evaluated again and again on the same prompts."""

from dataclasses import dataclass

import torch

from speculators_cli.core.conversations.prompt_ids import PromptRenderer
from speculators_cli.core.drafts.trained_draft import TrainedDraft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.evaluation.draft_and_verify import draft_and_verify
from speculators_cli.core.evaluation.questions import read_questions
from speculators_cli.core.evaluation.verifier import LoadedVerifier, load_verifier
from speculators_cli.core.models.verifier import VerifierConfig
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_tokens import VerifierTokens, load_verifier_tokens
from speculators_cli.core.progress import SILENT, Progress
from speculators_cli.settings.evaluate import PromptSettings

CPU_BATCH, GPU_BATCH = 16, 64  # prompts drafted and verified together


@dataclass(frozen=True)
class Share:
    """The prompts of one of several processes."""

    index: int
    num_shares: int


@dataclass(frozen=True, eq=False)
class RepeatedEvaluation:
    """A loaded verifier, and prompts that it answers greedily."""

    verifier: LoadedVerifier
    prompts: tuple[Prompt, ...]
    max_new_tokens: int
    num_draft_tokens: int

    def count_accepted(self, draft: TrainedDraft) -> list[int]:
        """Draft and verify; the accepted draft tokens of each verifier pass."""
        if not self.prompts:
            return []
        rows = self.verifier.rows
        rows.select_layers(draft.config.target_layer_ids)
        drafter = draft.build_drafter(
            self.verifier.embedding,
            num_draft_tokens=self.num_draft_tokens,
            head=self.verifier.head,
        )
        drafted = draft_and_verify(
            rows,
            drafter,
            self.prompts,
            Sampling(self.max_new_tokens, temperature=0.0),
            end_ids=self.verifier.tokens.end_ids,
            batch_size=GPU_BATCH if rows.device.type == "cuda" else CPU_BATCH,
            progress=SILENT,
        )
        rows.start(0, 0)  # frees keys and values for the training
        return [count for answer in drafted.answers for count in answer.num_accepted]


def open_repeated(
    files: VerifierFiles,
    config: VerifierConfig,
    given: PromptSettings,
    share: Share,
    *,
    layer_ids: tuple[int, ...],
    num_draft_tokens: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    memory_hint: str,
    trust_remote_code: bool,
    progress: Progress,
) -> RepeatedEvaluation:
    """Read the prompts and load the whole verifier.

    Args:
        files: Of the verifier.
        config: Of the verifier.
        given: The prompts.
        share: Which of them are answered here.
        layer_ids: Aux layers that the draft reads, ascending.
        num_draft_tokens: Per verifier pass.
        max_new_tokens: Maximum length of an answer.
        dtype: Of the verifier.
        device: Of the verifier.
        memory_hint: What to do if it does not fit.
        trust_remote_code: Whether custom code from the verifier's repository may run.
        progress: Reports prompts that are left out.

    Raises:
        SettingsError: Prompts or verifier cannot be used.
        DataError: The prompts cannot be read, or none is usable.
        MachineError: The verifier does not fit into memory, or the hub cannot be reached.
    """
    tokens = load_verifier_tokens(files, config, trust_remote_code=trust_remote_code)
    prompts = read_share(
        given,
        tokens,
        share,
        max_tokens=max(config.max_position_embeddings - max_new_tokens - num_draft_tokens, 1),
        progress=progress,
    )
    verifier = load_verifier(
        files,
        layer_ids,
        dtype=dtype,
        device=device,
        config=config,
        tokens=tokens,
        trust_remote_code=trust_remote_code,
        memory_hint=memory_hint,
    )
    return RepeatedEvaluation(verifier, prompts, max_new_tokens, num_draft_tokens)


def read_share(
    given: PromptSettings,
    tokens: VerifierTokens,
    share: Share,
    *,
    max_tokens: int,
    progress: Progress,
) -> tuple[Prompt, ...]:
    """Read the prompts, and keep those of a share: every so manyth one."""
    renderer = PromptRenderer(tokens.tokenizer, thinking=None, vocab_size=tokens.vocab_size)
    found = read_questions(given, renderer, vocab_size=tokens.vocab_size, max_tokens=max_tokens)
    if found.num_too_long:
        progress.warn(
            f"{found.num_too_long:,} prompts of `{given.prompts}` are left out: they have more "
            f"than {max_tokens:,} tokens"
        )
    own = found.questions[share.index :: share.num_shares]
    return tuple(Prompt(question.ids, seed=0) for question in own)
