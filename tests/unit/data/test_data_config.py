"""Layer ids: two conventions, one of which is ours."""

from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.data.data_config import DataConfig, LayerIds, resolve_layer_ids
from speculators_cli.core.errors import DataError


def make_config(ids: tuple[int, ...] | None, **changes: Any) -> DataConfig:
    fields: dict[str, Any] = {
        "file": Path("data_config.json"),
        "verifier": None,
        "convention": None,
        "is_assumed": False,
        "version": None,
    }
    return DataConfig(layer_ids=ids, **(fields | changes))


def resolve(
    *configs: DataConfig,
    given: tuple[int, ...] | None = None,
    aux: int = 3,
    data_format: str = "v1",
) -> LayerIds:
    return resolve_layer_ids(
        configs, num_verifier_layers=32, num_aux_layers=aux, data_format=data_format, given=given
    )


def test_ids_of_version_2_are_raised_by_one_and_lose_the_last() -> None:
    # Trap: taken as they stand, acceptance falls from 58.9 % to 1.2 %.
    assert resolve(make_config((2, 16, 29, 31), version="2.0")) == LayerIds((3, 17, 30), False)


def test_version_2_that_does_not_end_in_the_last_layer_is_refused() -> None:
    with pytest.raises(DataError, match="expected the verifier's last layer 31") as error:
        resolve(make_config((2, 16, 29, 30), version="2.0"))

    assert "--target-layer-ids" in str(error.value.hint)


def test_our_own_metadata_is_taken_as_it_stands() -> None:
    assert resolve(make_config((3, 16, 28), convention="vllm")) == LayerIds((3, 16, 28), False)


def test_samples_that_say_nothing_get_what_their_generators_captured() -> None:
    for data_format in ("v0", "v1"):
        assert resolve(data_format=data_format) == LayerIds((3, 17, 30), is_assumed=True)
    assert resolve(data_format="specforge") == LayerIds((2, 16, 29), is_assumed=True)


def test_the_flag_wins() -> None:
    assert resolve(make_config((3, 16, 28), convention="vllm"), given=(1, 2, 4)).ids == (1, 2, 4)


def test_folders_that_disagree_are_refused() -> None:
    with pytest.raises(DataError, match="different verifier layers"):
        resolve(
            make_config((3, 16, 28), convention="vllm"),
            make_config((2, 16, 28), convention="vllm", file=Path("b/data_config.json")),
        )


@pytest.mark.parametrize(
    ("ids", "aux"), [((3, 16), 3), ((16, 3, 28), 3), ((3, 3, 28), 3), ((3, 16, 33), 3)]
)
def test_ids_that_do_not_fit_are_refused(ids: tuple[int, ...], aux: int) -> None:
    with pytest.raises(DataError):
        resolve(given=ids, aux=aux)


def test_ids_that_were_assumed_when_they_were_written_stay_assumed() -> None:
    config = make_config((3, 17, 30), convention="vllm", is_assumed=True)

    assert resolve(config) == LayerIds((3, 17, 30), is_assumed=True)
    assert resolve(config, make_config((3, 17, 30), convention="vllm")).is_assumed is False
