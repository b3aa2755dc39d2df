"""What a test reads from the folder that a run has written."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from speculators_cli.core.training.report import TrainReport

CHECKPOINT_TENSORS = ("model.safetensors", "trainer/optimizer.safetensors")


def read_metrics(save_path: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, those of one split if it is given."""
    lines = map(json.loads, (save_path / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if split in (None, line["split"])]


def read_losses(save_path: Path) -> list[float]:
    """The loss of each line of `metrics.jsonl`."""
    return [line["loss"] for line in read_metrics(save_path)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_cuts_change_nothing(
    run: Callable[..., TrainReport], folder: Path, find_cuts: Callable[[int], Iterable[int]]
) -> None:
    """A run that is cut after some of its steps, and resumed, ends in the bits of a whole one.

    Args:
        run: Trains for two epochs, with sections of settings that are changed.
        folder: For both runs, named `whole` and `cut`.
        find_cuts: The steps to cut at, given the number of all steps.
    """

    def run_to(name: str, max_steps: int | None = None) -> TrainReport:
        where = {"save_path": folder / name, "max_steps": max_steps}
        return run(run=where, schedule={"scheduler": "none"})

    for step in find_cuts(run_to("whole").total_steps):
        assert run_to("cut", step).step == step
    assert run_to("cut").is_resumed

    for file in CHECKPOINT_TENSORS:
        whole, cut = (folder / name / "1" / file for name in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()
