"""Layer ids: two conventions, one of which is ours."""

from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.data.data_config import (
    DataConfig,
    LayerIds,
    default_layer_ids,
    read_data_config,
    resolve_layer_ids,
)
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


@pytest.mark.parametrize(
    "ids", ["[3, 5, 7]", '["3", "5", "7"]', '"3, 5,7"', "[3.0, 5.0, 7.0]"], ids=str
)
def test_layer_ids_are_read_as_numbers_and_as_texts(tmp_path: Path, ids: str) -> None:
    file = tmp_path / "data_config.json"
    file.write_text(f'{{"hidden_states": {{"layer_ids": {ids}, "layer_ids_convention": "vllm"}}}}')

    assert read_data_config(file).layer_ids == (3, 5, 7)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "holds a list, expected an object"),
        ("null", "holds null, expected an object"),
        ('{"hidden_states": [3, 5]}', "has `hidden_states` `[3, 5]`, expected an object"),
        ('{"model": "name"}', 'has `model` `"name"`, expected an object'),
        ('{"model": {"target_model_path": ["a"]}}', 'has `target_model_path` `["a"]`, expected a'),
        ('{"hidden_states": {"layer_ids": [NaN]}}', "`[NaN]`, expected a list of whole numbers"),
        ('{"hidden_states": {"layer_ids": [3.5]}}', "`[3.5]`, expected a list of whole numbers"),
        ('{"hidden_states": {"layer_ids": [true]}}', "`[true]`, expected a list of whole"),
        ('{"hidden_states": {"layer_ids": ["x"]}}', '`["x"]`, expected a list of whole numbers'),
        ('{"hidden_states": {"layer_ids": []}}', "`[]`, expected a list of whole numbers"),
        ('{"hidden_states": {"layer_ids": {"a": 3}}}', '`{"a": 3}`, expected a list of whole'),
        ('{"hidden_states": {"layer_ids": 3}}', "`3`, expected a list of whole numbers"),
        (
            '{"hidden_states": {"layer_ids": [Infinity], "layer_ids_convention": 3}}',
            "has `layer_ids_convention` `3`, expected a string",
        ),
        ('{"hidden_states": ', "is truncated"),
        ("", "is empty"),
        ("version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ],
)
def test_what_is_not_as_expected_is_named(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "data_config.json"
    file.write_text(content)

    with pytest.raises(DataError) as error:
        read_data_config(file)

    assert error.value.message.startswith(f"`{file}` ")
    assert reason in error.value.message
    assert error.value.hint is not None


def test_a_value_of_any_length_is_shown_in_short(tmp_path: Path) -> None:
    file = tmp_path / "data_config.json"
    file.write_text('{"hidden_states": {"layer_ids": ["' + "x" * 9999 + '"]}}')

    with pytest.raises(DataError) as error:
        read_data_config(file)

    assert len(error.value.message) < 300


def test_without_ids_three_layers_are_those_of_the_generator_and_others_are_even() -> None:
    assert resolve(aux=5).ids == (2, 9, 16, 23, 30)
    assert resolve(aux=1).ids == (2,)
    assert resolve(aux=5).is_assumed
    assert default_layer_ids(36, 5) == (2, 10, 18, 26, 34)
    assert default_layer_ids(36) == (2, 18, 33)
