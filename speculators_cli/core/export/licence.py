"""read_licence(): the licence of a verifier, from the front matter of its model card."""

import re
from typing import Any

import yaml

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import Progress
from speculators_cli.core.reading import UnreadableError, read_text

CARD_NAME = "README.md"
FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)
MAX_CARD_BYTES = 2**22
MAX_FRONT_CHARACTERS = 2**18


def read_licence(verifier: str, progress: Progress) -> dict[str, str]:
    """Licence metadata of a verifier's model card, under the hub's keys; empty if it has none."""
    try:
        file = VerifierFiles(verifier).find(CARD_NAME)
        data = _parse(read_text(file, max_bytes=MAX_CARD_BYTES)) if file else {}
    except SpeculatorsError:
        return {}  # `check_verifier` has warned already.
    except (UnreadableError, yaml.YAMLError) as error:
        reason = error.reason if isinstance(error, UnreadableError) else str(error)
        progress.warn(
            f"The licence of verifier `{verifier}` is unknown: its `{CARD_NAME}` "
            f"{reason.splitlines()[0]}",
            hint="Pass `--license` with the licence of the draft",
        )
        return {}
    found = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    # Other links are relative to the verifier's repository.
    if not re.fullmatch(r"https://[^\s<>\"]+", str(found["license_link"])):
        del found["license_link"]
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _parse(card: str) -> dict[str, Any]:
    """The front matter of a model card; empty if it is not an object."""
    match = FRONT_MATTER.match(card)
    front = match[1] if match else ""
    try:
        if len(front) > MAX_FRONT_CHARACTERS:
            raise ValueError("too long")
        content = yaml.safe_load(front)
    # PyYAML raises the others for tags such as `!!timestamp` on values of another type.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"has front matter that cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise yaml.YAMLError(f"has front matter that is not YAML: {error}") from None
    return content if isinstance(content, dict) else {}
