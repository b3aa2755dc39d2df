"""`speculators train` as the user types it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.data.folder import SampleFolder
from speculators_cli.core.data.formats import FORMATS, v1
from speculators_cli.core.data.sample import Sample
from tests.chat_verifier import write_rows, write_word_verifier
from tests.fork_server import ForkServer
from tests.generated_samples import sample_files
from tests.tiny_run import TinyInputs, write_as_specforge

Capture = pytest.CaptureFixture[str]

FIXED = {
    "--verifier-name-or-path": "required",
    "--data-path": "default: data",
    "--save-path": "default: checkpoints",
    "--epochs": "default: 20",
    "--lr": "default: 0.0001",
    "--logger": "default: none",
    "--total-seq-len": "default: 8192",
    "--data-format-version": "default: 1",
    "--log-dir": "default: logs",
    "--num-layers": "default: 1",
    "--d2t-path": "default: d2t.npy",
    "--t2d-path": "default: t2d.npy",
    "--ttt-steps": "default: 3",
    "--ttt-step-loss-decay": "default: 1.0",
}


def fails(argv: list[str], capture: Capture) -> tuple[int, str]:
    """Exit code and stderr of a command line that must write nothing on stdout."""
    capture.readouterr()
    code = run(["train", *argv])
    out, err = capture.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err


@pytest.mark.parametrize("flag", [*FIXED, "--run-name", "--no-resume-from-checkpoint"])
def test_the_fixed_interface_keeps_its_flags_and_defaults(flag: str) -> None:
    from speculators_cli.cli.setting_flags import show_default
    from speculators_cli.settings.base import setting_fields
    from speculators_cli.settings.train import TrainSettings

    by_flag = {field.flag: field for field in setting_fields(TrainSettings)}
    field = by_flag[flag.replace("--no-", "--")]

    assert (
        show_default(field.info)
        == {**FIXED, "--run-name": "", "--no-resume-from-checkpoint": "default: on"}[flag]
    )


def test_json_is_all_that_stdout_holds(tiny: TinyInputs, capsys: Capture) -> None:
    code = run(["train", *tiny.flags(epochs=1, json=True)])

    out, err = capsys.readouterr()
    report = json.loads(out)
    assert code == 0
    assert (report["schema_version"], report["command"]) == (1, "train")
    assert report["step"] == report["total_steps"] > 0
    assert report["acceptance_length"] >= 1
    assert "Training eagle3" in err
    assert "\x1b" not in err


def test_a_finished_run_hints_at_more_epochs(tiny: TinyInputs, capsys: Capture) -> None:
    run(["train", *tiny.flags(epochs=1)])
    capsys.readouterr()

    code = run(["train", *tiny.flags(epochs=1)])

    assert code == 0
    hint = "hint: Raise `--epochs` to train further: the run was already finished"
    assert hint in capsys.readouterr().err


def test_waiting_for_samples_is_warned_of(
    tiny: TinyInputs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speculators_cli.core.training.run_log.WATCHED_SECONDS", 0.05)
    read = SampleFolder.read

    def read_slowly(dataset: SampleFolder, sample_id: int) -> Sample:
        time.sleep(0.1)
        return read(dataset, sample_id)

    monkeypatch.setattr(SampleFolder, "read", read_slowly)

    assert run(["train", *tiny.flags(num_workers=0, log_every_steps=1, max_steps=4)]) == 0

    _, err = capsys.readouterr()
    assert err.count("was spent waiting for data") == 1
    assert "--num-workers" in err


def test_all_settings_errors_are_shown_at_once(tiny: TinyInputs, capsys: Capture) -> None:
    flags = tiny.flags(total_seq_len=0, lr=-1, logger="foo", epochs="many")

    code, err = fails(flags, capsys)

    assert code == 2
    assert "4 settings cannot be used" in err
    for flag in ("--total-seq-len", "--lr", "--logger", "--epochs"):
        assert f"`{flag}`" in err
    assert "got `foo`" in err
    assert not tiny.save_path.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--full-attention-layers", "0"], "has no effect without `--sliding-window`"),
        (["--sliding-window", "8", "--full-attention-layers", "2"], "the layers 0 to 1, not all"),
        (["--sliding-window", "8", "--full-attention-layers", "0,1"], "the layers 0 to 1, not all"),
        (["--sliding-window", "-1"], "--sliding-window"),
    ],
)
def test_windows_that_no_layer_has_are_refused(
    tiny: TinyInputs, capsys: Capture, flags: list[str], message: str
) -> None:
    assert run(["train", *tiny.flags(num_layers=2), *flags]) == 2

    assert message in " ".join(capsys.readouterr().err.split())
    assert not tiny.save_path.exists()


def test_a_run_is_not_resumed_with_another_window(tiny: TinyInputs, capsys: Capture) -> None:
    assert run(["train", *tiny.flags(sliding_window=8, max_steps=1)]) == 0

    assert run(["train", *tiny.flags(sliding_window=9, max_steps=2)]) == 4

    assert "`--sliding-window` is `9`, the run began with `8`" in capsys.readouterr().err


def test_an_unknown_key_in_the_settings_file_gets_a_suggestion(
    tiny: TinyInputs, capsys: Capture
) -> None:
    file = tiny.folder / "run.toml"
    file.write_bytes(b"\xef\xbb\xbf[data]\r\ntotl_seq_len = 64\r\n")

    code, err = fails(tiny.flags(config=file), capsys)

    assert code == 2
    assert "`data.totl_seq_len`" in err
    assert "Did you mean `data.total_seq_len`?" in err


@pytest.mark.parametrize("suffix", ["toml", "yaml", "json"])
def test_flags_win_over_the_settings_file(tiny: TinyInputs, suffix: str) -> None:
    file = tiny.folder / f"run.{suffix}"
    texts = {
        "toml": "[run]\nepochs = 7\nseed = 5\n",
        "yaml": "run:\n  epochs: 7\n  seed: 5\n",
        "json": '{"run": {"epochs": 7, "seed": 5}}',
    }
    file.write_text(texts[suffix])

    run(["train", *tiny.flags(epochs=1, config=file)])

    saved = json.loads((tiny.save_path / "settings.json").read_text())
    assert (saved["run"]["epochs"], saved["run"]["seed"]) == (1, 5)


def test_missing_maps_hint_at_how_to_make_them(tiny: TinyInputs, capsys: Capture) -> None:
    code, err = fails(tiny.flags(d2t_path=tiny.folder / "no.npy"), capsys)

    assert code == 2
    assert "no.npy" in err
    assert "build-vocab-map" in err
    assert "--full-vocab" in err


def test_maps_that_disagree_are_refused(tiny: TinyInputs, capsys: Capture) -> None:
    import numpy as np

    other = tiny.folder / "other.npy"
    np.save(other, np.ones(37, dtype=bool))

    code, err = fails(tiny.flags(t2d_path=other), capsys)

    assert code == 2
    assert "do not keep the same tokens" in err


def test_maps_of_another_verifier_are_refused(tiny: TinyInputs, capsys: Capture) -> None:
    import numpy as np

    t2d = np.load(tiny.folder / "t2d.npy")
    other = tiny.folder / "longer.npy"
    np.save(other, np.concatenate([t2d, [False]]))

    code, err = fails(tiny.flags(t2d_path=other), capsys)

    assert code == 2
    assert "covers 38 tokens, the verifier has 37" in err


def test_a_missing_data_path_is_a_settings_error(tiny: TinyInputs, capsys: Capture) -> None:
    code, err = fails(tiny.flags(data_path=tiny.folder / "nowhere"), capsys)

    assert code == 2
    assert "nowhere` does not exist" in err


def test_an_empty_data_path_is_a_data_error(tiny: TinyInputs, capsys: Capture) -> None:
    empty = tiny.folder / "empty"
    empty.mkdir()

    code, err = fails(tiny.flags(data_path=empty), capsys)

    assert code == 3
    assert "holds no samples" in err
    assert not tiny.save_path.exists()


def test_the_wrong_format_version_names_both(tiny: TinyInputs, capsys: Capture) -> None:
    code, err = fails(tiny.flags(data_format_version=0), capsys)

    assert code == 3
    assert "holds v1 samples, which were read as v0" in err
    assert "Pass `--data-format-version 1`" in err


def test_a_few_broken_files_are_left_out_and_named(tiny: TinyInputs, capsys: Capture) -> None:
    data = tiny.folder / "more"
    data.mkdir()
    for file in sorted(tiny.data_dir.iterdir()):
        (data / file.name).symlink_to(file)
    (data / "empty.pt").touch()
    (data / "token_freq.pt").touch()
    os.mkfifo(data / "pipe.pt")

    code = run(["train", *tiny.flags(data_path=data, epochs=1)])

    err = capsys.readouterr().err
    assert code == 0
    assert "Skipped 1 sample that" in err
    assert "empty.pt` is empty (0 bytes)" in err


def test_many_broken_files_are_an_error(tiny: TinyInputs, capsys: Capture) -> None:
    data = tiny.folder / "broken"
    data.mkdir()
    for index, file in enumerate(sorted(tiny.data_dir.iterdir())):
        content = file.read_bytes()
        (data / file.name).write_bytes(content[: len(content) // 2] if index % 2 else content)

    code, err = fails(tiny.flags(data_path=data), capsys)

    assert code == 3
    assert "12 of 24 samples cannot be used" in err
    assert "--max-bad-samples 12" in err
    assert not tiny.save_path.exists()


def test_foreign_samples_are_refused(tiny: TinyInputs, capsys: Capture) -> None:
    data = tiny.folder / "foreign"
    data.mkdir()
    torch.save({"weights": torch.zeros(3)}, data / "model.pt")

    code, err = fails(tiny.flags(data_path=data), capsys)

    assert code == 3
    assert "has no `input_ids`; found `weights`" in err


def test_a_pickle_with_code_is_not_run(tiny: TinyInputs, capsys: Capture) -> None:
    marker = tiny.folder / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(marker),))

    data = tiny.folder / "hostile"
    data.mkdir()
    torch.save({"input_ids": Hostile()}, data / "0.pt")

    code, _ = fails(tiny.flags(data_path=data), capsys)

    assert code == 3
    assert not marker.exists()


def test_a_missing_verifier_folder_is_a_settings_error(tiny: TinyInputs, capsys: Capture) -> None:
    code, err = fails(tiny.flags(verifier_name_or_path="./nowhere"), capsys)

    assert code == 2
    assert "the folder `./nowhere` does not exist" in err


def test_an_unreachable_hub_is_named(
    tiny: TinyInputs, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    code, err = fails(tiny.flags(verifier_name_or_path="someone/some-verifier"), capsys)

    assert code == 5
    assert "`someone/some-verifier` is not a local folder" in err


def test_a_save_path_that_is_a_file_is_refused(tiny: TinyInputs, capsys: Capture) -> None:
    tiny.save_path.touch()

    code, err = fails(tiny.flags(), capsys)

    assert code == 2
    assert "is not a folder" in err


def test_foreign_checkpoints_in_the_save_path_are_left_alone(
    tiny: TinyInputs, capsys: Capture
) -> None:
    foreign = tiny.save_path / "0"
    foreign.mkdir(parents=True)
    (foreign / "config.json").write_text("{}")

    for flags in (tiny.flags(), tiny.flags(no_resume_from_checkpoint=True)):
        code, err = fails(flags, capsys)
        assert code == 4
        assert "was not written by" in err

    assert (foreign / "config.json").read_text() == "{}"


def test_two_ranks_train(fork_server: ForkServer, tiny: TinyInputs) -> None:
    flags = tiny.flags(epochs=1, json=True, nproc_per_node=2)

    done = fork_server.run("speculators_cli", "train", *flags)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total_steps"] > 0
    state = json.loads((tiny.save_path / "0" / "trainer" / "state.json").read_text())
    assert (state["num_ranks"], state["global_batch"]) == (2, 2)


def test_more_ranks_than_packed_sequences_are_refused(
    fork_server: ForkServer, tiny: TinyInputs
) -> None:
    flags = tiny.flags(total_seq_len=4096)

    done = fork_server.run("speculators_cli", "train", *flags, num_ranks=2)

    assert done.returncode == 3, done.stderr
    assert "2 ranks need as many packed sequences" in done.stderr
    assert not tiny.save_path.exists()


def write_twins(tiny: TinyInputs) -> tuple[Path, Path]:
    """The tiny samples as v0 and as SpecForge's; what is before the final norm counts as after."""
    v0 = tiny.folder / "v0"
    v0.mkdir()
    for file in tiny.data_dir.glob("*.pt"):
        sample = torch.load(file, weights_only=True)
        *aux, last = sample.pop("hidden_states")
        joined = torch.cat(aux, dim=-1)
        torch.save(sample | {"hidden_state": joined, "target": last}, v0 / f"{file.stem}.ckpt")
    specforge = write_as_specforge(tiny.data_dir, tiny.folder / "specforge")
    return v0, specforge


