"""The demo's prompts against the corpus of its verifier."""

import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.demo.make_verifier import choose_prompts, read_functions

SOURCE = {
    "kept.py": 'def one(a):\n    """Say."""\n    return a\n',
    "more.py": "class X:\n    def two(self):\n        x = 1\n        return x\n",
}


def test_functions_are_cut_after_signature_and_docstring(tmp_path: Path) -> None:
    for name, text in SOURCE.items():
        (tmp_path / name).write_text(text)

    training, held_out = read_functions(tmp_path)

    assert training + held_out == [
        ('def one(a):\n    """Say."""\n', "    return a\n"),
        ("def two(self):\n", "    x = 1\n    return x\n"),
    ]


@pytest.mark.demo
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the corpus is Python 3.11.7's")
def test_no_prompt_begins_a_function_that_was_trained_on() -> None:
    training, held_out = read_functions(Path(sysconfig.get_path("stdlib")))
    tokenizer: Any = AutoTokenizer.from_pretrained(VERIFIER_DIR)

    prompts = choose_prompts(tokenizer, held_out)

    assert prompts == read_prompts()
    assert len(training) == 53459
    by_first_line: dict[str, list[str]] = defaultdict(list)
    for head, body in training:
        by_first_line[head.splitlines()[0]].append(head + body)
    candidates = {p: by_first_line[p.splitlines()[0]] for p in prompts}
    assert any(candidates.values())
    assert [p for p, texts in candidates.items() if any(t.startswith(p) for t in texts)] == []
