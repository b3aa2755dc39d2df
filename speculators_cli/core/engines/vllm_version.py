"""The interpreter that vLLM is installed for, and its version."""

import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from speculators_cli.core.engines.vllm_process import ProcessEndedError, first_error, run_once
from speculators_cli.core.errors import MachineError, SettingsError

FLAG = "--vllm-python"
OLDEST_ANSWER = (0, 18)
# Until 0.23 the states of a prompt that is computed in several steps are cut wrongly.
OLDEST_CAPTURE = (0, 24)
VERSION_SECONDS = 120.0  # for an interpreter to start and look at its packages


def find_python(python: Path | None) -> Path:
    """Return the absolute path of an interpreter, without following links; None is ours.

    Raises:
        SettingsError: It is not an executable file.
    """
    if python is None:
        return Path(sys.executable)
    if (found := shutil.which(python)) is None:
        raise SettingsError(
            f"`{FLAG}`: `{python}` is not an executable file",
            hint="Pass the `bin/python` of an environment with vLLM",
        )
    return Path(found).absolute()


def read_versions(python: Path) -> dict[str, str]:
    """Return the versions of vLLM, torch and transformers; what is missing is left out.

    Raises:
        SettingsError: The interpreter does not run.
    """
    with tempfile.TemporaryDirectory(prefix="speculators-vllm-") as folder:
        log_file = Path(folder, "versions.log")
        try:
            versions = run_once(python, "versions", log_file=log_file, seconds=VERSION_SECONDS)
        except OSError as error:
            reason = str(error.strerror)
        except ProcessEndedError as error:
            reason = first_error(log_file) or f"it {error}"
        else:
            return versions
    raise SettingsError(
        f"`{FLAG}`: `{python}` does not run: {reason}",
        hint="Pass the `bin/python` of an environment with vLLM",
    )


def check_version(
    versions: Mapping[str, str], oldest: tuple[int, int], python: Path, *, what: str
) -> None:
    """Check that an interpreter has vLLM, and one that is new enough.

    Args:
        versions: From `read_versions`.
        oldest: The oldest version that has what is needed.
        python: The interpreter.
        what: What needs it; begins a sentence.

    Raises:
        MachineError: It has not.
    """
    found = versions.get("vllm")
    if found is None:
        raise MachineError(
            f"vLLM is not installed for `{python}`",
            hint=f"Install it in an environment of its own, and pass its interpreter with `{FLAG}`",
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)  # a checkout may have none
    if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
        raise MachineError(
            f"{what} need vLLM {oldest[0]}.{oldest[1]} or newer; `{python}` has {found}",
            hint=f"Upgrade vLLM there, or pass another interpreter with `{FLAG}`",
        )
