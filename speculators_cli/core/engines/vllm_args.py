"""The engine's own flags, as passed through by `--vllm-args`."""

import shlex
from collections.abc import Mapping

from speculators_cli.core.errors import SettingsError

FLAG = "--vllm-args"
# Flags of the engine, or how they begin, and where they come from instead.
OWN = {
    "--model": "--verifier-name-or-path",
    "--dtype": "--dtype",
    "--tensor-parallel-size": "--tensor-parallel-size",
    "-tp": "--tensor-parallel-size",
    "--trust-remote-code": "--trust-remote-code",
    "--enable-prefix-caching": None,  # answers have it, hidden states cannot
    "--disable-log-stats": None,
    "--speculative-config": None,
    "-sc": None,
    "--spec-method": None,
    "--spec-model": None,
    "--spec-tokens": None,
    "--kv-transfer-config": None,
    "--data-parallel": None,  # a prefix; engines within one process have one replica
    "-dp": None,
}

SAME_NAMES: Mapping[str, str] = {}


def parse_vllm_args(text: str, names: Mapping[str, str] = SAME_NAMES) -> tuple[str, ...]:
    """Split flags of the engine as a shell does; the engine checks them when it loads.

    Args:
        text: The flags.
        names: How the command calls its own flags, where it is not as in `OWN`.

    Raises:
        SettingsError: They are not flags, or include one that is set by this command.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise SettingsError(
            f"`{FLAG}`: `{text}` cannot be split into words: {error}",
            hint=f'Quote it once for the shell: `{FLAG} "--max-model-len 8192"`',
        ) from None
    if words and not words[0].startswith("-"):
        raise SettingsError(
            f"`{FLAG}`: `{words[0]}` is not a flag of vLLM",
            hint=f'Pass flags as for `vllm serve`: `{FLAG} "--max-model-len 8192"`',
        )
    for word in words:
        _check(word, names)
    return words


def _check(word: str, names: Mapping[str, str]) -> None:
    name = word.split("=")[0].split(".")[0].replace("_", "-")
    for own, flag in OWN.items():
        is_own = name in (own, own.replace("--", "--no-", 1))
        if not is_own and not (own == "--data-parallel" and name.startswith(own)):
            continue
        raise SettingsError(
            f"`{FLAG}`: `{word}` is set by this command",
            hint=f"Pass `{names.get(flag, flag)}` instead" if flag else f"Remove it from `{FLAG}`",
        )
