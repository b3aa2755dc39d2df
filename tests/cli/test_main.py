"""How a command's process ends."""

import subprocess
import sys

HEAD = """
import atexit
from speculators_cli import __main__ as program

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
"""


def end_of(run: str) -> subprocess.CompletedProcess[str]:
    """Run `main` with another `run`, in a process of its own."""
    script = f"{HEAD}\ndef run(argv):\n    {run}\n\nprogram.run = run\nprogram.main()"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_a_command_ends_with_its_code_and_what_it_printed() -> None:
    done = end_of("print('done', end=''); return 5")

    assert (done.returncode, done.stdout, done.stderr) == (5, "done", "")


def test_what_libraries_register_for_the_exit_is_done() -> None:
    done = end_of("atexit.register(print, 'at exit'); return 0")

    assert done.stdout == "at exit\n"


def test_a_bug_shows_its_traceback_and_ends_as_python_does() -> None:
    done = end_of("raise ValueError('a bug')")

    assert done.returncode == 1
    assert "ValueError: a bug" in done.stderr
    assert "taken apart" in done.stdout
