"""Generates data once, then again and again with a kill at each change it makes on disk.

    python -m tests.faults.generate_kill_points FOLDER JOB EVERY

Jobs: `answers`: the verifier answers prompts, and states are captured in its own precision;
`float8`: conversations with answers, and states as float8. EVERY: try each so many-th point.

Kill points are those of `kill_points`: changes on disk, and writes of shards of tokens, samples
and records at some of their lengths. After each kill every file is absent or has the very bytes of
the uninterrupted run; the run that follows ends in its tree, without anything left over.
"""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from speculators_cli.core.capture import states
from speculators_cli.core.capture.generate import generate_data
from speculators_cli.core.capture.generated_folder import LOCK_NAME
from speculators_cli.core.files import TEMPORARY
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.generate_data import GenerateDataSettings
from tests.chat_verifier import write_rows, write_word_verifier
from tests.faults.kill_points import SHARES, Point, fork, wait
from tests.run_files import tree

# Under its own name, too: a file that is not replaced atomically is torn.
BEGUN = re.compile(
    rf"open .*/(?:{re.escape(TEMPORARY)})?([^/]+?\.(?:pt|safetensors|json))(?:\.\d+)?"
)
NUM_ROWS, SHARD_SIZE = 5, 2
SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "answers": {"tokens": {"regenerate": True, "max_new_tokens": 5, "temperature": 0.8}},
    "float8": {"storage": {"storage_dtype": "float8"}},
}
# What the first run of a process would import.
PRELOADED = (transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast)


def write_prompts(file: Path) -> Path:
    """Conversations of two turns, of different lengths."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(["w7", "w9"] * (i + 1))},
                {"role": "assistant", "content": f"w{10 + i} w8"},
                {"role": "user", "content": f"w{20 + i}"},
                {"role": "assistant", "content": "w12"},
            ]
        }
        for i in range(NUM_ROWS)
    ]
    return write_rows(file, rows)


def read_settings(folder: Path, out_dir: Path, job: str) -> GenerateDataSettings:
    """The settings of a job."""
    content: dict[str, dict[str, Any]] = {
        "input": {
            "prompts": str(folder / "prompts.jsonl"),
            "output_dir": out_dir,
            "shard_size": SHARD_SIZE,
        },
        "verifier": {"verifier_name_or_path": str(folder / "verifier")},
        "engine": {"device": "cpu", "capture_tokens": 256},
        "storage": {"writers": 1},
    }
    for name, section in SECTIONS[job].items():
        content[name] = content.get(name, {}) | dict(section)
    return GenerateDataSettings.model_validate(content)


def list_points(changes: Sequence[str], expected: Mapping[str, bytes]) -> list[Point]:
    """Every change, and some lengths of each file that is begun."""
    sizes = {Path(name).name: len(data) for name, data in expected.items()}
    begun: dict[str, int] = {}  # the last time each is opened for writing
    for number, change in enumerate(changes, 1):
        found = BEGUN.fullmatch(change)
        if found is not None:
            begun[found[1]] = number
    return [Point(number) for number in range(1, len(changes) + 1)] + [
        Point(number, num_bytes=int(share * sizes[name]))
        for name, number in begun.items()
        for share in SHARES
    ]


def is_unfinished(name: str) -> bool:
    """Whether a file may be there after a kill without being a part of the result."""
    return Path(name).name.startswith(TEMPORARY) or name == LOCK_NAME


def main() -> None:
    """Try kill points and print what was found as JSON."""
    folder, job, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    out_dir, log = folder / "out", folder / "log"
    write_word_verifier(folder / "verifier")
    write_prompts(folder / "prompts.jsonl")
    settings = read_settings(folder, out_dir, job)
    states.MAX_IN_FLIGHT = 0  # each write is waited for, so changes have the same order every time

    def generate(point: Point | None = None) -> int:
        work: Callable[[], object] = lambda: generate_data(settings, progress=SilentProgress())  # noqa: E731
        return wait(fork(work, out_dir, point=point, log=None if point else log))

    assert generate() == 0
    expected = tree(out_dir)
    points = list_points(json.loads(log.read_text()), expected)
    tried, failures = points[::every], []
    for point in tried:
        shutil.rmtree(out_dir)
        if generate(point) not in (-signal.SIGKILL, -signal.SIGXFSZ):
            failures.append(f"{point} was not reached")
        left = tree(out_dir) if out_dir.exists() else {}
        whole = {name: data for name, data in left.items() if not is_unfinished(name)}
        if not whole.items() <= expected.items():
            failures.append(f"a file is torn after {point}")
        if generate() != 0 or tree(out_dir) != expected:
            failures.append(f"the next run differs after {point}")
    report = {
        "num_points": len(points),
        "num_files": len(expected),
        "tried": len(tried),
        "tried_in_writes": sum(point.num_bytes is not None for point in tried),
        "failures": failures,
    }
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
