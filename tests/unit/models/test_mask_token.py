"""The mask token: never one that text, a template or the end of an answer has."""

from typing import Any

import pytest

from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models import mask_token
from speculators_cli.core.models.mask_token import choose_mask_token
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.tiny_run import TinyInputs


class FakeToken:
    def __init__(self, content: str) -> None:
        self.content = content
        self.special = content != "<tool>"


class FakeTokenizer:
    """Ten words, then special tokens."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id = 10, 11, 12, None

    def __init__(self, *special: str) -> None:
        self.added_tokens_decoder = {10 + i: FakeToken(name) for i, name in enumerate(special)}
        self.names = {f"word{i}": i for i in range(10)}
        self.names |= {name: 10 + i for i, name in enumerate(special)}

    def get_vocab(self) -> dict[str, int]:
        return self.names

    def decode(self, ids: list[int]) -> str:
        return next(name for name, i in self.names.items() if i == ids[0])


def choose(
    monkeypatch: pytest.MonkeyPatch, *special: str, vocab_size: int, used: set[int] | None = None
) -> int:
    def load(*_: Any, **__: Any) -> FakeTokenizer:
        return FakeTokenizer(*special)

    def find(*_: Any, **__: Any) -> tuple[frozenset[int], None]:
        return frozenset(used or {11}), None

    monkeypatch.setattr(mask_token, "load_tokenizer", load)
    monkeypatch.setattr(mask_token, "find_special_ids", find)
    files = VerifierFiles(str(VERIFIER_DIR))
    return choose_mask_token(None, files, vocab_size, trust_remote_code=False)


def test_a_row_without_a_token_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    special = ("<s>", "</s>", "<pad>", "<|reserved_0|>")

    assert choose(monkeypatch, *special, vocab_size=20) == 14


def test_then_a_reserved_token_that_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    special = ("<s>", "</s>", "<reserved_pad>", "<|reserved_0|>", "<|reserved_1|>", "<tool>")

    # 12 pads; 13 is in the chat template.
    assert choose(monkeypatch, *special, vocab_size=16, used={11, 13}) == 14


def test_padding_and_end_tokens_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    special = ("<mask_start>", "<mask_end>", "<mask_pad>", "<tool>")

    with pytest.raises(SettingsError, match="every token of verifier") as error:
        choose(monkeypatch, *special, vocab_size=14)

    assert "--mask-token-id" in str(error.value.hint)


def test_special_tokens_of_other_uses_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    special = ("<s>", "</s>", "<pad>", "<tool>", "<filename>", "<gh_stars>")

    assert choose(monkeypatch, *special, vocab_size=16) == 14


def test_a_byte_that_no_text_has_comes_before() -> None:
    files = VerifierFiles(str(VERIFIER_DIR))
    tokenizer = load_tokenizer(files, trust_remote_code=False)

    chosen = choose_mask_token(None, files, len(tokenizer), trust_remote_code=False)

    assert tokenizer.decode([chosen]) == "\ufffd"
    texts = ["ÿ À Á õ", "".join(map(chr, range(0x20, 0x800))), "日本語 🙂"]
    assert all(chosen not in tokenizer.encode(text) for text in texts)


def test_a_given_token_is_checked(tiny: TinyInputs) -> None:
    files = VerifierFiles(str(tiny.verifier_dir))  # without a tokenizer

    assert choose_mask_token(1, files, 37, trust_remote_code=False) == 1
    for given in (2, 37):  # its end token; beyond its vocabulary
        with pytest.raises(SettingsError, match=f"`--mask-token-id` is `{given}`"):
            choose_mask_token(given, files, 37, trust_remote_code=False)