@pytest.mark.parametrize("data_format", ["auto", "specforge"])
def test_specforge_samples_train_to_the_loss_of_their_v0_twins(
    tiny: TinyInputs, capsys: Capture, data_format: str
) -> None:
    v0, specforge = write_twins(tiny)
    one, two = tiny.folder / "one", tiny.folder / "two"

    run(["train", *tiny.flags(data_path=v0, data_format_version=0, save_path=one)])
    capsys.readouterr()
    flags = tiny.flags(data_path=specforge, data_format=data_format, save_path=two)
    code = run(["train", *flags])

    # Their generators captured other layers.
    assert "assumed `2,4,6`" in capsys.readouterr().err
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    losses = [[json.loads(line)["loss"] for line in part] for part in lines]
    assert code == 0
    assert losses[0] == losses[1]
    assert len(losses[0]) > 4


def test_v0_samples_read_as_specforges_are_refused(tiny: TinyInputs, capsys: Capture) -> None:
    v0, _ = write_twins(tiny)

    code, err = fails(tiny.flags(data_path=v0, data_format="specforge"), capsys)

    assert code == 3
    assert "holds v0 samples, which were read as specforge" in err
    assert "`--data-format pt --data-format-version 0`" in err


UPSTREAM = Path(__file__).parents[1] / "oracle" / "upstream-0.9.0-data"


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_upstreams_samples_train_to_the_loss_of_their_v1_twins(
    tiny: TinyInputs, capsys: Capture, name: str
) -> None:
    twins, one, two = (tiny.folder / part for part in ("twins", "one", "two"))
    twins.mkdir()
    for file in sorted((UPSTREAM / name / "hidden_states").iterdir()):
        sample = FORMATS["speculators"].read_sample(file)
        v1.write_sample(sample, twins / f"{file.stem}.pt")

    run(["train", *tiny.flags(data_path=twins, save_path=one)])
    capsys.readouterr()
    code = run(["train", *tiny.flags(data_path=UPSTREAM / name, save_path=two)])

    # vLLM captures other layers than the generators of `.pt` files did.
    assert "assumed `2,4,6`" in capsys.readouterr().err
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)]
    losses = [[json.loads(line)["loss"] for line in part] for part in lines]
    assert code == 0
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 4


