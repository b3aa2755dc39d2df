"""Weights that ranks share: bytes on the wire, when they travel, and that no bit is lost."""

import json
import os
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.core.algorithms.draft_config import DraftConfig
from tests.fork_server import ForkServer
from tests.tiny_dflash import make_block_config
from tests.tiny_drafts import make_config

Line = dict[str, Any]
FOLDED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")  # with a norm weight, in float32

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton's interpreter",
)


def run(fork_server: ForkServer, folder: Path, num_ranks: int) -> list[list[Line]]:
    """Of each rank, what `shared_weights.py` found."""
    done = fork_server.run("tests.distributed.shared_weights", folder, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def pair(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> list[list[Line]]:
    return run(fork_server, tmp_path_factory.mktemp("pair"), 2)


def matrices_of(line: Line) -> dict[str, tuple[int, ...]]:
    config: DraftConfig = make_config() if line["algorithm"] == "eagle3" else make_block_config()
    shapes = config.tensor_shapes()
    return {name: tuple(shape) for name, shape in shapes.items() if len(shape) > 1}


def count_padded(shape: tuple[int, ...], num_shards: int) -> int:
    """Values of a matrix whose rows are filled up to equal shards."""
    return -(-shape[0] // num_shards) * num_shards * prod(shape[1:])


@pytest.mark.parametrize("index", range(4))
def test_two_ranks_have_the_loss_and_twice_the_gradients_of_one_bit_for_bit(
    pair: list[list[Line]], index: int
) -> None:
    for lines in pair:
        assert lines[index]["is_loss_equal"]
        # Two equal numbers add up exactly; bfloat16 weights are those that each rank would cast.
        assert lines[index]["gradient_error"] == 0.0
        assert lines[index]["are_gradients_float32"]


@pytest.mark.parametrize("index", range(4))
def test_gradients_are_sent_during_the_backward_and_that_of_the_head_first(
    pair: list[list[Line]], index: int
) -> None:
    first, second = (lines[index] for lines in pair)

    assert first["buckets"] == second["buckets"]
    order = [name for bucket in first["buckets"] for name in bucket]
    assert set(order) == set(matrices_of(first))
    assert order[0] == "lm_head.weight"
    assert order[-1] == "fc.weight"
    assert first["num_in_backward"] == len(first["buckets"]) > 3


def test_bytes_on_the_wire_are_those_of_the_weights(pair: list[list[Line]]) -> None:
    plain, blocks, fast, replicated = pair[0][:4]
    for line in (plain, blocks, fast):
        padded = {name: count_padded(shape, 2) for name, shape in matrices_of(line).items()}
        is_wide = line is not fast
        sizes = {name: 4 if is_wide or name.endswith(FOLDED) else 2 for name in padded}
        assert line["bytes"]["scattered"] == 4 * sum(padded.values())
        assert line["bytes"]["gathered"] == sum(sizes[name] * padded[name] for name in padded)

    values = sum(prod(shape) for shape in make_config().tensor_shapes().values())
    assert replicated["bytes"] == {"reduced": 4 * values}
    vectors = values - sum(map(prod, matrices_of(plain).values()))
    assert plain["bytes"]["reduced"] == fast["bytes"]["reduced"] == 4 * vectors


def test_accumulated_sequences_send_the_bytes_of_one(pair: list[list[Line]]) -> None:
    for line in pair[0][:4]:
        sent = {kind: size for kind, size in line["bytes"].items() if kind != "gathered"}
        assert line["accumulated_bytes"] == sent


def test_ranks_sum_in_one_order_whatever_their_backward_does(pair: list[list[Line]]) -> None:
    for lines in pair:
        sums, names = lines[4]["sums"], lines[4]["names"]
        # The second rank reads neither of the last two.
        expected = dict.fromkeys(names, 2.0) | dict.fromkeys(names[-2:], 1.0)
        assert {name: sums[name] for name in names} == expected


def test_two_machines_shard_within_and_sum_across(fork_server: ForkServer, tmp_path: Path) -> None:
    for (line,) in run(fork_server, tmp_path, 4):
        padded = sum(count_padded(shape, 2) for shape in matrices_of(line).values())
        assert line["num_shards"] == 2
        assert line["is_loss_equal"]
        # Three or four equal numbers of float32 are added up.
        assert line["gradient_error"] < 1e-6
        assert line["bytes"]["scattered"] == line["bytes"]["gathered"] == 4 * padded
        vectors = sum(
            prod(shape) for shape in make_config().tensor_shapes().values() if len(shape) == 1
        )
        assert line["bytes"]["reduced"] == 4 * (padded // 2 + vectors)
