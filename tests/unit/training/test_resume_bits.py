"""A run that was cut and resumed ends in the bits of one that was not, however samples are read."""

from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import train
from tests.tiny_run import TinyInputs

NAMES = ("model.safetensors", "trainer/optimizer.safetensors")


def read(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in NAMES]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_cut_again_and_again_ends_in_the_same_bits(
    tiny: TinyInputs, tmp_path: Path, accumulation: int
) -> None:
    def run(name: str, *, num_workers: int, max_steps: int | None = None) -> Any:
        settings = tiny.settings(
            run={"save_path": tmp_path / name, "max_steps": max_steps},
            optimizer={"gradient_accumulation_steps": accumulation},
            schedule={"scheduler": "none"},
            data={"num_workers": num_workers},
        )
        return train(settings, progress=SilentProgress())

    total_steps = run("whole", num_workers=0).total_steps
    expected = read(tmp_path / "whole/1")
    assert total_steps >= 5

    for num_workers in (0, 1, 4):
        name = f"workers-{num_workers}"
        cuts = range(1, total_steps, 1 if accumulation > 1 else 3)
        for cut in cuts:
            assert run(name, num_workers=num_workers, max_steps=cut).step == cut
        assert run(name, num_workers=num_workers).is_resumed
        assert read(tmp_path / name / "1") == expected