def test_a_folder_of_several_formats_asks_for_one(tiny: TinyInputs, capsys: Capture) -> None:
    mixed = tiny.folder / "mixed"
    shutil.copytree(UPSTREAM / "bf16", mixed)
    for file in tiny.data_dir.glob("*.pt"):
        shutil.copy(file, mixed)

    code, err = fails(tiny.flags(data_path=mixed), capsys)

    assert code == 3
    assert "are of several formats: `.pt`, `.safetensors`" in err
    assert run(["train", *tiny.flags(data_path=mixed, data_format="pt", epochs=1)]) == 0


def with_wrong_states(source: Path, target: Path, *, shift: int = 0) -> Path:
    """The samples of a folder with their last hidden states marked, or moved, wrongly."""
    target.mkdir()
    for file in sample_files(source):
        sample = torch.load(file, weights_only=True)
        sample["last_hidden_state_is_normed"] = torch.tensor(not shift)
        sample["hidden_states"][-1] = sample["hidden_states"][-1].roll(shift, 0)
        torch.save(sample, target / file.name)
    return target


def check_flags(tiny: TinyInputs, verifier_dir: Path, folder: Path, **more: object) -> list[str]:
    flags = {"target_layer_ids": "2,4,5", "full_vocab": True, "epochs": 1} | more
    return tiny.flags(verifier_name_or_path=verifier_dir, data_path=folder, **flags)


