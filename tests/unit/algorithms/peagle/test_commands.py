"""P-EAGLE in the commands: train, resume, plan, bench, evaluate, export, start from a draft."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from speculators_cli.core.algorithms.eagle3.cost import Eagle3Cost
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.cost import PEagleCost
from speculators_cli.core.bench.bench import bench
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import DataError, ExportError, SettingsError
from speculators_cli.core.evaluation.measurement import Work, answer_alone, measure
from speculators_cli.core.evaluation.verifier import load_verifier
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.export import export
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.plan import plan
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.algorithms.peagle import PEagleSettings
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.export import ExportSettings
from speculators_cli.settings.train import TrainSettings
from tests.embedded_draft import train_draft
from tests.generated_samples import generate_samples
from tests.run_files import assert_cuts_change_nothing, read_metrics
from tests.tiny_drafts import make_config, read_folder, write_draft, write_folder
from tests.tiny_peagle import make_peagle_config
from tests.tiny_run import TinyInputs
from tests.unit.export.test_contract import change, put

QUIET = SilentProgress()


def mask_settings(tiny: TinyInputs, **changes: Any) -> TrainSettings:
    own = {"mask_token_id": 1, "ttt_steps": 3}
    return tiny.settings(
        draft={"algorithm": "peagle", "num_layers": 2, **changes.pop("draft", {})},
        peagle=own | changes.pop("peagle", {}),
        **changes,
    )


def run(tiny: TinyInputs, **changes: Any) -> TrainReport:
    return train(mask_settings(tiny, **changes), progress=QUIET)


def test_it_trains_resumes_in_the_same_bits_and_is_planned(
    tiny: TinyInputs, tmp_path: Path
) -> None:
    assert_cuts_change_nothing(partial(run, tiny), tmp_path, lambda _: [2])
    first, last = read_metrics(tmp_path / "whole", "val")
    assert last["loss_2"] < first["loss_2"]
    draft = read_draft(str(tmp_path / "whole"))
    assert isinstance(draft.config, PEagleConfig)
    assert (draft.config.mask_token_id, draft.config.num_draft_tokens) == (1, 3)
    found = plan(mask_settings(tiny), progress=QUIET)
    assert found.num_parameters == sum(x.numel() for x in draft.weights.values())
    assert found.useful_tflop_per_step > 0


def test_its_defaults_are_those_of_its_settings(tiny: TinyInputs) -> None:
    eagle = tiny.settings()
    masks = tiny.settings(draft={"algorithm": "peagle"})

    assert (eagle.draft.num_layers, eagle.eagle3.ttt_steps) == (1, 3)
    assert (masks.draft.num_layers, masks.peagle.ttt_steps) == (4, 5)
    assert masks.algorithm_settings is masks.peagle


def test_a_bench_counts_its_work(tiny: TinyInputs) -> None:
    content = {
        "shape": {
            "verifier_name_or_path": str(tiny.verifier_dir),
            "draft_vocab_size": 19,
            "algorithm": "peagle",
            "num_layers": 2,
        },
        "step": {"total_seq_len": 64, "device": "cpu"},
        "measure": {"steps": 2, "warmup_steps": 1},
    }

    report = bench(BenchSettings.model_validate(content), progress=QUIET)

    assert report.ttt_steps == 5
    assert report.useful_tflop > 0


def test_its_work_is_that_of_eagle_3_without_the_projections_of_masks() -> None:
    changes = {"num_layers": 2, "ttt_steps": 4}
    mask, lengths = torch.ones(30).bool(), (18, 12)
    every = PEagleSettings.model_validate({"down_sample_ratio": 1.0})

    eagle = Eagle3Cost().count_work(make_config(**changes), Eagle3Settings(), mask, lengths)
    own = PEagleCost().count_work(make_peagle_config(**changes), every, mask, lengths)

    # Queries, keys and values of three steps at 30 positions: forward, and back twice.
    assert own.num_active == eagle.num_active == 30
    assert eagle.flops - own.flops == 2 * 3 * (3 * 30) * 24 * (6 + 2 * 2) * 8


def test_validation_draws_the_same_depths_after_each_epoch(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 3}, optimizer={"lr": 1e-9}, peagle={"num_anchors": 8})

    losses = [line["loss"] for line in read_metrics(tiny.save_path, "val")]
    # Other depths would differ in the second digit.
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"down_sample_ratio": 0.0}, "greater than 0"),
        ({"down_sample_ratio": 1.5}, "less than or equal to 1"),
        ({"down_sample_ratio": 0.1}, "`--down-sample-ratio-min` is `0.2`, above"),
        ({"num_anchors": 0}, "greater than or equal to 1"),
    ],
)
def test_fractions_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PEagleSettings.model_validate(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peagle": {"ttt_steps": 1}}, "`--ttt-steps` is `1`, but step 0 of a P-EAGLE draft"),
        ({"peagle": {"mask_token_id": 37}}, "`--mask-token-id` is `37`, but verifier"),
        ({"peagle": {"mask_token_id": 2}}, "`--mask-token-id` is `2`, which is an end"),
        ({"peagle": {"mask_token_id": None}}, "no mask token can be chosen"),
        ({"peagle": {"full_attention_layers": (0,)}}, "no effect without `--sliding-window`"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny: TinyInputs, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        run(tiny, **changes)


def test_samples_with_its_mask_are_refused(tiny: TinyInputs) -> None:
    with pytest.raises(DataError, match="has token 7, which is the mask token of the draft"):
        run(tiny, peagle={"mask_token_id": 7})


def test_neither_it_nor_eagle_3_starts_from_the_other(tiny: TinyInputs, tmp_path: Path) -> None:
    masks = run(tiny, run={"save_path": tmp_path / "masks", "epochs": 1})
    eagle = train(tiny.settings(run={"save_path": tmp_path / "eagle", "epochs": 1}), progress=QUIET)

    for chosen, source in (("eagle3", masks), ("peagle", eagle)):
        settings = tiny.settings(
            draft={"from_checkpoint": str(source.checkpoint), "algorithm": chosen},
            run={"save_path": tmp_path / "other"},
        )
        with pytest.raises(SettingsError, match=f"`--algorithm` is `{chosen}`, but the draft in"):
            train(settings, progress=QUIET)


def test_it_starts_from_another_of_its_kind(tiny: TinyInputs, tmp_path: Path) -> None:
    source = run(tiny, run={"save_path": tmp_path / "first", "epochs": 1})

    settings = tiny.settings(
        draft={"from_checkpoint": str(source.checkpoint)},
        peagle={"ttt_steps": 4},
        run={"save_path": tmp_path / "second", "epochs": 1},
        optimizer={"lr": 1e-8},  # too little to move a weight
    )
    train(settings, progress=QUIET)

    before, after = read_draft(str(source.checkpoint)), read_draft(str(tmp_path / "second"))
    assert isinstance(after.config, PEagleConfig)
    assert (after.config.ttt_steps, after.config.mask_token_id) == (4, 1)
    assert before.weights["mask_hidden"].abs().max() > 0
    for name, weight in before.weights.items():
        torch.testing.assert_close(after.weights[name], weight, rtol=1e-4, atol=1e-5)


def test_a_trained_draft_drafts_what_the_verifier_accepts(tmp_path: Path) -> None:
    texts = read_prompts()[:5]
    generate_samples(tmp_path / "data", texts, max_new_tokens=24)
    algorithm = {"algorithm": "peagle", "num_layers": 2}
    checkpoint = train_draft(tmp_path, epochs=20, draft=algorithm, peagle={"ttt_steps": 3})
    draft = read_draft(str(checkpoint))
    verifier = load_verifier(
        VerifierFiles(str(VERIFIER_DIR)), draft.config.target_layer_ids, dtype=torch.float32
    )

    drafter = draft.build_drafter(verifier.embedding, num_draft_tokens=3)
    # Fewer rows than prompts: some begin while others go on, and rows are dropped at the end.
    work = Work([Prompt(verifier.encode(text), 0) for text in texts], Sampling(24), 3)
    own = answer_alone(verifier, work, QUIET).answers
    result = measure(verifier, drafter, work, own, progress=QUIET)

    assert isinstance(draft.config, PEagleConfig)
    assert draft.config.mask_token_id not in verifier.tokens.end_ids
    assert result.is_lossless
    first, second, _ = result.acceptance_rates
    assert first > second > 0.05
    assert 1.2 < result.acceptance_length <= 4.0


FAULTS: dict[str, Any] = {
    "another algorithm": change("speculators_model_type", "eagle3"),
    "no mask": change("mask_token_id", None),
    "a mask without an embedding": change("mask_token_id", 37),
    "a mask for the engine's other drafts": change("transformer_layer_config.mask_token_id", 3),
    "no norm_before_residual": change("norm_before_residual", None),
    "fc_norm": change("fc_norm", True),
    "no number of tokens": change("speculators_config.proposal_methods.0.speculative_tokens", None),
    "too few layers": change("eagle_aux_hidden_state_layer_ids", [2, 4]),
    "no mask_hidden": put("mask_hidden", lambda _: None),
    "a shorter mask_hidden": put("mask_hidden", lambda x: x["mask_hidden"][:, :, :-1].clone()),
    "no lm_head": put("lm_head.weight", lambda _: None),
    "no d2t": put("d2t", lambda _: None),
    "fc_norm's weights": put("fc_norm.0.weight", lambda _: torch.ones(24)),
}


def test_its_export_is_checked(tiny: TinyInputs, tmp_path: Path) -> None:
    run(tiny, run={"epochs": 1})
    content = {
        "source": {"checkpoint": str(tiny.save_path)},
        "export": {"output_dir": tmp_path / "served", "dtype": "float32"},
    }
    report = export(ExportSettings.model_validate(content), progress=QUIET)

    served = tmp_path / "served"
    config, tensors = read_folder(served)
    assert report.verification is not None
    assert read_draft(str(served)).config == read_draft(str(tiny.save_path)).config
    assert find_problems(served, "vllm") == []
    assert config["mask_token_id"] == 1
    assert tensors["mask_hidden"].shape == (1, 1, 3 * 24)
    command = TARGETS["vllm"].serve_command(read_draft(str(served)).config, served)
    assert '"method": "eagle3"' in str(command)
    assert '"parallel_drafting": true' in str(command)
    for name, fault in FAULTS.items():
        changed, others = read_folder(served)
        fault(changed, others)
        write_folder(tmp_path / "fault", changed, others)
        assert find_problems(tmp_path / "fault", "vllm") != [], name


def test_engines_without_masks_are_refused(tiny: TinyInputs, tmp_path: Path) -> None:
    run(tiny, run={"epochs": 1})
    content = {
        "source": {"checkpoint": str(tiny.save_path)},
        "export": {"output_dir": tmp_path / "served", "target": "sglang"},
    }

    with pytest.raises(ExportError, match="algorithm `peagle` cannot be exported for SGLang"):
        export(ExportSettings.model_validate(content), progress=QUIET)
    assert not (tmp_path / "served").exists()


def test_a_draft_with_fc_norm_is_read_and_not_exported(tmp_path: Path) -> None:
    config = make_peagle_config(fc_norm=True, norm_before_residual=False)
    folder = write_draft(tmp_path / "draft", config)

    assert read_draft(str(folder)).config == config
    (obstacle,) = TARGETS["vllm"].format_of(config).find_obstacles(config)
    assert "`fc_norm` is on" in obstacle
