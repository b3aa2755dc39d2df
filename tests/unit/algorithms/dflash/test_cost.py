"""The cost model of blocks: counts against those of real batches."""

from math import prod

import numpy as np
import pytest
import torch

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.cost import Work, find_gpu
from speculators_cli.core.algorithms.dflash.blocks import find_blocks
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.cost import DFlashCost, count_blocks, count_flops
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.training.inputs import fresh_config
from speculators_cli.settings.algorithms.dflash import BlockSettings, DFlashSettings
from speculators_cli.settings.bench import BenchSettings
from tests.tiny_dflash import filled_blocks, make_block_config
from tests.tiny_drafts import make_sample, pack

# By `speculators bench --shape qwen3-8b --num-layers 5`, NVIDIA H100 80GB, torch 2.11: algorithm,
# anchors, whether the vocabulary is full, ms per step.
STEP_MS = [
    ("dspark", 512, False, 71.1),
    ("dspark", 1024, False, 118.8),
    ("dspark", 2048, False, 213.4),
    ("dflash", 1024, False, 115.3),
    ("dspark", 512, True, 93.7),
]
# The same of DSpark on an NVIDIA H200, with the verifier's whole LM head on the GPU: anchors,
# whether products are in float8, GiB at the peak.
PEAK_GIB = [
    (512, False, 21.55),
    (1024, False, 21.94),
    (2048, False, 25.06),
    (512, True, 22.16),
    (1024, True, 23.98),
    (2048, True, 28.01),
]
H100 = find_gpu("NVIDIA H100 80GB HBM3")


