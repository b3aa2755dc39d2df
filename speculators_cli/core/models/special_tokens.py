"""Tokens of a verifier that a draft must be able to propose, however rare they are."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import logging


def find_special_ids(
    name_or_path: str, *, trust_remote_code: bool = False
) -> tuple[frozenset[int], bool]:
    """End tokens, and the control tokens that the chat template writes.

    Returns:
        Their ids; whether a tokenizer was found, without which only the configs were asked.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    ids = _as_set(getattr(config.get_text_config(decoder=True), "eos_token_id", None))
    with _quiet_transformers():
        with suppress(OSError):  # not every verifier has one
            ids |= _as_set(GenerationConfig.from_pretrained(name_or_path).eos_token_id)
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                name_or_path, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError):
            return frozenset(ids), False
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.items()
    control = {token_id for token_id, token in added if token.content in template}
    return frozenset(ids | control | _as_set(tokenizer.eos_token_id)), True


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """What is missing is reported by the caller, in a line."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _as_set(ids: int | list[int] | None) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
