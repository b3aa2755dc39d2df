"""Whether a draft can be evaluated with a verifier."""

from pathlib import Path

from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.data.data_config import LayerIds, warn_of_assumed
from speculators_cli.core.drafts.trained_draft import ASSUMED_HINT, TrainedDraft, read_draft
from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import VerifierShape, read_verifier_shape
from speculators_cli.core.progress import Progress
from speculators_cli.settings.evaluate import EvaluatedDraftSettings

HINT = "Pass the draft's own verifier with `--verifier-name-or-path`"


def read_source(
    name: str, given: EvaluatedDraftSettings, flag: str, progress: Progress
) -> TrainedDraft:
    """Read a trained draft; warn of what its config.json leaves open.

    Raises:
        SettingsError: The folder does not exist.
        CheckpointError: It is not a complete draft of a known algorithm.
        MachineError: The hub cannot be reached.
    """
    known = Overrides(
        verifier_name_or_path=given.verifier_name_or_path,
        target_layer_ids=given.target_layer_ids,
        read_verifier=lambda verifier: read_verifier_shape(
            VerifierFiles(verifier), trust_remote_code=given.trust_remote_code
        ),
    )
    source = read_draft(name, known, flag=flag)
    ids = LayerIds(source.config.target_layer_ids, is_assumed=source.config.are_layer_ids_assumed)
    warn_of_assumed(ids, progress, whose=f"`{source.name}` has")
    if source.assumption is not None:
        progress.warn(source.assumption, hint=ASSUMED_HINT)
    return source


def check_fit(
    source: TrainedDraft, verifier: VerifierShape, vocab_size: int, progress: Progress
) -> None:
    """Check that a draft is for a verifier; warn if only the name differs.

    Raises:
        CheckpointError: Sizes or layers differ.
    """
    config, name = source.config, verifier.name_or_path
    for word, found, expected in (
        ("hidden size", config.target_hidden_size, verifier.hidden_size),
        ("vocabulary", config.vocab_size, vocab_size),
    ):
        if found != expected:
            raise CheckpointError(
                f"`{source.name}` is for a verifier of {word} {found:,}, `{name}` has {expected:,}",
                hint=HINT,
            )
    if source.embedding is None and config.hidden_size != verifier.hidden_size:
        raise CheckpointError(
            f"`{source.name}` has no embedding, and its hidden size {config.hidden_size:,} is not "
            f"the {verifier.hidden_size:,} of `{name}`",
            hint=HINT,
        )
    if config.target_layer_ids[-1] > verifier.num_layers:
        raise CheckpointError(
            f"`{source.name}` reads verifier layer {config.target_layer_ids[-1]}, `{name}` has "
            f"{verifier.num_layers}",
            hint=HINT,
        )
    recorded = source.recorded_verifier
    # A verifier may be in a folder that was moved, so only the last parts are compared.
    if recorded is not None and Path(recorded).name != Path(name).name:
        progress.warn(
            f"`{source.name}` was trained for verifier `{recorded}`, and is evaluated with `{name}`"
        )


def check_num_draft_tokens(drafter: Drafter, wanted: int, source: TrainedDraft) -> None:
    """Check that a drafter proposes as many tokens as it should.

    Raises:
        SettingsError: Its algorithm cannot.
    """
    if drafter.num_draft_tokens != wanted:
        raise SettingsError(
            f"`--num-speculative-tokens` is `{wanted}`, and algorithm `{source.config.algorithm}` "
            f"drafts {drafter.num_draft_tokens}",
            hint=f"Pass `--num-speculative-tokens {drafter.num_draft_tokens}`",
        )
