"""Evaluate drafts of one verifier on the same prompts, each beside the first.

    python docs/benchmarks/compare_drafts.py held-out.jsonl eagle3 dflash dspark --dtype float32

What `speculators evaluate --against` does for two drafts: each draft answers with its own number of
draft tokens, and is compared prompt by prompt. Prints one line of JSON per draft; intervals (95 %)
are bootstrapped over prompts, and `minus_first` is its acceptance length less the first draft's.
"""

import argparse
import json
from typing import Any

from speculators_cli.core.evaluation.intervals import length_interval
from speculators_cli.core.evaluation.job import Job
from speculators_cli.core.evaluation.measurement import Measurement, answer_alone, measure
from speculators_cli.core.evaluation.report import compare
from speculators_cli.core.progress import SILENT
from speculators_cli.settings.evaluate import EvaluateSettings


def main() -> None:
    """Evaluate one draft after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts")
    parser.add_argument("drafts", nargs="+", help="checkpoints, save paths or exports")
    parser.add_argument("--max-prompts", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--num-speculative-tokens", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    first = Job(settings_of(options.drafts[0], options), SILENT)
    own = answer_alone(first.verifier, first.work, SILENT).answers
    found: list[Measurement] = []
    for draft in options.drafts:
        job = Job(settings_of(draft, options), SILENT) if found else first
        drafter = job.build_drafter(job.source)
        found.append(measure(job.verifier, drafter, first.work, own, progress=SILENT))
        print(json.dumps(describe(draft, found[-1], found[0], seed=options.seed)), flush=True)


def settings_of(draft: str, options: argparse.Namespace) -> EvaluateSettings:
    """The settings of `speculators evaluate` for one of the drafts."""
    return EvaluateSettings.model_validate(
        {
            "source": {"checkpoint": draft},
            "prompts": {"prompts": options.prompts, "max_prompts": options.max_prompts},
            "drafting": {
                "num_speculative_tokens": options.num_speculative_tokens,
                "max_new_tokens": options.max_new_tokens,
                "seed": options.seed,
            },
            "engine": {"dtype": options.dtype, "batch_size": options.batch_size},
        }
    )


def describe(draft: str, measured: Measurement, first: Measurement, *, seed: int) -> dict[str, Any]:
    """What a draft reached, and its difference to the first."""
    beside = compare(draft, measured, first, seed=seed)
    return {
        "draft": draft,
        "acceptance_length": measured.acceptance_length,
        "interval": length_interval(measured.answers, seed=seed),
        "acceptance_rates": measured.acceptance_rates,
        "num_draft_tokens": measured.num_draft_tokens,
        "num_passes": measured.num_passes,
        "num_different": measured.num_different,
        "minus_first": beside.difference,
        "minus_first_interval": beside.interval,
    }


if __name__ == "__main__":
    main()
