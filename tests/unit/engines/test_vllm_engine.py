"""VLLMEngine against a package `vllm` that computes nothing, in a child process as ever."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from speculators_cli.core.engines.engine import Answer, Prompt, Sampling
from speculators_cli.core.engines.vllm_engine import VLLMEngine
from speculators_cli.core.engines.vllm_process import VLLMProcess
from speculators_cli.core.errors import DataError, MachineError, SettingsError
from tests.unit.engines.fakes import FakeVLLM, have_ended, pack, write_fake_vllm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")

PROMPTS = [Prompt([10 + i, 20 + i, 30 + i][: 1 + i % 3], seed=i) for i in range(5)]
ANSWERS = {i: (*reversed(prompt.ids), 1) for i, prompt in enumerate(PROMPTS)}
SAMPLING = Sampling(max_new_tokens=8)
SLEEP = "exec sleep 600"
IGNORE_SIGTERM = "trap '' TERM; while :; do sleep 1; done"


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return write_fake_vllm(tmp_path, monkeypatch)


def answer(engine: VLLMEngine, prompts: Sequence[Prompt] = PROMPTS) -> dict[int, tuple[int, ...]]:
    return {x.index: tuple(x.ids) for x in engine.answer(prompts, SAMPLING)}


def test_answers_are_the_engines_ids_by_prompt(vllm: FakeVLLM) -> None:
    engine = vllm.engine()

    found = list(engine.answer(PROMPTS, Sampling(max_new_tokens=3)))

    engine.close()
    assert {x.index: tuple(x.ids) for x in found} == {i: x[:3] for i, x in ANSWERS.items()}
    # An end token at the limit is none too few.
    assert {x.index for x in found if x.is_truncated} == {2}
    assert {len(x.ids) for x in found} == {2, 3}


def test_a_second_call_uses_the_same_process(vllm: FakeVLLM) -> None:
    engine = vllm.engine()

    found = answer(engine) | {9: answer(engine, PROMPTS[:1])[0]}

    engine.close()
    assert found == ANSWERS | {9: ANSWERS[0]}
    assert len(vllm.pids()) == 1


def test_states_are_columns_of_the_layers_in_ascending_order(vllm: FakeVLLM) -> None:
    engine = vllm.engine(layer_ids=(5, 2))
    packed = pack([[7, 8], [9], [4, 5, 6]], rows=[1, 3, 5])

    states = engine.capture(packed)

    engine.close()
    tokens, hidden = packed.input_ids[:, None], torch.arange(6)
    aux = [1000 * tokens + 10 * k + hidden for k in (2, 5)]
    torch.testing.assert_close(states.aux, torch.cat(aux, dim=1).float(), rtol=0, atol=0)
    last = 1000 * tokens[[1, 3, 5]] + 10 * 8 + hidden
    torch.testing.assert_close(states.last, last.float(), rtol=0, atol=0)


def test_the_last_layer_can_be_an_aux_layer_too(vllm: FakeVLLM) -> None:
    engine = vllm.engine(layer_ids=(2, 8))

    states = engine.capture(pack([[7]], rows=[0]))

    engine.close()
    assert states.aux[0, ::6].tolist() == [7020, 7080]
    assert states.last[0, 0] == 7080


def test_files_of_states_are_removed(vllm: FakeVLLM) -> None:
    engine = vllm.engine()
    engine.capture(pack([[7, 8], [9]], rows=[0]))
    files = [Path(file) for file in vllm.notes("states ")]
    left = [file for file in files if file.exists()]

    engine.close()

    assert len(files) == 2
    assert left == []
    assert not files[0].parent.exists()
    assert list(vllm.folder.glob("speculators-vllm-*")) == []


def test_one_engine_is_loaded_at_a_time(vllm: FakeVLLM) -> None:
    engine = vllm.engine()
    answer(engine)
    first = vllm.pids()

    engine.capture(pack([[7]], rows=[0]))

    has_ended = have_ended(first, within_seconds=0)
    answer(engine)
    engine.close()
    assert has_ended
    assert len(vllm.pids()) == 3


def test_a_dead_process_is_restarted_with_the_rest_in_order(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[2])
    engine = vllm.engine()

    found = answer(engine)

    engine.close()
    assert found == ANSWERS
    # The engine had finished its last two.
    assert vllm.notes("request 0 ") == ["0", "1", "2", "3", "4"]
    assert vllm.notes("request 1 ") == ["0", "1", "2"]


def test_a_hung_process_is_restarted(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[2], hangs=True)
    engine = vllm.engine(silent_seconds=1.0)

    found = answer(engine)

    engine.close()
    assert found == ANSWERS
    assert have_ended(vllm.pids())


def test_a_process_whose_engine_is_killed_is_restarted(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[2], hangs=True, is_killed=True)
    engine = vllm.engine()  # which would wait for minutes
    started_at = time.monotonic()

    found = answer(engine)

    engine.close()
    assert found == ANSWERS
    assert time.monotonic() - started_at < 60


def test_states_survive_a_restart(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[1])
    engine = vllm.engine(layer_ids=(2,))

    states = engine.capture(pack([[7, 8], [9]], rows=[2]))

    engine.close()
    assert states.aux[:, 0].tolist() == [7020, 8020, 9020]
    assert states.last[:, 0].tolist() == [9080]


def test_a_second_death_ends_it_with_the_tail_of_the_log(vllm: FakeVLLM) -> None:
    vllm.plan(fails_after=[2, 1])
    engine = vllm.engine()
    found: list[Answer] = []

    with pytest.raises(MachineError, match=r"second time: torch\.OutOfMemoryError") as raised:
        found.extend(engine.answer(PROMPTS, SAMPLING))

    engine.close()
    assert {x.index: tuple(x.ids) for x in found} == {i: ANSWERS[i] for i in (2, 3, 4)}
    assert raised.value.message.splitlines()[-1] == "torch.OutOfMemoryError: CUDA out of memory"
    logs = list(vllm.folder.glob("speculators-vllm-*/answer.log"))
    assert len(logs) == 1  # kept
    assert str(logs[0]) in str(raised.value.hint)
    assert have_ended(vllm.pids())


def test_a_refused_prompt_is_named_and_restarts_nothing(vllm: FakeVLLM) -> None:
    engine = vllm.engine()

    with pytest.raises(DataError, match="longer than 20"):
        answer(engine, [Prompt([5] * 21, 0)])

    engine.close()
    assert len(vllm.pids()) == 1


def test_an_answer_that_ends_otherwise_counts_as_lost(vllm: FakeVLLM) -> None:
    vllm.plan(finish_reason="abort")
    engine = vllm.engine()

    with pytest.raises(MachineError, match="`abort`, for the second time"):
        answer(engine)

    engine.close()


def test_states_of_other_tokens_are_an_error(vllm: FakeVLLM) -> None:
    vllm.plan(other_tokens="1")
    engine = vllm.engine()

    with pytest.raises(MachineError, match=r"other tokens: .* document 1"):
        engine.capture(pack([[7], [8, 9], [4]], rows=[0]))

    engine.close()
    assert len(vllm.pids()) == 1
    assert not Path(vllm.notes("states ")[0]).parent.exists()


def test_a_full_disk_is_named(vllm: FakeVLLM) -> None:
    vllm.plan(disk_is_full=True)
    engine = vllm.engine()

    with pytest.raises(MachineError, match=r"free: OSError: No space left"):
        engine.capture(pack([[7]], rows=[0]))

    engine.close()


def test_without_vllm_the_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    fake = FakeVLLM(Path(), monkeypatch)

    with pytest.raises(MachineError, match="not installed") as raised:
        fake.engine()

    assert sys.executable in raised.value.message
    assert "--vllm-python" in str(raised.value.hint)


@pytest.mark.parametrize(("version", "needed"), [("0.17.1", "0.18"), ("0.23.0", "0.24")])
def test_an_old_vllm_is_refused_with_both_versions(
    vllm: FakeVLLM, version: str, needed: str
) -> None:
    vllm.plan(version=version)

    with pytest.raises(MachineError, match=rf"need vLLM {needed} or newer.* has {version}"):
        vllm.engine().capture(pack([[7]], rows=[0]))

    assert vllm.pids() == []


@pytest.mark.parametrize("name", ["no/such/python", "/bin/false"])
def test_an_interpreter_that_does_not_run_is_refused(name: str, vllm: FakeVLLM) -> None:
    with pytest.raises(SettingsError, match=f"`--vllm-python`: `{name}`"):
        vllm.engine(python=Path(name))


def test_an_error_at_load_is_the_first_of_the_log(vllm: FakeVLLM) -> None:
    vllm.plan(load_error=True)
    engine = vllm.engine()

    with pytest.raises(MachineError) as raised:
        answer(engine)

    engine.close()
    first, *rest = raised.value.message.splitlines()
    assert first == "vLLM cannot load `org/verifier`: ValueError: no memory"
    assert rest[-1] == "RuntimeError: Engine core initialization failed"
    assert len(list(vllm.folder.glob("speculators-vllm-*/answer.log"))) == 1


def test_an_interrupted_load_ends_at_once(vllm: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        while not vllm.notes("{"):  # until it loads
            time.sleep(0.01)
        raise KeyboardInterrupt

    vllm.plan(load_seconds=600)
    engine = vllm.engine()
    monkeypatch.setattr(VLLMProcess, "receive", interrupt)
    started_at = time.monotonic()

    with pytest.raises(KeyboardInterrupt):
        answer(engine)

    engine.close()
    assert time.monotonic() - started_at < 10  # after which a child that loads ends by itself


def test_a_flag_that_vllm_lacks_is_an_error_at_load(vllm: FakeVLLM) -> None:
    engine = vllm.engine(args=("--no-such-flag",))

    with pytest.raises(MachineError, match="error: unrecognized arguments: --no-such-flag"):
        answer(engine)

    engine.close()


@pytest.mark.parametrize("helper", [SLEEP, IGNORE_SIGTERM], ids=["ends", "ignores SIGTERM"])
def test_close_leaves_no_process(vllm: FakeVLLM, helper: str) -> None:
    vllm.plan(helper=helper)
    engine = vllm.engine()
    answer(engine)
    pids = vllm.pids()

    engine.close()

    assert len(pids) == 2
    assert have_ended(pids, within_seconds=1)  # SIGKILL takes effect after it was sent
    assert vllm.notes("shutdown") == [""]


def test_an_abandoned_call_leaves_no_process(vllm: FakeVLLM) -> None:
    vllm.plan(helper=SLEEP)
    engine = vllm.engine()
    answers = engine.answer(PROMPTS, SAMPLING)
    next(answers)

    answers.close()  # type: ignore[attr-defined]

    assert have_ended(vllm.pids(), within_seconds=0)
    assert answer(engine) == ANSWERS
    engine.close()


PARENT = """
import time
import torch
from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.vllm_engine import VLLMEngine
from speculators_cli.core.engines.vllm_setup import VLLMSetup

