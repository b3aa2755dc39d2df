"""Online capture: the verifier computes hidden states in the step, and nothing else changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from speculators_cli.core.capture.engines import Engines
from speculators_cli.core.capture.generated_folder import GeneratedFolder
from speculators_cli.core.capture.job import Job
from speculators_cli.core.capture.state_stage import StateStage
from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.engines.engine import CapturedStates, Packed
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.errors import CheckpointError, DataError, MachineError, SettingsError
from speculators_cli.core.models.verifier import read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.place import Place
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.generate_data import GenerateDataSettings
from tests.recorded_progress import RecordedProgress
from tests.run_files import read_metrics
from tests.tiny_run import LAYER_IDS, VOCAB, TinyInputs
from tests.token_files import make_rows, write_tokens

NUM_ROWS = 24


@pytest.fixture
def generated(tiny: TinyInputs) -> Path:
    """The output folder of `generate-data`: tokens in two shards, and samples of them."""
    folder = tiny.folder / "generated"
    write_tokens(folder / "tokens", make_rows(15), make_rows(NUM_ROWS - 15, first=15, seed=1))
    return folder


def store(generated: Path, tiny: TinyInputs) -> None:
    """Write the samples as the second stage of `generate-data` does."""
    settings = GenerateDataSettings.model_validate(
        {
            "input": {"prompts": "-", "output_dir": generated},
            "verifier": {"verifier_name_or_path": str(tiny.verifier_dir)},
            # Other sequences than those of training.
            "engine": {"capture_tokens": 256, "device": "cpu"},
        }
    )
    files = VerifierFiles(str(tiny.verifier_dir))
    job = Job(
        settings=settings,
        folder=GeneratedFolder(generated),
        files=files,
        config=read_verifier_config(files, trust_remote_code=False),
        tokenizer=None,
        end_ids=frozenset(),
        vocab_size=VOCAB,
        layer_ids=LAYER_IDS,
        device=torch.device("cpu"),
        dtype=torch.float32,
        place=Place(0, 1, 0, 1),
    )
    StateStage(job, Engines(job), SilentProgress()).run(range(2))
    write_data_config(generated, verifier=str(tiny.verifier_dir), layer_ids=LAYER_IDS)


def run(
    tiny: TinyInputs,
    data_path: Path,
    save_path: Path,
    *,
    progress: Any = None,
    data: dict[str, Any] | None = None,
    **changes: Any,
) -> TrainReport:
    given = {
        "draft": {"target_layer_ids": LAYER_IDS} | changes.pop("draft", {}),
        "data": {"data_path": (data_path,), "noise_std": 0.05} | (data or {}),
        "run": {"save_path": save_path} | changes.pop("run", {}),
        "schedule": {"scheduler": "none"},
    }
    settings = tiny.settings(**given, **changes)
    return train(settings, progress=progress or SilentProgress())


def weights(save_path: Path, name: str = "1") -> bytes:
    return (save_path / name / "model.safetensors").read_bytes()


def test_weights_equal_those_of_stored_samples_bit_for_bit(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    online = run(tiny, generated, tmp_path / "online")
    store(generated, tiny)

    stored = run(tiny, generated, tmp_path / "stored")

    assert weights(tmp_path / "online") == weights(tmp_path / "stored")
    start = load_file(tmp_path / "online" / "0" / "model.safetensors")["fc.weight"]
    end = load_file(tmp_path / "online" / "1" / "model.safetensors")["fc.weight"]
    assert (end - start).abs().max() > 1e-3
    assert online.validation_loss == stored.validation_loss
    assert stored.capture_share is None
    assert online.capture_share is not None
    assert 0 < online.capture_share < 1
    lines = read_metrics(tmp_path / "online", "train")
    assert all(0 < line["capture_share"] < 1 for line in lines)
    assert all("capture_share" not in line for line in read_metrics(tmp_path / "stored"))


def test_a_run_resumed_in_an_epoch_equals_an_unbroken_one(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    whole = run(tiny, generated, tmp_path / "whole")
    cut = run(tiny, generated, tmp_path / "cut", run={"max_steps": whole.total_steps // 2 + 1})

    resumed = run(tiny, generated, tmp_path / "cut")

    assert cut.step < whole.total_steps == resumed.step
    assert resumed.is_resumed
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_validation_tokens_may_stand_apart(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    others = write_tokens(tmp_path / "others", make_rows(5, seed=9))

    report = run(tiny, generated, tmp_path / "run", data={"val_data_path": (others,)})

    assert report.validation_loss is not None


def test_another_precision_is_refused_on_resume_and_other_versions_are_named(
    generated: Path, tiny: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_path = tmp_path / "run"
    run(tiny, generated, save_path, run={"max_steps": 2})

    with pytest.raises(CheckpointError, match="dtype: `float32` then, `bfloat16` now"):
        run(tiny, generated, save_path, capture={"capture_dtype": "bfloat16"})
    monkeypatch.setattr("torch.__version__", "0.0.1")
    progress = RecordedProgress()
    run(tiny, generated, save_path, progress=progress, run={"max_steps": 3})

    assert any("torch: " in text for text in progress.warnings), progress.warnings


def test_stored_samples_of_the_same_tokens_are_other_samples(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    run(tiny, generated, tmp_path / "run", run={"max_steps": 2})
    store(generated, tiny)

    with pytest.raises(DataError, match="The samples are not the ones"):
        run(tiny, generated, tmp_path / "run")


def change_states(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Packed, CapturedStates], None]
) -> None:
    """Let the engine compute other states."""
    real = TransformersEngine.capture

    def capture(engine: TransformersEngine, packed: Packed) -> CapturedStates:
        states = real(engine, packed)
        change(packed, states)
        return states

    monkeypatch.setattr(TransformersEngine, "capture", capture)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda _, s: s.aux[:, :24].zero_(), "layer 3 are zero"),
        (lambda _, s: s.aux[:, 24:48].copy_(s.aux[:1, 24:48].clone().expand(len(s.aux), -1)),
         "layer 5 are the same for all tokens"),
        (lambda _, s: s.aux[:, 48:].copy_(s.aux[:, :24]), "layers 3 and 7 are equal"),
        (lambda _, s: s.last.copy_(s.last.flip(1)), "predicts the verifier's own token"),
    ],
)  # fmt: skip
def test_wrong_states_end_the_run_before_its_first_step(
    generated: Path,
    tiny: TinyInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Packed, CapturedStates], None],
    problem: str,
) -> None:
    change_states(monkeypatch, change)

    with pytest.raises(MachineError, match=problem) as raised:
        run(tiny, generated, tmp_path / "run")

    assert "`--capture-engine`" in str(raised.value.hint)
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_verifier_whose_states_cannot_be_taken_needs_the_other_engine(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    verifier = tmp_path / "several-states"
    shutil.copytree(tiny.verifier_dir, verifier)
    config = json.loads((verifier / "config.json").read_text())
    (verifier / "config.json").write_text(json.dumps(config | {"altup_num_inputs": 2}))

    with pytest.raises(SettingsError, match="cannot be taken") as raised:
        run(tiny, generated, tmp_path / "run", draft={"verifier_name_or_path": str(verifier)})

    assert raised.value.hint == "Pass `--capture-engine vllm`"


def test_a_document_with_states_that_are_not_finite_is_left_out_and_counted(
    generated: Path, tiny: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned = make_rows(15)[4].input_ids[:6]

    def break_one(packed: Packed, states: CapturedStates) -> None:
        ids = packed.input_ids.unfold(0, 6, 1) if len(packed.input_ids) >= 6 else torch.empty(0, 6)
        found = (ids == torch.from_numpy(poisoned)).all(-1).nonzero().flatten()
        if len(found) and packed.aux_rows is not None:
            row = int(torch.searchsorted(packed.aux_rows, found[0]))
            states.aux[row, 2] = torch.nan

    change_states(monkeypatch, break_one)
    progress = RecordedProgress()

    report = run(tiny, generated, tmp_path / "run", progress=progress,
                 data={"train_data_ratio": 1.0})  # fmt: skip

    assert report.num_bad_samples == 1
    assert any("tokens-00000.safetensors/000004" in text for text in progress.warnings)


def test_many_documents_that_are_not_finite_end_the_run_saved(
    generated: Path, tiny: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_all(packed: Packed, states: CapturedStates) -> None:
        if packed.aux_rows is not None:  # not in the check before the first step
            states.aux[:, 1] = torch.inf

    change_states(monkeypatch, break_all)

    with pytest.raises(MachineError, match="not finite for"):
        run(tiny, generated, tmp_path / "run")

    saved = [p for p in (tmp_path / "run").glob("step-*") if p.is_dir()]
    assert len(saved) == 1
    assert (saved[0] / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["error"]


def test_out_of_memory_names_the_verifier_and_the_flags(
    generated: Path, tiny: TinyInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(packed: Packed, _: CapturedStates) -> None:
        if packed.aux_rows is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    change_states(monkeypatch, fail)

    with pytest.raises(MachineError, match=r"in the capture of .* weights take") as e:
        run(tiny, generated, tmp_path / "run")

    assert "--total-seq-len" in str(e.value.hint)


def test_one_rank_has_nothing_to_shard_a_verifier_across(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="`--shard-verifier` needs several ranks"):
        run(tiny, generated, tmp_path / "run", capture={"shard_verifier": True})


def test_a_trained_draft_goes_on_with_the_layers_that_it_reads(
    generated: Path, tiny: TinyInputs, tmp_path: Path
) -> None:
    run(tiny, generated, tmp_path / "first", run={"epochs": 1})
    source = {"from_checkpoint": str(tmp_path / "first" / "0"), "target_layer_ids": None}

    report = run(tiny, generated, tmp_path / "second", draft=source, run={"max_steps": 2})

    assert report.target_layer_ids == LAYER_IDS != (2, 4, 6)


def test_a_run_in_bfloat16_trains(generated: Path, tiny: TinyInputs, tmp_path: Path) -> None:
    report = run(
        tiny, generated, tmp_path / "run", capture={"capture_dtype": "bfloat16"},
        distributed={"device": "cpu", "compute_dtype": "bfloat16"}, run={"max_steps": 2},
    )  # fmt: skip

    assert report.step == 2
    assert report.num_bad_samples == 0
