"""train() from samples to checkpoints."""

import json
import math
import shutil
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speculators_cli.core.data import packing
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.errors import CheckpointError, DataError, DivergedError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.build import build_loader
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.metrics import Metrics
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.core.training.trainer import Trainer
from tests.recorded_progress import RecordedProgress
from tests.run_files import read_metrics
from tests.tiny_run import DRAFT_VOCAB, HIDDEN, LAYER_IDS, VOCAB, TinyInputs


def run(tiny: TinyInputs, **changes: Any) -> TrainReport:
    return train(tiny.settings(**changes), progress=SilentProgress())


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 2
    return {f"{f.name}:{name}": x for f in files for name, x in load_file(f).items()}


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = all_tensors(one), all_tensors(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_training_lowers_the_loss_and_raises_the_acceptance(tiny: TinyInputs) -> None:
    report = run(tiny, run={"epochs": 8})

    val = read_metrics(tiny.save_path, "val")
    assert len(val) == 8
    assert val[-1]["loss"] < 0.9 * val[0]["loss"]
    assert report.step == report.total_steps
    assert report.validation_loss == val[-1]["loss"]
    assert report.acceptance_length == val[-1]["acceptance_length"]


def test_each_epoch_leaves_a_checkpoint_in_the_speculators_format(trained_once: Path) -> None:
    for epoch in (0, 1):
        folder = trained_once / str(epoch)
        assert [f.name for f in folder.glob("*.safetensors")] == ["model.safetensors"]
        tensors = load_file(folder / "model.safetensors")
        layer = "layers.0."
        assert set(tensors) == {
            "d2t", "t2d", "embed_tokens.weight", "fc.weight", "lm_head.weight", "norm.weight",
            *(f"{layer}{norm}.weight" for norm in
              ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
            *(f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"),
            *(f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        }  # fmt: skip
        assert tensors["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
        assert tensors["layers.0.self_attn.q_proj.weight"].shape == (48, 2 * HIDDEN)
        assert tensors["lm_head.weight"].shape == (DRAFT_VOCAB, HIDDEN)
        assert tensors["d2t"].dtype == torch.int64
        assert tensors["t2d"].sum() == DRAFT_VOCAB
        config = json.loads((folder / "config.json").read_text())
        assert config["speculators_model_type"] == "eagle3"
        assert config["eagle_aux_hidden_state_layer_ids"] == list(LAYER_IDS)
        assert config["norm_before_residual"] is True
        assert config["transformer_layer_config"]["rope_parameters"]["rope_theta"] == 50000.0
        assert config["transformer_layer_config"]["vocab_size"] == VOCAB
        assert config["producer"]["name"] == "speculators-cli"


def test_the_verifier_does_not_move_and_the_head_does(trained: TinyInputs) -> None:
    # Trap: a head that is silently frozen.
    verifier = load_file(trained.verifier_dir / "model.safetensors")
    draft = load_file(trained.save_path / "1" / "model.safetensors")
    kept = torch.arange(0, VOCAB, 2)
    assert torch.equal(draft["embed_tokens.weight"], verifier["model.embed_tokens.weight"])
    assert not torch.equal(draft["lm_head.weight"], verifier["lm_head.weight"][kept])
    assert (draft["norm.weight"] != 1.0).any()


def test_a_frozen_head_stays_the_verifiers(tiny: TinyInputs) -> None:
    run(tiny, eagle3={"train_head": False})

    verifier = load_file(tiny.verifier_dir / "model.safetensors")
    draft = load_file(tiny.save_path / "1" / "model.safetensors")
    assert torch.equal(draft["lm_head.weight"], verifier["lm_head.weight"][::2])


def test_a_full_vocabulary_writes_no_maps(tiny: TinyInputs) -> None:
    run(tiny, draft={"full_vocab": True}, run={"epochs": 1})

    draft = load_file(tiny.save_path / "0" / "model.safetensors")
    assert draft["lm_head.weight"].shape == (VOCAB, HIDDEN)
    assert not {"d2t", "t2d"} & set(draft)


def test_metrics_lines_hold_every_documented_key(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 1})

    per_step = ("loss", "full_acc", "cond_acc", "acceptance_rate")
    shared = {"step", "epoch", "split", "loss", "acceptance_length", "supervised_fraction"}
    shared |= {f"{name}_{k}" for name in per_step for k in range(3)}
    (val,) = read_metrics(tiny.save_path, "val")
    assert shared <= set(val)
    for line in read_metrics(tiny.save_path, "train"):
        assert shared | {"lr", "grad_norm", "tokens_per_second"} <= set(line)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_resuming_in_mid_epoch_equals_going_on(tiny: TinyInputs, arch: str, tmp_path: Path) -> None:
    layers = {"draft_arch": arch, "num_layers": 2}
    whole, halves = tmp_path / "whole", tmp_path / "halves"

    run(tiny, draft=layers, run={"save_path": whole}, schedule={"scheduler": "none"})
    first = run(
        tiny,
        draft=layers,
        schedule={"scheduler": "none"},
        run={"save_path": halves, "max_steps": 3},
    )
    second = run(tiny, draft=layers, run={"save_path": halves}, schedule={"scheduler": "none"})

    assert (halves / "step-3").is_dir()
    assert (first.is_resumed, second.is_resumed) == (False, True)
    assert_same_bits(whole / "1", halves / "1")


def test_resuming_after_an_epoch_equals_going_on(tiny: TinyInputs, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flat = {"scheduler": "none"}

    run(tiny, run={"save_path": whole, "epochs": 3}, schedule=flat)
    run(tiny, run={"save_path": halves, "epochs": 1}, schedule=flat)
    messages = RecordedProgress()
    settings = tiny.settings(run={"save_path": halves, "epochs": 3}, schedule=flat)
    train(settings, progress=messages)

    assert_same_bits(whole / "2", halves / "2")
    assert any("Resuming from" in line for line in messages.infos)
    assert any("epochs" in line for line in messages.warnings)


def test_running_a_finished_run_again_changes_nothing(trained: TinyInputs) -> None:
    before = all_tensors(trained.save_path / "1")

    report = run(trained)

    assert report.was_already_finished
    after = all_tensors(trained.save_path / "1")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_starting_over_replaces_the_old_run(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 3})

    report = run(tiny, run={"epochs": 1, "resume_from_checkpoint": False, "seed": 1})

    assert not report.is_resumed
    assert not (tiny.save_path / "2").exists()
    assert {line["epoch"] for line in read_metrics(tiny.save_path, "val")} == {0}


def test_another_shape_is_refused_on_resume(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 1})

    with pytest.raises(CheckpointError, match=r"num-layers.*2.*1"):
        run(tiny, draft={"num_layers": 2})


def test_changed_samples_are_refused_on_resume(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 1})
    data = tiny.data_dir.resolve()
    tiny.data_dir.unlink()
    tiny.data_dir.mkdir()
    for file in sorted(data.iterdir())[1:]:
        (tiny.data_dir / file.name).symlink_to(file)

    with pytest.raises(DataError, match="not the ones") as error:
        run(tiny)
    report = run(tiny, data={"allow_changed_data": True})

    assert "--allow-changed-data" in str(error.value.hint)
    assert report.is_resumed


def pack_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda ids, *given: pack(ids[::-1], *given))


def test_another_packing_of_the_epoch_is_refused_on_resume(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap: the rest of the epoch has samples that its first steps had.
    run(tiny, run={"max_steps": 4})
    pack_backwards(monkeypatch)
    messages = RecordedProgress()

    with pytest.raises(CheckpointError, match="after its step 4, would repeat") as error:
        run(tiny)
    train(tiny.settings(data={"allow_changed_data": True}), progress=messages)

    assert "--allow-changed-data" in str(error.value.hint)
    assert any("packed in another order" in line for line in messages.warnings)


def test_another_packing_of_later_epochs_is_warned_of(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny, run={"epochs": 1})
    pack_backwards(monkeypatch)
    messages = RecordedProgress()

    train(tiny.settings(), progress=messages)

    assert any("packed in another order" in line for line in messages.warnings)
    assert run(tiny, run={"epochs": 3}).is_resumed


def test_a_dry_run_writes_nothing(tiny: TinyInputs, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    report = train(tiny.settings(), progress=SilentProgress(), dry_run=True)

    assert report.is_dry_run
    assert report.step == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tie_in_acceptance_goes_to_the_lower_loss(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Trainer.validate

    def validate_without_a_hit(trainer: Trainer) -> Metrics:
        return (validate(trainer) or {}) | {"acceptance_length": 1.0}

    monkeypatch.setattr(Trainer, "validate", validate_without_a_hit)

    report = run(tiny, run={"epochs": 3})

    losses = [line["loss"] for line in read_metrics(tiny.save_path, "val")]
    assert losses[2] < losses[0]
    assert report.best_epoch == losses.index(min(losses))


@pytest.mark.parametrize(
    ("loss", "message"),
    [(math.nan, "loss of epoch 1 is not finite"), (None, "of epoch 1 has no metrics")],
)
def test_a_validation_without_a_finite_loss_is_warned_of_and_never_the_best(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, loss: float | None, message: str
) -> None:
    validate = Trainer.validate

    def validate_badly(trainer: Trainer) -> Metrics:
        metrics = validate(trainer) or {}
        # The acceptance length alone would make the first epoch the best.
        return metrics | {"loss": loss, "acceptance_length": 3.9} if is_bad(trainer) else metrics

    def is_bad(trainer: Trainer) -> bool:
        return trainer.state.epoch in bad_epochs

    monkeypatch.setattr(Trainer, "validate", validate_badly)
    messages, best = RecordedProgress(), tiny.save_path / "checkpoint_best"

    bad_epochs = {0}
    first = train(tiny.settings(run={"epochs": 1}), progress=messages)
    is_linked_at_first = best.exists()
    run(tiny, run={"epochs": 2})
    bad_epochs = {2}
    last = run(tiny, run={"epochs": 3})

    assert any(message in warning for warning in messages.warnings)
    assert (first.best_epoch, first.validation_loss, is_linked_at_first) == (None, None, False)
    assert (last.best_epoch, best.readlink()) == (1, Path("1"))
    lines = (tiny.save_path / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert [line["loss"] is None for line in read_metrics(tiny.save_path, "val")] == [
        True,
        False,
        True,
    ]


def test_the_end_of_an_epoch_is_saved_once(tiny: TinyInputs) -> None:
    report = run(tiny, checkpoints={"checkpoint_every_steps": 3})

    assert report.total_steps == 18
    folders = {f.name for f in tiny.save_path.iterdir() if f.is_dir() and not f.is_symlink()}
    assert folders == {"step-3", "step-6", "0", "step-12", "step-15", "1"}


def test_saving_does_not_count_in_speed_or_waiting(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Trap: a clock set anew at a checkpoint, beside tokens of all steps since the last log line.
    step, save = Trainer.train_step, Trainer.save

    def slow_step(trainer: Trainer, *args: Any) -> None:
        time.sleep(0.1)
        step(trainer, *args)

    def slow_save(trainer: Trainer, name: str) -> None:
        time.sleep(0.3)
        save(trainer, name)

    monkeypatch.setattr(Trainer, "train_step", slow_step)
    monkeypatch.setattr(Trainer, "save", slow_save)

    report = run(
        tiny,
        run={"epochs": 1, "log_every_steps": 100},
        checkpoints={"checkpoint_every_steps": 3},
    )

    # Eight steps of at most 64 tokens, a tenth of a second and a bit each.
    assert 100 < report.tokens_per_second < 640


def test_a_broken_sample_is_counted_and_named_once(data_dir: Path, tiny: TinyInputs) -> None:
    messages = RecordedProgress()
    file = sorted(data_dir.rglob("*.pt"))[3]
    content = torch.load(file, weights_only=True)
    content["hidden_states"][0][2, 1] = float("nan")
    torch.save(content, file)
    settings = tiny.settings(
        data={"data_path": (data_dir,), "total_seq_len": 64, "train_data_ratio": 1.0},
        run={"epochs": 3, "save_path": tiny.save_path},
    )

    report = train(settings, progress=messages)

    assert report.num_bad_samples == 1
    assert sum("Skipped" in warning for warning in messages.warnings) == 1


def break_gradients(monkeypatch: pytest.MonkeyPatch, *, steps: set[int]) -> None:
    """Make a gradient NaN in these steps, counted from 1 over all runs."""
    step, calls = Optimizer.step, count(1)

    def step_broken(optimizer: Optimizer, lr: float) -> torch.Tensor:
        if next(calls) in steps:
            assert optimizer.parameters[0].grad is not None
            optimizer.parameters[0].grad.fill_(float("nan"))
        return step(optimizer, lr)

    monkeypatch.setattr(Optimizer, "step", step_broken)


def test_skipped_steps_are_counted_on_after_a_resume(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch, steps={2})

    first = run(tiny, run={"max_steps": 3})
    second = run(tiny, run={"max_steps": 5})

    assert first.num_skipped_steps == second.num_skipped_steps == 1


def test_a_run_that_diverged_between_log_lines_is_stopped(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_gradients(monkeypatch, steps={2, 3, 4})

    with pytest.raises(DivergedError, match="3 steps in a row"):
        run(tiny, run={"log_every_steps": 100}, optimizer={"max_skipped_steps": 3})


def test_no_logger_creates_no_log_folder(tiny: TinyInputs) -> None:
    run(tiny, run={"epochs": 1})

    assert not tiny.log_dir.exists()


def test_the_saved_settings_repeat_the_run(tiny: TinyInputs, tmp_path: Path) -> None:
    from speculators_cli.settings.loading import load_settings
    from speculators_cli.settings.train import TrainSettings

    run(tiny)
    saved = load_settings(TrainSettings, {}, tiny.save_path / "settings.json")
    again = saved.model_copy(
        update={"run": saved.run.model_copy(update={"save_path": tmp_path / "again"})}
    )
    train(again, progress=SilentProgress())

    assert_same_bits(tiny.save_path / "1", tmp_path / "again" / "1")


def test_samples_of_another_verifier_are_refused_before_anything_is_written(
    tiny: TinyInputs,
) -> None:
    tiny.data_dir.unlink()
    tiny.data_dir.mkdir()
    for index in range(4):
        sample = {
            "input_ids": torch.arange(9),
            "loss_mask": torch.ones(9),
            "hidden_states": [torch.randn(9, 16) for _ in range(4)],
        }
        torch.save(sample, tiny.data_dir / f"{index}.pt")

    with pytest.raises(DataError, match=r"hidden size 16.*24"):
        run(tiny)

    assert not tiny.save_path.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_thread_reads_on_once_training_has_ended(
    tiny: TinyInputs, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_readers() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name.startswith("reader")]

    def fail(*_: object) -> None:
        assert find_readers()
        raise error

    # An epoch is trained on and validated by then; the next one is being read.
    monkeypatch.setattr(Trainer, "save", fail)
    with pytest.raises(error):
        run(tiny)

    for reader in find_readers():
        reader.join(timeout=10)
    assert not find_readers()


def test_ranks_of_several_machines_share_the_samples(tiny: TinyInputs) -> None:
    # Trap: the local rank in the sampler, which gives each machine the same data.
    settings = tiny.settings(data={"num_workers": 0})
    samples = read_folders(
        [tiny.data_dir], version=1, index_file=None, max_bad_samples=0, progress=SilentProgress()
    )

    def read_by(rank: int) -> list[int]:
        ranks = Ranks(
            rank=rank,
            num_ranks=4,
            local_rank=rank % 2,
            num_local_ranks=2,
            device=torch.device("cpu"),
            store=None,
        )
        steps = build_loader(settings, samples, ranks, global_batch=4, is_validation=True).epoch(0)
        return [i for batches in steps for batch in batches for i in batch.sample_ids]

    read = [read_by(rank) for rank in range(4)]

    assert all(read)
    assert sorted(i for ids in read for i in ids) == list(range(len(samples)))


def rewrite(file: Path, **changes: Any) -> None:
    content = torch.load(file, weights_only=True)
    for key, change in changes.items():
        content[key] = change(content[key])
    torch.save(content, file)


def test_samples_captured_anew_are_noticed_on_resume(tiny: TinyInputs, data_dir: Path) -> None:
    # Trap: the same names and sizes.
    data = {"data_path": (data_dir,)}
    run(tiny, data=data, run={"epochs": 1})
    for file in data_dir.rglob("*.pt"):
        rewrite(file, hidden_states=lambda states: [x + 0.5 for x in states])

    with pytest.raises(DataError, match="names and sizes are the same, contents differ"):
        run(tiny, data=data)
    report = run(tiny, data=data | {"allow_changed_data": True})

    assert report.is_resumed
    run(tiny, data=data, run={"epochs": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "`RoPE rope_theta`"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}},
            "`RoPE rope_type` `default`, but the verifier's config.json has `linear`",
        ),
        (
            {"rms_norm_eps": 1e-3},
            "`rms_norm_eps` `1e-06`, but the verifier's config.json has `0.001`",
        ),
    ],
)
def test_layers_that_compute_otherwise_are_refused_on_resume(
    tiny: TinyInputs, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    # Trap: the same weights and shapes, and half the run with another RoPE.
    verifier = Path(shutil.copytree(tiny.verifier_dir, tmp_path / "own"))
    given: dict[str, Any] = {"draft": {"verifier_name_or_path": str(verifier)}}
    run(tiny, **given, run={"epochs": 1})
    content = json.loads((verifier / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps(content | changes))

    with pytest.raises(CheckpointError, match=message):
        run(tiny, **given)

    (verifier / "config.json").write_text(json.dumps(content))
    assert run(tiny, **given).is_resumed


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_other_weights_of_the_verifier_are_noticed_on_resume(
    tiny: TinyInputs, tmp_path: Path, name: str
) -> None:
    # Trap: the same folder, config and shapes; one value of one tensor differs.
    verifier = Path(shutil.copytree(tiny.verifier_dir, tmp_path / "own"))
    changes: dict[str, Any] = {
        "draft": {"verifier_name_or_path": str(verifier)},
        "data": {"check_samples": False},
    }
    run(tiny, **changes, run={"epochs": 1})
    tensors = load_file(verifier / "model.safetensors")
    tensors[name].view(-1)[-1] += 0.125
    save_file(tensors, verifier / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckpointError, match="weights of verifier"):
        run(tiny, **changes)
    report = run(tiny, draft=changes["draft"], data={"allow_changed_data": True})

    assert report.is_resumed
    assert run(tiny, **changes, run={"epochs": 3}).is_resumed
