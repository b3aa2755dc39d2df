"""Which kernels a run trains with, and in which precision."""

from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.errors import MachineError
from speculators_cli.core.kernels import support
from speculators_cli.core.models.losses import LOSSES, Loss
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.build import choose_train_kernels
from speculators_cli.core.training.run import train
from speculators_cli.settings.train import TrainSettings
from tests.tiny_drafts import make_config
from tests.tiny_run import TinyInputs


def total_variation(draft_logits: Tensor, verifier_log_probs: Tensor) -> Tensor:
    return (draft_logits.float().softmax(-1) - verifier_log_probs.exp()).abs().sum(-1) / 2


@pytest.fixture
def loss(monkeypatch: pytest.MonkeyPatch) -> Loss:
    """A second loss, without a fused kernel, on a machine that could run the fast kernels."""
    own = Loss("tv", total_variation, has_fused_kernel=False)
    monkeypatch.setitem(LOSSES, "tv", own)
    monkeypatch.setattr(support, "why_not_fast", lambda _: None)
    monkeypatch.setattr(support, "can_use_flash", lambda *_: True)
    return own


def with_loss(tiny: TinyInputs, name: str, kernels: str) -> TrainSettings:
    settings = tiny.settings(distributed={"device": "cpu", "kernels": kernels}, run={"epochs": 1})
    own: Any = settings.algorithm_settings.model_copy(update={"loss": name})
    return settings.model_copy(update={"eagle3": own})


def test_auto_trains_with_plain_kernels_where_the_loss_has_no_fused_one(
    loss: Loss, tiny: TinyInputs
) -> None:
    device = torch.device("cpu")
    assert support.use_fast_kernels("auto", device, torch.float32, head_dim=8) is True

    report = train(with_loss(tiny, loss.name, "auto"), progress=SilentProgress())

    assert report.validation_loss is not None
    assert 0 < report.validation_loss < 3  # three TTT steps of at most one


@pytest.mark.parametrize(("window", "is_fast"), [(2, False), (3, True), (None, True)])
def test_a_window_within_the_ttt_steps_trains_with_plain_kernels(
    window: int | None, is_fast: bool, tiny: TinyInputs
) -> None:
    settings = tiny.settings(eagle3={"sliding_window": window, "ttt_steps": 3})

    unsupported = ALGORITHMS["eagle3"].find_unsupported(make_config(), settings.algorithm_settings)

    assert (unsupported is None) == is_fast
    assert is_fast or "a sliding window of 2 tokens is shorter than 3 TTT steps" in str(unsupported)


def test_fast_refuses_a_loss_without_a_fused_kernel_by_its_name(
    loss: Loss, tiny: TinyInputs
) -> None:
    with pytest.raises(MachineError, match=f"fast`: loss `{loss.name}` has no fused kernel"):
        train(with_loss(tiny, loss.name, "fast"), progress=SilentProgress())


def test_float8_refuses_a_loss_without_a_fused_kernel_by_its_name(
    loss: Loss, tiny: TinyInputs
) -> None:
    settings = with_loss(tiny, loss.name, "auto")
    own = settings.distributed.model_copy(update={"gemm_dtype": "float8"})

    with pytest.raises(MachineError, match=f"float8` needs the fast kernels: loss `{loss.name}`"):
        train(settings.model_copy(update={"distributed": own}), progress=SilentProgress())


def test_float8_refuses_a_gpu_that_cannot_multiply_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "why_not_fast", lambda _: None)
    monkeypatch.setattr(support, "why_not_float8", lambda _: "this GPU cannot")

    with pytest.raises(MachineError, match="`--gemm-dtype float8`: this GPU cannot") as error:
        support.use_float8_products("float8", torch.device("cuda"))

    assert error.value.exit_code == 5
    assert support.use_float8_products("auto", torch.device("cuda")) is False


def test_float8_is_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_zeros, cpu_ones = torch.zeros, torch.ones
    monkeypatch.setattr(torch, "zeros", lambda *n, dtype, **_: cpu_zeros(*n, dtype=dtype))
    monkeypatch.setattr(torch, "ones", lambda *n, **_: cpu_ones(*n))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: cpu_zeros(16, 16))
    assert support.why_not_float8(torch.device("cuda")) is None

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)

    reason = support.why_not_float8(torch.device("cuda"))

    assert reason is not None
    assert reason.endswith("on this GPU of compute capability 7.5: no kernel")
    on_cpu = support.why_not_float8(torch.device("cpu"))
    assert on_cpu is not None
    assert on_cpu.endswith("on this CPU: no kernel")


@pytest.mark.parametrize("gemm_dtype", ["auto", "float8"])
def test_a_run_trains_in_the_precision_of_its_settings(gemm_dtype: str, tiny: TinyInputs) -> None:
    settings = tiny.settings(
        distributed={"device": "cpu", "gemm_dtype": gemm_dtype}, run={"epochs": 1, "max_steps": 1}
    )
    config = make_config()

    kernels = choose_train_kernels(settings, config, torch.device("cpu"))

    assert kernels == (gemm_dtype == "float8", gemm_dtype == "float8")
