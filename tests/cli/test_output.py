"""What reaches the terminal, and what happens where nobody or no character takes it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.cli.output import Output
from speculators_cli.cli.streams import LastingFile
from speculators_cli.core.errors import DataError
from speculators_cli.core.escaping import escape, escape_message
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]
# An OSC that sets the clipboard, a C1 CSI, a bidi override, a line separator.
HOSTILE = "\x1b]52;c;cHduZWQ=\x07 \x9b2J \u202egnp.\u2028x"
SHOWN = r"\x1b]52;c;cHduZWQ=\x07 \x9b2J \u202egnp.\u2028x"


def speak(output: Output, text: str) -> None:
    """Say a text in each way there is."""
    output.info(text)
    output.warn(text, hint=text)
    output.error(DataError(text, hint=text))
    output.line(text)
    output.marked([(text, True), (text, False)])
    output.panel(text, [("name", text)])
    output.table(["name"], [[text]])


def test_text_from_outside_is_escaped_wherever_it_is_shown(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    speak(Output(), HOSTILE)

    out, err = capsys.readouterr()
    assert (out.count(SHOWN), err.count(SHOWN)) == (6, 5)
    assert not set("\x1b\x07\x9b\u202e\u2028") & set(out + err)


def test_a_traceback_is_escaped(capsys: Capture) -> None:
    output = Output(is_verbose=True)

    try:
        raise ValueError(HOSTILE)
    except ValueError:
        output.traceback()

    err = capsys.readouterr().err
    assert f"ValueError: {SHOWN}" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two lines\n  stay `as` they\nare", "two lines\n  stay `as` they\nare"),
        ("`a\nname` and\na line", "`a\\nname` and\na line"),
        ("an open ` does\nnot count", "an open ` does\nnot count"),
    ],
)
def test_a_newline_is_escaped_inside_a_value_alone(text: str, shown: str) -> None:
    assert escape_message(text) == shown


def test_a_byte_that_is_not_utf8_is_shown_as_that_byte() -> None:
    assert escape(os.fsdecode(b"caf\xe9.pt")) == r"caf\xe9.pt"


def test_names_in_the_data_folder_reach_the_terminal_escaped_and_json_as_they_are(
    data_dir: Path, capsys: Capture
) -> None:
    name = "\x1b]52;c;cHduZWQ=\x07\n\x9b.pt"
    (data_dir / name).write_bytes(b"junk")
    (data_dir / "data_config.json").write_text('{"model": {"target_model_path": "\\u001b[2Jx"}}')

    code = run(["inspect-data", str(data_dir)])
    out, err = capsys.readouterr()
    run(["inspect-data", str(data_dir), "--json"])

    assert code == 1
    assert r"\x1b]52;c;cHduZWQ=\x07\n\x9b.pt" in out
    assert "\x1b" not in out + err
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [Path(problem["file"]).name for problem in problems] == [name]


def test_a_traceback_of_an_unexpected_error_is_for_verbose_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fail() -> None:
        raise ValueError(HOSTILE)

    monkeypatch.setattr("speculators_cli.core.environment.describe_environment", fail)

    codes = run(["env"]), run(["env", "--verbose", "--json"])

    first, _, rest = capsys.readouterr().err.partition("Traceback")
    assert codes == (1, 1)
    assert f"error: Unexpected ValueError: {SHOWN}" in first
    assert json.loads(rest.splitlines()[-1])["exit_code"] == 1


def test_a_file_that_nobody_reads_takes_all_and_keeps_the_first_error() -> None:
    reader, writer = os.pipe()
    file = LastingFile(writer)

    taken = [file.write(b"one")]
    os.close(reader)
    taken += [file.write(b"more"), file.write(b"still more")]
    os.close(writer)

    assert taken == [3, 4, 10]
    assert isinstance(file.error, BrokenPipeError)


def start(*arguments: object, stdout: object, stderr: object) -> tuple[int, str]:
    """Run a command in a process of its own; its exit code and stderr, where that is a pipe."""
    command = [sys.executable, "-m", "speculators_cli", *map(str, arguments)]
    done = subprocess.run(command, check=False, text=True, stdout=stdout, stderr=stderr)  # type: ignore[call-overload]
    return done.returncode, done.stderr


def test_a_command_whose_readers_leave_ends_quietly_with_its_own_code() -> None:
    reader, writer = os.pipe()
    os.close(reader)

    done = start("env", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert done == (0, "")


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_full
def test_a_result_that_a_full_disk_does_not_take_is_an_error() -> None:
    with Path("/dev/full").open("wb") as full:
        code, err = start("env", stdout=full, stderr=subprocess.PIPE)

    assert code == 5
    assert "error: The result cannot be written to stdout: No space left on device" in err


@needs_full
def test_a_run_goes_on_without_stdout_and_stderr(tiny: TinyInputs) -> None:
    reader, writer = os.pipe()
    os.close(reader)

    with Path("/dev/full").open("wb") as full:
        code, _ = start("train", *tiny.flags(max_steps=2), stdout=full, stderr=writer)
    os.close(writer)

    assert code == 0
    assert (tiny.save_path / "step-2" / "model.safetensors").exists()


def test_an_output_of_ascii_takes_every_report(tiny: TinyInputs) -> None:
    data_dir = tiny.folder / "données"
    data_dir.symlink_to(tiny.data_dir.resolve())
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}

    done = subprocess.run(
        [sys.executable, "-m", "speculators_cli", "inspect-data", str(data_dir)],
        env=os.environ | ascii_only,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("ascii").splitlines()
    assert lines[0].split(":")[0].endswith(r"donn\xe9es")
    assert any(line.startswith("| tokens ") and "#" in line for line in lines)


def test_settings_take_and_repeat_names_that_are_not_utf8(tiny: TinyInputs) -> None:
    data_dir = tiny.folder / os.fsdecode(b"caf\xe9")
    data_dir.mkdir()
    for index, file in enumerate(sorted(tiny.data_dir.iterdir())):
        (data_dir / os.fsdecode(b"\xff%d.pt" % index)).symlink_to(file)
    save_path = tiny.folder / os.fsdecode(b"saved\xe9")
    flags = tiny.flags(data_path=data_dir, save_path=save_path, epochs=1, run_name=data_dir.name)

    codes = [run(["train", *flags])]
    codes += [run(["train", *flags, "--epochs", "2"])]
    settings = save_path / "settings.json"
    codes += [run(["train", "--config", str(settings), "--save-path", str(tiny.save_path)])]

    assert codes == [0, 0, 0]
    assert json.loads(settings.read_text())["data"]["data_path"] == [str(data_dir)]
    assert (tiny.save_path / "0" / "model.safetensors").exists()


def test_a_missing_folder_whose_name_is_not_utf8_is_a_settings_error(capsys: Capture) -> None:
    code = run(["inspect-data", os.fsdecode(b"/nowhere/caf\xe9")])

    assert code == 2
    assert "does not exist" in capsys.readouterr().err
