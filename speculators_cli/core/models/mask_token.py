"""The mask token: a verifier token that no text has, in place of an unknown token."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from speculators_cli.core.errors import SettingsError, SpeculatorsError
from speculators_cli.core.models.special_tokens import find_special_ids
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles

FLAG = "--mask-token-id"
# Names of tokens that model makers keep for others to use.
RESERVED = re.compile(r"mask|reserved|unused|extra_?\d|placeholder|dummy", re.IGNORECASE)


# Names of tokens of a byte that no UTF-8 text has, in byte-level and byte-fallback tokenizers.
BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))
IMPOSSIBLE = {name for byte in BYTES for name in (chr(byte), f"<0x{byte:02X}>")}
UNDECODABLE = "\ufffd"


def choose_mask_token(
    given: int | None, files: VerifierFiles, vocab_size: int, *, trust_remote_code: bool
) -> int:
    """The mask token of a run, given or chosen.

    Chosen is a row of the embedding that the tokenizer has no token for, else a token that its
    makers reserved, else one of a byte that no text has, else a special token of other uses, such
    as `<filename>`, which samples are checked for; never one that text, a chat template or the end
    of an answer has.

    Raises:
        SettingsError: The given one cannot be used, or none can be chosen.
    """
    if given is not None:
        _check(given, files, vocab_size, trust_remote_code=trust_remote_code)
        return given
    hint = f"Pass `{FLAG}` with a token that no sample has"
    try:
        tokenizer: Any = load_tokenizer(files, trust_remote_code=trust_remote_code)
    except SpeculatorsError as error:
        raise SettingsError(
            f"`{FLAG}`: no mask token can be chosen: {error.message}", hint=hint
        ) from None
    names = {int(i): str(token) for token, i in tokenizer.get_vocab().items()}
    spare = [i for i in range(vocab_size) if i not in names]
    if spare:
        return spare[0]
    used = _find_used(files, tokenizer, trust_remote_code=trust_remote_code)
    added = {int(i): token for i, token in tokenizer.added_tokens_decoder.items() if i not in used}
    found = [i for i in sorted(added) if RESERVED.search(names.get(i, ""))]
    found += _find_impossible(tokenizer, names)
    found += [i for i in sorted(added) if added[i].special]
    if not found:
        raise SettingsError(
            f"`{FLAG}`: no mask token can be chosen: every token of verifier "
            f"`{files.name_or_path}` is in use",
            hint=hint,
        )
    return found[0]


def _find_impossible(tokenizer: Any, names: Mapping[int, str]) -> list[int]:
    """Tokens of single bytes that no text has, since UTF-8 has no such bytes."""
    found = [i for i, name in names.items() if name in IMPOSSIBLE]
    return sorted(i for i in found if tokenizer.decode([i]) == UNDECODABLE)


def _check(given: int, files: VerifierFiles, vocab_size: int, *, trust_remote_code: bool) -> None:
    if given >= vocab_size:
        raise SettingsError(
            f"`{FLAG}` is `{given}`, but verifier `{files.name_or_path}` has {vocab_size:,} tokens",
            hint=f"Pass a token below {vocab_size:,}",
        )
    tokenizer: Any = None
    with suppress(SpeculatorsError):  # without a tokenizer, the end tokens are in the configs
        tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    if given in _find_used(files, tokenizer, trust_remote_code=trust_remote_code):
        raise SettingsError(
            f"`{FLAG}` is `{given}`, which is an end, padding or control token of verifier "
            f"`{files.name_or_path}`",
            hint="Pass a token that no sample has, or leave it out",
        )


def _find_used(files: VerifierFiles, tokenizer: Any, *, trust_remote_code: bool) -> set[int]:
    """End, start, padding and control tokens."""
    used, _ = find_special_ids(files, trust_remote_code=trust_remote_code)
    names: Iterable[str] = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    others = {getattr(tokenizer, name, None) for name in names}
    return set(used) | {i for i in others if isinstance(i, int)}