def test_states_marked_wrongly_as_normed_are_refused_before_the_first_step(
    tiny: TinyInputs, captured_dir: Path, verifier_dir: Path, capsys: Capture
) -> None:
    # Trap: 25 % against 40 % acceptance.
    folder = with_wrong_states(captured_dir, tiny.folder / "marked")

    code, err = fails(check_flags(tiny, verifier_dir, folder), capsys)

    assert code == 3
    assert "has last hidden states marked as after the final norm: top-1 accuracy" in err
    assert "--no-check-samples" in err
    assert "step 1/" not in err


def test_states_marked_wrongly_are_trained_on_where_that_is_asked_for(
    tiny: TinyInputs, captured_dir: Path, verifier_dir: Path
) -> None:
    folder = with_wrong_states(captured_dir, tiny.folder / "marked")

    assert run(["train", *check_flags(tiny, verifier_dir, folder, no_check_samples=True)]) == 0


def test_samples_that_the_verifier_does_not_predict_are_warned_of(
    tiny: TinyInputs, captured_dir: Path, verifier_dir: Path, capsys: Capture
) -> None:
    folder = with_wrong_states(captured_dir, tiny.folder / "shifted", shift=7)

    code = run(["train", *check_flags(tiny, verifier_dir, folder)])

    assert code == 0
    assert "does not match this verifier, or is misaligned" in capsys.readouterr().err


