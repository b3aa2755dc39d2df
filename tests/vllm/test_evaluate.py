"""`evaluate --engine vllm` and `--endpoint`: the counts of the engine that runs in process.

docs/contributing.md says how to install the engine; `VLLM_PYTHON` names its interpreter.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from speculators_cli.cli.app import run
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.engines.endpoint import EndpointAnswerer
from speculators_cli.core.errors import MachineError
from tests.chat_verifier import write_rows
from tests.vllm.exported_drafts import MAX_NEW_TOKENS, NUM_PROMPTS, VARIANTS, export, train

pytestmark = pytest.mark.vllm

FLAGS = ("--enforce-eager", "--gpu-memory-utilization", "0.2", "--max-model-len", "512")
SERVE_SECONDS = 600
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a run, and its export."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_rows(folder / "prompts.jsonl", [{"prompt": x} for x in read_prompts()[:NUM_PROMPTS]])
    export(train(VARIANTS["default"], folder), folder / "served")
    return folder


def evaluate(draft: Path, folder: Path, capsys: Capture, *flags: object) -> dict[str, Any]:
    usual = ("--prompts", folder / "prompts.jsonl", "--max-new-tokens", MAX_NEW_TOKENS)
    fixed = ("--num-speculative-tokens", 3, "--dtype", "float32", "--json")
    capsys.readouterr()
    assert run(["evaluate", *map(str, (draft, *usual, *fixed, *flags))]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def assert_same_counts(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("num_passes", "acceptance_rates", "num_answer_tokens"):
        assert found[key] == expected[key], key
    # A draft that is never accepted would agree too.
    assert found["acceptance_length"] > 1.25


@pytest.mark.parametrize("kind", ["export", "checkpoint"])
def test_the_engine_counts_what_the_process_counts(
    folder: Path, kind: str, capsys: Capture
) -> None:
    draft = folder / "served" if kind == "export" else train(VARIANTS["default"], folder)
    expected = evaluate(draft, folder, capsys)

    found = evaluate(
        draft,
        folder,
        capsys,
        *("--engine", "vllm", "--vllm-python", os.environ["VLLM_PYTHON"]),
        *("--vllm-args", " ".join(FLAGS), "--concurrency", "1,4", "--repeats", 2),
    )

    assert_same_counts(found, expected)
    assert found["is_lossless"]
    assert [x["concurrency"] for x in found["throughput"]] == [1, 4]
    assert all(len(x["tokens_per_second"]) == 2 for x in found["throughput"])
    # Together, prompts take less time.
    rates = [max(x["tokens_per_second"]) for x in found["throughput"]]
    assert rates[1] > rates[0]


def test_a_server_counts_what_the_process_counts(folder: Path, capsys: Capture) -> None:
    draft = folder / "served"
    expected = evaluate(draft, folder, capsys)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    loaded = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3}
    # `vllm serve` of vllm-cpu misses the metadata of a package called vllm.
    module = ("-m", "vllm.entrypoints.openai.api_server", "--model", VERIFIER_DIR)
    place = ("--dtype", "float32", "--host", "127.0.0.1", "--port", port)
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [
                os.environ["VLLM_PYTHON"],
                *module,
                *FLAGS,
                *place,
                *("--speculative-config", json.dumps(loaded)),
            ],
            env=kept,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server)

        found = evaluate(
            draft, folder, capsys, "--endpoint", url, "--concurrency", "2", "--repeats", 1
        )
    finally:
        server.terminate()  # so that it removes its shared memory
        server.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    assert_same_counts(found, expected)
    assert found["throughput"][0]["speedup"] is None
    assert found["is_lossless"] is None


def wait_for(url: str, server: "subprocess.Popen[bytes]") -> None:
    give_up_at = time.monotonic() + SERVE_SECONDS
    while time.monotonic() < give_up_at and server.poll() is None:
        with suppress(MachineError):
            EndpointAnswerer(url, str(VERIFIER_DIR), 1, backoff_seconds=0.5)
            return
    raise AssertionError("The server has not started")
