"""`speculators build-vocab-map` as the user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from speculators_cli.cli.app import run
from speculators_cli.core.data.vocab_map import VocabMap
from tests.cli.golden import assert_golden
from tests.tiny_run import VOCAB, TinyInputs

Capture = pytest.CaptureFixture[str]


def build(*flags: object) -> int:
    return run(["build-vocab-map", *map(str, flags)])


def count_supervised(data_dir: Path) -> list[int]:
    """Counted by torch's own reader."""
    counts = [0] * VOCAB
    for file in data_dir.glob("*.pt"):
        sample = torch.load(file, weights_only=True)
        for i in range(1, len(sample["input_ids"])):
            counts[int(sample["input_ids"][i])] += int(sample["loss_mask"][i])
    return counts


def copy_of_verifier(tiny: TinyInputs, *, eos: int | None = None) -> Path:
    """The tiny verifier in a folder that may be written into."""
    folder = tiny.folder / "verifier-copy"
    folder.mkdir()
    for file in tiny.verifier_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))
    (folder / "generation_config.json").unlink()
    return folder


def test_maps_hold_the_most_frequent_supervised_tokens(tiny: TinyInputs, capsys: Capture) -> None:
    out_dir = tiny.folder / "maps"

    code = build(
        *("--data-path", tiny.data_dir, "--verifier-name-or-path", tiny.verifier_dir),
        *("--draft-vocab-size", 19, "--no-keep-special", "--output-dir", out_dir, "--json"),
    )

    report = json.loads(capsys.readouterr().out)
    counts = count_supervised(tiny.data_dir)
    kept = sorted(sorted(range(VOCAB), key=lambda i: (-counts[i], i))[:19])
    vocab_map = VocabMap.load(out_dir / "d2t.npy", out_dir / "t2d.npy")
    assert code == 0
    assert vocab_map.kept_ids.tolist() == kept
    assert vocab_map.vocab_size == VOCAB
    assert report["coverage"] == sum(counts[i] for i in kept) / sum(counts) < 1
    assert report["num_counted_tokens"] == sum(counts)
    assert 0 < report["probability_mass"] < 1
    assert_golden(report, "build-vocab-map", tiny.folder)
    freq = torch.load(out_dir / "token_freq.pt", weights_only=True)
    assert freq == {i: count for i, count in enumerate(counts) if count}


def test_counting_without_a_verifier_does_not_wait_for_transformers(tiny: TinyInputs) -> None:
    script = (
        "import sys; from speculators_cli.cli.app import run; code = run(sys.argv[1:]); "
        "print(code, 'transformers' in sys.modules)"
    )
    flags = ["build-vocab-map", "--data-path", tiny.data_dir, "--output-dir", tiny.folder / "maps"]
    sizes = ["--target-vocab-size", VOCAB, "--draft-vocab-size", 19]

    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, [*flags, *sizes])],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == "0 False"
    assert (tiny.folder / "maps" / "d2t.npy").exists()


def test_train_accepts_the_maps(tiny: TinyInputs, capsys: Capture) -> None:
    out_dir = tiny.folder / "maps"
    build(
        *("--data-path", tiny.data_dir, "--target-vocab-size", VOCAB),
        *("--draft-vocab-size", 11, "--output-dir", out_dir),
    )
    err = capsys.readouterr().err

    flags = tiny.flags(d2t_path=out_dir / "d2t.npy", t2d_path=out_dir / "t2d.npy", epochs=1)
    code = run(["train", *flags])

    assert code == 0
    assert f"--d2t-path {out_dir / 'd2t.npy'}" in err
    assert "Special tokens are unknown" in err


def test_end_tokens_and_control_tokens_of_the_chat_template_are_kept(
    tiny: TinyInputs, capsys: Capture
) -> None:
    verifier_dir = copy_of_verifier(tiny, eos=36)
    vocabulary = {f"t{i}": i for i in range(VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    backend.add_special_tokens([AddedToken("t34", special=True), AddedToken("t35", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="t33")
    tokenizer.chat_template = "{{ 't35' }}{{ messages }}"
    tokenizer.save_pretrained(verifier_dir)
    torch.save({1: 50, 2: 40, 3: 30}, tiny.folder / "freq.pt")

    code = build(
        *("--token-freq-path", tiny.folder / "freq.pt", "--verifier-name-or-path", verifier_dir),
        *("--draft-vocab-size", 5, "--output-dir", tiny.folder),
    )

    kept = np.flatnonzero(np.load(tiny.folder / "t2d.npy")).tolist()
    assert code == 0
    assert kept == [1, 2, 33, 35, 36]
    assert "Kept 5 of 37 verifier tokens, covering 75.0%" in capsys.readouterr().out


def test_a_verifier_without_a_tokenizer_gives_its_end_token_alone(
    tiny: TinyInputs, capsys: Capture
) -> None:
    verifier_dir = copy_of_verifier(tiny, eos=36)

    code = build(
        *("--data-path", tiny.data_dir, "--verifier-name-or-path", verifier_dir),
        *("--draft-vocab-size", 1, "--mass-samples", 0, "--output-dir", tiny.folder / "maps"),
    )

    assert code == 0
    assert "has no tokenizer" in capsys.readouterr().err
    kept = np.flatnonzero(np.load(tiny.folder / "maps" / "t2d.npy")).tolist()
    assert kept == [36]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "One of `--verifier-name-or-path` and `--target-vocab-size` must be given"),
        (["--target-vocab-size", "37", "--draft-vocab-size", "38"], 2, "to 37"),
        (["--target-vocab-size", "20"], 3, "token ids up to"),
        (["--target-vocab-size", "37", "--data-path", "nowhere"], 2, "does not exist"),
        (["--target-vocab-size", "37", "--token-freq-path", "no.pt"], 2, "does not exist"),
        (["--target-vocab-size", "37", "--data-format-version", "0"], 3, "v1 samples"),
    ],
)
def test_bad_input_writes_nothing(
    tiny: TinyInputs,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tiny.folder)  # where `data` is
    out_dir = tiny.folder / "maps"

    given = ["--output-dir", str(out_dir), *flags]
    if "--draft-vocab-size" not in flags:
        given += ["--draft-vocab-size", "5"]
    assert run(["build-vocab-map", *given]) == code

    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert not out_dir.exists()


def test_samples_without_a_supervised_token_are_refused(tiny: TinyInputs, capsys: Capture) -> None:
    data = tiny.folder / "unsupervised"
    data.mkdir()
    sample = torch.load(tiny.data_dir / "data_0.pt", weights_only=True)
    torch.save(sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}, data / "0.pt")
    flags = ["--data-path", data, "--target-vocab-size", VOCAB, "--draft-vocab-size", 5]

    code = build(*flags, "--output-dir", tiny.folder / "maps")

    assert code == 3
    assert "the samples have no supervised tokens" in capsys.readouterr().err
    assert build(*flags, "--all-tokens", "--output-dir", tiny.folder / "maps") == 0
