"""The choices of a setting are the keys of the table that they choose from."""

from collections.abc import Collection

import pytest

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.export.export import DTYPES
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.models.losses import LOSSES
from speculators_cli.core.training.loggers import LOGGERS
from speculators_cli.settings.base import Settings, choices_of, setting_fields
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.export import ExportSettings
from speculators_cli.settings.train import TrainSettings

# `.pt` files are of two versions, which another setting chooses from; `auto` is none of them.
FOLDER_FORMATS = {"auto", "pt", *FORMATS} - {"v0", "v1"}


@pytest.mark.parametrize(
    ("settings_class", "name", "table"),
    [
        (TrainSettings, "algorithm", ALGORITHMS),
        (TrainSettings, "logger", LOGGERS),
        (TrainSettings, "block_loss", LOSSES),
        (TrainSettings, "data_format", FOLDER_FORMATS),
        (BenchSettings, "shape", SHAPES),
        (ExportSettings, "target", TARGETS),
        (ExportSettings, "dtype", DTYPES),
    ],
)
def test_choices_are_the_keys_of_the_table(
    settings_class: type[Settings], name: str, table: Collection[str]
) -> None:
    (info,) = [field.info for field in setting_fields(settings_class) if field.name == name]

    assert sorted(choices_of(info)) == sorted(table)
