"""MeasuredEndpoint: a running vLLM server with a draft, while it is measured."""

import re
import time
from collections.abc import Mapping, Sequence

from speculators_cli.core.engines.endpoint import (
    BACKOFF_SECONDS,
    FLAG,
    QUESTION_SECONDS,
    EndpointAnswerer,
)
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.engines.measured import MeasuredRun
from speculators_cli.core.engines.server import Server
from speculators_cli.core.errors import MachineError
from speculators_cli.core.progress import Progress

PASSES = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
GENERATED = "vllm:generation_tokens_total"
SETTLE_SECONDS = 0.5  # a server counts a step after it has sent its tokens
_SAMPLE = re.compile(
    r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? "
    r"(?P<value>[-+]?(?:[\d.]+(?:[eE][-+]?\d+)?|NaN|Inf))(?: \d+)?$"
)
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')


class MeasuredEndpoint:
    """Answers of a server; counts are differences of its Prometheus metrics.

    Args:
        url: Of the server, with or without `/v1`.
        model: The verifier. If the server has another name for its only model, that is used.
        api_key: Sent as a bearer token.
        progress: Reports counts that are not only of these prompts.
        settle_seconds: Before metrics are read.

    Raises:
        SettingsError: The address cannot be used.
        MachineError: The server cannot be reached, or serves no draft.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None,
        progress: Progress,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._url, self._model, self._api_key = url, model, api_key
        self._progress, self._settle_seconds = progress, settle_seconds
        self._server = Server(url, flag=FLAG, api_key=api_key, backoff_seconds=BACKOFF_SECONDS)
        self._fingerprint = self._answerer(1).fingerprint
        self._is_warned = False
        if PASSES not in self._read():
            raise MachineError(
                f"`{self._server.url}` has no metric `{PASSES}`: it serves no draft",
                hint="Serve the verifier with `vllm serve` and `--speculative-config`, without "
                "`--disable-log-stats`",
            )

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The model's name on the server, and the version of vLLM if the server has it."""
        return self._fingerprint

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, concurrency: int) -> MeasuredRun:
        """Answer prompts, so many at a time.

        Raises:
            MachineError: The server fails, or returns no token ids.
        """
        before = self._read()
        started_at = time.perf_counter()
        found = {x.index: x.ids for x in self._answerer(concurrency).answer(prompts, sampling)}
        seconds = time.perf_counter() - started_at
        time.sleep(self._settle_seconds)
        after = self._read()
        answers = tuple(tuple(found[index]) for index in range(len(prompts)))
        self._check_alone(before, after, sum(map(len, answers)))
        positions = sorted(key for key in after if key.startswith(f"{ACCEPTED}/"))
        return MeasuredRun(
            answers=answers,
            seconds=seconds,
            num_passes=int(after[PASSES] - before.get(PASSES, 0.0)),
            num_accepted=tuple(int(after[key] - before.get(key, 0.0)) for key in positions),
        )

    def close(self) -> None:
        """Nothing: connections end with their requests."""

    def _answerer(self, concurrency: int) -> EndpointAnswerer:
        return EndpointAnswerer(self._url, self._model, concurrency, api_key=self._api_key)

    def _read(self) -> dict[str, float]:
        return read_samples(self._server.fetch_text("/metrics", seconds=QUESTION_SECONDS))

    def _check_alone(
        self, before: Mapping[str, float], after: Mapping[str, float], num_tokens: int
    ) -> None:
        """Warn once if the server has generated other tokens as well."""
        num_counted = after.get(GENERATED, 0.0) - before.get(GENERATED, 0.0)
        if GENERATED in after and num_counted != num_tokens and not self._is_warned:
            self._is_warned = True
            self._progress.warn(
                f"`{self._server.url}` counted {num_counted:,.0f} tokens, and the answers have "
                f"{num_tokens:,}: other requests are in its counts, too",
                hint="Evaluate a server that nobody else uses",
            )


def read_samples(text: str) -> dict[str, float]:
    """Parse Prometheus text: sums over engines, by name; with a position, by `name/position`."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        position = _POSITION.search(sample["labels"] or "")
        name = sample["name"] + (f"/{int(position[1]):02d}" if position else "")
        found[name] = found.get(name, 0.0) + float(sample["value"])
    return found
