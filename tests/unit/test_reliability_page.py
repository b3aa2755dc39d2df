"""The page of promises names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/explanation/reliability.md"


def test_every_test_and_file_the_page_names_exists() -> None:
    text = PAGE.read_text("utf-8")
    files = {file: file.read_text("utf-8") for file in TESTS.rglob("test_*.py")}
    defined = {name for source in files.values() for name in re.findall(r"def (test_\w+)", source)}
    named = set(re.findall(r"`(test_\w+)`", text))
    paths = set(re.findall(r"`((?:\w+/)+test_\w+\.py)`", text))

    assert len(named) > 40
    assert named - defined == set()
    assert {path for path in paths if not (TESTS / path).is_file()} == set()
