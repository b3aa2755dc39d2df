"""A copy of the embedded verifier that takes conversations, and inputs for it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speculators_cli.core.demo.demo import VERIFIER_DIR

# Near to the code that the verifier has seen: a line each, and an end token after answers.
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}\n{% endfor %}"
)


def write_chat_verifier(folder: Path, *, template: str | None = CHAT_TEMPLATE) -> Path:
    """Copy the embedded verifier, with a chat template unless it is None."""
    shutil.copytree(VERIFIER_DIR, folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8"))
    if template is not None:
        file.write_text(json.dumps(content | {"chat_template": template}), "utf-8")
    return folder


def write_rows(file: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    """Write JSON lines; a string is a line as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file
