"""RoPE of verifiers of all kinds, as a draft has it, against their own code and an engine's."""

import re
from typing import Any

import pytest
import torch
from transformers import HunYuanDenseV1Config, LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (
    HunYuanDenseV1RotaryEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from speculators_cli.core.models.layers import RotaryEmbedding
from speculators_cli.core.models.rope import (
    ROPE_TYPES,
    RopeError,
    check_rope,
    choose_rope,
    find_frequencies,
    gather_rope,
    read_rope,
)
from tests.tiny_drafts import make_config

HEAD_DIM, LONGEST = 16, 512
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
LENGTH = {"original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | LENGTH
YARN = {"factor": 8.0} | LENGTH
LONGROPE = {"short_factor": SHORT, "long_factor": LONG} | LENGTH
SETS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "factor": 4.0, "beta_fast": 5, "beta_slow": 0.5},
    {"rope_type": "yarn", **YARN, "truncate": False},
    {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.3},
    {"rope_type": "yarn", **YARN, "factor": None},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "llama3", **LLAMA3, "factor": 32.0, "high_freq_factor": 2.0},
    {"rope_type": "longrope", **LONGROPE},
    {"rope_type": "longrope", **LONGROPE, "factor": 8.0},
    {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 512},
]


def llama(rope: dict[str, Any] | None, **changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": HEAD_DIM}
    return LlamaConfig(
        **(sizes | {"max_position_embeddings": LONGEST, "rope_parameters": rope} | changes)
    )


def frequencies_of(rope: dict[str, Any]) -> tuple[list[float], float]:
    found, scale = find_frequencies(
        make_config(head_dim=HEAD_DIM, rope_parameters=rope, max_position_embeddings=LONGEST)
    )
    return found.tolist(), scale


@pytest.mark.parametrize("rope", SETS, ids=str)
def test_a_draft_turns_by_the_frequencies_of_its_verifier(rope: dict[str, Any]) -> None:
    verifier = llama({"rope_theta": 50000.0} | rope)

    chosen = choose_rope(
        verifier.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST
    )

    found, scale = frequencies_of(dict(chosen.parameters))
    if rope["rope_type"] == "default":
        theirs = LlamaRotaryEmbedding(verifier)
        expected, factor = theirs.inv_freq.clone(), theirs.attention_scaling
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](verifier, seq_len=LONGEST)
    assert chosen.left_out is None
    # Both sides round once or twice in float32.
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert scale == pytest.approx(factor, rel=1e-6)


def test_every_kind_has_a_set() -> None:
    assert {rope["rope_type"] for rope in SETS} == set(ROPE_TYPES)


