"""VLLMEngine: answers and hidden states of a verifier that vLLM runs, in a process of its own."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.engines.engine import Answer, CapturedStates, Packed, Prompt, Sampling
from speculators_cli.core.engines.vllm_process import (
    ProcessEndedError,
    VLLMProcess,
    first_error,
    tail,
)
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import (
    OLDEST_ANSWER,
    OLDEST_CAPTURE,
    check_version,
    find_python,
    read_versions,
)
from speculators_cli.core.errors import DataError, MachineError
from speculators_cli.core.files import format_bytes
from speculators_cli.core.reading import UnreadableError, open_safetensors

T = TypeVar("T")

ANSWER, CAPTURE = "answer", "capture"
LOAD_SECONDS = 3600.0
SILENT_SECONDS = 600.0  # far longer than a step of the engine
FILE_POLL_SECONDS = 0.001
SHARED_DIR = Path("/dev/shm")  # noqa: S108 -- a folder of our own is made in it
# States of a packed sequence: 8192 tokens, 4 layers, 8192 hidden, 2 bytes are 0.5 GiB.
SHARED_BYTES = 2 * 2**30
FAILED = ".failed"  # as in vllm_connector.py


class VLLMEngine:
    """A verifier in vLLM, which is loaded when first used.

    Answers and hidden states come from two configurations of the engine, one at a time: a change
    from one to the other loads the verifier again.

    Args:
        setup: The verifier, and how vLLM is started.
        layer_ids: Aux layers; id k is the output after k layers.
        num_layers: Layers of the verifier.
        silent_seconds: Without a sign of life for so long, a working engine counts as hung.

    Raises:
        SettingsError: The interpreter cannot be started.
        MachineError: It has no vLLM, or one that is too old.
    """

    def __init__(
        self,
        setup: VLLMSetup,
        *,
        layer_ids: Sequence[int],
        num_layers: int,
        silent_seconds: float = SILENT_SECONDS,
    ) -> None:
        self._verifier = setup.verifier
        self._layer_ids = sorted(set(layer_ids))
        self._captured_ids = sorted({*layer_ids, num_layers})
        self._python = find_python(setup.python)
        self._silent_seconds = silent_seconds
        self._flags = [*setup.flags, "--disable-log-stats"]
        self._process: VLLMProcess | None = None
        self._mode = ""
        self._log_start = 0
        self._num_restarts = 0
        self._log_dir: Path | None = None
        self._states_dir: Path | None = None
        self._versions = read_versions(self._python)
        check_version(self._versions, OLDEST_ANSWER, self._python, what="Answers")
        self._fingerprint = {
            "engine": "vllm",
            **{name: self._versions[name] for name in sorted(self._versions)},
            "dtype": setup.dtype,
            "tensor_parallel_size": str(setup.tensor_parallel_size),
            "vllm_args": " ".join(setup.args),
        }

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Versions of vLLM, torch and transformers, dtype and flags; the engine is not loaded."""
        return self._fingerprint

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Answer prompts; answers are yielded as they are finished, in any order.

        Raises:
            DataError: vLLM refuses a prompt: it is too long, say.
            MachineError: vLLM cannot be loaded, or has failed twice.
        """
        requests = [
            {
                "index": index,
                "ids": list(prompt.ids),
                "sampling": sampling_parameters(sampling, prompt.seed),
            }
            for index, prompt in enumerate(prompts)
        ]

        def take(request: Mapping[str, Any], reply: Mapping[str, Any]) -> Answer:
            if reply["reason"] not in ("stop", "length"):
                raise ProcessEndedError(f"has ended an answer by `{reply['reason']}`")
            return Answer(request["index"], tuple(reply["ids"]), reply["reason"] == "length")

        return self._run(ANSWER, requests, take)

    def capture(self, packed: Packed) -> CapturedStates:
        """Compute the hidden states of packed documents, one request each; on the CPU.

        Raises:
            DataError: vLLM refuses a document: it is too long, say.
            MachineError: vLLM cannot be loaded, has failed twice, or has computed other tokens.
        """
        check_version(self._versions, OLDEST_CAPTURE, self._python, what="Hidden states")
        documents = [x.tolist() for x in packed.input_ids.split(list(packed.lengths))]
        requests = [
            {"index": index, "ids": ids, "sampling": {"max_tokens": 1, "temperature": 0.0}}
            for index, ids in enumerate(documents)
        ]
        found = dict(self._run(CAPTURE, requests, self._take_states))
        states = torch.cat([found[index] for index in range(len(documents))])
        # Columns are those of the captured ids, ascending; the last one is before the final norm.
        aux = [self._captured_ids.index(k) for k in self._layer_ids]
        own = states if packed.aux_rows is None else states[packed.aux_rows]
        own = F.pad(own[:, aux].flatten(1), (0, 0, 0, packed.num_zero_rows))
        return CapturedStates(own, states[packed.rows, -1])

    def close(self) -> None:
        """End vLLM and remove its files; the log of a failure is kept."""
        self._stop()
        if self._log_dir is not None:
            shutil.rmtree(self._log_dir, ignore_errors=True)
            self._log_dir = None

    def _run(
        self,
        mode: str,
        requests: Sequence[Mapping[str, Any]],
        take: Callable[[Mapping[str, Any], Mapping[str, Any]], T],
    ) -> Iterator[T]:
        outstanding = {request["index"]: request for request in requests}
        try:
            while outstanding:
                try:
                    for reply in self._replies(mode, outstanding):
                        request = outstanding[reply["index"]]
                        if "refused" in reply:
                            raise DataError(
                                f"vLLM refuses tokens of `{self._verifier}`: {reply['refused']}",
                                hint="Leave out what is too long, or pass "
                                '`--vllm-args "--max-model-len N"`',
                            )
                        result = take(request, reply)
                        del outstanding[reply["index"]]
                        yield result
                except ProcessEndedError as error:
                    self._recover(error)
        finally:
            if outstanding:  # what is in work for nobody would delay the next call
                self._stop()

    def _replies(
        self, mode: str, outstanding: Mapping[int, Mapping[str, Any]]
    ) -> Iterator[Mapping[str, Any]]:
        process = self._open(mode)
        for request in outstanding.values():
            process.send(request)
        while outstanding:
            yield process.receive(silent_seconds=self._silent_seconds)

    def _open(self, mode: str) -> VLLMProcess:
        if self._process is not None and self._mode == mode:
            return self._process
        self._stop()
        if self._log_dir is None:
            self._log_dir = Path(tempfile.mkdtemp(prefix="speculators-vllm-"))
        job: dict[str, Any] = {"flags": self._flags}
        if mode == CAPTURE:
            self._states_dir = _make_states_dir()
            job |= {"layer_ids": self._captured_ids, "states_dir": str(self._states_dir)}
        log_file = self._log_dir / f"{mode}.log"
        self._log_start = log_file.stat().st_size if log_file.exists() else 0
        self._process = VLLMProcess(self._python, mode, job, log_file=log_file)
        self._mode = mode
        try:
            self._process.receive(silent_seconds=LOAD_SECONDS)
        except ProcessEndedError as error:
            self._process.kill()  # so that the log is complete
            reason = first_error(log_file, start=self._log_start) or f"it {error}"
            raise self._failed(f"vLLM cannot load `{self._verifier}`: {reason}") from None
        except BaseException:
            self._process.kill()  # while it loads it would end late by itself
            raise
        return self._process

    def _recover(self, error: ProcessEndedError) -> None:
        """Let the next requests start another process, once."""
        assert self._process is not None
        self._process.kill()
        if self._num_restarts:
            found = first_error(self._process.log_file, start=self._log_start)
            reason = f"{error}, for the second time" + (f": {found}" if found else "")
            raise self._failed(f"vLLM {reason}") from None
        self._num_restarts += 1
        self._stop()

    def _failed(self, message: str) -> MachineError:
        assert self._process is not None
        log_file = self._process.log_file
        self._stop()
        self._log_dir = None  # kept
        lines = tail(log_file)
        return MachineError(
            f"{message}\n{lines}" if lines else message,
            hint=f"See the whole log, `{log_file}`; change the engine with `--vllm-args`",
        )

    def _stop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._states_dir is not None:
            shutil.rmtree(self._states_dir, ignore_errors=True)
            self._states_dir = None

    def _take_states(
        self, request: Mapping[str, Any], reply: Mapping[str, Any]
    ) -> tuple[int, Tensor]:
        """Read and remove the file of a request: [tokens, ids, hidden]."""
        file, ids = Path(reply["file"]), request["ids"]
        self._wait_for(file)
        try:
            with open_safetensors(file) as content:
                states = content.get_tensor("hidden_states").clone()
                token_ids = content.get_tensor("token_ids").tolist()
        except UnreadableError as error:
            raise ProcessEndedError(f"has written a file that cannot be used: {error}") from None
        file.unlink()
        if token_ids != ids or states.shape[:2] != (len(ids), len(self._captured_ids)):
            raise self._failed(
                f"vLLM has computed hidden states of other tokens: {len(token_ids)} tokens, "
                f"states {list(states.shape)}, for document {request['index']} of {len(ids)}"
            )
        return request["index"], states

    def _wait_for(self, file: Path) -> None:
        assert self._process is not None
        failed = file.with_name(file.name + FAILED)
        give_up_at = time.monotonic() + self._silent_seconds
        while not file.exists():
            if failed.is_symlink():
                free = format_bytes(shutil.disk_usage(file.parent).free)
                raise self._failed(
                    f"vLLM cannot write hidden states to `{file.parent}`, {free} free: "
                    f"{failed.readlink()}"
                )
            if not self._process.is_alive or time.monotonic() > give_up_at:
                raise ProcessEndedError("has ended without the hidden states of a document")
            time.sleep(FILE_POLL_SECONDS)


def sampling_parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
    """How vLLM calls the parameters of a request."""
    content = asdict(sampling)
    content["max_tokens"] = content.pop("max_new_tokens")
    # Greedy answers need no random numbers, and a generator each is slow.
    return content if sampling.temperature == 0 else content | {"seed": seed}


def _make_states_dir() -> Path:
    is_usable = SHARED_DIR.is_dir() and shutil.disk_usage(SHARED_DIR).free >= SHARED_BYTES
    parent = SHARED_DIR if is_usable else None
    return Path(tempfile.mkdtemp(prefix="speculators-vllm-states-", dir=parent))
