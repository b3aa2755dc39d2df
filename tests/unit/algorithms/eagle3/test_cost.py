"""The cost model, against counts made by hand and against memory measured on an H100."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speculators_cli.core.algorithms.cost import Work
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.cost import (
    Eagle3Cost,
    RowCounts,
    count_flops,
    count_rows,
)
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from tests.tiny_drafts import filled_draft, make_config, shaped_config

# GiB, by `speculators bench`, NVIDIA H100 80GB, torch 2.11, with the verifier's whole LM head on
# the GPU: shape, changes of the draft, tokens, supervised fraction.
MEASURED: list[tuple[str, dict[str, Any], int, float, float]] = [
    ("llama-3.1-8b", {}, 8192, 0.6, 11.71),
    ("llama-3.1-8b", {}, 8192, 1.0, 13.28),
    ("llama-3.1-8b", {}, 8192, 0.2, 10.19),
    ("llama-3.1-8b", {}, 16384, 0.6, 14.53),
    ("llama-3.1-8b", {}, 32768, 0.6, 20.17),
    ("llama-3.1-8b", {"num_layers": 2}, 8192, 0.6, 16.95),
    ("llama-3.1-8b", {"ttt_steps": 7}, 8192, 0.6, 14.92),
    ("qwen3-8b", {"draft_vocab_size": 151936}, 8192, 0.6, 20.84),
]


def estimate(
    config: Eagle3Config,
    *,
    total_seq_len: int,
    num_active: int,
    num_targets: int,
    num_accumulated: int = 1,
    num_shards: int = 1,
) -> int:
    """Bytes at the peak of a step."""
    work = [Work(total_seq_len, num_targets, num_active, flops=0.0)]
    terms = Eagle3Cost().estimate_memory(
        config,
        Eagle3Settings(),
        work,
        total_seq_len=total_seq_len,
        num_accumulated=num_accumulated,
        num_shards=num_shards,
        has_whole_head=True,
    )
    return sum(terms.values())


@pytest.mark.parametrize(("shape", "changes", "seq_len", "fraction", "gib"), MEASURED)
def test_memory_is_within_10_percent_of_what_was_measured(
    shape: str, changes: dict[str, Any], seq_len: int, fraction: float, gib: float
) -> None:
    num_bytes = estimate(
        shaped_config(shape, **changes),
        total_seq_len=seq_len,
        num_active=int(seq_len * fraction),
        num_targets=int(seq_len * fraction),
    )

    assert num_bytes / 2**30 == pytest.approx(gib, rel=0.1)


def test_memory_of_a_shard_is_within_10_percent_of_what_was_measured() -> None:
    num_bytes = estimate(
        shaped_config("llama-3.1-8b"),
        total_seq_len=8192,
        num_active=4915,
        num_targets=4915,
        num_shards=2,
    )

    # As above, with `--nproc-per-node 2 --sharding shard`.
    assert num_bytes / 2**30 == pytest.approx(10.20, rel=0.1)


def test_the_page_describes_each_term_of_the_memory() -> None:
    config = shaped_config("llama-3.1-8b")
    work = Work(num_positions=100, num_targets=60, num_active=80, flops=1.0)

    terms = Eagle3Cost().estimate_memory(config, Eagle3Settings(), [work], total_seq_len=100)

    page = Path(__file__).parents[4] / "docs/how-to/measure-speed.md"
    described = re.findall(r"^\| `([a-z_]+)` \|", page.read_text("utf-8"), re.MULTILINE)
    assert described[: len(terms)] == list(terms)
    assert min(terms.values()) > 0


def test_memory_grows_with_the_rows_that_scattered_targets_reach() -> None:
    config = shaped_config("qwen3-8b", draft_vocab_size=151936)

    many, few = (
        estimate(config, total_seq_len=8192, num_active=num_active, num_targets=700)
        for num_active in (2000, 700)
    )

    # Each has the draft's logits of all TTT steps, in bfloat16.
    assert many - few >= 1300 * config.ttt_steps * 151936 * 2


def test_rows_are_counted_as_they_are_computed() -> None:
    # Two documents of 4 and 3, one position of padding; step 1 scores one position earlier.
    mask = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0]).bool()

    rows = count_rows(make_config(ttt_steps=2), mask, (4, 3))

    assert rows == RowCounts(
        num_positions=7,
        num_active=5,  # 1, 2 | 4, 5, 6
        num_needed=7,  # 1, 2, 3 | 4, 5, 6, and the padding after them
        num_targets=3,
        pairs=(2 + 3 + 1 + 2 + 3,),
        all_pairs=(1 + 2 + 3 + 4 + 1 + 2 + 3,),
    )


def test_pairs_outside_the_window_are_not_counted() -> None:
    config = make_config(ttt_steps=2, num_layers=3, sliding_window=2, full_attention_layers=(1,))
    mask = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0]).bool()

    rows = count_rows(config, mask, (4, 3))

    few, few_of_all = 2 + 2 + 1 + 2 + 2, 1 + 2 + 2 + 2 + 1 + 2 + 2
    assert rows.pairs == (few, 11, few)
    assert rows.all_pairs == (few_of_all, 16, few_of_all)


def test_a_window_is_expected_as_it_is_counted() -> None:
    config = make_config(num_layers=2, sliding_window=5)
    lengths = (3, 5, 9, 15)
    work = Eagle3Cost().count_work(config, Eagle3Settings(), torch.ones(32).bool(), lengths)
    sizes = np.array(lengths)

    expected = Eagle3Cost().expect_work(config, Eagle3Settings(), sizes, sizes)

    assert expected == work


def test_with_a_window_operations_grow_linearly_with_a_document() -> None:
    config, sizes = make_config(sliding_window=64), 64 + np.array([[1000], [2000], [3000]])

    flops = [Eagle3Cost().expect_work(config, Eagle3Settings(), size, size).flops for size in sizes]

    assert flops[2] - flops[1] == pytest.approx(flops[1] - flops[0], rel=1e-12)


def test_more_steps_than_positions_are_counted() -> None:
    rows = count_rows(make_config(ttt_steps=7), torch.ones(3).bool(), (3,))

    assert rows.num_active == rows.num_needed == 3


def test_each_accumulated_sequence_takes_memory() -> None:
    one, two, eight = (
        estimate(
            shaped_config("llama-3.1-8b"),
            total_seq_len=8192,
            num_active=4915,
            num_targets=4915,
            num_accumulated=num_accumulated,
        )
        for num_accumulated in (1, 2, 8)
    )

    # Both copies of the aux hidden states of six more sequences.
    assert eight - two > 6 * 2 * 8192 * 3 * 4096 * 2
    assert two > one


def test_operations_of_a_draft_of_ones_are_those_counted_by_hand() -> None:
    config = make_config(
        hidden_size=1, target_hidden_size=1, intermediate_size=1, num_heads=1, num_kv_heads=1,
        head_dim=1, draft_vocab_size=1, target_layer_ids=(1,), ttt_steps=2,
    )  # fmt: skip
    rows = RowCounts(
        num_positions=10, num_active=4, num_needed=5, num_targets=3, pairs=(20,), all_pairs=(55,)
    )

    flops = count_flops(config, rows, num_passes=2 * 4, train_head=True)

    fc = 2 * 10
    embedding = 2 * (5 + 10 * 2)
    kv = 3 * 2 * (10 + 4)
    query_o_mlp = 3 * (2 + 3) * (4 + 4)
    head = 3 + 3 * 2 * 3
    attention = 7 * 2 * 20
    assert flops == 2 * (fc + embedding + kv + query_o_mlp + head + attention)


def test_parameters_are_those_of_the_module() -> None:
    config = make_config(num_layers=2, arch="qwen3", fc_norm=True)
    draft = filled_draft(config, torch.Generator().manual_seed(0), kept_ids=torch.arange(0, 37, 2))

    assert config.count_parameters() == sum(p.numel() for p in draft.parameters())
