"""A package `vllm` that computes nothing; copied to where a child process imports it from.

`FAKE_VLLM` holds a JSON object that says what goes wrong; see `tests/unit/engines/fakes.py`.
"""

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
from safetensors.numpy import save_file

PLAN = json.loads(os.environ["FAKE_VLLM"])
FOLDER = Path(PLAN["folder"])
HIDDEN = PLAN.get("hidden", 6)
MAX_TOKENS = PLAN.get("max_tokens", 20)

__version__ = PLAN["version"]


class EngineArgs:
    def __init__(self, values: Namespace) -> None:
        self.values = values

    @staticmethod
    def add_cli_args(parser: ArgumentParser) -> ArgumentParser:
        for name in ("model", "dtype", "tensor-parallel-size", "max-model-len"):
            parser.add_argument(f"--{name}")
        for name in ("speculative-config", "kv-transfer-config"):
            parser.add_argument(f"--{name}", type=json.loads)
        for name in ("disable-log-stats", "trust-remote-code", "no-enable-prefix-caching"):
            parser.add_argument(f"--{name}", action="store_true")
        return parser

    @classmethod
    def from_cli_args(cls, values: Namespace) -> Self:
        return cls(values)


class SamplingParams:
    def __init__(self, **values: Any) -> None:
        self.values = values


class RequestOutputKind:
    FINAL_ONLY = 2


class UsageContext:
    LLM_CLASS = "llm"


class VLLMValidationError(Exception):
    pass


class ExampleHiddenStatesConnector:
    pass


class LLMEngine:
    def __init__(self, arguments: EngineArgs) -> None:
        self.arguments = arguments.values
        self.requests: list[tuple[str, list[int], dict[str, Any]]] = []
        self.num_finished = 0
        self.engine_core = SimpleNamespace(
            shutdown=lambda: note("shutdown"), resources=SimpleNamespace(engine_dead=False)
        )
        self.num_starts = len(list(FOLDER.glob("start-*")))
        (FOLDER / f"start-{self.num_starts}").write_text(str(os.getpid()))

    @classmethod
    def from_engine_args(cls, arguments: EngineArgs, usage_context: str) -> Self:
        assert usage_context == UsageContext.LLM_CLASS
        note(json.dumps(vars(arguments.values)))
        time.sleep(PLAN.get("load_seconds", 0))
        if PLAN.get("load_error"):
            sys.stderr.write("WARNING 01-01 00:00:00 [x.py:1] ImportError: harmless\n")
            sys.stderr.write("(EngineCore) ERROR 01-01 00:00:00 [x.py:2] ValueError: no memory\n")
            raise RuntimeError("Engine core initialization failed")
        if PLAN.get("helper"):
            helper = subprocess.Popen(["sh", "-c", PLAN["helper"]])
            (FOLDER / "helper").write_text(str(helper.pid))
        return cls(arguments)

    def get_metrics(self) -> list[Any]:
        """With a draft: of each answer 3 passes, of which 2 accepted the first token, 1 all."""
        assert not self.arguments.disable_log_stats
        draft = self.arguments.speculative_config
        if draft is None:
            return []
        accepted = [2, *[1] * (draft["num_speculative_tokens"] - 1)]
        counts: dict[str, dict[str, Any]] = {
            "num_drafts": {"value": 3 * self.num_finished},
            "num_accepted_tokens_per_pos": {"values": [x * self.num_finished for x in accepted]},
        }
        return [
            SimpleNamespace(name=f"vllm:spec_decode_{name}", **values)
            for name, values in counts.items()
        ]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def add_request(self, request_id: str, prompt: Any, sampling: SamplingParams) -> None:
        ids = prompt["prompt_token_ids"]
        note(f"request {self.num_starts} {request_id}")
        if len(ids) > MAX_TOKENS:
            raise VLLMValidationError(f"The decoder prompt is longer than {MAX_TOKENS}")
        self.requests.append((request_id, ids, sampling.values))

    def step(self) -> list[Any]:
        # Each start of the engine takes its number of answers from the plan, then fails.
        limits = PLAN.get("fails_after", [])
        if self.num_starts < len(limits) and self.num_finished == limits[self.num_starts]:
            self.engine_core.resources.engine_dead = bool(PLAN.get("is_killed"))
            if PLAN.get("hangs"):
                subprocess.run(["sleep", "600"], check=False)
            sys.stderr.write("torch.OutOfMemoryError: CUDA out of memory\n")
            sys.stderr.flush()
            os._exit(1)
        note(f"in work {len(self.requests)}")
        self.num_finished += 1
        request_id, ids, sampling = self.requests.pop()  # the last one first
        answer = [*reversed(ids), 1]
        reason = "stop" if len(answer) <= sampling["max_tokens"] else "length"
        output = SimpleNamespace(
            token_ids=answer[: sampling["max_tokens"]],
            finish_reason=PLAN.get("finish_reason", reason),
        )
        file = self.write_states(request_id, ids) if self.arguments.kv_transfer_config else None
        return [
            SimpleNamespace(
                request_id=request_id,
                finished=True,
                outputs=[output],
                kv_transfer_params=file and {"hidden_states_path": file},
            )
        ]

    def write_states(self, request_id: str, ids: list[int]) -> str:
        """State h of token i after layer k is 1000 i + 10 k + h."""
        folder = self.arguments.kv_transfer_config["kv_connector_extra_config"]
        file = Path(folder["shared_storage_path"], f"{request_id}.safetensors")
        note(f"states {file}")
        if PLAN.get("disk_is_full"):
            Path(f"{file}.failed").symlink_to("OSError: No space left on device")
            return str(file)
        draft = self.arguments.speculative_config["draft_model_config"]["hf_config"]
        layer_ids = np.array(draft["eagle_aux_hidden_state_layer_ids"])
        computed = np.array(ids) + (1 if request_id == PLAN.get("other_tokens") else 0)
        states = 1000 * computed[:, None, None] + 10 * layer_ids[:, None] + np.arange(HIDDEN)
        states = states * (not PLAN.get("is_zero"))
        tensors = {"hidden_states": states.astype(np.float32), "token_ids": computed}
        save_file(tensors, f"{file}.part")
        Path(f"{file}.part").rename(file)
        return str(file)


def note(line: str) -> None:
    with (FOLDER / "notes").open("a") as notes:
        notes.write(line + "\n")


# The process that imports this gives engines seconds to end, of which this one needs none.
child: Any = sys.modules["__main__"]
child.WATCH_SECONDS, child.END_SECONDS = 0.1, 0.2

# One module for all that is imported from.
own = sys.modules[__name__]
own.FlexibleArgumentParser = ArgumentParser  # type: ignore[attr-defined]
own.example_hidden_states_connector = own  # type: ignore[attr-defined]
for name in (
    "exceptions",
    "sampling_params",
    "usage.usage_lib",
    "utils.argparse_utils",
    "distributed.kv_transfer.kv_connector.v1",
):
    sys.modules[f"vllm.{name}"] = own
# The connector only names a type of it, and it takes a second to import.
sys.modules.setdefault("torch", SimpleNamespace(Tensor=object))  # type: ignore[arg-type]
