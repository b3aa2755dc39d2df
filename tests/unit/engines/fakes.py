"""Engines that run under a package `vllm` of our own, and what they left behind."""

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from speculators_cli.core.engines import vllm_process
from speculators_cli.core.engines.engine import Packed
from speculators_cli.core.engines.vllm_engine import VLLMEngine
from speculators_cli.core.engines.vllm_setup import VLLMSetup

FAKE_FILE = Path(__file__).with_name("fake_vllm.py")
NUM_LAYERS = 8


@dataclass(frozen=True)
class FakeVLLM:
    """A package `vllm` that the child of an engine imports."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def plan(self, **plan: Any) -> None:
        """Say what goes wrong in processes that start from now on.

        Args:
            plan: `fails_after`: of each start, the number of answers after which the process
                ends; with `hangs` it does nothing any more instead, with `is_killed` too because
                its engine has ended; `load_error`; `load_seconds`; `finish_reason`;
                `other_tokens`: the document whose states are of other tokens; `disk_is_full`;
                `hidden`: width of the states; `is_zero`: whether these are all zero;
                `max_tokens`: of a prompt;
                `helper`: a command that the engine starts and leaves running; `version`.
        """
        content = {"version": "0.33.0", "folder": str(self.folder), **plan}
        self.monkeypatch.setenv("FAKE_VLLM", json.dumps(content))

    def engine(self, layer_ids: Sequence[int] = (5, 2), **options: Any) -> VLLMEngine:
        silent = {name: options.pop(name) for name in ("silent_seconds",) if name in options}
        setup = VLLMSetup("org/verifier", "float32", **options)
        return VLLMEngine(setup, layer_ids=layer_ids, num_layers=NUM_LAYERS, **silent)

    def notes(self, start: str) -> list[str]:
        """Rest of the lines of the engine's notes that begin so."""
        file = self.folder / "notes"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix(start) for line in lines if line.startswith(start)]

    def pids(self) -> list[int]:
        """Processes of the engine's starts, and those they have started."""
        files = [*self.folder.glob("start-*"), *self.folder.glob("helper")]
        return [int(file.read_text()) for file in files]


def write_fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    package = folder / "packages/vllm"
    package.mkdir(parents=True)
    shutil.copy(FAKE_FILE, package / "__init__.py")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    # Where nobody waits for processes that have lost their parent, they count as running.
    monkeypatch.setattr(vllm_process, "KILL_SECONDS", 0.3)
    fake = FakeVLLM(folder, monkeypatch)
    fake.plan()
    return fake


def pack(documents: Sequence[Sequence[int]], rows: Sequence[int]) -> Packed:
    ids = [i for document in documents for i in document]
    return Packed(torch.tensor(ids), [*map(len, documents)], torch.tensor(rows))


def have_ended(pids: Sequence[int], *, within_seconds: float = 15) -> bool:
    """Whether processes end in time; one that nobody has waited for has ended as well."""
    give_up_at = time.monotonic() + within_seconds
    while any(_is_running(pid) for pid in pids):
        if time.monotonic() > give_up_at:
            return False
        time.sleep(0.05)
    return True


def _is_running(pid: int) -> bool:
    assert sys.platform == "linux"
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"
