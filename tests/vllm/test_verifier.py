"""The demo's verifier in vLLM: answers and hidden states equal transformers' in float32.

docs/contributing.md says how to install the engine; `VLLM_PYTHON` names its interpreter.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.conversations.encoder import Encoder
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.engines.endpoint import EndpointAnswerer
from speculators_cli.core.engines.engine import Answerer, Packed, Prompt, Sampling
from speculators_cli.core.engines.vllm_engine import VLLMEngine
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.errors import DataError, MachineError
from speculators_cli.core.models.tokenizer import load_tokenizer
from speculators_cli.core.models.verifier_files import VerifierFiles
from tests.cache_free_draft_and_verify import load_plain

pytestmark = pytest.mark.vllm

LAYER_IDS = (5, 2, 4)
NUM_LAYERS, MAX_LENGTH = 8, 512
NUM_PROMPTS, MAX_NEW_TOKENS = 30, 48
# Steps are smaller than all prompts together, and than the longest document.
FLAGS = ("--max-model-len", str(MAX_LENGTH), "--max-num-batched-tokens", "128", "--enforce-eager")
GREEDY = Sampling(MAX_NEW_TOKENS)
SERVE_SECONDS = 600
# float32 rounds the largest states, about 50, by 3e-6; sums in another order add up over 8 layers
# of 2 sums each. Seen: 6e-5. Another layer, or a norm, differs by more than 1.
ATOL = 2e-4


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def verifier() -> Any:
    """transformers' own model."""
    return load_plain(VERIFIER_DIR)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(VerifierFiles(str(VERIFIER_DIR)), trust_remote_code=False)
    encoder = Encoder(tokenizer, vocab_size=len(tokenizer))
    ids = encoder.encode(read_prompts()[:NUM_PROMPTS])
    return [[*encoder.begin.tolist(), *one.tolist()] for one in ids]


