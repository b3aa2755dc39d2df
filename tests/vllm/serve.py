"""Serve prompts with vLLM's own engine, and write what it answered and counted.

Runs in the virtual environment of the engine, which has nothing of this package:
`python serve.py JOB RESULT`, both JSON files.
"""

import json
import sys
from pathlib import Path
from typing import Any

PASSES = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


def main(job_file: str, result_file: str) -> None:
    from vllm import LLM

    job = json.loads(Path(job_file).read_text())
    if job["num_layers"] > 1:
        mend_grouped_norm()
    draft = {
        "method": job["method"],
        "model": job["draft"],
        "num_speculative_tokens": job["num_draft_tokens"],
    }
    if job["is_parallel"]:
        draft["parallel_drafting"] = True
    drafted = record_drafts()
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
    served = []
    for prompt in job["prompts"]:
        drafted.clear()
        found = answer(engine, prompt, job["max_new_tokens"])
        # After the last pass, the engine drafts once more.
        served.append((*found, drafted[: len(found[1])]))
    answers, accepted, drafts = zip(*served, strict=True)
    result = {"answers": answers, "accepted": accepted, "drafted": drafts}
    Path(result_file).write_text(json.dumps(result))


def record_drafts() -> list[list[int]]:
    """A list to which the engine adds each chain that it drafts; one request at a time."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    drafted: list[list[int]] = []
    propose = SpecDecodeBaseProposer.propose

    def record(self: Any, *given: Any, **named: Any) -> Any:
        tokens = propose(self, *given, **named)
        drafted.extend(tokens.tolist())
        return tokens

    SpecDecodeBaseProposer.propose = record
    return drafted


def mend_grouped_norm() -> None:
    """Norm the context keys of each layer by its own weights.

    The CPU kernel of the engine takes the first layer's for all of them; that of CUDA does not.
    """
    import torch
    from vllm.model_executor.models import qwen3_dflash

    def normalise(model: Any, all_k: Any) -> Any:
        normed = torch.nn.functional.rms_norm(all_k, all_k.shape[-1:], eps=model._rms_norm_eps)
        return (normed * model._k_norm_weights[:, None, None, :]).contiguous()

    qwen3_dflash.DFlashQwen3Model._normalize_context_k = normalise


def answer(engine: Any, prompt: list[int], max_new_tokens: int) -> tuple[list[int], list[int]]:
    """The answer, and how many draft tokens each of its verifier passes accepted."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    engine.llm_engine.add_request(str(prompt), {"prompt_token_ids": prompt}, sampling)
    tokens: list[int] = []
    accepted = []
    num_passes, num_accepted = count(engine)
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
        passes, total = count(engine)
        # One request at a time, so a step is at most one pass over a chain.
        assert passes - num_passes in (0, 1)
        if passes > num_passes:
            accepted.append(total - num_accepted)
        num_passes, num_accepted = passes, total
    return tokens, accepted


def count(engine: Any) -> tuple[int, int]:
    """Passes over a chain so far, and draft tokens that they accepted."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    if PASSES not in found:
        return 0, 0
    return found[PASSES].value, found[ACCEPTED].value


if __name__ == "__main__":
    main(*sys.argv[1:])
