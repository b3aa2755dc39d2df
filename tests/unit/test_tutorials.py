"""The scripts of the tutorials."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "docs/tutorials"


def test_held_out_prompts_are_new_combinations_of_known_tasks_and_topics(tmp_path: Path) -> None:
    files = [tmp_path / "prompts.jsonl", tmp_path / "held-out.jsonl"]
    subprocess.run([sys.executable, SCRIPTS / "write_prompts.py", *files], check=True)

    rows = [[json.loads(x) for x in file.read_text("utf-8").splitlines()] for file in files]

    assert [len(x) for x in rows] == [2294, 254]
    training, held_out = ({row["prompt"] for row in x} for x in rows)
    assert len(training) + len(held_out) == 2294 + 254
    assert not training & held_out
    assert {row["category"] for row in rows[0]} == {row["category"] for row in rows[1]}