# Second, middle and last frequency and the scale, by vLLM 0.32.0's own classes: theta 50,000, heads
# of 16, 512 positions.
COMPUTED_BY_VLLM: list[tuple[dict[str, Any], tuple[float, float, float], float]] = [
    ({"rope_type": "default"}, (0.2586001, 0.004472136, 7.733948e-05), 1.0),
    ({"rope_type": "linear", "factor": 4}, (0.06465004, 0.001118034, 1.933487e-05), 1.0),
    ({"rope_type": "dynamic", "factor": 4.0}, (0.2586001, 0.004472136, 7.733948e-05), 1.0),
    (
        {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0, "beta_fast": 32, "mscale": 1.0},
        (0.09639563, 8.634343e-05, 7.733948e-08),
        1.0,
    ),
    ({"rope_type": "yarn", **YARN}, (0.1454626, 0.000559017, 9.667435e-06), 1.2079442),
    (
        {"rope_type": "yarn", **YARN, "beta_fast": 16, "beta_slow": 2.0, "truncate": False},
        (0.07060421, 0.000559017, 9.667435e-06),
        1.2079442,
    ),
    (
        {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
        (0.1454626, 0.000559017, 9.667435e-06),
        0.9495609,
    ),
    ({"rope_type": "llama3", **LLAMA3}, (0.1555755, 0.000559017, 9.667435e-06), 1.0),
    ({"rope_type": "longrope", **LONGROPE}, (0.08620005, 0.0007453561, 8.593275e-06), 1.2247449),
    (
        {"rope_type": "longrope", **LONGROPE, "short_mscale": 1.1, "long_mscale": 1.2},
        (0.08620005, 0.0007453561, 8.593275e-06),
        1.2,
    ),
]


@pytest.mark.parametrize(("rope", "expected", "scale"), COMPUTED_BY_VLLM, ids=str)
def test_the_rope_of_a_trained_draft_is_what_the_engine_computes(
    rope: dict[str, Any], expected: tuple[float, float, float], scale: float
) -> None:
    read = read_rope(
        {"rope_scaling": rope, "rope_theta": 50000},
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
    )

    found, factor = frequencies_of(read)
    # Seven digits are written.
    assert (found[1], found[4], found[-1]) == pytest.approx(expected, rel=1e-6)
    assert factor == pytest.approx(scale, rel=1e-6)


def build(config_class: Any, **values: Any) -> Any:
    return config_class(**values)


def test_the_alpha_of_hunyuan_is_part_of_theta() -> None:
    # Trap: trained with the plain theta, and served with `alpha`.
    rope = {"type": "dynamic", "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0}
    verifier = build(HunYuanDenseV1Config, head_dim=HEAD_DIM, rope_scaling=rope, rope_theta=10000.0)

    chosen = choose_rope(
        verifier.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST
    )

    theta = 10000.0 * 1000.0 ** (16 / 14)
    assert chosen.parameters == {"rope_type": "default", "rope_theta": pytest.approx(theta)}
    assert frequencies_of(dict(chosen.parameters))[0] == pytest.approx(
        HunYuanDenseV1RotaryEmbedding(verifier).inv_freq.tolist(), rel=1e-6
    )


def test_a_draft_of_phi3_turns_by_its_long_factors() -> None:
    verifier = build(
        Phi3Config, hidden_size=64, num_attention_heads=4, max_position_embeddings=LONGEST,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
        pad_token_id=0, **LENGTH,
    )  # fmt: skip

    chosen = choose_rope(
        verifier.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST
    )

    theirs = Phi3RotaryEmbedding(verifier)
    positions = torch.arange(LONGEST)
    cos, sin = theirs(torch.empty(0), positions[None])
    config = make_config(
        head_dim=HEAD_DIM,
        rope_parameters=chosen.parameters,
        max_position_embeddings=LONGEST,
    )
    own_cos, own_sin = RotaryEmbedding(config)(positions)
    assert chosen.left_out is None
    # Angles of some hundreds of radians, rounded in float32.
    torch.testing.assert_close(own_cos[:, 0], cos[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own_sin[:, 0], sin[0], rtol=1e-4, atol=1e-4)


PLAIN = {"rope_type": "default", "rope_theta": 70000.0}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 8.0}, "rope_theta": 7e4, **LENGTH},
            {"rope_type": "yarn", "rope_theta": 7e4, **YARN},
        ),
        ({"rope_theta": "70000"}, PLAIN),
        ({"rotary_emb_base": 70000}, PLAIN),
        (
            {"rope_theta": 7e4, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            PLAIN,
        ),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, PLAIN),
    ],
)
def test_rope_is_read_from_a_config_that_transformers_cannot_build(
    content: dict[str, Any], expected: dict[str, Any]
) -> None:
    # Trap: the kind under its older name is lost, and the draft has plain RoPE.
    text = PreTrainedConfig()
    text.rope_parameters = gather_rope(content)

    chosen = choose_rope(text.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert (chosen.parameters, chosen.left_out) == (expected, None)


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ({"rope_theta": "much"}, "has `rope_theta` `much`"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, "rotates only 0.25 of each head"),
        ({"rope_theta": {"a": 1}}, "has `rope_theta`"),
    ],
)
def test_what_a_config_has_in_place_of_numbers_is_left_out_and_named(
    content: dict[str, Any], left_out: str
) -> None:
    text = PreTrainedConfig()
    text.rope_parameters = gather_rope(content)

    chosen = choose_rope(text.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert chosen.parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert chosen.left_out is not None
    assert left_out in chosen.left_out


LEFT_OUT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "half of each head": (
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        PLAIN,
        "rotates only 0.5 of each head",
    ),
    "YaRN on half of each head": (
        {"rope_type": "yarn", **YARN, "partial_rotary_factor": 0.5},
        {"rope_type": "yarn", **YARN, "rope_theta": 70000.0},
        "rotates only 0.5 of each head",
    ),
    "LongRoPE on 3/4 of each head": (
        {"rope_type": "longrope", **LENGTH, "partial_rotary_factor": 0.75}
        | {"short_factor": SHORT[:6], "long_factor": LONG[:6]},
        PLAIN,
        "rotates only 0.75 of each head",
    ),
    "lists of another length": (
        {"rope_type": "longrope", **LONGROPE, "long_factor": LONG[:5]},
        PLAIN,
        "has 5 values in `long_factor`, expected 8",
    ),
    "two readings of one factor": (
        {"rope_type": "longrope", **LONGROPE, "factor": 4.0},
        PLAIN,
        "has `factor` 4.0, but its lengths have the ratio 8",
    ),
    "a scale that engines do not read": (
        {"rope_type": "longrope", **LONGROPE, "attention_factor": 1.5},
        PLAIN,
        "has `attention_factor` 1.5, but engines apply 1.22474",
    ),
    "Gemma 4": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        PLAIN,
        "rotates only 0.25 of each head",
    ),
    "another kind": ({"rope_type": "ntk", "factor": 2.0}, PLAIN, "is of type `ntk`"),
    "a factor of no number": (
        {"rope_type": "linear", "factor": "much"},
        PLAIN,
        "has `factor` `much`, expected a positive number",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_draft_cannot_have_of_its_verifier_is_left_out_and_named(case: str) -> None:
    rope, expected, left_out = LEFT_OUT[case]
    text = PreTrainedConfig()
    text.rope_parameters = rope | {"rope_theta": 70000.0}

    chosen = choose_rope(text.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert chosen.parameters == expected
    assert chosen.left_out is not None
    assert left_out in chosen.left_out


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"full_attention": PLAIN, "sliding_attention": {"rope_theta": 10.0}}, PLAIN),
        ({"full_attention": None, "sliding_attention": PLAIN}, PLAIN),
        (PLAIN | {"mrope_section": [2, 3, 3], "mrope_interleaved": True}, PLAIN),
        (PLAIN | {"rope_type": "mrope", "mrope_section": [2, 3, 3]}, PLAIN),
        (PLAIN | {"beta_fast": 32, "alpha": 3.0, "factor": 2.0}, PLAIN),
        (None, {"rope_type": "default", "rope_theta": 10000.0}),
    ],
)
def test_only_what_is_computed_is_kept(
    rope: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    text = PreTrainedConfig()
    text.rope_parameters = rope

    chosen = choose_rope(text.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert (chosen.parameters, chosen.left_out) == (expected, None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "part of a head": ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` `0.5`"),
    "part of a head, in NeoX's words": ({"rotary_pct": 0.25}, "`partial_rotary_factor` `0.25`"),
    "sections": ({"rope_scaling": {"mrope_section": [2, 3, 3]}}, "`mrope_section`"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "type `mrope`"),
    "Fourier": ({"rope_scaling": {"use_fope": True}}, "`use_fope` `True`"),
    "some values": ({"rope_scaling": {"rope_dim": 8}}, "`rope_dim` `8`"),
    "the trained length": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "max_trained_positions": 64}},
        "`max_trained_positions` `64`",
    ),
    "SGLang's scale": (
        {"rope_scaling": {"type": "yarn", **YARN, "attn_factor": 0.5}},
        "`attn_factor` `0.5`",
    ),
    "two kinds": ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "and `type` `yarn`"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "lacks `factor`"),
    "a factor of nothing": ({"rope_scaling": {"type": "linear", "factor": 0}}, "`factor` `0`"),
    "a switch": ({"rope_scaling": {"type": "linear", "factor": True}}, "`factor` `True`"),
    "a list": ({"rope_scaling": [1, 2]}, "expected an object"),
    "a list of words": (
        {"rope_scaling": {"rope_type": "longrope", **LONGROPE, "long_factor": ["a"] * 8}},
        "`long_factor` `a`",
    ),
    "no list": (
        {"rope_scaling": {"rope_type": "longrope", **LONGROPE, "long_factor": 2.0}},
        "`long_factor` `2.0`, expected a list",
    ),
    "a kind of layer": (
        {"rope_parameters": {"full_attention": PLAIN}},
        "separate values for `full_attention`",
    ),
    "a theta of nothing": ({"rope_theta": 0}, "`rope_theta` `0`"),
    "a theta beyond numbers": ({"rope_theta": 10**30}, "`rope_theta` `1000000"),
    "a factor beyond float32": (
        {"rope_scaling": {"type": "yarn", **YARN, "factor": 1e308}},
        "`factor` `1e+308`",
    ),
    "no number": ({"rope_theta": float("nan")}, "`rope_theta` `nan`"),
    "crossed bounds": (
        {"rope_scaling": {"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
        "`low_freq_factor`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_would_apply_and_a_draft_does_not_is_refused(case: str) -> None:
    layers, message = REFUSED[case]

    with pytest.raises(RopeError, match=re.escape(message)):
        read_rope(layers, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)


def test_numbers_are_read_from_text_and_null_is_nothing() -> None:
    layers = {
        "rope_theta": "50000",
        "partial_rotary_factor": 1.0,
        "rope_scaling": {"type": "yarn", "factor": "8.0", "beta_fast": None, **LENGTH},
    }

    read = read_rope(layers, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert read == {
        "rope_type": "yarn", "rope_theta": 50000, "type": "yarn", "factor": 8.0, **LENGTH,
    }  # fmt: skip


def test_the_rope_of_full_attention_layers_stays_as_it_is() -> None:
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0}
    text = PreTrainedConfig()
    text.rope_parameters = {"sliding_attention": PLAIN, "full_attention": rope}

    chosen = choose_rope(text.rope_parameters, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert list(chosen.parameters.items()) == list(rope.items())


def test_what_is_checked_stays_as_it_is() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 50000.0, **LLAMA3}

    read = check_rope(rope, head_dim=HEAD_DIM, max_position_embeddings=LONGEST)

    assert list(read.items()) == list(rope.items())
