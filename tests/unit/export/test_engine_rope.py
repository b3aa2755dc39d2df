"""What engines compute of a written RoPE, against transformers' own code for every kind."""

from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from speculators_cli.core.export.engine_rope import (
    EngineRope,
    find_rope_problem,
    trained_rope,
)
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.export.targets.sglang import sglang_rope
from speculators_cli.core.export.targets.vllm import vllm_rope
from tests.tiny_drafts import make_config
from tests.unit.models.test_rope import (
    HEAD_DIM,
    LENGTH,
    LLAMA3,
    LONGEST,
    LONGROPE,
    SETS,
    YARN,
    llama,
)

PARTIAL: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", **YARN, "partial_rotary_factor": 0.25},
    {"rope_type": "llama3", **LLAMA3, "partial_rotary_factor": 0.75},
    {"rope_type": "longrope", **LENGTH, "partial_rotary_factor": 0.5}
    | {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
]


def layers_of(rope: dict[str, Any]) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "max_position_embeddings": LONGEST,
        "rope_parameters": {"rope_theta": 50000.0} | rope,
    }


@pytest.mark.parametrize("rope", [*SETS[1:], *PARTIAL], ids=str)
def test_vllm_computes_the_frequencies_of_transformers(rope: dict[str, Any]) -> None:
    written = {key: value for key, value in rope.items() if value is not None}
    if rope["rope_type"] == "yarn":
        written["factor"] = rope["factor"] or 8.0
    config: PreTrainedConfig = llama(layers_of(rope)["rope_parameters"])

    applied = vllm_rope(layers_of(written))

    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=LONGEST)
    assert len(applied.frequencies) == len(frequencies)
    assert applied.is_close(EngineRope(tuple(frequencies.tolist()), scale))


@pytest.mark.parametrize(
    "written",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "yarn", **YARN, "factor": 7.9},
        {"rope_type": "yarn", **YARN, "beta_slow": 4},
        {"rope_type": "yarn", **YARN, "attention_factor": 1.0},
        {"rope_type": "yarn", **YARN, "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", **YARN, "mrope_section": [2, 3, 3]},
        {"rope_type": "yarn", "factor": 8.0},
        {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        {"rope_type": "unknown"},
    ],
    ids=str,
)
def test_a_written_rope_that_is_not_the_trained_one_is_found(written: dict[str, Any]) -> None:
    config = make_config(
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "yarn", "rope_theta": 50000.0, **YARN},
    )
    assert find_rope_problem(layers_of({"rope_type": "yarn", **YARN}), config, vllm_rope) is None

    assert find_rope_problem(layers_of(written), config, vllm_rope) is not None


def test_a_whole_number_as_linear_factor_is_found() -> None:
    # The engine takes it for a list of factors, and ends.
    rope = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
    config = make_config(head_dim=HEAD_DIM, max_position_embeddings=LONGEST, rope_parameters=rope)

    problem = find_rope_problem(layers_of(rope | {"factor": 4}), config, vllm_rope)

    assert problem is not None
    assert "decimal" in problem


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", **LONGROPE},
        {"rope_type": "longrope", **LONGROPE, "long_mscale": 1.2},
    ],
    ids=str,
)
def test_sglang_is_given_the_rope_that_was_trained(rope: dict[str, Any]) -> None:
    # Trap: that engine stretches `dynamic` from the first token on, and turns short sequences by
    # the short factors of LongRoPE.
    config = make_config(
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_theta": 50000.0} | rope,
        norm_before_residual=False,
    )

    content = TARGETS["sglang"].build_config(config, "float32")

    assert find_rope_problem(layers_of(rope), config, sglang_rope) is not None
    assert sglang_rope(content).is_close(trained_rope(config))


def test_a_scale_that_sglang_does_not_read_is_an_obstacle() -> None:
    config = make_config(
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "yarn", "rope_theta": 5e4, **YARN, "attention_factor": 1.3},
    )
    target = TARGETS["sglang"]

    problem = target.find_rope_problem(target.build_config(config, "float32"), config)

    assert problem is not None
    assert "not the one it was trained with" in problem