def benched(
    name: str, num_anchors: int, *, is_full: bool = False
) -> tuple[DFlashConfig, BlockSettings, Work]:
    """The draft that `bench` times, its settings, and the work of a packed sequence."""
    shape = {"shape": "qwen3-8b", "algorithm": name, "full_vocab": is_full}
    settings = BenchSettings.model_validate({"shape": shape, name: {"num_anchors": num_anchors}})
    verifier, vocab_size = SHAPES["qwen3-8b"]
    config = fresh_config(
        name,
        settings.algorithm_settings,
        verifier,
        VocabMap.choose(np.zeros(vocab_size, np.int64), vocab_size if is_full else 32000),
        LayerIds(default_layer_ids(verifier.num_layers, 5), is_assumed=True),
        arch=settings.shape.draft_arch,
        num_layers=settings.shape.num_layers,
    )
    # As its synthetic samples: six documents of two turns, 60 % of each supervised.
    lengths = [2304, 1792, 1408, 1152, 896, 640]
    mask = torch.cat([torch.arange(n // 2) >= 0.4 * (n // 2) for n in lengths for _ in range(2)])
    own = settings.algorithm_settings
    assert isinstance(config, DFlashConfig)
    assert isinstance(own, BlockSettings)
    return config, own, ALGORITHMS[name].cost.count_work(config, own, mask, lengths)


@pytest.mark.parametrize(("name", "num_anchors", "is_full", "step_ms"), STEP_MS)
def test_time_is_within_10_percent_of_what_was_measured(
    name: str, num_anchors: int, is_full: bool, step_ms: float
) -> None:
    config, own, work = benched(name, num_anchors, is_full=is_full)
    cost = ALGORITHMS[name].cost

    assert H100 is not None
    seconds = cost.estimate_seconds(work.flops, cost.count_trained(config, own), H100)

    assert seconds == pytest.approx(step_ms / 1e3, rel=0.1)


@pytest.mark.parametrize(("num_anchors", "in_float8", "gib"), PEAK_GIB)
def test_memory_is_within_10_percent_of_what_was_measured(
    num_anchors: int, in_float8: bool, gib: float
) -> None:
    config, own, work = benched("dspark", num_anchors)

    memory, resting = (
        ALGORITHMS["dspark"].cost.estimate_memory(
            config,
            own,
            [work],
            total_seq_len=8192,
            num_ranks=2,  # measured with all gradients in float32, as several ranks have them
            has_whole_head=has_whole_head,
            in_float8=in_float8,
        )
        for has_whole_head in (True, False)
    )

    assert sum(memory.values()) == pytest.approx(gib * 2**30, rel=0.1)
    assert sum(memory.values()) - sum(resting.values()) == 2 * 151936 * 4096


def test_one_rank_that_accumulates_nothing_has_most_gradients_in_bfloat16() -> None:
    config, own, work = benched("dspark", 512)

    alone, *others = (
        sum(
            ALGORITHMS["dspark"]
            .cost.estimate_memory(
                config,
                own,
                [work],
                total_seq_len=8192,
                num_ranks=num_ranks,
                num_accumulated=num_accumulated,
            )
            .values()
        )
        for num_ranks, num_accumulated in ((1, 1), (2, 1), (1, 2))
    )

    weights = {n: prod(shape) for n, shape in config.tensor_shapes().items() if len(shape) > 1}
    saved = 2 * sum(size for n, size in weights.items() if n.startswith(("fc.", "layers.")))
    assert alone == others[0] - saved
    assert alone < others[1] - saved


@pytest.mark.parametrize("num_anchors", [6, 100])
def test_counts_are_those_of_drawn_anchors_on_average(
    num_anchors: int, rng: torch.Generator
) -> None:
    config = make_block_config()
    draft = filled_blocks(config, rng, num_anchors=num_anchors)
    batch = pack(*(make_sample(n, config, rng) for n in (9, 14)))
    counts = count_blocks(config, num_anchors, batch.host_mask, batch.lengths)

    scored, context, targets = [], [], []
    for epoch in range(300 if num_anchors == 6 else 1):
        drawn = draft.draw(batch, seed=0, epoch=epoch)
        blocks = find_blocks(drawn, config.num_draft_tokens)
        scored.append(int((blocks.targets >= 0).sum()))
        context.append(int(drawn.position_ids[blocks.anchors].sum()))
        targets.append(len(set(blocks.targets[blocks.targets >= 0].tolist())))

    assert counts.num_anchors == min(num_anchors, int(batch.host_mask.sum()))
    # 300 draws: a standard deviation of a fifth leaves 1.2 %.
    assert counts.num_scored == pytest.approx(np.mean(scored), rel=0.05)
    assert counts.context == pytest.approx(np.mean(context), rel=0.05)
    # Neighbours overlap: the model takes draws as independent.
    assert counts.num_targets == pytest.approx(np.mean(targets), rel=0.15)


def test_a_long_answer_costs_the_same_from_headers_and_masks() -> None:
    config, cost = make_block_config(), DFlashCost()
    settings = DFlashSettings(num_anchors=10)
    mask = torch.arange(50) >= 20

    from_mask = cost.count_work(config, settings, mask, [50])
    from_headers = cost.expect_work(config, settings, np.array([50]), np.array([30]))

    assert from_mask == from_headers
    assert from_mask.num_targets == 30


def test_operations_follow_their_formula(rng: torch.Generator) -> None:
    config = make_block_config(num_layers=1, draft_vocab_size=37)
    batch = pack(make_sample(21, config, rng, supervised_fraction=1.0), total_seq_len=20)
    counts = count_blocks(config, 100, batch.host_mask, batch.lengths)

    flops = count_flops(config, counts)

    rows, scored = 20 * 5, 20 + 19 + 18 + 17
    expected = 2 * 20 * 3 * 24 * 24 + 3 * 20 * 2 * 16 * 24
    expected += 3 * rows * (2 * 24 * 48 + 2 * 16 * 24 + 3 * 24 * 40)
    expected += 37 * 24 * (20 + 2 * scored) + 7 * 48 * 5 * (210 + 20 * 5)
    assert flops == pytest.approx(2 * expected)
