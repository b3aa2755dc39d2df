"""MeasuredVLLM against a package `vllm` that computes nothing, in a child process as ever."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.vllm_measured import MeasuredVLLM, ServedDraft
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import DataError, MachineError
from tests.unit.engines.fakes import FakeVLLM, have_ended, write_fake_vllm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vLLM runs on Linux")

PROMPTS = [Prompt([10 + i, 20 + i, 30 + i][: 1 + i % 3], seed=i) for i in range(5)]
ANSWERS = tuple((*reversed(prompt.ids), 1) for prompt in PROMPTS)
SAMPLING = Sampling(max_new_tokens=8)
DRAFT = ServedDraft("org/draft", "eagle3", num_draft_tokens=3)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return write_fake_vllm(tmp_path, monkeypatch)


@pytest.fixture
def engine(vllm: FakeVLLM) -> Iterator[MeasuredVLLM]:
    assert vllm.pids() == []
    with closing(MeasuredVLLM(VLLMSetup("org/verifier", "float32"), DRAFT)) as engine:
        yield engine


def test_counts_are_those_of_a_run_alone(engine: MeasuredVLLM) -> None:
    first = engine.run(PROMPTS, SAMPLING, 5)
    second = engine.run(PROMPTS[:2], SAMPLING, 1)

    assert first.answers == ANSWERS
    assert (first.num_passes, first.num_accepted) == (15, (10, 5, 5))
    assert second.answers == ANSWERS[:2]
    assert (second.num_passes, second.num_accepted) == (6, (4, 2, 2))
    assert second.tokens_per_second == pytest.approx(5 / second.seconds)


@pytest.mark.parametrize(("concurrency", "most"), [(1, 1), (2, 2), (8, 5)])
def test_so_many_requests_are_in_work_at_a_time(
    vllm: FakeVLLM, engine: MeasuredVLLM, concurrency: int, most: int
) -> None:
    engine.run(PROMPTS, SAMPLING, concurrency)

    in_work = [int(note) for note in vllm.notes("in work ")]
    assert len(in_work) == 5
    assert max(in_work) == most
    assert in_work[: 6 - most] == [most] * (6 - most)  # filled up after every answer


def test_the_draft_is_loaded_and_log_statistics_are_on(
    vllm: FakeVLLM, engine: MeasuredVLLM
) -> None:
    engine.run(PROMPTS[:1], SAMPLING, 1)

    flags = json.loads(vllm.notes("")[0])
    assert flags["model"] == "org/verifier"
    assert flags["speculative_config"] == {
        "method": "eagle3",
        "model": "org/draft",
        "num_speculative_tokens": 3,
    }
    assert flags["no_enable_prefix_caching"]
    assert not flags["disable_log_stats"]


def test_without_a_draft_there_is_nothing_to_count(vllm: FakeVLLM) -> None:
    with closing(MeasuredVLLM(VLLMSetup("org/verifier", "float32"), None)) as engine:
        found = engine.run(PROMPTS, SAMPLING, 2)

    assert (found.answers, found.num_passes, found.num_accepted) == (ANSWERS, 0, ())
    assert have_ended(vllm.pids())


def test_a_prompt_that_is_too_long_is_a_data_error(engine: MeasuredVLLM) -> None:
    with pytest.raises(DataError, match="longer than 20"):
        engine.run([*PROMPTS, Prompt([5] * 21, seed=0)], SAMPLING, 8)


def test_a_draft_that_vllm_cannot_load_is_named_with_the_first_error(
    vllm: FakeVLLM, engine: MeasuredVLLM
) -> None:
    vllm.plan(load_error=True)

    with pytest.raises(MachineError) as error:
        engine.run(PROMPTS, SAMPLING, 1)

    first = error.value.message.splitlines()[0]
    assert first == (
        "vLLM cannot load `org/verifier` with draft `org/draft`: ValueError: no memory"
    )
    assert "--vllm-args" in str(error.value.hint)


def test_an_engine_that_fails_is_not_started_again(vllm: FakeVLLM, engine: MeasuredVLLM) -> None:
    vllm.plan(fails_after=[3])

    with pytest.raises(MachineError, match=r"torch\.OutOfMemoryError"):
        engine.run(PROMPTS, SAMPLING, 2)

    assert len(vllm.pids()) == 1
    assert have_ended(vllm.pids())
