"""A tokenizer of words for the tiny verifier, with a chat template."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_run import VOCAB

SPECIAL = ("<unk>", "<end>", "<user>", "<bot>")
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<bot> ' }}{{ m['content'] }}"
    " <end> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def add_tokenizer(verifier_dir: Path, folder: Path) -> Path:
    """Copy a verifier into a folder, with a tokenizer of the words `w0`, `w1`, ..."""
    shutil.copytree(verifier_dir, folder)
    names = [*SPECIAL, *(f"w{i}" for i in range(VOCAB - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<bot>"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
