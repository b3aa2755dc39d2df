"""`speculators bench` on a GPU."""

import json

import pytest

from speculators_cli.cli.app import run

pytestmark = pytest.mark.gpu


def test_a_gpus_time_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--shape", "smollm2-135m", "--total-seq-len", "2048", "--steps", "5"]

    code = run(["bench", "--json", *flags])

    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert report["kernels"] == "fast"
    assert 0 < report["launch_ms"] < 1000
    assert 0 <= report["idle_share"] < 1
    assert 0 < report["utilisation"] < 1
    assert all(report["split_ms"][kind] > 0 for kind in ("gemm", "attention", "loss", "optimizer"))
    busy = sum(ms for kind, ms in report["split_ms"].items() if kind != "copy")
    # Two profiled steps against five timed ones.
    assert busy < 1.5 * report["step_ms"]
