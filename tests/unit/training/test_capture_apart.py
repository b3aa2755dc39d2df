"""Training with a vLLM that captures in a process of its own; here a fake one."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

import speculators_cli
from speculators_cli.cli.app import run as run_command
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.data_config import write_data_config
from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.token_shards import TokenRow
from speculators_cli.core.data.tokens import TokenFolder
from speculators_cli.core.engines.ahead_capturer import AheadCapturer
from speculators_cli.core.engines.captured_layers import CapturedLayers
from speculators_cli.core.errors import CheckpointError, DataError, MachineError, SettingsError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.ahead import AheadLoader
from speculators_cli.core.training.live_capture import MAX_CHECKED_SAMPLES
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.capture import CaptureSettings
from tests.fork_server import ForkServer
from tests.run_files import read_metrics
from tests.tiny_run import HIDDEN, LAYER_IDS, NUM_LAYERS, TinyInputs
from tests.token_files import make_rows, write_tokens
from tests.unit.data.test_tokens import read
from tests.unit.engines.fakes import FakeVLLM, have_ended, write_fake_vllm

NUM_ROWS = 16


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fake = write_fake_vllm(tmp_path, monkeypatch)
    own = Path(speculators_cli.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{own}")
    plan(fake)
    yield fake
    assert have_ended(fake.pids())


def plan(fake: FakeVLLM, **more: Any) -> None:
    fake.plan(hidden=HIDDEN, max_tokens=64, **more)


@pytest.fixture
def tokens(tiny: TinyInputs) -> Path:
    return write_tokens(tiny.folder / "tokens", make_rows(NUM_ROWS))


def fake_states(row: TokenRow, layer_id: int) -> torch.Tensor:
    ids = torch.from_numpy(row.input_ids).float()
    return 1000 * ids[:, None] + 10 * layer_id + torch.arange(HIDDEN)


def write_samples(folder: Path, verifier: Path) -> Path:
    """The samples of the fake's states."""
    folder.mkdir()
    for row in make_rows(NUM_ROWS):
        sample = Sample(
            torch.from_numpy(row.input_ids).long(),
            torch.from_numpy(row.loss_mask),
            tuple(fake_states(row, k) for k in LAYER_IDS),
            fake_states(row, NUM_LAYERS),
            is_normed=False,
        )
        v1.write_sample(sample, folder / f"{row.name}.pt")
    write_data_config(folder, verifier=str(verifier), layer_ids=LAYER_IDS)
    return folder


def run(
    tiny: TinyInputs, data_path: Path, save_path: Path, *, apart: bool = True, **changes: Any
) -> TrainReport:
    settings = tiny.settings(
        draft={"target_layer_ids": LAYER_IDS},
        data={"data_path": (data_path,), "num_workers": 1} | changes.pop("data", {}),
        run={"save_path": save_path} | changes.pop("run", {}),
        schedule={"scheduler": "none"},
        capture={"capture_engine": "vllm"} | changes.pop("capture", {}) if apart else {},
        **changes,
    )
    return train(settings, progress=SilentProgress())


def weights(save_path: Path, name: str = "1") -> bytes:
    return (save_path / name / "model.safetensors").read_bytes()


