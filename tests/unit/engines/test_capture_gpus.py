"""GPUs of a machine are divided between training and capture."""

import pytest

from speculators_cli.core.engines.capture_gpus import choose_capture_gpus, list_gpus
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import SettingsError


@pytest.mark.parametrize(
    ("environment", "num_visible", "expected"),
    [
        ({}, 3, ["0", "1", "2"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, 2, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "5,2, 7"}, 3, ["5", "2", "7"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a,MIG-b"}, 2, ["GPU-a", "MIG-b"]),
        # What follows a name that does not exist is not visible.
        ({"CUDA_VISIBLE_DEVICES": "5,2,99"}, 2, ["5", "2"]),
    ],
)
def test_gpus_are_named_as_the_variable_names_them(
    environment: dict[str, str], num_visible: int, expected: list[str]
) -> None:
    assert list_gpus(environment, num_visible) == expected


def test_the_last_gpus_capture_and_ranks_train_on_the_first() -> None:
    visible = ["4", "5", "6", "7"]

    assert choose_capture_gpus(visible, 3, 1) == ["7"]
    assert choose_capture_gpus(visible, 2, 2) == ["6", "7"]
    assert choose_capture_gpus(visible, 1, 2) == ["6", "7"]


@pytest.mark.parametrize(("num_ranks", "num_gpus"), [(4, 1), (3, 2), (1, 4)])
def test_too_few_gpus_are_refused_with_their_number(num_ranks: int, num_gpus: int) -> None:
    with pytest.raises(SettingsError, match=rf"need {num_ranks + num_gpus} GPUs, 4 are visible"):
        choose_capture_gpus(["0", "1", "2", "3"], num_ranks, num_gpus)


def test_the_process_sees_its_own_gpus_only() -> None:
    assert VLLMSetup("v", "auto", gpus=["6", "7"]).environment == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert VLLMSetup("v", "auto").environment == {}
