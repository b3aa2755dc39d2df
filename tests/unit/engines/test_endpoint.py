"""EndpointAnswerer against a server of this machine."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from speculators_cli.core.engines.endpoint import EndpointAnswerer
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import MachineError, SettingsError
from tests.unit.engines.local_server import HANG_UP, Body, serving

MODEL = "org/verifier"
PROMPTS = [Prompt([10 + i, 20 + i], seed=i) for i in range(7)]
SAMPLING = Sampling(max_new_tokens=8, temperature=0.7, top_p=0.9)


def complete(body: Body) -> Body:
    """The prompt backwards, and an end token."""
    ids = [*reversed(body["prompt"]), 1]
    limit = body["max_tokens"]
    choice = {
        "token_ids": ids[:limit],
        "prompt_token_ids": body["prompt"],
        "finish_reason": "stop" if len(ids) <= limit else "length",
        "text": "?",
    }
    return {"choices": [choice]}


@dataclass
class FakeServer:
    """What a server returns, and what it has been sent."""

    models: list[Body] = field(default_factory=lambda: [{"id": MODEL, "root": MODEL}])
    complete: Callable[[Body], Body] = complete
    failures: list[int] = field(default_factory=list)  # status of the next requests
    bodies: list[Body] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    num_requests: int = 0
    gate: threading.Barrier | None = None
    url: str = ""

    def answerer(
        self, model: str = MODEL, concurrency: int = 3, **options: Any
    ) -> EndpointAnswerer:
        return EndpointAnswerer(self.url, model, concurrency, backoff_seconds=0.001, **options)

    def reply(self, body: Body, headers: Mapping[str, str]) -> tuple[int, Body]:
        self.num_requests += 1
        self.bodies.append(body)
        self.headers.append(headers)
        if self.gate is not None:
            self.gate.wait(timeout=20)
        status = self.failures.pop(0) if self.failures else 200
        if status == 200:
            return status, self.complete(body)
        return status, {"error": {"message": "no room", "code": status}}


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    pages: Mapping[str, Callable[[], Body]] = {
        "/v1/models": lambda: {"data": fake.models},
        "/version": lambda: {"version": "0.33.0"},
    }
    with serving(pages, fake.reply) as fake.url:
        yield fake


def test_answers_are_the_servers_ids_by_prompt(server: FakeServer) -> None:
    answerer = server.answerer()

    found = list(answerer.answer(PROMPTS, Sampling(max_new_tokens=2)))

    assert {x.index: list(x.ids) for x in found} == {i: [20 + i, 10 + i] for i in range(7)}
    assert all(x.is_truncated for x in found)
    assert not next(iter(answerer.answer(PROMPTS[:1], SAMPLING))).is_truncated


def test_a_request_has_ids_seed_and_nothing_of_the_generation_config(server: FakeServer) -> None:
    list(server.answerer(api_key="secret").answer(PROMPTS[2:3], SAMPLING))

    assert server.bodies == [
        {
            "model": MODEL,
            "prompt": [12, 22],
            "max_tokens": 8,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 2,
            "return_token_ids": True,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
    ]
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_greedy_answers_need_no_seed(server: FakeServer) -> None:
    list(server.answerer().answer(PROMPTS[:1], Sampling(max_new_tokens=2)))

    assert "seed" not in server.bodies[0]


def test_requests_are_in_flight_together(server: FakeServer) -> None:
    # Each waits for two others: fewer at a time would break the barrier.
    server.gate = threading.Barrier(3)

    found = list(server.answerer(concurrency=3).answer(PROMPTS[:6], SAMPLING))

    assert len(found) == 6


@pytest.mark.parametrize("failures", [[500, 503, 429], [HANG_UP], [HANG_UP, 502]])
def test_a_busy_server_is_asked_again(server: FakeServer, failures: list[int]) -> None:
    server.failures = [*failures]

    found = list(server.answerer(concurrency=1).answer(PROMPTS, SAMPLING))

    assert {x.index: list(x.ids) for x in found} == {i: [20 + i, 10 + i, 1] for i in range(7)}
    assert server.num_requests == 7 + len(failures)


def test_after_three_retries_the_url_and_the_status_are_named(server: FakeServer) -> None:
    server.failures = [503] * 4

    with pytest.raises(MachineError, match=r"fails \(4 times\): status 503, no room") as raised:
        list(server.answerer().answer(PROMPTS[:1], SAMPLING))

    assert f"{server.url}/v1/completions" in raised.value.message
    assert server.num_requests == 4


def test_a_refused_request_is_not_sent_again(server: FakeServer) -> None:
    server.failures = [400]

    with pytest.raises(MachineError, match="fails: status 400, no room"):
        list(server.answerer().answer(PROMPTS[:1], SAMPLING))

    assert server.num_requests == 1


def test_an_error_ends_all_threads(server: FakeServer) -> None:
    server.failures = [400]

    with pytest.raises(MachineError):
        list(server.answerer(concurrency=1).answer(PROMPTS, SAMPLING))

    assert server.num_requests == 1


def test_a_server_without_token_ids_is_refused(server: FakeServer) -> None:
    server.complete = lambda _: {"choices": [{"text": "?", "finish_reason": "stop"}]}

    with pytest.raises(MachineError, match="without token ids") as raised:
        list(server.answerer().answer(PROMPTS, SAMPLING))

    assert "vllm serve" in str(raised.value.hint)


def test_answers_to_other_tokens_are_refused(server: FakeServer) -> None:
    server.complete = lambda body: complete({**body, "prompt": [3]})

    with pytest.raises(MachineError, match="other tokens"):
        list(server.answerer().answer(PROMPTS, SAMPLING))


def test_an_aborted_answer_is_an_error(server: FakeServer) -> None:
    choice = {"token_ids": [4], "finish_reason": "abort"}
    server.complete = lambda _: {"choices": [choice]}

    with pytest.raises(MachineError, match="`abort`"):
        list(server.answerer().answer(PROMPTS, SAMPLING))


@pytest.mark.parametrize(
    ("models", "name"),
    [
        ([{"id": "other"}, {"id": MODEL}], MODEL),
        ([{"id": "other"}, {"id": "alias", "root": MODEL}], "alias"),
        ([{"id": "alias"}], "alias"),
        ([{"id": "adapter", "parent": "alias"}, {"id": "alias"}], "alias"),
    ],
)
def test_the_model_is_found_by_name_root_or_as_the_only_one(
    server: FakeServer, models: list[Body], name: str
) -> None:
    server.models = models

    answerer = server.answerer()

    assert answerer.model == name
    assert answerer.fingerprint == {"engine": "endpoint", "model": name, "vllm": "0.33.0"}


def test_several_other_models_are_listed(server: FakeServer) -> None:
    server.models = [{"id": "a"}, {"id": "b"}]

    with pytest.raises(MachineError, match=f"does not serve `{MODEL}`, but `a`, `b`"):
        server.answerer()


def test_a_server_that_does_not_run_is_named(server: FakeServer) -> None:
    server.url = "http://127.0.0.1:9"  # the port of the discard service, which nobody runs

    with pytest.raises(MachineError, match=r"127.0.0.1:9/v1/models` fails \(4 times\)"):
        server.answerer()


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://"])
def test_what_is_not_an_address_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="not an HTTP address"):
        EndpointAnswerer(url, MODEL, 1)


def test_the_address_may_end_in_v1(server: FakeServer) -> None:
    server.url += "/v1/"

    assert server.answerer().model == MODEL
