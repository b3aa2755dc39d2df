"""The cost model of capture, against the tiny verifier, formulas, and what was measured."""

from pathlib import Path

import pytest

from speculators_cli.core.algorithms.cost import GPUS, Work
from speculators_cli.core.algorithms.eagle3.cost import Eagle3Cost
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.engines.cost import CaptureCost
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_shape import read_verifier_shape
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from tests.tiny_drafts import shaped_config
from tests.tiny_run import write_verifier

# `docs/benchmarks/online.py` on an H200, torch 2.11: whether in float8, ms of capture, peak GiB.
MEASURED = [(False, 198.5, 24.28), (True, 117.7, 17.78)]


def test_weights_and_operations_are_those_of_the_layers(tmp_path: Path) -> None:
    model = write_verifier(tmp_path / "verifier")
    files = VerifierFiles(str(tmp_path / "verifier"))
    cost = CaptureCost(read_verifier_shape(files, trust_remote_code=False))

    matrices = [p.numel() for p in model.model.layers.parameters() if p.dim() == 2]
    one, two, both = (cost.count_flops(x) for x in ([10], [20], [10, 20]))

    assert cost.num_layer_parameters == sum(matrices) > 10_000
    assert one + two == both
    # 9 layers of 6 heads of 8; scores and values take 4 operations for each half of the pairs.
    assert one == 2 * 10 * sum(matrices) + 9 * 6 * 8 * 4 * 10 * 10 / 2


def test_memory_has_the_layers_and_half_of_the_batches(tmp_path: Path) -> None:
    write_verifier(tmp_path / "verifier")
    files = VerifierFiles(str(tmp_path / "verifier"))
    cost = CaptureCost(read_verifier_shape(files, trust_remote_code=False))
    step = {"weights_and_optimizer": 7, "verifier": 5, "batches": 40, "activations": 100}

    small = cost.add_memory(step, total_seq_len=8)
    large = cost.add_memory(step, total_seq_len=800)
    sharded = cost.add_memory(step, total_seq_len=8, num_shards=4)

    assert small["batches"] == 20
    assert small["capture_weights"] == 2 * cost.num_layer_parameters
    assert small["capture_buffers"] == 2 * 8 * (3 * 40 + 6 * 24) - 100
    assert large["capture_buffers"] > small["capture_buffers"]
    assert sharded["capture_weights"] < small["capture_weights"]


@pytest.mark.parametrize(("in_float8", "ms", "gib"), MEASURED)
def test_time_and_memory_are_within_10_percent_of_what_was_measured(
    in_float8: bool, ms: float, gib: float
) -> None:
    config = shaped_config("llama-3.1-8b")
    step = Eagle3Cost().estimate_memory(
        config, Eagle3Settings(), [Work(8192, 4915, 4915, flops=0.0)], total_seq_len=8192,
        has_whole_head=True,
    )  # fmt: skip
    cost = CaptureCost(SHAPES["llama-3.1-8b"][0], in_float8=in_float8)

    seconds = cost.estimate_seconds(cost.count_flops([1366] * 6), GPUS["H200"].flops)
    memory = cost.add_memory(step, total_seq_len=8192)

    assert 1e3 * seconds == pytest.approx(ms, rel=0.1)
    assert sum(memory.values()) / 2**30 == pytest.approx(gib, rel=0.1)