engine = VLLMEngine(VLLMSetup("org/verifier", "float32"), layer_ids=(2,), num_layers=8)
engine.capture(Packed(torch.tensor([7]), [1], torch.tensor([0])))
print("ready", flush=True)
time.sleep(600)
"""


def test_the_engine_ends_with_its_parent(vllm: FakeVLLM) -> None:
    vllm.plan(helper=IGNORE_SIGTERM)
    paths = [os.environ["PYTHONPATH"], *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"

        parent.kill()

    assert len(vllm.pids()) == 2
    assert have_ended(vllm.pids())
    assert not Path(vllm.notes("states ")[0]).parent.exists()


def test_fingerprint_is_known_before_the_engine_is_loaded(vllm: FakeVLLM) -> None:
    engine = vllm.engine(tensor_parallel_size=2, args=("--max-model-len", "512"))

    assert vllm.pids() == []
    assert {key: engine.fingerprint[key] for key in engine.fingerprint if key != "torch"} == {
        "engine": "vllm",
        "vllm": "0.33.0",
        "transformers": engine.fingerprint["transformers"],
        "dtype": "float32",
        "tensor_parallel_size": "2",
        "vllm_args": "--max-model-len 512",
    }


def test_own_flags_win(vllm: FakeVLLM) -> None:
    engine = vllm.engine(args=("--dtype", "float16", "--max-model-len", "512"))
    answer(engine)
    engine.close()

    found = vllm.notes("{")[0]

    assert '"dtype": "float32"' in found
    assert '"max_model_len": "512"' in found


def test_closing_twice_and_without_use_is_fine(vllm: FakeVLLM) -> None:
    engine = vllm.engine()
    started_at = time.monotonic()

    engine.close()
    engine.close()

    assert time.monotonic() - started_at < 5
