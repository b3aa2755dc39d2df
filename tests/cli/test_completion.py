"""What a shell offers, asked as its script does."""

from pathlib import Path

import pytest
import shellingham

from speculators_cli.cli.app import run
from speculators_cli.cli.commands import COMMANDS

Capture = pytest.CaptureFixture[str]


def offers(line: str, capture: Capture, patch: pytest.MonkeyPatch) -> list[str]:
    """The completions of the last word of a line, as bash receives them."""
    patch.setenv("_SPECULATORS_COMPLETE", "complete_bash")
    patch.setenv("COMP_WORDS", line)
    patch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    code = run([])
    out, err = capture.readouterr()
    assert (code, err) == (0, "")
    return out.splitlines()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("speculators tr", ["train"]),
        ("speculators export --targ", ["--target-layer-ids", "--target"]),
        ("speculators export --target ", ["vllm", "sglang", "eagle"]),
        ("speculators train --draft-arch q", ["qwen3"]),
        ("speculators train --data-format-version ", ["0", "1"]),
        ("speculators train --logger wandb,t", ["wandb,trackio", "wandb,tensorboard"]),
        ("speculators train --no-res", ["--no-resume-from-checkpoint"]),
        ("speculators train --he", ["--help"]),
        ("speculators train --data-path ", []),  # the shell completes paths
    ],
)
def test_commands_flags_and_choices_are_completed(
    line: str, expected: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [x for x in offers(line, capsys, monkeypatch) if x] == expected


def test_every_command_is_offered(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offers("speculators ", capsys, monkeypatch) == list(COMMANDS)


def test_settings_files_and_folders_are_offered_for_config(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.toml", "b.yaml", "c.yml", "d.json", "e.pt", ".hidden.toml"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "settings.json").touch()
    monkeypatch.chdir(tmp_path)

    found = {
        word: offers(f"speculators bench --config {word}", capsys, monkeypatch)
        for word in ("", "b", "ru", "runs/")
    }

    assert found == {
        "": ["runs/", "a.toml", "b.yaml", "c.yml", "d.json"],
        "b": ["b.yaml"],
        "ru": ["runs/settings.json"],
        "runs/": ["runs/settings.json"],
    }


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".bash_completions/speculators.sh"),
        ("zsh", ".zfunc/_speculators"),
        ("fish", ".config/fish/completions/speculators.fish"),
    ],
)
def test_completion_is_installed_for_the_shell_in_use(
    shell: str, file: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(shellingham, "detect_shell", lambda: (shell, f"/bin/{shell}"))

    installed = run(["--install-completion"])
    capsys.readouterr()
    shown = run(["--show-completion"])

    script = (tmp_path / file).read_text().strip()
    assert (installed, shown) == (0, 0)
    assert f"_SPECULATORS_COMPLETE=complete_{shell}" in script
    assert capsys.readouterr().out.strip() == script
