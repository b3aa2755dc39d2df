"""DFlash through the commands: trained, resumed, planned, read back, drafted with."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speculators_cli.core.algorithms.dflash.blocks import draw_anchors
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.bench.bench import bench
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.evaluation.measurement import Work, answer_alone, measure
from speculators_cli.core.evaluation.verifier import load_verifier
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.plan import plan
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.train import TrainSettings
from tests.embedded_draft import train_draft
from tests.generated_samples import generate_samples
from tests.run_files import assert_cuts_change_nothing, read_metrics
from tests.tiny_dflash import make_block_config
from tests.tiny_drafts import make_sample, pack, read_folder, write_draft
from tests.tiny_run import LAYER_IDS, TinyInputs

QUIET = SilentProgress()


def dflash_settings(tiny: TinyInputs, **changes: Any) -> TrainSettings:
    own = {"block_size": 5, "mask_token_id": 1, "num_anchors": 12}
    return tiny.settings(
        draft={"algorithm": "dflash", "num_layers": 2, **changes.pop("draft", {})},
        dflash=own | changes.pop("dflash", {}),
        **changes,
    )


def run(tiny: TinyInputs, **changes: Any) -> TrainReport:
    return train(dflash_settings(tiny, **changes), progress=QUIET)


def test_a_draft_learns_and_its_best_epoch_is_the_one_that_accepts_most(tiny: TinyInputs) -> None:
    report = run(tiny, run={"epochs": 6})

    lines = read_metrics(tiny.save_path, "val")
    lengths = [line["acceptance_length"] for line in lines]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert report.best_epoch is not None
    assert lengths[report.best_epoch] == max(lengths)
    assert {f"acceptance_rate_{k}" for k in range(4)} <= lines[0].keys()


def test_a_run_cut_at_any_step_ends_in_the_same_bits(tiny: TinyInputs, tmp_path: Path) -> None:
    assert_cuts_change_nothing(partial(run, tiny), tmp_path, lambda total: range(1, total, 3))


def test_anchors_depend_on_seed_epoch_and_sample_only(rng: torch.Generator) -> None:
    config = make_block_config()
    samples = [make_sample(n, config, rng, supervised_fraction=1.0) for n in (9, 12)]
    first, second = pack(samples[0]), pack(*samples)

    few = [draw_anchors(second, 5, seed=0, epoch=epoch).anchors for epoch in (0, 0, 1, -1)]
    all_of = draw_anchors(second, 100, seed=0, epoch=0).anchors
    alone = draw_anchors(first, 3, seed=0, epoch=0).anchors

    assert all(x is not None and len(x) == 5 for x in few)
    lists = [x.tolist() for x in few if x is not None]
    assert lists[0] == lists[1] == sorted(lists[0])
    assert lists[1] != lists[2] != lists[3] != lists[1]
    assert all_of is not None
    assert all_of.tolist() == list(range(19))
    # A document's smallest numbers are those it has in any packed sequence.
    assert alone is not None
    inside = [row for row in lists[0] if row < 8]
    assert inside
    assert set(inside[:3]) <= set(alone.tolist()) or set(alone.tolist()) <= set(inside)


def test_anchors_are_drawn_uniformly(rng: torch.Generator) -> None:
    config = make_block_config()
    batch = pack(make_sample(21, config, rng, supervised_fraction=1.0))

    drawn = [draw_anchors(batch, 5, seed=0, epoch=epoch).anchors for epoch in range(400)]

    counts = np.bincount(np.concatenate([x.numpy() for x in drawn if x is not None]), minlength=20)
    # 100 expected of each; five standard deviations of a binomial are 43.
    assert counts[:20].min() > 57
    assert counts[:20].max() < 143


def test_a_checkpoint_is_read_back_trained_further_and_drafts(
    tiny: TinyInputs, tmp_path: Path
) -> None:
    report = run(tiny, run={"epochs": 4})

    draft = read_draft(str(report.checkpoint), Overrides(), flag="CHECKPOINT")
    further = train(
        dflash_settings(
            tiny,
            draft={"from_checkpoint": str(report.checkpoint)},
            run={"save_path": tmp_path / "further", "epochs": 1},
            optimizer={"lr": 1e-6},  # too little to change a metric's third digit
        ),
        progress=QUIET,
    )

    assert isinstance(draft.config, DFlashConfig)
    assert draft.config.target_layer_ids == LAYER_IDS
    assert draft.config.mask_token_id == 1
    assert further.validation_loss is not None
    assert report.validation_loss is not None
    assert further.validation_loss == pytest.approx(report.validation_loss, rel=1e-2)


@pytest.mark.parametrize("is_full", [False, True])
def test_drafting_keeps_the_verifiers_answers(tmp_path: Path, is_full: bool) -> None:
    texts = read_prompts()[:5]
    generate_samples(tmp_path / "data", texts, max_new_tokens=24, layer_ids=(1, 2, 4, 5))
    algorithm = {"algorithm": "dflash", "num_layers": 1, "full_vocab": is_full}
    checkpoint = train_draft(tmp_path, epochs=25, draft=algorithm, dflash={"block_size": 5})
    draft = read_draft(str(checkpoint), Overrides(), flag="CHECKPOINT")
    verifier = load_verifier(
        VerifierFiles(str(VERIFIER_DIR)), draft.config.target_layer_ids, dtype=torch.float32
    )

    drafter = draft.build_drafter(verifier.embedding, num_draft_tokens=4, head=verifier.head)
    # Fewer rows than prompts: some begin while others go on, and rows are dropped at the end.
    prompts = [Prompt(verifier.encode(text), 0) for text in texts]
    work = Work(prompts, Sampling(24), 3)
    own = answer_alone(verifier, work, QUIET).answers
    result = measure(verifier, drafter, work, own, progress=QUIET)

    assert draft.config.owns_head != is_full
    assert draft.config.target_layer_ids == (1, 2, 4, 5)
    assert isinstance(draft.config, DFlashConfig)
    assert draft.config.mask_token_id not in verifier.tokens.end_ids
    assert result.is_lossless
    assert len(result.acceptance_rates) == 4
    assert 1.2 < result.acceptance_length <= 5.0


def test_a_plan_and_a_bench_count_its_work(tiny: TinyInputs) -> None:
    planned = plan(dflash_settings(tiny), progress=QUIET)
    measured = bench(
        BenchSettings.model_validate(
            {
                "shape": {
                    "verifier_name_or_path": str(tiny.verifier_dir),
                    "full_vocab": True,
                    "algorithm": "dflash",
                    "num_layers": 2,
                },
                "dflash": {"num_anchors": 8},
                "step": {"total_seq_len": 64, "device": "cpu"},
                "measure": {"steps": 2, "warmup_steps": 1},
            }
        ),
        progress=QUIET,
    )

    config = make_block_config()
    assert planned.num_parameters == config.count_parameters()
    assert planned.useful_tflop_per_step > 0
    assert measured.ttt_steps == 7
    assert measured.useful_tflop > 0


def test_its_defaults_are_those_of_its_settings(tiny: TinyInputs) -> None:
    plain = tiny.settings()
    block = tiny.settings(draft={"algorithm": "dflash"})
    given = tiny.settings(draft={"algorithm": "dflash", "num_layers": 3}, data={"noise_std": 0.1})

    assert (plain.draft.num_layers, plain.draft.draft_arch, plain.data.noise_std) == (
        1,
        "llama",
        0.05,
    )
    assert (block.draft.num_layers, block.draft.draft_arch, block.data.noise_std) == (
        5,
        "qwen3",
        0.0,
    )
    assert (given.draft.num_layers, given.data.noise_std) == (3, 0.1)
    assert "num_layers" not in block.draft.model_fields_set


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": {"draft_arch": "llama"}}, "DFlash drafts have `qwen3` layers"),
        ({"dflash": {"mask_token_id": 37}}, "`--mask-token-id` is `37`, but verifier"),
        ({"dflash": {"mask_token_id": 2}}, "`--mask-token-id` is `2`, which is an end"),
        ({"dflash": {"mask_token_id": None}}, "no mask token can be chosen"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny: TinyInputs, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(tiny, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The samples have 8 to 39 tokens.
        ({"block_size": 64}, "A block proposes 63 tokens, but no sample has more than"),
        ({"mask_token_id": 7}, "has token 7, which is the mask token of the draft"),
    ],
)
def test_samples_that_cannot_train_it_are_refused(
    tiny: TinyInputs, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        run(tiny, dflash=changes)

    assert error.value.exit_code == 3
    assert not list(tiny.save_path.glob("*/model.safetensors"))


def test_a_draft_of_more_aux_layers_than_the_samples_have_is_refused(
    tiny: TinyInputs, tmp_path: Path
) -> None:
    config = make_block_config(target_layer_ids=(1, 2, 3, 4, 5), mask_token_id=1)
    folder = write_draft(tmp_path / "five", config)
    maps = {name: folder / f"{name}.npy" for name in ("d2t", "t2d")}  # beside are shared ones
    for name, file in maps.items():
        np.save(file, read_folder(folder)[1][name].numpy())

    paths = {f"{name}_path": file for name, file in maps.items()}
    with pytest.raises(DataError, match="The samples have the verifier layers"):
        run(tiny, draft={"from_checkpoint": str(folder), **paths})


def test_a_draft_of_eagle3_is_not_a_start_of_it(tiny: TinyInputs) -> None:
    source = train(tiny.settings(run={"epochs": 1}), progress=QUIET)

    with pytest.raises(SettingsError, match="`--algorithm` is `dflash`, but the draft in") as error:
        run(
            tiny,
            draft={"from_checkpoint": str(source.checkpoint)},
            run={"save_path": tiny.folder / "other"},
        )

    assert error.value.exit_code == 2
