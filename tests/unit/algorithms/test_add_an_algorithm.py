"""An algorithm that only the tests have runs through every command, without a change elsewhere."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

from speculators_cli.cli.setting_flags import flags_of
from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.bench.bench import bench
from speculators_cli.core.data.batch import collate
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import CheckpointError, SettingsError
from speculators_cli.core.evaluation.measurement import Work, answer_alone, measure
from speculators_cli.core.evaluation.verifier import load_verifier
from speculators_cli.core.models.verifier import (
    load_embedding,
    load_frozen_verifier,
    read_verifier_config,
)
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.plan import plan
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.algorithms import ALGORITHM_SETTINGS
from speculators_cli.settings.bench import BenchSettings
from speculators_cli.settings.loading import load_settings
from speculators_cli.settings.train import TrainSettings
from tests.generated_samples import generate_samples
from tests.run_files import assert_cuts_change_nothing, read_metrics
from tests.tiny_run import HIDDEN, TinyInputs
from tests.toy_algorithm import Toy, ToyConfig, ToySettings, ToyTrainSettings

PAGE = Path(__file__).parents[3] / "docs/how-to/add-an-algorithm.md"
SOURCE = Path(__file__).parents[2] / "toy_algorithm.py"
QUIET = SilentProgress()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHM_SETTINGS, "toy", ToySettings)
    monkeypatch.setitem(ALGORITHMS, "toy", Toy())


def toy_settings(tiny: TinyInputs, **changes: Any) -> TrainSettings:
    changes["draft"] = {"algorithm": "toy", **changes.get("draft", {})}
    return tiny.settings(ToyTrainSettings, **changes)


def run(tiny: TinyInputs, **changes: Any) -> TrainReport:
    return train(toy_settings(tiny, **changes), progress=QUIET)


def test_its_settings_are_flags_under_its_name_and_its_name_is_a_choice(tiny: TinyInputs) -> None:
    flags = {flag.names[0]: flag for flag in flags_of(ToyTrainSettings)}
    given = {
        "verifier_name_or_path": str(tiny.verifier_dir),
        "data_path": [str(tiny.data_dir)],
        "full_vocab": "true",
    }

    settings = load_settings(ToyTrainSettings, {**given, "algorithm": "toy", "top_k": "3"}, None)

    assert flags["--top-k"].panel == "Toy"
    assert flags["--algorithm"].metavar == "<eagle3|dflash|dspark|peagle|toy>"
    assert settings.algorithm_settings == ToySettings(top_k=3)
    with pytest.raises(
        SettingsError, match="must be `eagle3`, `dflash`, `dspark`, `peagle` or `toy`, got `toi`"
    ):
        load_settings(ToyTrainSettings, {**given, "algorithm": "toi"}, None)


def test_every_algorithm_has_a_section_of_its_own_settings() -> None:
    assert {x.name: x.settings_class for x in ALGORITHMS.values()} == ALGORITHM_SETTINGS
    for name, section in ALGORITHM_SETTINGS.items():
        assert ToyTrainSettings.model_fields[name].annotation is section


def test_it_trains_and_its_own_counters_are_logged(tiny: TinyInputs) -> None:
    report = run(tiny, run={"epochs": 8})

    first, *_, last = read_metrics(tiny.save_path, "val")
    assert last["loss_0"] == last["loss"] < 0.9 * first["loss"]
    assert 0.0 < first["hit_rate_0"] <= last["hit_rate_0"] <= 1.0
    assert 1 / 19 < last["mean_confidence_0"] < 1.0
    # It counts no acceptance rate, so the best epoch is the one of the lowest loss.
    assert last["acceptance_length"] is None
    losses = [line["loss"] for line in read_metrics(tiny.save_path, "val")]
    assert report.best_epoch == losses.index(min(losses))
    assert report.validation_loss == last["loss"]


def test_a_run_cut_at_any_step_ends_in_the_same_bits(tiny: TinyInputs, tmp_path: Path) -> None:
    assert_cuts_change_nothing(partial(run, tiny), tmp_path, lambda total: range(1, total, 2))


def test_a_checkpoint_is_resumed_by_its_own_algorithm_only(tiny: TinyInputs) -> None:
    run(tiny, run={"max_steps": 1})

    with pytest.raises(
        CheckpointError, match="`--algorithm` is `eagle3`, the run began with `toy`"
    ):
        train(tiny.settings(ToyTrainSettings), progress=QUIET)


def test_a_checkpoint_is_read_back_and_trained_further(tiny: TinyInputs, tmp_path: Path) -> None:
    report = run(tiny)

    draft = read_draft(str(report.checkpoint), Overrides(), flag="CHECKPOINT")
    further = run(
        tiny,
        draft={"from_checkpoint": str(report.checkpoint)},
        run={"save_path": tmp_path / "further", "epochs": 1},
    )

    assert isinstance(draft.config, ToyConfig)
    assert draft.config.target_layer_ids == report.target_layer_ids
    assert draft.weights["fc.weight"].shape == (HIDDEN, 4 * HIDDEN)
    assert (
        draft.compute_probe_logits(load_embedding(VerifierFiles(str(tiny.verifier_dir))))
        .isfinite()
        .all()
    )
    assert further.validation_loss is not None
    assert report.validation_loss is not None
    assert further.validation_loss < report.validation_loss


def test_a_run_is_planned_over_its_own_positions(tiny: TinyInputs) -> None:
    found = plan(toy_settings(tiny), num_ranks=None, progress=QUIET)

    samples = read_folders(
        [tiny.data_dir], version=1, index_file=None, max_bad_samples=0, progress=QUIET
    )
    assert found.num_samples + found.num_validation_samples == len(samples)
    report = run(tiny)
    assert found.total_steps == report.total_steps
    # Two tokens of each sample have no position.
    lines = read_metrics(tiny.save_path, "train")
    assert sum(line["tokens_per_second"] > 0 for line in lines) == len(lines)
    checkpoint = read_draft(str(report.checkpoint), Overrides(), flag="CHECKPOINT")
    assert found.num_parameters == sum(x.numel() for x in checkpoint.weights.values())
    flops = 6 * found.num_parameters * found.tokens_per_epoch / found.steps_per_epoch
    assert found.useful_tflop_per_step == pytest.approx(flops / 1e12)


def test_its_training_step_is_timed(tiny: TinyInputs) -> None:
    class ToyBenchSettings(BenchSettings):
        toy: ToySettings = Field(default_factory=ToySettings, title="Toy")

    settings = ToyBenchSettings.model_validate(
        {
            "shape": {
                "verifier_name_or_path": str(tiny.verifier_dir),
                "algorithm": "toy",
                "draft_vocab_size": 19,
            },
            "step": {"total_seq_len": 100, "supervised_fraction": 0.5, "device": "cpu"},
            "measure": {"steps": 2, "warmup_steps": 1},
        }
    )

    report = bench(settings, progress=QUIET)

    assert report.kernels == "plain"
    assert report.ttt_steps == 1
    assert report.supervised_fraction == pytest.approx(0.5, abs=0.05)
    # Random states: the draft is as far from the verifier as it begins.
    assert 0.0 < report.loss < 1.0


def test_drafting_predicts_what_training_predicted(tiny: TinyInputs) -> None:
    """Each token of a sample is fed to the drafter by itself; training scores all at once."""
    report = run(tiny)
    draft = read_draft(str(report.checkpoint), Overrides(), flag="CHECKPOINT")
    files = VerifierFiles(str(tiny.verifier_dir))
    verifier = load_frozen_verifier(files, read_verifier_config(files, trust_remote_code=False))
    assert isinstance(draft.config, ToyConfig)
    training = Toy().build(
        draft.config, verifier, draft.vocab_map, ToySettings(), use_fast_kernels=False, seed=0
    )
    training.load_state_dict(dict(draft.weights))
    samples = read_folders(
        [tiny.data_dir],
        version=1,
        index_file=None,
        max_bad_samples=0,
        alignment=Toy.alignment,
        progress=QUIET,
    )
    sample = samples.read(0)
    batch = collate(
        [0],
        [sample],
        total_seq_len=64,
        num_aux_layers=3,
        hidden_size=HIDDEN,
        dtype=torch.float32,
        alignment=Toy.alignment,
    )
    drafter = draft.build_drafter(verifier.embedding, num_draft_tokens=1)

    aux = torch.cat([states[:] for states in sample.aux_hidden_states], dim=-1)
    drafter.start(1, sample.num_tokens)
    chains = []
    for p in range(sample.num_tokens - 1):
        tokens, row = sample.input_ids[None, p + 1 : p + 2], 0 if p == 0 else None
        drafter.read(Verified(tokens, aux[None, p : p + 1], [p], [1], row))
        chains.append(drafter.propose())

    expected = draft.vocab_map.kept_ids[training.logits(batch).argmax(-1)]
    assert batch.lengths == (sample.num_tokens - 2,)
    # The first position waits for a second token.
    drafted = torch.cat(chains[1:])[:, 0]
    assert len(drafted) == sample.num_tokens - 2
    assert drafted[batch.targets].tolist() == expected.tolist()


def test_it_drafts_and_the_answers_are_the_verifiers(tmp_path: Path) -> None:
    verifier = load_verifier(VerifierFiles(str(VERIFIER_DIR)), (2, 4, 5), dtype=torch.float32)
    prompts = [Prompt(verifier.encode(text), 0) for text in read_prompts()[:8]]
    generate_samples(tmp_path / "data", read_prompts()[:8], max_new_tokens=24)
    settings = ToyTrainSettings.model_validate(
        {
            "draft": {
                "verifier_name_or_path": str(VERIFIER_DIR),
                "full_vocab": True,
                "algorithm": "toy",
            },
            "data": {"data_path": (tmp_path / "data",), "total_seq_len": 512},
            "run": {"save_path": tmp_path / "checkpoints", "epochs": 12},
            "optimizer": {"lr": 3e-3},
            "distributed": {"device": "cpu"},
        }
    )
    report = train(settings, progress=QUIET)
    draft = read_draft(str(report.checkpoint), Overrides(), flag="CHECKPOINT")
    drafter = draft.build_drafter(verifier.embedding, num_draft_tokens=1)
    work = Work(prompts, Sampling(24), batch_size=3)

    own = answer_alone(verifier, work, QUIET).answers
    found = measure(verifier, drafter, work, own, progress=QUIET)

    assert found.is_lossless
    assert found.num_draft_tokens == 1
    assert 1.2 < found.acceptance_length <= 2.0


def test_the_page_shows_the_code_that_is_tested() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    source = SOURCE.read_text("utf-8")

    assert len(blocks) > 8
    assert [block for block in blocks if block.strip() not in source] == []
    for name in re.findall(r"^(?:class|def) (\w+)", source, re.MULTILINE):
        assert f" {name}" in "".join(blocks), f"the page shows `{name}`"
