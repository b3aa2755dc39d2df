"""MeasuredEndpoint against a server of this machine."""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from speculators_cli.core.engines.endpoint_measured import MeasuredEndpoint, read_samples
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.errors import MachineError
from tests.recorded_progress import RecordedProgress
from tests.unit.engines.local_server import Body, serving

MODEL = "org/verifier"
PROMPTS = [Prompt([10 + i, 20 + i], seed=i) for i in range(5)]
SAMPLING = Sampling(max_new_tokens=8)
LABELS = f'engine="{{engine}}",model_name="{MODEL}"'


@dataclass
class DraftingServer:
    """Of each answer of 3 tokens, 2 passes, of which one accepted the first draft token."""

    num_answers: int = 0
    num_others: int = 0  # answers to somebody else between two of ours
    has_draft: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def complete(self, body: Body, _: Mapping[str, str]) -> tuple[int, Body]:
        with self.lock:
            self.num_answers += 1 + self.num_others
        choice = {"token_ids": [*body["prompt"], 1], "finish_reason": "stop"}
        return 200, {"choices": [choice]}

    def metrics(self) -> str:
        """Half of it by each of two engines."""
        lines = ["# HELP vllm:generation_tokens_total Tokens.", "process_open_fds 12.0"]
        for engine in (0, 1):
            labels, half = LABELS.format(engine=engine), self.num_answers / 2
            lines.append(f"vllm:generation_tokens_total{{{labels}}} {3 * half}")
            if self.has_draft:
                name = "vllm:spec_decode_num_"
                lines.append(f"{name}drafts_total{{{labels}}} {2 * half:e}")
                lines.append(f"{name}drafts_created{{{labels}}} 1.79e+09")
                for k, count in enumerate((1, 0)):
                    position = f'{labels},position="{k}"'
                    lines.append(
                        f"{name}accepted_tokens_per_pos_total{{{position}}} {count * half}"
                    )
        return "\n".join(lines) + "\n"


@pytest.fixture
def server() -> Iterator[DraftingServer]:
    fake = DraftingServer()
    pages: Mapping[str, Callable[[], Body | str]] = {
        "/v1/models": lambda: {"data": [{"id": MODEL, "root": MODEL}]},
        "/version": lambda: {"version": "0.33.0"},
        "/metrics": fake.metrics,
    }
    with serving(pages, fake.complete) as fake.url:
        yield fake


def connect(server: DraftingServer, progress: RecordedProgress) -> MeasuredEndpoint:
    return MeasuredEndpoint(server.url, MODEL, api_key=None, progress=progress, settle_seconds=0)


def test_counts_are_the_difference_of_the_metrics_over_all_engines(server: DraftingServer) -> None:
    server.num_answers = 40  # before
    progress = RecordedProgress()

    found = connect(server, progress).run(PROMPTS, SAMPLING, 3)

    assert found.answers == tuple((*prompt.ids, 1) for prompt in PROMPTS)
    assert (found.num_passes, found.num_accepted) == (10, (5, 0))
    assert found.tokens_per_second == pytest.approx(15 / found.seconds)
    assert progress.warnings == []


def test_other_requests_of_the_server_are_warned_of_once(server: DraftingServer) -> None:
    server.num_others = 1
    progress = RecordedProgress()
    engine = connect(server, progress)

    engine.run(PROMPTS, SAMPLING, 1)
    engine.run(PROMPTS, SAMPLING, 1)

    assert len(progress.warnings) == 1
    assert "counted 30 tokens, and the answers have 15" in progress.warnings[0]


def test_a_server_without_a_draft_is_refused(server: DraftingServer) -> None:
    server.has_draft = False

    with pytest.raises(MachineError, match="it serves no draft") as error:
        connect(server, RecordedProgress())

    assert "--speculative-config" in str(error.value.hint)


def test_positions_are_in_the_order_of_their_numbers() -> None:
    lines = [f'per_pos_total{{position="{k}",engine="0"}} {100 - k}' for k in (10, 2, 0)]

    found = read_samples("\n".join([*lines, "broken line", "# per_pos_total 3", "plain 2 17000"]))

    assert found == {"per_pos_total/10": 90, "per_pos_total/02": 98, "per_pos_total/00": 100,
                     "plain": 2}  # fmt: skip
    assert sorted(found)[:3] == ["per_pos_total/00", "per_pos_total/02", "per_pos_total/10"]
