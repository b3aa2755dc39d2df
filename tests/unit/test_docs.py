"""Links, module paths and commands in the documentation exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import speculators_cli
from speculators_cli.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGE = Path(speculators_cli.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ARCHITECTURE = ROOT / "docs/explanation/architecture.md"
OF_OTHERS = {"scripts/train.py"}  # upstream's
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A command, also behind a shell or launcher; not the word in a sentence or diagram.
COMMAND = re.compile(
    r"^\s*(?:time |sh -c '|srun .* )*(?:speculators|(?:torchrun .*|python) -m speculators_cli) "
    r"([a-z][a-z0-9-]*)(.*)"
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def source_files() -> set[str]:
    """Paths of the project's Python files, from its root."""
    folders = (PACKAGE, ROOT / "tests", ROOT / "docs")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    return {file.relative_to(ROOT).as_posix() for file in files}


def missing(named: set[str], existing: set[str]) -> set[str]:
    """Names that no existing path ends in."""
    return {x for x in named if not any(f"/{path}".endswith(f"/{x}") for path in existing)}


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each command line in a page's blocks and code spans, and its flags."""
    text = page.read_text("utf-8")
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    for line in [*(line for block in blocks for line in block.splitlines()), *spans]:
        for command in line.split("&&"):
            if match := COMMAND.search(command):
                words = shlex.split(match[2].strip().rstrip("'"), comments=True)
                yield match[1], [word.split("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    links = [x for x in LINK.findall(page.read_text("utf-8")) if not x.startswith("http")]

    for link in links:
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(file), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_and_flag_exists(page: Path) -> None:
    for command, flags in commands(page):
        assert command in COMMANDS, f"{name(page)}: {command}"
        known = {
            spelling
            for flag in COMMANDS[command].load().flags
            for spelling in (*flag.names, *flag.off_names)
        }
        assert set(flags) - known == set(), f"{name(page)}: {command}"


def test_links_and_commands_are_found() -> None:
    found = [pair for page in PAGES for pair in commands(page)]
    links = [link for page in PAGES for link in LINK.findall(page.read_text("utf-8"))]

    assert {command for command, _ in found} == set(COMMANDS)
    assert len([flag for _, flags in found for flag in flags]) > 50
    assert len(links) > 30


def test_every_source_file_exists() -> None:
    texts = [page.read_text("utf-8") for page in PAGES]
    named = {path for text in texts for path in re.findall(r"\b(?:\w+/)+\w+\.py\b", text)}

    assert len(named) > 60
    assert missing(named - OF_OTHERS, source_files()) == set()


def test_every_module_and_name_in_the_architecture_exists() -> None:
    text = ARCHITECTURE.read_text("utf-8")
    named = set(re.findall(r"\b(?:\w+/)*\w+\.py\b", text))
    named_folders = set(re.findall(r"`((?:\w+/)+)`", text))
    # `read_draft()`, `Trainer.fit()`, `Drafter`: with parentheses, or in the case of a class.
    called = set(re.findall(r"\b(\w+)\(\)", text))
    classes = set(re.findall(r"`([A-Z][a-z]\w+)`", text))
    defined = {
        node.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    folders = {f"{Path(file).parent.as_posix()}/" for file in source_files()}

    assert len(named) > 30
    assert len(called | classes) > 20
    assert missing(named, source_files()) == set()
    assert missing(named_folders, folders) == set()
    assert (called | classes) - defined == set()
