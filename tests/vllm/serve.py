"""Serve prompts with vLLM's own engine, and write what it answered and counted.

Runs in the virtual environment of the engine, which has nothing of this package:
`python serve.py JOB RESULT`, both JSON files.
"""

import json
import sys
from pathlib import Path
from typing import Any

COUNTERS = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos")


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    draft = {"method": "eagle3", "model": job["draft"], "num_speculative_tokens": 3}
    ways: dict[str, dict[str, Any]] = {
        "alone": {"model": job["verifier"]},
        "explicit": {"model": job["verifier"], "speculative_config": draft},
        "folder": {"model": job["draft"]},
    }
    engine = LLM(
        **ways[job["way"]],
        dtype="float32",
        max_model_len=job["max_model_len"],
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    answers, counts = [], [count(engine)]
    for prompt in job["prompts"]:
        output = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        answers.append(list(output[0].outputs[0].token_ids))
        counts.append(count(engine))
    Path(result_file).write_text(json.dumps({"answers": answers, "counts": counts}))


def count(engine: Any) -> list[int]:
    """Chains drafted, then chains that accepted their first, second and third token."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    if COUNTERS[0] not in found:
        return [0, 0, 0, 0]
    return [found[COUNTERS[0]].value, *found[COUNTERS[1]].values]


if __name__ == "__main__":
    main(*sys.argv[1:])
