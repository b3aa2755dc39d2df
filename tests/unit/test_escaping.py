"""Text from outside in pages and model cards: it is shown, and does nothing."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from speculators_cli.core.data.sample import Problem
from speculators_cli.core.escaping import escape_line
from speculators_cli.core.export import markdown
from speculators_cli.core.export.licence import read_licence
from speculators_cli.core.preparation.inspection import summarize
from speculators_cli.core.preparation.inspection_page import write_page
from speculators_cli.core.preparation.inspection_report import InspectionReport
from tests.recorded_progress import RecordedProgress

HOSTILE = (
    "</title><script>alert(1)</script>",
    "</td><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "' onload='alert(1)",
    "<!--",
    "&lt;b&gt;",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    "a\nb",
    b"caf\xe9".decode("utf-8", "surrogateescape"),
)


def report(**changes: Any) -> InspectionReport:
    lengths = summarize(np.array([3, 5]))
    fields: dict[str, Any] = {
        **dict.fromkeys(InspectionReport.__dataclass_fields__, 1),
        "format": "v1",
        "tokens": lengths,
        "supervised_tokens": lengths,
        "supervised_fractions": (0,) * 10,
        "coverage_by_size": {1: 0.5},
        "dtypes": {"bfloat16": 2},
        "layer_ids": None,
        "layer_ids_convention": None,
        "verifier": None,
        "layer_rms": (),
        "agreement": None,
        "problems": (),
    }
    return InspectionReport(**(fields | changes))


class Reader(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_page_shows_hostile_names_and_has_no_element_of_theirs(name: str, tmp_path: Path) -> None:
    def build(shown: str) -> Reader:
        problems = (Problem(Path(shown), f"has {shown}"),)
        write_page(report(verifier=shown, problems=problems), tmp_path / "page.html", name=shown)
        return read_page((tmp_path / "page.html").read_text("utf-8"))

    found, plain = build(name), build("plain")

    assert found.elements == plain.elements
    assert len(found.elements) > 20
    assert not set(found.text) & {"\x1b", "\x07", "\u202e"}
    # In title, heading, verifier, file and problem.
    assert found.text.count(escape_line(name)) == 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Qwen/Qwen3-8B_v2", "Qwen/Qwen3-8B_v2"),
        ("![x](https://e.example/p.png)", r"\!\[x\](https\://e.example/p.png)"),
        ("<img src=//e.example>", r"\<img src=//e.example\>"),
        ("a | b", r"a \| b"),
        ("`a`", r"\`a\`"),
        ("www.e.example", r"www\.e.example"),
        ("&amp;", r"\&amp;"),
        ("a\n# b", r"a\\n\# b"),
        ("\x1b[2J", r"\\x1b\[2J"),
    ],
)
def test_text_of_a_card_is_no_markup(value: str, expected: str) -> None:
    assert markdown.text(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("draft", "`draft`"),
        ("a`b", "``a`b``"),
        ("``", "``` `` ```"),
        ("a|b", r"`a\|b`"),
        ("a\n\nb", r"`a\n\nb`"),
    ],
)
def test_a_span_of_code_ends_only_at_its_end(value: str, expected: str) -> None:
    assert markdown.code(value) == expected


def test_a_block_of_code_ends_only_at_its_end() -> None:
    assert markdown.block("serve '```\n# heading'") == "````text\nserve '```\\n# heading'\n````"


def write_card(folder: Path, front: str) -> str:
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A verifier\n")
    return str(folder)


@pytest.mark.parametrize(
    "front",
    [
        "license: !!timestamp x",
        "license: !!python/name:os.system",
        "{a: " * 2000,
        ": : [",
        "x: " + "y" * 2**19,
    ],
    ids=["tag", "python", "deep", "broken", "long"],
)
def test_front_matter_that_cannot_be_read_leaves_the_licence_unknown(
    front: str, tmp_path: Path
) -> None:
    progress = RecordedProgress()

    licence = read_licence(write_card(tmp_path, front), progress)

    assert licence == {}
    assert len(progress.warnings) == 1
    assert "has front matter that " in progress.warnings[0]
    assert progress.hints[0] is not None
    assert "Pass `--license`" in progress.hints[0]


def test_a_link_of_a_licence_with_more_than_an_address_is_left_out(tmp_path: Path) -> None:
    front = yaml.safe_dump({"license": "other", "license_link": "https://e.example/\nx: 1"})

    assert read_licence(write_card(tmp_path, front), RecordedProgress()) == {"license": "other"}
