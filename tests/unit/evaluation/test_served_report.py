"""Speedups and their spread; rates from an engine's counts."""

import pytest

from speculators_cli.core.engines.measured import MeasuredRun
from speculators_cli.core.errors import SettingsError
from speculators_cli.core.evaluation.evaluate import evaluate
from speculators_cli.core.evaluation.served_report import ServedReport, Throughput
from speculators_cli.settings.evaluate import EvaluateSettings


def test_a_speedup_is_of_medians_and_its_range_of_extremes() -> None:
    found = Throughput(8, with_draft=(30.0, 24.0, 60.0), without_draft=(10.0, 20.0, 12.0))

    assert found.speedup == 30 / 12
    assert found.speedup_range == (24 / 20, 60 / 10)


def test_without_a_run_alone_there_is_no_speedup() -> None:
    found = Throughput(8, with_draft=(30.0,), without_draft=None)

    assert (found.speedup, found.speedup_range) == (None, None)
    assert found.to_json()["speedup_range"] is None


def make_report(num_accepted: tuple[int, ...], least: float | None = None) -> ServedReport:
    return ServedReport(
        draft="draft",
        verifier="verifier",
        prompts="prompts",
        num_bad_rows=0,
        num_too_long=0,
        max_new_tokens=8,
        temperature=0.0,
        engine={},
        counted=MeasuredRun(((5, 6), (7,)), 1.0, num_passes=8, num_accepted=num_accepted),
        num_different=None,
        throughputs=(),
        min_acceptance_length=least,
        duration_seconds=1.0,
    )


def test_rates_are_counts_by_pass() -> None:
    found = make_report((6, 3, 0))

    assert found.acceptance_rates == (6 / 8, 3 / 8, 0)
    assert found.conditional_acceptance_rates == (6 / 8, 3 / 6, 0)
    assert found.acceptance_length == 1 + 9 / 8
    assert make_report((6, 0, 0)).conditional_acceptance_rates == (6 / 8, 0, None)


def test_the_minimum_is_compared_with_the_engines_figure() -> None:
    assert make_report((6, 2), least=2.0).is_long_enough
    assert not make_report((6, 1), least=2.0).is_long_enough


def test_the_function_in_process_refuses_settings_of_an_engine() -> None:
    settings = EvaluateSettings.model_validate(
        {
            "source": {"checkpoint": "draft"},
            "prompts": {"prompts": "prompts.jsonl"},
            "engine": {"engine": "vllm"},
        }
    )

    with pytest.raises(SettingsError, match="not of this function"):
        evaluate(settings)
