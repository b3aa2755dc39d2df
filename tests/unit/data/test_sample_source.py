"""Samples that no file holds are trained on, through one line in the table of sources."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import pytest
import torch

from speculators_cli.core.data.alignment import Alignment
from speculators_cli.core.data.data_config import DataConfig
from speculators_cli.core.data.sample import Problem, Sample, SampleHeader
from speculators_cli.core.data.source import SampleSource
from speculators_cli.core.data.sources import SOURCES, Request, SourceKind
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import Progress, SilentProgress
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from tests.tiny_run import HIDDEN, VOCAB, TinyInputs

RECIPE = "recipe.txt"  # a folder with such a file holds no samples, but how many to make
LENGTHS = (12, 40, 9, 33, 25, 17, 30, 21)


class MadeSamples(SampleSource):
    """Samples that are computed from their ids when they are read."""

    format = "made"

    def __init__(self, folder: Path, ids: Sequence[int], seed: int, alignment: Alignment) -> None:
        self.folder, self.ids, self.seed, self.alignment = folder, tuple(ids), seed, alignment
        self.bad: tuple[Problem, ...] = ()
        self.configs: tuple[DataConfig, ...] = ()

    @property
    def headers(self) -> Sequence[SampleHeader]:
        return [
            SampleHeader(
                num_tokens=length,
                num_supervised_tokens=length - 4,
                hidden_size=HIDDEN,
                num_aux_layers=3,
                dtype="float32",
                is_normed=False,
                max_token_id=VOCAB - 1,
                first_target=4,
            )
            for length in (LENGTHS[i % len(LENGTHS)] for i in self.ids)
        ]

    @property
    def num_bytes(self) -> int:
        return 0

    @property
    def data_hash(self) -> str:
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()

    @property
    def content_hash(self) -> str:
        return hashlib.sha256(repr((self.ids, self.seed)).encode()).hexdigest()

    def path(self, sample_id: int) -> Path:
        return self.folder / f"made-{self.ids[sample_id]}"

    def read(self, sample_id: int) -> Sample:
        number = self.ids[sample_id]
        length = LENGTHS[number % len(LENGTHS)]
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        ids = torch.randint(VOCAB, (length,), generator=generator)
        states = torch.randn(4, length, HIDDEN, generator=generator)
        return Sample(ids, torch.arange(length) >= 4, tuple(states[:3]), states[3], is_normed=False)

    def select(self, ids: Iterable[int]) -> Self:
        return type(self)(self.folder, [self.ids[i] for i in ids], self.seed, self.alignment)


def open_recipe(request: Request, _progress: Progress) -> MadeSamples:
    (folder,) = request.folders
    count, seed = map(int, (folder / RECIPE).read_text().split())
    return MadeSamples(folder, range(count), seed, request.alignment)


@pytest.fixture
def recipe_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kind = SourceKind("made", lambda dirs: (dirs[0] / RECIPE).is_file(), open_recipe)
    monkeypatch.setattr("speculators_cli.core.data.sources.SOURCES", [kind, *SOURCES])
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / RECIPE).write_text("20 7")
    return folder


def run(tiny: TinyInputs, data_dir: Path, save_path: Path, max_steps: int | None) -> TrainReport:
    settings = tiny.settings(
        draft={"target_layer_ids": (3, 5, 7)},
        data={"data_path": (data_dir,), "check_samples": False},
        run={"save_path": save_path, "max_steps": max_steps},
        schedule={"scheduler": "none"},
    )
    return train(settings, progress=SilentProgress())


def test_samples_made_in_memory_are_trained_on_and_resumed(
    tiny: TinyInputs, recipe_dir: Path, tmp_path: Path
) -> None:
    whole = run(tiny, recipe_dir, tmp_path / "whole", None)
    cut = run(tiny, recipe_dir, tmp_path / "cut", whole.total_steps // 2)
    resumed = run(tiny, recipe_dir, tmp_path / "cut", None)

    assert cut.step < whole.total_steps == resumed.step
    assert resumed.is_resumed
    assert resumed.validation_loss == whole.validation_loss
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        ends = [(tmp_path / run_name / "1" / name).read_bytes() for run_name in ("whole", "cut")]
        assert ends[0] == ends[1]
    assert list(recipe_dir.iterdir()) == [recipe_dir / RECIPE]


def test_samples_made_otherwise_are_not_resumed_on(
    tiny: TinyInputs, recipe_dir: Path, tmp_path: Path
) -> None:
    run(tiny, recipe_dir, tmp_path / "run", 1)
    (recipe_dir / RECIPE).write_text("20 8")

    with pytest.raises(DataError, match="are not the ones"):
        run(tiny, recipe_dir, tmp_path / "run", None)


def test_any_other_folder_is_read_as_files(tiny: TinyInputs, recipe_dir: Path) -> None:
    assert recipe_dir.is_dir()

    report = run(tiny, tiny.data_dir, tiny.save_path, 1)

    assert report.step == 1
