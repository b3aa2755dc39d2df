"""`speculators bench` on two ranks."""

import json

import pytest

from tests.fork_server import ForkServer
from tests.tiny_run import TinyInputs

SMALL = ("--total-seq-len", "64", "--steps", "3", "--warmup-steps", "1", "--draft-vocab-size", "30")


@pytest.mark.parametrize(("sharding", "num_shards"), [("shard", 2), ("auto", 1)])
def test_two_ranks_are_compared_with_each_alone(
    fork_server: ForkServer, tiny: TinyInputs, sharding: str, num_shards: int
) -> None:
    flags = ["--verifier-name-or-path", str(tiny.verifier_dir), "--device", "cpu", *SMALL]

    done = fork_server.run(
        "speculators_cli", "bench", *flags, "--sharding", sharding, "--json", num_ranks=2
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["num_ranks"] == 2
    assert report["num_shards"] == num_shards
    assert report["tokens_per_second"] == pytest.approx(2 * 64 / report["step_ms"] * 1e3)
    assert report["efficiency"] == pytest.approx(report["alone_step_ms"] / report["step_ms"])
    assert report["exposed_ms"] is None  # only known on GPUs
    assert 0 < report["loss"] < 10
