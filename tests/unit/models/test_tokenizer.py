"""Tokenizers that cannot be read: why, and what to do; what works without one goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.demo.demo import VERIFIER_DIR
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.evaluation.verifier import load_verifier
from speculators_cli.core.models.special_tokens import find_special_ids
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.preparation import text

Capture = pytest.CaptureFixture[str]
UPDATE = "Run `pip install -U tokenizers transformers`, or download the tokenizer again"
OF_ITS_OWN = {
    "tokenizer_class": "OwnTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
}
CONFIG = json.loads((VERIFIER_DIR / "tokenizer_config.json").read_text())
NEWER = {"version": "1.0", "added_tokens": [], "model": {"type": "NextBPE", "vocab": {}}}
# What is written in place of a file, the reason, and the fix.
BROKEN: dict[str, tuple[str, str, str, str]] = {
    "newer": (
        "tokenizer.json",
        json.dumps(NEWER),
        "cannot be read: data did not match any variant",
        UPDATE,
    ),
    "cut": ("tokenizer.json", '{"version": ', "is truncated", "Download it again"),
    "empty": ("tokenizer.json", "", "is empty (0 bytes)", "Download it again"),
    "pointer": (
        "tokenizer.json",
        "version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer",
        "Run `git lfs pull` in ",
    ),
    "a list": ("tokenizer.json", "[]", "holds a list, expected an object", "Download it again"),
    "config cut": ("tokenizer_config.json", '{"a', "is truncated", "Download it again"),
    "config of a number": (
        "tokenizer_config.json",
        '{"tokenizer_class": 7}',
        "cannot be read",
        UPDATE,
    ),
    "own code": (
        "tokenizer_config.json",
        json.dumps(OF_ITS_OWN),
        "cannot be read: it requires custom code",
        "Pass `--trust-remote-code` if you trust the code",
    ),
    "template": (
        "tokenizer_config.json",
        json.dumps(CONFIG | {"chat_template": [1]}),
        "cannot be read",
        UPDATE,
    ),
    "added tokens": ("added_tokens.json", '{"a": "b"}', "cannot be read", UPDATE),
}


@pytest.fixture
def verifier_dir(tmp_path: Path) -> Path:
    """The embedded verifier in a folder that may be written into."""
    return Path(shutil.copytree(VERIFIER_DIR, tmp_path / "verifier"))


@pytest.mark.parametrize("name", BROKEN)
def test_a_tokenizer_that_cannot_be_read_says_why(name: str, verifier_dir: Path) -> None:
    file, content, reason, hint = BROKEN[name]
    (verifier_dir / file).write_text(content)

    with pytest.raises(SettingsError) as caught:
        load_tokenizer(VerifierFiles(str(verifier_dir)), trust_remote_code=False)

    assert reason in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("name", BROKEN)
def test_special_tokens_are_those_of_the_configs_where_the_tokenizer_cannot_be_read(
    name: str, verifier_dir: Path
) -> None:
    file, content, reason, _ = BROKEN[name]
    (verifier_dir / file).write_text(content)
    config = json.loads((verifier_dir / "config.json").read_text()) | {"eos_token_id": [7, 9]}
    (verifier_dir / "config.json").write_text(json.dumps(config))
    (verifier_dir / "generation_config.json").write_text('{"eos_token_id": 11}')

    ids, problem = find_special_ids(VerifierFiles(str(verifier_dir)))

    assert ids == {7, 9, 11}
    assert problem is not None
    assert reason in problem.message


@pytest.mark.parametrize("end", ['"</s>"', "[[1]]", "true", "1.5"])
def test_end_tokens_that_are_no_ids_are_refused(end: str, verifier_dir: Path) -> None:
    (verifier_dir / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')

    with pytest.raises(SettingsError, match=r"`eos_token_id` in `generation_config\.json`"):
        find_special_ids(VerifierFiles(str(verifier_dir)))


def test_a_cut_generation_config_is_named(verifier_dir: Path) -> None:
    (verifier_dir / "generation_config.json").write_text('{"eos_token_id": 1')

    with pytest.raises(SettingsError, match=r"generation_config\.json` is truncated"):
        find_special_ids(VerifierFiles(str(verifier_dir)))


def test_evaluation_needs_a_tokenizer_and_says_what_is_wrong_with_it(verifier_dir: Path) -> None:
    (verifier_dir / "tokenizer.json").write_text(json.dumps(NEWER))

    with pytest.raises(SettingsError, match="did not match any variant") as caught:
        load_verifier(VerifierFiles(str(verifier_dir)), (2, 4, 5), dtype=torch.float32)

    assert caught.value.hint == UPDATE


def test_the_text_of_a_sample_needs_a_tokenizer_and_says_what_is_wrong_with_it(
    verifier_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    (verifier_dir / "tokenizer.json").write_text(json.dumps(NEWER))
    write_sample(tmp_path / "data", token_id=5)

    code = run(["inspect-data", str(tmp_path / "data"), "--show", "0", *flags(verifier_dir)])

    assert code == 2
    assert UPDATE in capsys.readouterr().err


class SmallTokenizer:
    """Knows the tokens of a small vocabulary, as a tokenizer with code of its own may."""

    def decode(self, ids: list[int]) -> str:
        return "".join({1: "a"}[token_id] for token_id in ids)


def test_token_ids_that_the_tokenizer_lacks_are_an_error_of_the_data(
    verifier_dir: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "load_tokenizer", lambda *_, **__: SmallTokenizer())
    write_sample(tmp_path / "data", token_id=5)

    code = run(["inspect-data", str(tmp_path / "data"), "--show", "0", *flags(verifier_dir)])

    err = capsys.readouterr().err
    assert code == 3
    assert "data_0.pt` has token ids that the tokenizer of" in err


def flags(verifier_dir: Path) -> list[str]:
    return ["--verifier-name-or-path", str(verifier_dir)]


def write_sample(folder: Path, *, token_id: int) -> None:
    folder.mkdir()
    content = {
        "input_ids": torch.full((9,), token_id),
        "loss_mask": torch.ones(9, dtype=torch.long),
        "hidden_states": [torch.zeros(9, 24) for _ in range(4)],
    }
    torch.save(content, folder / "data_0.pt")
