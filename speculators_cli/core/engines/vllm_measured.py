"""MeasuredVLLM: vLLM in a process of its own, with or without a draft, while it is measured."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.measured import MeasuredRun
from speculators_cli.core.engines.vllm_engine import (
    LOAD_SECONDS,
    SILENT_SECONDS,
    sampling_parameters,
)
from speculators_cli.core.engines.vllm_process import (
    ProcessEndedError,
    VLLMProcess,
    first_error,
    tail,
)
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import (
    OLDEST_ANSWER,
    check_version,
    find_python,
    read_versions,
)
from speculators_cli.core.errors import DataError, MachineError

MODE = "measure"


@dataclass(frozen=True)
class ServedDraft:
    """A draft that vLLM loads."""

    name_or_path: str
    method: str  # as vLLM calls the algorithm
    num_draft_tokens: int

    def to_json(self) -> str:
        """The value of `--speculative-config`."""
        return json.dumps(
            {
                "method": self.method,
                "model": self.name_or_path,
                "num_speculative_tokens": self.num_draft_tokens,
            }
        )


class MeasuredVLLM:
    """A verifier in vLLM, which is loaded with the first run.

    Args:
        setup: The verifier, and how vLLM is started.
        draft: None: the verifier alone.

    Raises:
        SettingsError: The interpreter cannot be started.
        MachineError: It has no vLLM, or one that is too old.
    """

    def __init__(self, setup: VLLMSetup, draft: ServedDraft | None) -> None:
        with_draft = f" with draft `{draft.name_or_path}`" if draft else ""
        self._name = f"`{setup.verifier}`{with_draft}"
        self._python = find_python(setup.python)
        self._flags = [
            *setup.flags,
            "--no-enable-prefix-caching",  # the same prompts again would take no time
            *(["--speculative-config", draft.to_json()] if draft else []),
        ]
        versions = read_versions(self._python)
        check_version(versions, OLDEST_ANSWER, self._python, what="Evaluations")
        self._fingerprint = {"engine": "vllm", **versions, "vllm_args": " ".join(setup.args)}
        self._log_dir: Path | None = None
        self._process: VLLMProcess | None = None

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """Versions of vLLM, torch and transformers, and flags; the engine is not loaded."""
        return self._fingerprint

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, concurrency: int) -> MeasuredRun:
        """Answer prompts, so many at a time.

        Raises:
            DataError: vLLM refuses a prompt: it is too long, say.
            MachineError: vLLM cannot be loaded, or has failed.
        """
        process = self._open()
        process.send(
            {
                "prompts": [list(prompt.ids) for prompt in prompts],
                "sampling": [sampling_parameters(sampling, prompt.seed) for prompt in prompts],
                "concurrency": concurrency,
            }
        )
        try:
            reply = process.receive(silent_seconds=SILENT_SECONDS)
        except ProcessEndedError as error:
            raise self._failed(process, "vLLM {reason}", str(error)) from None
        if "refused" in reply:
            raise DataError(
                f"vLLM refuses a prompt: {reply['refused']}",
                hint='Leave out what is too long, or pass `--vllm-args "--max-model-len N"`',
            )
        return MeasuredRun(
            answers=tuple(tuple(answer) for answer in reply["answers"]),
            seconds=reply["seconds"],
            num_passes=reply["num_passes"],
            num_accepted=tuple(reply["num_accepted"]),
        )

    def close(self) -> None:
        """End vLLM and remove its files; the log of a failure is kept."""
        if self._process is not None:
            self._process.close()
            self._process = None
        if self._log_dir is not None:
            shutil.rmtree(self._log_dir, ignore_errors=True)
            self._log_dir = None

    def _open(self) -> VLLMProcess:
        if self._process is not None:
            return self._process
        self._log_dir = Path(tempfile.mkdtemp(prefix="speculators-vllm-"))
        log_file = self._log_dir / f"{MODE}.log"
        process = VLLMProcess(self._python, MODE, {"flags": self._flags}, log_file=log_file)
        try:
            process.receive(silent_seconds=LOAD_SECONDS)
        except ProcessEndedError as error:
            message = f"vLLM cannot load {self._name}: {{reason}}"
            raise self._failed(process, message, f"it {error}") from None
        except BaseException:
            process.kill()  # while it loads it would end late by itself
            raise
        self._process = process
        return process

    def _failed(self, process: VLLMProcess, message: str, reason: str) -> MachineError:
        process.kill()  # so that the log is complete
        self._process, self._log_dir = None, None  # the log is kept
        log_file = process.log_file
        found = first_error(log_file)
        message = message.replace("{reason}", found or reason)
        lines = tail(log_file)
        return MachineError(
            f"{message}\n{lines}" if lines else message,
            hint=f"See the whole log, `{log_file}`; change the engine with `--vllm-args`",
        )
