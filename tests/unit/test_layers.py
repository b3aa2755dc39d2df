"""Imports point one way."""

import ast
import re
from pathlib import Path

import pytest

import speculators_cli

ROOT = Path(speculators_cli.__file__).parent
PACKAGE = "speculators_cli"
# From bottom to top: a module imports its own layer and those below. Packages that share a layer do
# not import each other. The longest prefix of a module names its layer.
LAYERS: list[set[str]] = [
    {"core.errors", "core.escaping", "core.signals"},
    {"core.progress"},
    {""},  # the version
    {"core.environment", "core.files", "core.place"},
    {"core.reading", "core.scratch"},
    {"settings"},
    {"core.torch_file"},
    {"core.kernels"},
    {"core.data"},
    {"core.models"},
    {"core.engines", "core.conversations"},
    {"core.algorithms"},
    {"core.drafts"},
    {"core.capture", "core.evaluation", "core.export", "core.preparation", "core.training"},
    {"core.bench", "core.demo", "core.evaluated_training"},
    {"cli"},
    {"__main__"},
]
ALLOWED = {
    layer: {layer}.union(*LAYERS[:height])
    for height, layers in enumerate(LAYERS)
    for layer in layers
}
ALLOWED[""] |= {
    name for name in ALLOWED if name.startswith(("core", "settings"))
}  # imported when used


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

    above = {x for x in imports_of(file) if layer_of(x) not in ALLOWED[layer]}

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


# Who reads without the guard: itself; files of the package; weights with checksums; own marks;
# files of the system.
UNGUARDED = {
    "core/reading.py",
    "core/demo/demo.py",
    "core/demo/make_verifier.py",
    "core/drafts/checkpoint_reader.py",
    "core/scratch.py",
    "core/training/start_up.py",
}
READS = re.compile(r"\.read_(text|bytes)\(|safe_open\(|load_file\(|= np\.load\(")


def test_files_from_outside_are_read_by_the_guard() -> None:
    sources = {f.relative_to(ROOT).as_posix(): f.read_text() for f in ROOT.rglob("*.py")}
    assert len(sources) > 20

    readers = {name for name, text in sources.items() if READS.search(text)}

    assert readers - UNGUARDED == set()
    assert "core/reading.py" in readers


WITHOUT_ALGORITHMS = (
    "core/training",
    "core/data",
    "core/bench",
    "core/evaluation",
    "core/export",
    "core/drafts",
    "cli",
)
# Where a flag or a JSON key of the seed has the name of an algorithm, or of a part of it.
NAMES_OF_ALGORITHMS = re.compile(r"eagle.?3|\bttt|TTT", re.IGNORECASE)
FLAGS_AND_KEYS = re.compile(r"--ttt-steps|\bttt_steps: int|\bttt_steps=config|report\.ttt_steps")


@pytest.mark.parametrize("folder", WITHOUT_ALGORITHMS)
def test_no_algorithm_is_named_outside_its_folder(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    lines = [(file, line) for file in files for line in file.read_text().splitlines()]
    assert files

    named = [(file.name, line) for file, line in lines if NAMES_OF_ALGORITHMS.search(line)]

    assert [x for x in named if not FLAGS_AND_KEYS.search(x[1])] == []
