"""Each metric logger, proven by reading its own store back."""

import json
import os
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.drafts.checkpoint_reader import find_checkpoints
from speculators_cli.core.errors import MachineError, SettingsError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training import loggers
from speculators_cli.core.training.loggers import LOGGERS
from speculators_cli.core.training.loggers.jsonl import JsonlLogger
from speculators_cli.core.training.run import train
from tests.recorded_progress import RecordedProgress
from tests.run_files import read_metrics
from tests.tiny_run import TinyInputs


def expected_values(tiny: TinyInputs, split: str, name: str) -> dict[int, float]:
    return {x["step"]: x[name] for x in read_metrics(tiny.save_path) if x["split"] == split}


def train_with(tiny: TinyInputs, logger: str, **run: Any) -> None:
    train(
        tiny.settings(run={"logger": logger, "run_name": "tried", **run}),
        progress=SilentProgress(),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_metric(tiny: TinyInputs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_with(tiny, "tensorboard")

    events = EventAccumulator(str(tiny.log_dir / "tried"))
    events.Reload()
    for split, name in (("train", "loss"), ("train", "lr"), ("val", "acceptance_length")):
        found = {event.step: event.value for event in events.Scalars(f"{split}/{name}")}
        assert found == pytest.approx(expected_values(tiny, split, name), rel=1e-6)
        assert len(found) >= 2


def test_wandb_holds_every_metric_offline(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    train_with(tiny, "wandb")
    # As at exit: a process of wandb's own writes the file, some of it after the run has finished.
    wandb.teardown()

    (file,) = (tiny.log_dir / "tried").rglob("*.wandb")
    losses: dict[int, float] = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        items = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "train/loss" in items:
            losses[items["_step"]] = items["train/loss"]
    assert losses == pytest.approx(expected_values(tiny, "train", "loss"))


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a `.wandb` file: LevelDB's log format after a header of 7 bytes."""
    block_size, header_size = 32768, 7
    start, parts = 7, b""
    while start + header_size < len(data):
        if block_size - start % block_size < header_size:  # too little left of the block
            start += block_size - start % block_size
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        parts += data[start + header_size : start + header_size + length]
        start += header_size + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_trackio_holds_every_metric(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    train_with(tiny, "trackio")

    import trackio  # reads the variable that names its folder

    trackio._cleanup_current_run()  # as at exit
    assert capsys.readouterr().out == ""

    (file,) = (tiny.log_dir / "tried").glob("*.db")
    with sqlite3.connect(file) as store:
        rows = store.execute("SELECT step, metrics FROM metrics WHERE run_name='tried'").fetchall()
    store.close()
    metrics = [(step, json.loads(text)) for step, text in rows]
    losses = {step: x["train/loss"] for step, x in metrics if "train/loss" in x}
    assert losses == pytest.approx(expected_values(tiny, "train", "loss"))


class Broken:
    """A logger that fails at every call."""

    def __init__(self, *_: object) -> None:
        """Opens without trouble."""

    def log(self, step: int, split: str, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        raise RuntimeError("the server is gone")

    def close(self) -> None:
        raise RuntimeError("the server is gone")


def test_a_logger_that_fails_changes_nothing(
    tiny: TinyInputs, trained_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Broken)
    warnings = RecordedProgress()

    train(tiny.settings(run={"logger": "tensorboard"}), progress=warnings)

    told = [text for text in warnings.warnings if "Logger" in text]
    assert told == ["Logger `tensorboard` failed and is disabled from here on: the server is gone"]
    ends = [find_checkpoints(path)[-1] for path in (tiny.save_path, trained_once)]
    weights, expected = (end.read_tensors() for end in ends)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_resumed_record_loses_the_steps_that_are_done_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "split": "train"}) for step in (1, 2, 3, 4)]
    file.write_text("\n".join(lines) + '\n{"step": 5, "spl')

    logger = JsonlLogger(file, resumed_step=2)
    logger.log(3, "train", {"loss": 1.5})
    logger.close()

    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_a_log_folder_that_cannot_be_one_is_refused_before_anything_is_read(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.log_dir.write_text("a file")
    monkeypatch.setattr("speculators_cli.core.training.run.read_inputs", lambda *_, **__: 1 / 0)

    with pytest.raises(SettingsError, match=r"`--log-dir`: .*logs` is not a folder"):
        train(tiny.settings(run={"logger": "tensorboard"}), progress=SilentProgress())

    assert not tiny.save_path.exists()


def test_a_log_folder_is_looked_at_only_where_a_logger_is_asked_for(tiny: TinyInputs) -> None:
    tiny.log_dir.write_text("a file")

    report = train(tiny.settings(run={"max_steps": 1}), progress=SilentProgress())

    assert report.step == 1


def test_a_logger_that_cannot_start_is_named(
    tiny: TinyInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(LOGGERS, "tensorboard", fail)

    with pytest.raises(MachineError, match=r"`--logger tensorboard` cannot start: .*No space left"):
        train(tiny.settings(run={"logger": "tensorboard"}), progress=SilentProgress())


def test_lines_that_are_no_metrics_are_left_out_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "split": "train"}\n'
    deep = b"[" * 100_000 + b"\n"
    file.write_bytes(good + b"\xff\xfe\n" + bytes(9) + b"\n[1]\n" + deep + good + b'{"step": ')

    JsonlLogger(file, resumed_step=2).close()

    assert file.read_bytes() == good * 2


def test_metrics_that_are_no_file_are_refused_without_waiting_for_them(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    os.mkfifo(file)

    with pytest.raises(SettingsError, match=r"metrics\.jsonl` is a FIFO"):
        JsonlLogger(file, resumed_step=2)
