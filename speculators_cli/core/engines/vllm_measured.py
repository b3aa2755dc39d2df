"""MeasuredVLLM: vLLM in a process of its own, with or without a draft, while it is measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.measured import MeasuredRun
from speculators_cli.core.engines.vllm_engine import SILENT_SECONDS, sampling_parameters
from speculators_cli.core.engines.vllm_process import ProcessEndedError
from speculators_cli.core.engines.vllm_runner import VLLMRunner
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import (
    OLDEST_ANSWER,
    check_version,
    find_python,
    read_versions,
)
from speculators_cli.core.errors import DataError

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
        python = find_python(setup.python)
        flags = [
            *setup.flags,
            "--no-enable-prefix-caching",  # the same prompts again would take no time
            *(["--speculative-config", draft.to_json()] if draft else []),
        ]
        self._runner = VLLMRunner(
            setup, flags, name=f"`{setup.verifier}`{with_draft}", silent_seconds=SILENT_SECONDS
        )
        versions = read_versions(python)
        check_version(versions, OLDEST_ANSWER, python, what="Evaluations")
        self._fingerprint = {"engine": "vllm", **versions, "vllm_args": " ".join(setup.args)}

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
        process = self._runner.open(MODE)
        process.send(
            {
                "prompts": [list(prompt.ids) for prompt in prompts],
                "sampling": [sampling_parameters(sampling, prompt.seed) for prompt in prompts],
                "concurrency": concurrency,
            }
        )
        try:
            reply = self._runner.receive()
        except ProcessEndedError as error:
            process.kill()  # so that the log is complete
            raise self._runner.failed(f"vLLM {self._runner.explain(str(error))}") from None
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
        self._runner.close()
