"""The reference pages are those of the present flags."""

import runpy
from pathlib import Path

DOCS_DIR = Path(__file__).parents[2] / "docs"
NOT_COMPARED = {"library.md", "verifiers.md"}


def test_reference_pages_are_not_stale() -> None:
    pages = dict(runpy.run_path(str(DOCS_DIR / "write_reference.py"))["pages"]())

    # `write_verifier_table.py` writes verifiers.md; a slow test compares it.
    files = [f for f in (DOCS_DIR / "reference").iterdir() if f.name not in NOT_COMPARED]
    written = {file.name: file.read_text("utf-8") for file in files}

    assert written == pages, "run `python docs/write_reference.py`"
    assert "`--total-seq-len <int>`" in pages["train.md"]
