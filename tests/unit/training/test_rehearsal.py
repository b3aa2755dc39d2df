"""The rehearsal of a step: it compiles what a step launches."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from speculators_cli.core.kernels.launch import in_place_of_launches
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.inputs import read_inputs
from speculators_cli.core.training.optimizer_step import NoLog
from speculators_cli.core.training.rehearsal import META, build_step, make_batch
from speculators_cli.core.training.run import train
from speculators_cli.settings.train import TrainSettings
from tests.tiny_run import TinyInputs

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# Where the noise is drawn without a kernel: on the CPU.
ONLY_ON_A_GPU = {"_mark_kernel", "_zero_kernel", "_perturb_kernel"}
BLOCKS = {"mask_token_id": 36, "num_anchors": 3, "block_size": 3}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "eagle3": {},
    "two layers, norms, frozen head": {
        "draft": {"num_layers": 2},
        "eagle3": {"train_head": False, "sliding_window": 8},
    },
    "peagle": {"draft": {"algorithm": "peagle"}, "peagle": {"mask_token_id": 36}},
    "dflash": {"draft": {"algorithm": "dflash", "num_layers": 1}, "dflash": BLOCKS},
    "dspark": {"draft": {"algorithm": "dspark", "num_layers": 1}, "dspark": BLOCKS},
}


def record_launches(work: Callable[[], object], *, launches: bool) -> set[tuple[object, ...]]:
    """Kernels with the dtypes of tensors and the options they are launched with."""
    found = set()

    def record(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
        kinds = [x.dtype if isinstance(x, torch.Tensor) else type(x).__name__ for x in args]
        found.add((kernel.fn.__name__, *kinds, *sorted(options.items())))
        if launches:
            kernel[grid](*args, **options)

    with in_place_of_launches(record):
        work()
    return found


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_rehearsal_finds_the_kernels_of_a_step(
    changes: dict[str, dict[str, Any]], tiny: TinyInputs
) -> None:
    settings = tiny.settings(
        **changes,
        data={"check_samples": False, "total_seq_len": 40},
        distributed={"device": "cpu", "kernels": "fast"},
    )

    expected = record_launches(
        lambda: train(settings, progress=SilentProgress(), dry_run=True), launches=True
    )
    found = record_launches(lambda: rehearse(settings), launches=False)

    assert {x for x in found if x[0] not in ONLY_ON_A_GPU} == expected
    assert {x[0] for x in found} >= ONLY_ON_A_GPU
    assert len(expected) > 10


def rehearse(settings: TrainSettings) -> None:
    inputs = read_inputs(settings, num_ranks=1, index_file=None, progress=SilentProgress())
    config = inputs.draft_config(settings)
    step = build_step(config, settings, inputs, torch.float32, in_float8=False)
    batch = make_batch(config, settings.data.total_seq_len, torch.float32)
    step.run((batch,), NoLog(), epoch=0, lr=0.0)
    assert {p.device for p in step.draft.parameters()} == {META}


COMPILES = """
import json, os, sys, threading
import torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    launcher_cls = staticmethod(lambda source, metadata: "launcher")
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 3, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 2**17},
    )
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
from speculators_cli.core.kernels import rms_norm
from speculators_cli.core.kernels.rehearsal import rehearsing

prepared = []
with rehearsing(2, prepare_thread=lambda: prepared.append(threading.get_ident())):
    for rows in (5, 6):
        x = torch.empty(rows, 64, dtype=torch.bfloat16, device="meta")
        rms_norm.rms_norm(x, torch.empty(64, device="meta"), 1e-5)
kernels = [
    kernel
    for cache, *_ in rms_norm._forward_kernel.device_caches.values()
    for kernel in cache.values()
]
print(json.dumps([len(prepared), [kernel.run for kernel in kernels]]))
"""


def test_a_rehearsal_compiles_and_loads_a_kernel_once_without_a_gpu(tmp_path: Any) -> None:
    environment = {"TRITON_CACHE_DIR": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES], capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    num_threads, kernels = json.loads(done.stdout)
    assert num_threads in (1, 2)
    assert kernels == ["launcher"]
    assert list(tmp_path.rglob("*.cubin"))
