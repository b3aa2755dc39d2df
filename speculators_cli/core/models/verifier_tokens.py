"""VerifierTokens: a verifier's tokenizer, end tokens and vocabulary, checked against each other."""

from dataclasses import dataclass
from typing import Any

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.special_tokens import read_end_ids
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier import VerifierConfig
from speculators_cli.core.models.verifier_files import VerifierFiles


@dataclass(frozen=True)
class VerifierTokens:
    """What is needed to turn texts into tokens, and answers into texts."""

    tokenizer: Any
    end_ids: frozenset[int]
    vocab_size: int  # rows of the embedding


def load_verifier_tokens(
    files: VerifierFiles, config: VerifierConfig, *, trust_remote_code: bool
) -> VerifierTokens:
    """Load the tokenizer, and read the end tokens and the size of the vocabulary.

    Raises:
        SettingsError: There is no tokenizer, or it is of another model.
        MachineError: The hub cannot be reached.
    """
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    end_ids = read_end_ids(files, trust_remote_code=trust_remote_code)
    own_end = tokenizer.eos_token_id
    if own_end is not None and not end_ids:
        end_ids = {own_end}
    vocab_size = files.read_vocab_size(config.modules)
    if len(tokenizer) > vocab_size:
        raise SettingsError(
            f"The tokenizer of `{files.name_or_path}` has {len(tokenizer):,} tokens, its embedding "
            f"{vocab_size:,}",
            hint="Download the verifier again: its tokenizer is of another model",
        )
    return VerifierTokens(tokenizer, frozenset(end_ids), vocab_size)
