"""VLLMEngine: answers and hidden states of a verifier that vLLM runs, in a process of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.engines.captured_layers import CapturedLayers, OtherTokensError
from speculators_cli.core.engines.engine import Answer, CapturedStates, Packed, Prompt, Sampling
from speculators_cli.core.engines.vllm_process import ProcessEndedError
from speculators_cli.core.engines.vllm_runner import CAPTURE, VLLMRunner
from speculators_cli.core.engines.vllm_setup import VLLMSetup
from speculators_cli.core.engines.vllm_version import (
    OLDEST_ANSWER,
    OLDEST_CAPTURE,
    check_version,
    find_python,
    read_versions,
)
from speculators_cli.core.errors import DataError
from speculators_cli.core.reading import UnreadableError

T = TypeVar("T")

ANSWER = "answer"  # a mode of the child
SILENT_SECONDS = 600.0  # far longer than a step of the engine
CAPTURE_SAMPLING = {"max_tokens": 1, "temperature": 0.0}  # of a request for hidden states


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
        self._layers = CapturedLayers(layer_ids, num_layers)
        self._python = find_python(setup.python)
        self._runner = VLLMRunner(setup, engine_flags(setup), silent_seconds=silent_seconds)
        self._versions = read_versions(self._python)
        check_version(self._versions, OLDEST_ANSWER, self._python, what="Answers")
        self._fingerprint = fingerprint_of(setup, self._versions)

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
            {"index": index, "ids": ids, "sampling": CAPTURE_SAMPLING}
            for index, ids in enumerate(documents)
        ]
        found = dict(self._run(CAPTURE, requests, self._take_states))
        states = torch.cat([found[index] for index in range(len(documents))])
        own = states if packed.aux_rows is None else states[packed.aux_rows]
        own = F.pad(own[:, self._layers.aux_columns].flatten(1), (0, 0, 0, packed.num_zero_rows))
        return CapturedStates(own, states[packed.rows, -1])

    def close(self) -> None:
        """End vLLM and remove its files; the log of a failure is kept."""
        self._runner.close()

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
                            raise refusal(self._verifier, reply["refused"])
                        result = take(request, reply)
                        del outstanding[reply["index"]]
                        yield result
                except ProcessEndedError as error:
                    self._runner.recover(error)
        finally:
            if outstanding:  # what is in work for nobody would delay the next call
                self._runner.stop()

    def _replies(
        self, mode: str, outstanding: Mapping[int, Mapping[str, Any]]
    ) -> Iterator[Mapping[str, Any]]:
        job = {"layer_ids": self._layers.ids} if mode == CAPTURE else {}
        process = self._runner.open(mode, **job)
        for request in outstanding.values():
            process.send(request)
        while outstanding:
            yield self._runner.receive()

    def _take_states(
        self, request: Mapping[str, Any], reply: Mapping[str, Any]
    ) -> tuple[int, Tensor]:
        """Read and remove the file of a request: [tokens, ids, hidden]."""
        file, index = Path(reply["file"]), request["index"]
        self._runner.wait_for(file)
        try:
            return index, self._layers.read(file, request["ids"])
        except UnreadableError as error:
            raise ProcessEndedError(f"has written a file that cannot be used: {error}") from None
        except OtherTokensError as error:
            raise self._runner.failed(f"{error}, for document {index}") from None


def engine_flags(setup: VLLMSetup) -> list[str]:
    """Return the flags of an engine that answers or captures."""
    return [*setup.flags, "--disable-log-stats"]


def fingerprint_of(setup: VLLMSetup, versions: Mapping[str, str]) -> Mapping[str, str]:
    """Return everything that results depend on besides verifier, tokens and layer ids."""
    return {
        "engine": "vllm",
        **{name: versions[name] for name in sorted(versions)},
        "dtype": setup.dtype,
        "tensor_parallel_size": str(setup.tensor_parallel_size),
        "vllm_args": " ".join(setup.args),
    }


def refusal(verifier: str, reason: str) -> DataError:
    """Return the error for tokens that vLLM refuses."""
    return DataError(
        f"vLLM refuses tokens of `{verifier}`: {reason}",
        hint='Leave out what is too long, or pass `--vllm-args "--max-model-len N"`',
    )


def sampling_parameters(sampling: Sampling, seed: int) -> dict[str, Any]:
    """How vLLM calls the parameters of a request."""
    content = asdict(sampling)
    content["max_tokens"] = content.pop("max_new_tokens")
    # Greedy answers need no random numbers, and a generator each is slow.
    return content if sampling.temperature == 0 else content | {"seed": seed}
