"""Imports point one way."""

import ast
from pathlib import Path

import pytest

import speculators_cli

ROOT = Path(speculators_cli.__file__).parent
PACKAGE = "speculators_cli"
# What each layer may import, besides itself; the longest prefix of a module names its layer.
BASE = {
    "core.errors",
    "core.files",
    "core.progress",
    "core.signals",
    "core.reading",
    "core.escaping",
    "core.scratch",
}
JOBS = {
    "core.capture",
    "core.evaluation",
    "core.export",
    "core.preparation",
    "core.training",
}  # do not import each other
ALLOWED = {
    "core.errors": set(),
    "core.environment": {""},
    "core.files": {"core.errors"},
    "core.progress": set(),
    "core.signals": set(),
    "core.escaping": set(),
    "core.reading": {"core.errors"},
    "core.scratch": {"core.errors", "core.files"},
    "settings": BASE,
    "core.data": BASE | {"settings"},
    "core.models": BASE | {"settings", "core.data", ""},
    "core.capture": BASE | {"settings", "core.data", "core.models"},
    "core.evaluation": BASE | {"settings", "core.data", "core.models"},
    "core.export": BASE | {"settings", "core.data", "core.models", ""},
    "core.preparation": BASE | {"settings", "core.data", "core.models"},
    "core.training": BASE | {"settings", "core.data", "core.models"},
    "core.demo": BASE | {"settings", "core.data", "core.models", *JOBS},
    "core.bench": BASE | {"settings", "core.data", "core.models", "core.training"},
    "cli": BASE
    | {
        "settings",
        "core.environment",
        "core.export",
        "core.preparation",
        "core.training",
        "core.bench",
        "core.demo",
        "",
    },
    "__main__": {"cli"},
    "": set(),
}


def layer_of(module: str) -> str:
    name = module.removeprefix(PACKAGE).removeprefix(".")
    return max((x for x in ALLOWED if x == "" or f"{name}.".startswith(f"{x}.")), key=len)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] == PACKAGE}


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_imports_only_what_lies_below_it(file: Path) -> None:
    module = ".".join([PACKAGE, *file.relative_to(ROOT).with_suffix("").parts])
    layer = layer_of(module)

    above = {x for x in imports_of(file) if layer_of(x) not in ALLOWED[layer] | {layer}}

    assert above == set()


def test_typer_and_rich_stay_in_the_command_line() -> None:
    files = [f for f in ROOT.rglob("*.py") if f.relative_to(ROOT).parts[0] != "cli"]
    assert len(files) > 20

    users = [
        f
        for f in files
        for line in f.read_text().splitlines()
        if line.strip().startswith(("import typer", "from typer", "import rich", "from rich"))
    ]

    assert users == []


def test_nothing_loads_code_from_files() -> None:
    sources = {f: f.read_text() for f in ROOT.rglob("*.py")}

    hits = [
        f for f, text in sources.items() if "weights_only=False" in text or "pickle.load" in text
    ]

    assert hits == []