@pytest.fixture(scope="module")
def expected(verifier: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers, with their end tokens."""
    answers = []
    for prompt in prompts:
        out = verifier.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def engine(_environment: None) -> Iterator[VLLMEngine]:
    with closing(
        VLLMEngine(
            VLLMSetup(
                str(VERIFIER_DIR),
                "float32",
                python=Path(os.environ["VLLM_PYTHON"]),
                args=FLAGS,
            ),
            layer_ids=LAYER_IDS,
            num_layers=NUM_LAYERS,
        )
    ) as engine:
        yield engine


def answer(
    engine: Answerer, prompts: list[list[int]], sampling: Sampling = GREEDY
) -> list[list[int]]:
    found = list(engine.answer([Prompt(ids, seed) for seed, ids in enumerate(prompts)], sampling))
    assert sorted(x.index for x in found) == [*range(len(prompts))]
    return [list(x.ids) for x in sorted(found, key=lambda x: x.index)]


def test_answers_equal_transformers_with_their_end_tokens(
    engine: VLLMEngine,
    verifier: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    found = list(engine.answer([Prompt(ids, 0) for ids in prompts], GREEDY))

    by_index = sorted(found, key=lambda x: x.index)
    assert [list(x.ids) for x in by_index] == expected
    assert [x.is_truncated for x in by_index] == [
        ids[-1] != verifier.generation_config.eos_token_id for ids in expected
    ]
    assert 0 < sum(x.is_truncated for x in found) < NUM_PROMPTS
    assert sum(map(len, prompts)) > 128
    assert len(set(map(len, prompts))) > 10


def test_a_seed_decides_an_answer_whatever_the_others(
    engine: VLLMEngine, prompts: list[list[int]]
) -> None:
    sampling = Sampling(MAX_NEW_TOKENS, temperature=1.0, top_p=0.95)
    same = [prompts[0]] * 4

    found = answer(engine, same, sampling)
    last = next(iter(engine.answer([Prompt(prompts[0], 3)], sampling)))

    assert list(last.ids) == found[3]
    assert len(set(map(tuple, found))) > 1


def test_a_prompt_without_room_for_an_answer_is_refused(engine: VLLMEngine) -> None:
    with pytest.raises(DataError, match="512"):
        answer(engine, [[5] * MAX_LENGTH])


def test_a_killed_engine_is_restarted_with_the_rest(
    engine: VLLMEngine, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    found: dict[int, list[int]] = {}
    for x in engine.answer([Prompt(ids, 0) for ids in prompts], GREEDY):
        if not found:
            assert engine._runner._process is not None
            child = engine._runner._process._process.pid
            [core] = [pid for pid in children(child) if "EngineCore" in name_of(pid)]
            os.kill(core, signal.SIGKILL)
        found[x.index] = list(x.ids)

    assert [found[index] for index in range(NUM_PROMPTS)] == expected
    assert engine._runner._num_restarts == 1


def test_states_equal_transformers(
    engine: VLLMEngine,
    verifier: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    documents = [[*prompt, *ids] for prompt, ids in zip(prompts, expected, strict=True)]
    longest = [i for document in documents for i in document][: MAX_LENGTH - 1]
    documents += [longest, documents[0]]
    ids = [i for document in documents for i in document]
    rows = torch.arange(1, len(ids), 3)

    states = engine.capture(Packed(torch.tensor(ids), [*map(len, documents)], rows))

    aux: list[torch.Tensor] = []
    last: list[torch.Tensor] = []
    for document in documents:
        tokens = torch.tensor(document)
        hook = verifier.model.norm.register_forward_pre_hook(
            lambda _, given: last.append(given[0][0])
        )
        with torch.no_grad():
            out = verifier(tokens[None], output_hidden_states=True)
        hook.remove()
        aux.append(torch.cat([out.hidden_states[k][0] for k in sorted(LAYER_IDS)], dim=1))
    torch.testing.assert_close(states.aux, torch.cat(aux), rtol=0, atol=ATOL)
    torch.testing.assert_close(states.last, torch.cat(last)[rows], rtol=0, atol=ATOL)
    assert states.aux.abs().max() > 10


def test_a_second_capture_leaves_no_file(engine: VLLMEngine, prompts: list[list[int]]) -> None:
    ids = torch.tensor(prompts[0])

    one = engine.capture(Packed(ids, [len(ids)], torch.tensor([0])))
    two = engine.capture(Packed(torch.cat([ids, ids]), [len(ids)] * 2, torch.tensor([0])))

    torch.testing.assert_close(one.aux, two.aux[: len(ids)], rtol=0, atol=ATOL)
    assert engine._runner._states_dir is not None
    assert list(engine._runner._states_dir.iterdir()) == []


def test_a_server_of_vllm_answers_the_same(
    verifier: Any,
    prompts: list[list[int]],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # `vllm serve` of vllm-cpu misses the metadata of a package called vllm.
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model", VERIFIER_DIR)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    flags = (*FLAGS, "--dtype", "float32", "--host", "127.0.0.1", "--port", port)
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [os.environ["VLLM_PYTHON"], *module, *flags, "--served-model-name", "alias"],
            env=kept,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        answerer = connect(f"http://127.0.0.1:{port}", server)

        found = list(answerer.answer([Prompt(ids, 0) for ids in prompts], GREEDY))
    finally:
        server.terminate()  # so that it removes its shared memory
        server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    by_index = sorted(found, key=lambda x: x.index)
    assert [list(x.ids) for x in by_index] == expected
    assert [x.is_truncated for x in by_index] == [
        ids[-1] != verifier.generation_config.eos_token_id for ids in expected
    ]
    assert answerer.model == "alias"


def connect(url: str, server: "subprocess.Popen[bytes]") -> EndpointAnswerer:
    give_up_at = time.monotonic() + SERVE_SECONDS
    while time.monotonic() < give_up_at and server.poll() is None:
        with suppress(MachineError):
            return EndpointAnswerer(url, str(VERIFIER_DIR), 8, backoff_seconds=0.5)
    raise AssertionError("The server has not started")


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
