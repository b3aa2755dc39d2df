"""EndpointAnswerer: answers of a verifier that a running OpenAI-compatible server has loaded."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from speculators_cli.core.engines.engine import Answer, Prompt, Sampling
from speculators_cli.core.engines.server import Server
from speculators_cli.core.errors import MachineError

T = TypeVar("T")

FLAG = "--endpoint"
BACKOFF_SECONDS = 1.0
ANSWER_SECONDS = 1800.0  # a long answer among many others takes minutes
QUESTION_SECONDS = 30.0
# A server takes what is not sent from the verifier's generation config.
PLAIN = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class EndpointAnswerer:
    """Answers prompts through a server; token ids are those of its engine.

    Args:
        url: Of the server, with or without `/v1`.
        model: The verifier. If the server has another name for its only model, that is used.
        concurrency: Requests at a time.
        api_key: Sent as a bearer token.
        answer_seconds: Maximum duration of a request.
        backoff_seconds: Before the first of three retries; doubled before each further one.

    Raises:
        SettingsError: The address cannot be used.
        MachineError: The server cannot be reached, or has several models of other names.
    """

    def __init__(
        self,
        url: str,
        model: str,
        concurrency: int,
        *,
        api_key: str | None = None,
        answer_seconds: float = ANSWER_SECONDS,
        backoff_seconds: float = BACKOFF_SECONDS,
    ) -> None:
        self._server = Server(url, flag=FLAG, api_key=api_key, backoff_seconds=backoff_seconds)
        self._concurrency = concurrency
        self._answer_seconds = answer_seconds
        self.model = self._find_model(model)  # its name on the server
        self._fingerprint = {"engine": "endpoint", "model": self.model, **self._find_version()}

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The model's name on the server, and the version of vLLM if the server has it."""
        return self._fingerprint

    def answer(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Answer]:
        """Answer prompts; answers are yielded as they are finished, in any order.

        Raises:
            MachineError: The server fails, or returns no token ids.
        """

        def answer_one(index: int) -> Answer:
            return self._answer(index, prompts[index], sampling)

        return _map_unordered(answer_one, len(prompts), num_threads=self._concurrency)

    def close(self) -> None:
        """Nothing: connections end with their requests."""

    def _answer(self, index: int, prompt: Prompt, sampling: Sampling) -> Answer:
        ids = list(prompt.ids)
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "return_token_ids": True,
            **({} if sampling.temperature == 0 else {"seed": prompt.seed}),
            **PLAIN,
        }
        reply = self._server.ask("/v1/completions", body, seconds=self._answer_seconds)
        choice = _first_choice(reply)
        if not isinstance(choice.get("token_ids"), list):
            raise self._error("returns answers without token ids; those of a text are not unique")
        if choice.get("prompt_token_ids", ids) != ids:
            raise self._error(f"has answered other tokens than those of prompt {index}")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise self._error(f"has ended the answer to prompt {index} by `{reason}`")
        return Answer(index, tuple(choice["token_ids"]), reason == "length")

    def _error(self, what: str) -> MachineError:
        return MachineError(
            f"`{self._server.url}` {what}",
            hint="Serve the verifier with a current `vllm serve`, which has `return_token_ids`",
        )

    def _find_model(self, model: str) -> str:
        reply = self._server.ask("/v1/models", seconds=QUESTION_SECONDS)
        models = reply.get("data")
        if not isinstance(models, list) or not all(isinstance(x, dict) for x in models):
            raise self._error("has no list of models")
        # vLLM's `root` is the folder or hub id of a model; adapters have a `parent`.
        for served in models:
            if model in (served.get("id"), served.get("root")):
                return str(served["id"])
        names = [str(served.get("id")) for served in models if not served.get("parent")]
        if len(names) != 1:
            raise MachineError(
                f"`{self._server.url}` does not serve `{model}`, but "
                f"{', '.join(f'`{name}`' for name in names) or 'no model'}",
                hint=f"Serve it there, or pass the address of its server with `{FLAG}`",
            )
        return names[0]

    def _find_version(self) -> dict[str, str]:
        try:
            reply = self._server.ask("/version", seconds=QUESTION_SECONDS, num_retries=0)
        except MachineError:  # vLLM has it, others may not
            return {}
        version = reply.get("version")
        return {"vllm": version} if isinstance(version, str) else {}


def _first_choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    found = choices[0] if isinstance(choices, list) and choices else {}
    return found if isinstance(found, dict) else {}


def _map_unordered(
    function: Callable[[int], T], num_items: int, *, num_threads: int
) -> Iterator[T]:
    """Call a function for each index in threads; the first error ends it."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(num_items):
        waiting.put(index)
    done: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()
    is_over = threading.Event()
    try:
        for _ in range(min(num_threads, num_items)):
            # Daemons: a request in flight does not keep an interrupted command alive.
            arguments = (function, waiting, done, is_over)
            threading.Thread(target=_work, args=arguments, daemon=True).start()
        for _ in range(num_items):
            result = done.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        is_over.set()


def _work(
    function: Callable[[int], T],
    waiting: "queue.SimpleQueue[int]",
    done: "queue.SimpleQueue[T | Exception]",
    is_over: threading.Event,
) -> None:
    while not is_over.is_set():
        try:
            index = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            done.put(function(index))
        except Exception as error:  # noqa: BLE001 - raised where results are read
            done.put(error)
            return