def test_weights_equal_those_of_stored_samples_bit_for_bit(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    online = run(tiny, tokens, tmp_path / "online")
    samples = write_samples(tiny.folder / "samples", tiny.verifier_dir)

    # The fake's states are not those of the verifier, which would be noticed.
    run(tiny, samples, tmp_path / "stored", apart=False, data={"check_samples": False})

    assert weights(tmp_path / "online") == weights(tmp_path / "stored")
    start, end = (
        load_file(tmp_path / "online" / x / "model.safetensors")["fc.weight"] for x in "01"
    )
    assert (end - start).abs().max() > 1e-3
    assert online.capture_share is not None
    assert online.validation_loss is not None
    assert all("capture_share" in line for line in read_metrics(tmp_path / "online", "train"))
    assert len(vllm.pids()) == 1


def test_a_resumed_run_and_a_process_that_dies_change_nothing(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    whole = run(tiny, tokens, tmp_path / "whole")
    plan(vllm, fails_after=[10_000, 5])
    run(tiny, tokens, tmp_path / "cut", run={"max_steps": whole.total_steps // 2 + 1})

    resumed = run(tiny, tokens, tmp_path / "cut")

    assert resumed.is_resumed
    assert len(vllm.pids()) == 4  # of three runs, one of them twice
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_another_engine_is_refused_on_resume(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    assert vllm.pids() == []
    run(tiny, tokens, tmp_path / "run", run={"max_steps": 2})

    with pytest.raises(CheckpointError, match="engine: `vllm` then, `transformers` now"):
        run(tiny, tokens, tmp_path / "run", capture={"capture_engine": "transformers"})


def test_a_cache_keeps_what_was_captured(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    cache = {"cache_dir": tmp_path / "cache"}
    run(tiny, tokens, tmp_path / "plain")
    num_requests = len(vllm.notes("request "))

    run(tiny, tokens, tmp_path / "one", capture=cache, run={"epochs": 1})
    filled = len(vllm.notes("request ")) - num_requests
    run(tiny, tokens, tmp_path / "two", capture=cache)

    assert filled >= NUM_ROWS
    # Some samples are checked at each start.
    num_more = len(vllm.notes("request ")) - num_requests - filled
    assert num_more == MAX_CHECKED_SAMPLES < filled
    assert weights(tmp_path / "two") == weights(tmp_path / "plain")


def test_a_process_that_dies_twice_ends_the_run_with_the_sample(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    plan(vllm, fails_after=[8, 3])

    with pytest.raises(MachineError, match=r"states of sample `.*/0000\d\d` are missing: .*second"):
        run(tiny, tokens, tmp_path / "run")


def test_a_sample_that_vllm_refuses_ends_the_run(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    vllm.plan(hidden=HIDDEN, max_tokens=30)

    with pytest.raises(DataError, match=r"sample `.*` are missing: vLLM refuses tokens"):
        run(tiny, tokens, tmp_path / "run")


@pytest.mark.usefixtures("vllm")
def test_memory_that_runs_out_is_not_taken_by_the_verifier(
    tiny: TinyInputs, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> NoReturn:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr("speculators_cli.core.training.build.build_draft", run_out)

    with pytest.raises(MachineError) as raised:
        run(tiny, tokens, tmp_path / "run")

    assert "--shard-verifier" not in str(raised.value.hint)


def test_states_that_cannot_be_right_end_the_run_before_its_first_step(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    vllm.plan(hidden=HIDDEN, max_tokens=64, is_zero=True)

    with pytest.raises(MachineError, match="states of layer 3 are zero"):
        run(tiny, tokens, tmp_path / "run")


def test_two_ranks_share_one_process_and_equal_one(
    vllm: FakeVLLM, fork_server: ForkServer, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    common = {
        "data_path": tokens,
        "target_layer_ids": ",".join(map(str, LAYER_IDS)),
        "scheduler": "none",
        "capture_engine": "vllm",
        "epochs": 1,
    }
    one = tiny.flags(save_path=tmp_path / "one", gradient_accumulation_steps=2, **common)
    two = tiny.flags(save_path=tmp_path / "two", **common)

    assert run_command(["train", *one]) == 0
    done = fork_server.run("speculators_cli", "train", *two, num_ranks=2)

    assert done.returncode == 0, done.stderr
    assert len(vllm.pids()) == 2
    norms = [
        [line["grad_norm"] for line in read_metrics(tmp_path / x, "train")][:3]
        for x in ("one", "two")
    ]
    # Gradients of two ranks are summed in another order than those of one.
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


class Recorded:
    """A stream that records what it is asked for."""

    def __init__(self) -> None:
        self.futures: list[Future[Path]] = []

    def submit(self, input_ids: Sequence[int]) -> "Future[Path]":
        assert len(input_ids)
        self.futures.append(Future())
        return self.futures[-1]

    def close(self) -> None:
        """Do nothing."""


class Steps:
    """A source of batches of one sample each."""

    def __init__(self, samples: TokenFolder) -> None:
        self.samples = samples
        self.num_read = 0

    def steps_in(self, epoch: int) -> int:
        return len(self.samples) + 0 * epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, ...]]:
        for index in range(start_step, self.steps_in(epoch)):
            self.num_read += 1
            yield (self.samples.collate([index], total_seq_len=64, pin_memory=False, pads=False),)

    def close(self) -> None:
        """Do nothing."""


def test_a_bounded_number_of_steps_is_requested_ahead(tokens: Path) -> None:
    samples, stream = read(tokens), Recorded()
    capturer = AheadCapturer(
        stream,
        CapturedLayers(LAYER_IDS, NUM_LAYERS),
        fingerprint={},
        dtype=torch.float32,
        hidden_size=HIDDEN,
        device=torch.device("cpu"),
    )
    steps = Steps(samples)
    loader = AheadLoader(steps, capturer, samples, steps_ahead=3)

    epoch = loader.epoch(0, 5)
    next(epoch)
    assert (steps.num_read, len(stream.futures)) == (4, 4)
    next(epoch)
    assert len(stream.futures) == 5
    epoch.close()  # type: ignore[attr-defined]

    # Those that were not yielded are cancelled, the others are awaited.
    assert [future.cancelled() for future in stream.futures] == [False] * 2 + [True] * 3
    for future in stream.futures[:2]:
        future.set_exception(MachineError("end"))
    assert len(list(loader.epoch(0))) == len(samples)
    capturer.close()
    for future in stream.futures[5:]:
        future.set_exception(MachineError("end"))


@pytest.mark.parametrize(
    ("capture", "problem"),
    [
        ({"capture_gpus": 2}, "need `--capture-engine vllm`"),
        ({"vllm_args": "--enforce-eager"}, "need `--capture-engine vllm`"),
        ({"vllm_python": "python"}, "need `--capture-engine vllm`"),
        ({"capture_engine": "vllm", "shard_verifier": True}, "`--capture-engine transformers`"),
        (
            {"capture_engine": "vllm", "capture_compute_dtype": "float8"},
            "`--capture-engine transformers`",
        ),
    ],
)
def test_flags_of_the_other_engine_are_refused(capture: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        CaptureSettings.model_validate(capture)


def test_flags_that_training_sets_itself_are_refused(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="is set by this command") as raised:
        run(tiny, tokens, tmp_path / "run", capture={"vllm_args": "--tensor-parallel-size 2"})

    assert raised.value.hint == "Pass `--capture-gpus` instead"
    assert vllm.pids() == []


def test_an_interpreter_without_vllm_is_refused(
    vllm: FakeVLLM, tiny: TinyInputs, tokens: Path, tmp_path: Path
) -> None:
    vllm.plan(version="0.23.0")

    with pytest.raises(MachineError, match=r"Hidden states need vLLM 0\.24 or newer"):
        run(tiny, tokens, tmp_path / "run")
