"""Memory that runs out: a named error with what to lower, and checkpoints as they were."""

import json
from typing import NoReturn

import pytest
import torch

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.errors import MachineError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.run import out_of_memory_explained, train
from tests.tiny_run import TinyInputs

ON_GPU = r"The GPU is out of memory: 64 tokens per packed sequence, peak \S+ "
ON_CPU = "The machine is out of memory: 64 tokens per packed sequence"
ERRORS = [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ON_GPU),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), ON_GPU),
    (RuntimeError("CUDA error: out of memory"), ON_GPU),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ON_CPU),
    (MemoryError("Unable to allocate 2 GiB for an array"), ON_CPU),
]
STEP = "trainer.Trainer.train_step"
OTHER_PLACES = ["build.load_frozen_verifier", "build.build_draft", "trainer.Trainer.validate"]


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [(STEP, *case) for case in ERRORS] + [(place, *ERRORS[0]) for place in OTHER_PLACES],
)
def test_memory_that_runs_out_keeps_the_last_checkpoint(
    trained: TinyInputs,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
    message: str,
) -> None:
    def run_out(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr(f"speculators_cli.core.training.{place}", run_out)

    with pytest.raises(MachineError, match=message) as raised:
        train(trained.settings(run={"epochs": 3}), progress=SilentProgress())

    assert "`--total-seq-len`" in (raised.value.hint or "")
    assert [c.find_damage() for c in find_checkpoints(trained.save_path)] == [None, None]
    assert json.loads((trained.save_path / "result.json").read_text())["exit_code"] == 5


@pytest.mark.parametrize(
    ("has_whole_verifier", "flag"), [(True, "--shard-verifier"), (False, "--nproc-per-node")]
)
def test_the_verifier_is_sharded_only_where_it_takes_memory(
    has_whole_verifier: bool, flag: str
) -> None:
    with (
        pytest.raises(MachineError) as raised,
        out_of_memory_explained(64, has_whole_verifier=has_whole_verifier),
    ):
        raise torch.cuda.OutOfMemoryError

    assert flag in str(raised.value.hint)


def test_another_error_is_not_taken_for_one_of_memory(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("speculators_cli.core.training.trainer.Trainer.train_step", fail)

    with pytest.raises(RuntimeError, match="device-side assert"):
        train(tiny.settings(), progress=SilentProgress())
