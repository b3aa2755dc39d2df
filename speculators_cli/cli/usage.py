"""Command lines that cannot be parsed: what is wrong, and what was probably meant."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from speculators_cli.cli.commands import COMMANDS, PROGRAM
from speculators_cli.cli.flags import OUTPUT, Flag
from speculators_cli.cli.help import PROGRAM_FLAGS
from speculators_cli.core.errors import SettingsError


@dataclass(frozen=True)
class Problem:
    """What is wrong with a word, and the one that was probably meant."""

    line: str
    meant: str | None = None


def explain_usage(argv: Sequence[str], fallback: str) -> SettingsError:
    """The error of a command line that the parser refuses.

    Args:
        argv: The command line.
        fallback: The parser's message, for a fault that is not found here.
    """
    place = next((k for k, word in enumerate(argv) if not word.startswith("-")), len(argv))
    name = argv[place] if place < len(argv) else None
    shown = f"{PROGRAM} {name}" if name in COMMANDS else PROGRAM
    found = list(_problems(argv[:place], PROGRAM_FLAGS, PROGRAM))
    misplaced = [word for word in argv[:place] if any(word in flag.names for flag in OUTPUT)]
    if not found and name in COMMANDS:
        found = list(_problems(argv[place + 1 :], COMMANDS[name].load().flags, shown))
    elif not found and name is not None:
        found = [Problem(f"`{name}` is not a command", _closest(name, COMMANDS))]
    message = "\n".join(dict.fromkeys(problem.line for problem in found))
    if not message:
        message = fallback.replace("'", "`")
    hint = f"Run `{shown} --help` for the list"
    meant = [f"`{problem.meant}`" for problem in found if problem.meant is not None]
    if misplaced and shown != PROGRAM:
        hint = f"Pass `{misplaced[0]}` after the name of the command"
    elif meant:
        hint = f"Did you mean {', '.join(dict.fromkeys(meant))}? {hint}"
    return SettingsError(message, hint=hint)


def _problems(words: Sequence[str], flags: Sequence[Flag], command: str) -> Iterator[Problem]:
    known = {name: flag for flag in flags for name in (*flag.names, *flag.off_names)}
    num_left = sum(flag.is_positional for flag in flags)
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word != "-":
            yield from _flag_problems(word, rest, known, command)
            continue
        num_left -= 1
        if num_left < 0:
            yield Problem(f"Unexpected argument `{word}` of `{command}`")


def _flag_problems(
    word: str, rest: list[str], known: Mapping[str, Flag], command: str
) -> Iterator[Problem]:
    """What is wrong with a flag; its value is taken from `rest`, the words after it."""
    name, equals, value = word.partition("=")
    flag = known.get(name)
    if flag is None:
        yield from _unknown(name, rest, known, command)
    elif flag.metavar is None:
        is_spaced = not equals and bool(rest) and rest[0].lower() in {"true", "false"}
        if equals or is_spaced:
            given = rest.pop(0) if is_spaced else value
            yield Problem(f"`{name}` takes no value, got `{given}`")
    elif not equals and (not rest or rest[0] in known):
        yield Problem(f"`{name}` needs a value, `{flag.metavar}`")
    elif not equals:
        rest.pop(0)


def _unknown(
    name: str, rest: list[str], known: Mapping[str, Flag], command: str
) -> Iterator[Problem]:
    if not name.startswith("--") and all(f"-{letter}" in known for letter in name[1:]):
        return  # short switches in one word
    closest = _closest(name.replace("_", "-"), known)
    yield Problem(f"`{name}` is not a flag of `{command}`", closest)
    if rest and not rest[0].startswith("-"):
        rest.pop(0)


def _closest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)
