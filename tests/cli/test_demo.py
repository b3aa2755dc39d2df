"""`speculators demo` as the user types it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.capture.report import GenerationReport
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.demo.demo import (
    MAX_NEW_TOKENS,
    NUM_DRAFT_TOKENS,
    NUM_EVALUATION_PROMPTS,
    NUM_LAYERS,
    VERIFIER_DIR,
    DemoReport,
    check_report,
    generate_settings,
    read_prompts,
    train_settings,
)
from speculators_cli.core.demo.demo_folder import RESULT_NAME, DemoFolder
from speculators_cli.core.errors import SettingsError, SpeculatorsError
from speculators_cli.core.evaluation.draft_and_verify import Answer, PassTimes
from speculators_cli.core.evaluation.measurement import Measurement
from speculators_cli.core.models.verifier import read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.inputs import fresh_config
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.demo import DemoSettings
from tests.cache_free_draft_and_verify import CacheFreeDraft, draft_and_verify, load_plain
from tests.run_files import tree
from tests.tiny_run import TinyInputs

Capture = pytest.CaptureFixture[str]


def report_of(
    num_accepted: tuple[int, int, int], *, num_different: int = 0, algorithm: str = "eagle3"
) -> DemoReport:
    """A report of 100 passes, trained and untrained alike."""
    # The passes that accepted exactly k draft tokens.
    bounds = (100, *num_accepted, 0)
    counts = [k for k in range(4) for _ in range(bounds[k] - bounds[k + 1])]
    evaluation = Measurement(
        num_draft_tokens=3,
        answers=(Answer(1, (), (), tuple(counts), (None,) * 100),),
        num_different=num_different,
        times=PassTimes(100, 1.0, 1.0),
        duration_seconds=1.0,
    )
    training = TrainReport(
        checkpoint=None,
        best_checkpoint=None,
        best_epoch=None,
        step=1,
        total_steps=1,
        epochs=1,
        duration_seconds=1.0,
        start_up_seconds={},
        save_wait_seconds=0.0,
        tokens_per_second=1.0,
        capture_share=None,
        peak_memory_bytes=None,
        validation_loss=None,
        best_validation_loss=None,
        acceptance_length=None,
        acceptance_rates=(),
        evaluated_acceptance_length=None,
        best_evaluated_acceptance_length=None,
        target_layer_ids=(1,),
        are_layer_ids_assumed=False,
        num_skipped_steps=0,
        num_bad_samples=0,
        is_resumed=False,
        is_stopped_early=False,
        was_already_finished=False,
        is_dry_run=False,
    )
    return DemoReport(
        algorithm=algorithm,
        output_dir=Path("demo"),
        captured=GenerationReport(Path("data"), "verifier", (2, 4, 5), 1, 0, (), 1, 2, 1, 0, 0),
        training=training,
        untrained=evaluation,
        trained=evaluation,
        sample_prompt="",
        sample=(),
        duration_seconds=1.0,
    )


def test_a_draft_that_misses_the_target_fails_the_demo() -> None:
    check_report(report_of((50, 30, 20)))

    with pytest.raises(SpeculatorsError, match=r"acceptance length 1\.99, expected 2\.0") as error:
        check_report(report_of((50, 30, 19)))

    assert error.value.exit_code == 1
    check_report(report_of((50, 0, 0), algorithm="dflash"))
    with pytest.raises(SpeculatorsError, match=r"acceptance length 1\.49, expected 1\.5"):
        check_report(report_of((49, 0, 0), algorithm="dflash"))


def test_an_answer_that_is_not_the_verifiers_own_fails_the_demo() -> None:
    good = report_of((50, 30, 20))
    bad = replace(good, untrained=report_of((50, 30, 20), num_different=1).untrained)

    with pytest.raises(SpeculatorsError, match="1 drafted answers are not the verifier's own"):
        check_report(bad)

    assert good.is_lossless
    assert not bad.is_lossless


@pytest.mark.parametrize("name", ["notes.txt", "demo.json", "data"])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(
    tmp_path: Path, capsys: Capture, name: str
) -> None:
    (tmp_path / name).write_text("{}")

    code = run(["demo", "--output-dir", str(tmp_path)])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert "has files that were not created by the demo" in err
    assert [file.name for file in tmp_path.iterdir()] == [name]


def make_demo(folder: Path) -> None:
    """What an earlier demo has left, without its checkpoints."""
    demo = DemoFolder(folder)
    with demo.placing("verifier", "data", "d2t.npy") as place:
        for name in ("verifier", "data"):
            (place / name).mkdir()
        (place / "verifier" / "config.json").write_text("{}")
        (place / "data" / "data_0.pt").write_text("states")
        (place / "d2t.npy").write_text("map")
    demo.write_result({"acceptance_length": 2.0})


@pytest.mark.parametrize(
    "name",
    ["data/mine.pt", "data/deep/er/mine.pt", "data/data_0.pt", "verifier/config.json", "t2d.npy"],
)
def test_what_a_demo_did_not_write_stays(tmp_path: Path, name: str) -> None:
    make_demo(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("weeks of capture")
    before = tree(tmp_path)

    with pytest.raises(SettingsError, match="would be removed") as error:
        DemoFolder(tmp_path)

    assert f"`{tmp_path / name}`" in error.value.message
    assert tree(tmp_path) == before


def test_a_link_in_a_demo_is_not_followed(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo")
    shutil.move(tmp_path / "demo" / "data", tmp_path / "data")
    (tmp_path / "demo" / "data").symlink_to(tmp_path / "data")

    with pytest.raises(SettingsError, match="would be removed"):
        DemoFolder(tmp_path / "demo")

    assert (tmp_path / "data" / "data_0.pt").exists()


def test_a_demo_stopped_half_way_makes_room_for_the_next(tmp_path: Path) -> None:
    make_demo(tmp_path)
    (tmp_path / "notes.txt").touch()
    demo = DemoFolder(tmp_path)
    (demo.scratch.open() / "data").mkdir()
    (demo.scratch.folder / "data" / "data_0.pt").write_text("half a sam")

    DemoFolder(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == [RESULT_NAME, "notes.txt"]


def test_only_checkpoints_of_the_demo_go(tmp_path: Path, shared_inputs: TinyInputs) -> None:
    def go_on(name: str, *, epochs: int) -> None:
        run = {"save_path": tmp_path / name / "checkpoints", "epochs": epochs}
        train(shared_inputs.settings(run=run), progress=SilentProgress())

    demo = DemoFolder(tmp_path / "demo")
    go_on("demo", epochs=1)
    demo.add_checkpoints()
    shutil.copytree(tmp_path / "demo", tmp_path / "other", symlinks=True)
    go_on("other", epochs=2)

    DemoFolder(tmp_path / "demo")
    with pytest.raises(SettingsError, match="checkpoints/1` was not created by a demo"):
        DemoFolder(tmp_path / "other")

    assert [path.name for path in (tmp_path / "demo").iterdir()] == [RESULT_NAME]
    assert (tmp_path / "other" / "checkpoints" / "1" / "model.safetensors").exists()


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").touch()

    code = run(["demo", "--output-dir", str(tmp_path / "file" / "demo")])

    assert code == 2
    assert "`--output-dir`" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_proposes_three_tokens(algorithm: str, tmp_path: Path) -> None:
    run = {"algorithm": algorithm, "output_dir": tmp_path}
    settings = DemoSettings.model_validate({"run": run})
    (tmp_path / "data").mkdir()
    for name in ("d2t.npy", "t2d.npy"):
        (tmp_path / name).touch()

    training = train_settings(settings)
    capture = generate_settings(settings, tmp_path / "data")

    verifier = read_verifier_config(VerifierFiles(str(VERIFIER_DIR)), trust_remote_code=False)
    layer_ids = default_layer_ids(NUM_LAYERS, ALGORITHMS[algorithm].num_aux_layers)
    config = fresh_config(
        algorithm,
        training.algorithm_settings,
        verifier,
        VocabMap.full(2048),
        LayerIds(layer_ids, is_assumed=False),
        arch=training.draft.draft_arch,
        num_layers=training.draft.num_layers,
    )
    assert config.num_draft_tokens == NUM_DRAFT_TOKENS
    assert training.draft.algorithm == capture.verifier.algorithm == algorithm


@pytest.mark.demo
def test_the_whole_demo_holds_what_it_reports(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "speculators_cli", "demo", "--output-dir", str(folder)]
    with DemoFolder(folder).placing("data") as place:
        (place / "data").mkdir()
        (place / "data" / "of-an-earlier-demo.pt").touch()
    (folder / "notes.txt").touch()

    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["lossless"] is True
    assert report["acceptance_length"] >= 2.0
    assert report["untrained_acceptance_length"] < 1.2
    assert report["duration_seconds"] > 0
    assert not (folder / "data" / "of-an-earlier-demo.pt").exists()
    assert (folder / "notes.txt").exists()
    saved = json.loads((folder / "demo.json").read_text())
    assert saved.pop("made_by") == "speculators demo"
    assert {"verifier/config.json", "data/samples/00000/000024.pt", "d2t.npy"} <= saved.pop(
        "files"
    ).keys()
    assert saved == {name: report[name] for name in saved}
    assert "acceptance_length" in saved
    check_acceptance(Path(report["checkpoint"]), report)
    DemoFolder(folder)  # as the next demo begins
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "notes.txt"]


def check_acceptance(checkpoint_dir: Path, report: dict[str, object]) -> None:
    """The reported figures are those of a loop without caches over the saved checkpoint."""
    verifier, draft = load_plain(VERIFIER_DIR), CacheFreeDraft(checkpoint_dir)
    begin = verifier.config.bos_token_id
    accepted: list[int] = []
    for prompt in encode(read_prompts()[:NUM_EVALUATION_PROMPTS]):
        counts = draft_and_verify(
            verifier,
            draft,
            [begin, *prompt],
            num_draft_tokens=NUM_DRAFT_TOKENS,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        accepted += counts.num_accepted
    assert report["num_passes"] == len(accepted)
    assert report["acceptance_length"] == 1 + sum(accepted) / len(accepted)
    assert report["acceptance_rates"] == [
        sum(count > k for count in accepted) / len(accepted) for k in range(NUM_DRAFT_TOKENS)
    ]


def encode(texts: list[str]) -> list[list[int]]:
    """Token ids, by the tokenizers library alone."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(VERIFIER_DIR / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_demo_that_is_stopped_while_capturing_ends_at_once_and_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("speculators_cli.core.demo.demo.generate_data", stop)

    code = run(["demo", "--output-dir", str(tmp_path)])

    assert code == 128 + signal.SIGTERM
    assert "error: Stopped by signal 15" in capsys.readouterr().err
    assert json.loads((tmp_path / RESULT_NAME).read_text())["exit_code"] == code
