"""What a shell offers for the value of a flag; it completes paths by itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

from speculators_cli.settings.config_file import PARSERS


def complete_choice(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Offer one of a few values."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def complete_list(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Offer the next of several values with commas between them."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        left = [choice for choice in choices if choice not in taken and choice.startswith(last)]
        return [f"{before}{comma}{choice}" for choice in left]

    return complete


def complete_config_file(incomplete: str) -> list[str]:
    """Offer settings files, and folders to look into."""
    before, slash, last = incomplete.rpartition("/")
    folder = Path(f"{before}{slash}").expanduser()
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    named = [entry for entry in entries if entry.name.startswith(last)]
    shown = [entry for entry in named if last or not entry.name.startswith(".")]
    folders = [f"{before}{slash}{entry.name}/" for entry in shown if entry.is_dir()]
    files = [f"{before}{slash}{entry.name}" for entry in shown if entry.suffix.lower() in PARSERS]
    # A shell ends the word after the only offer: of a single folder, its contents are offered.
    if len(folders) == 1 and not files:
        return complete_config_file(folders[0]) or folders
    return folders + files
