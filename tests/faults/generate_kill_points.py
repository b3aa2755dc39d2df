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
import sys
from collections.abc import Mapping
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
from tests.faults.whole_folder import try_points

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


def is_unfinished(name: str) -> bool:
    """Whether a file may be there after a kill without being a part of the result."""
    return Path(name).name.startswith(TEMPORARY) or name == LOCK_NAME


def main() -> None:
    """Try kill points and print what was found as JSON."""
    folder, job, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    write_word_verifier(folder / "verifier")
    write_prompts(folder / "prompts.jsonl")
    settings = read_settings(folder, folder / "out", job)
    states.MAX_IN_FLIGHT = 0  # each write is waited for, so changes have the same order every time
    report = try_points(
        lambda: generate_data(settings, progress=SilentProgress()),
        folder / "out",
        begun=BEGUN,
        is_unfinished=is_unfinished,
        every=every,
    )
    print(json.dumps(report))  # noqa: T201


if __name__ == "__main__":
    main()
