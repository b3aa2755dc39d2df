"""Verifiers that take conversations, and inputs for them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speculators_cli.core.demo.demo import VERIFIER_DIR
from tests.tiny_run import VOCAB, write_verifier

WORDS = ("<unk>", "<end>", "<user>", "<assistant>", "<system>")

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


def write_word_verifier(folder: Path) -> Path:
    """The verifier of `tiny_run`, with a word for each of its 37 tokens and a chat template."""
    write_verifier(folder)
    words = {WORDS[i] if i < len(WORDS) else f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        chat_template="{% for message in messages %}<{{ message.role }}> {{ message.content }} "
        "{% if message.role == 'assistant' %}<end> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}",
    ).save_pretrained(folder)
    generation = json.dumps({"eos_token_id": words["<end>"]})
    (folder / "generation_config.json").write_text(generation, "utf-8")
    return folder