def test_samples_that_the_verifier_predicts_give_no_warning(
    tiny: TinyInputs, captured_dir: Path, verifier_dir: Path, capsys: Capture
) -> None:
    code = run(["train", *check_flags(tiny, verifier_dir, captured_dir)])

    err = capsys.readouterr().err
    assert code == 0
    assert "final norm" not in err
    assert "shifted" not in err


def test_the_evaluation_on_prompts_is_shown_logged_and_recorded(
    tiny: TinyInputs, tmp_path: Path, capsys: Capture
) -> None:
    verifier = write_word_verifier(tmp_path / "worded")
    rows = [{"prompt": "w5 w9 w11"}, {"prompt": "w6 w7"}]
    given = {
        "verifier_name_or_path": verifier,
        "evaluate_prompts": write_rows(tmp_path / "prompts.jsonl", rows),
        "evaluate_max_new_tokens": 8,
        "early_stopping_patience": 5,
    }

    code = run(["train", *tiny.flags(**given)])

    out, err = capsys.readouterr()
    result = json.loads((tiny.save_path / "result.json").read_text())
    length = result["evaluated_acceptance_length"]
    assert code == 0
    assert 1.0 <= length <= result["best_evaluated_acceptance_length"]
    assert "evaluated acceptance length" in out
    assert f"evaluated {length:.2f}" in err
    assert result["is_stopped_early"] is False


def test_the_hint_of_a_run_that_was_stopped_early_names_its_flag(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(
        "speculators_cli.core.training.trainer.Trainer.validate",
        lambda _: {"loss": 2.0, "acceptance_length": 1.0},
    )
    line = ["train", *tiny.flags(epochs=5, early_stopping_patience=1)]
    assert run(line) == 0
    capsys.readouterr()

    assert run(line) == 0

    assert "Raise `--early-stopping-patience`" in capsys.readouterr().err
