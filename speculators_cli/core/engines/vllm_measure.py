"""Mode `measure` of `vllm_child.py`: answers to prompts, their time, and the engine's counts.

Imported by path, under an interpreter that may not have this package. A request has `prompts`,
`sampling` for each, and `concurrency`, how many are in work at a time.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

PASSES = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"

Submit = Callable[[Any, dict[str, Any]], None]


def measure(
    engine: Any,
    request: dict[str, Any],
    submit: Submit,
    show_life: Callable[[], None],
) -> dict[str, Any]:
    """Answer all prompts of a request.

    Args:
        engine: Which has nothing else in work.
        request: The request.
        submit: Submits one prompt to the engine.
        show_life: Called after every step.
    """
    waiting = deque(enumerate(zip(request["prompts"], request["sampling"], strict=True)))
    answers: dict[int, list[int]] = {}
    before = count(engine)
    started_at = time.perf_counter()
    num_started = 0
    while len(answers) < len(request["prompts"]):
        while waiting and num_started - len(answers) < request["concurrency"]:
            index, (ids, sampling) = waiting.popleft()
            submit(engine, {"index": index, "ids": ids, "sampling": sampling})
            num_started += 1
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        show_life()
    seconds = time.perf_counter() - started_at
    after = count(engine)
    accepted_before = before[1] or [0] * len(after[1])
    return {
        "answers": [answers[index] for index in range(len(answers))],
        "seconds": seconds,
        "num_passes": after[0] - before[0],
        "num_accepted": [a - b for a, b in zip(after[1], accepted_before, strict=True)],
    }


def count(engine: Any) -> tuple[int, list[int]]:
    """Verifier passes over a chain so far, and those that accepted each draft token."""
    num_passes, num_accepted = 0, []
    for metric in engine.get_metrics():
        if metric.name == PASSES:
            num_passes += metric.value
        elif metric.name == ACCEPTED:
            num_accepted = list(metric.values)
    return num_passes, num_accepted
