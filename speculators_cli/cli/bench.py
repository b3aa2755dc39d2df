"""`speculators bench`."""

from typing import TYPE_CHECKING

import typer

from speculators_cli.cli.flags import NPROC_PER_NODE
from speculators_cli.cli.imports import importing
from speculators_cli.cli.launch import launch
from speculators_cli.cli.options import with_settings
from speculators_cli.cli.output import Output, format_speed
from speculators_cli.cli.train_plan import describe_disk
from speculators_cli.core.files import format_bytes
from speculators_cli.core.place import is_first_rank
from speculators_cli.core.progress import SILENT
from speculators_cli.settings.bench import BenchSettings

if TYPE_CHECKING:
    from speculators_cli.core.bench.bench import BenchReport

EXAMPLES = (
    "speculators bench --shape qwen3-8b --nproc-per-node 8",
    "speculators bench --verifier-name-or-path Qwen/Qwen3-8B --ttt-steps 5",
    "speculators bench --data-path data --total-seq-len 16384 --json",
)


@with_settings(BenchSettings, NPROC_PER_NODE, examples=EXAMPLES)
def bench(
    context: typer.Context, *, settings: BenchSettings, output: Output, nproc_per_node: int | None
) -> None:
    """Time the training step."""
    if nproc_per_node is not None and nproc_per_node > 1:
        launch(nproc_per_node, context.obj)
        return
    with importing():
        from speculators_cli.core.bench.bench import bench as run

    try:
        report = run(settings, progress=output if is_first_rank() else SILENT)
    finally:
        output.close()
    if not is_first_rank():
        return
    if output.is_json:
        output.result("bench", report.to_json())
    else:
        show(report, output)


def show(report: "BenchReport", output: Output) -> None:
    """Write what was measured."""
    rows = [
        ("device", f"{report.device}, torch {report.torch_version}"),
        (
            "batch",
            f"{report.total_seq_len:,} tokens, {report.supervised_fraction:.0%} supervised, "
            f"{report.ttt_steps} draft tokens",
        ),
        (
            "step",
            f"{report.step_ms:,.1f} ms ({report.step_ms_min:,.1f} to {report.step_ms_max:,.1f}), "
            f"the first {report.first_step_seconds:.1f} s",
        ),
        ("speed", format_speed(report.tokens_per_second)),
        ("useful work", _useful(report)),
        ("waiting for data", f"{report.data_wait_share:.1%}"),
    ]
    if report.capture_ms is not None:
        share = f"{report.capture_share:.0%}"
        rows.insert(3, ("capture", f"{report.capture_ms:,.1f} ms per step, {share} of the time"))
        rows[4:4] = _stored(report)
    if report.efficiency is not None:
        rows.insert(3, ("ranks", _ranks(report)))
    if report.peak_memory_bytes is not None:
        rows.insert(4, ("peak memory", format_bytes(report.peak_memory_bytes)))
    if report.launch_ms is not None:
        rows.append(("kernel launches", f"{report.launch_ms:.1f} ms/step on the host"))
    if report.idle_share is not None:
        rows.append(("GPU idle", f"{report.idle_share:.1%}"))
    output.panel(f"{report.verifier}, {report.kernels} kernels, {report.gemm_dtype} products", rows)
    if report.split_ms is not None:
        output.table(
            ("kernels", "ms/step"),
            [(kind, f"{ms:.1f}") for kind, ms in report.split_ms.items()],
        )


def _stored(report: "BenchReport") -> list[tuple[str, str]]:
    if report.disk is None:
        return []
    rows = [("disk", describe_disk(report.disk))]
    for stored in report.stored:
        when = "never faster than capture"
        if stored.num_epochs is not None:
            when = f"faster than capture from {stored.num_epochs:,} epochs on"
        name = "stored in float8" if stored.is_float8 else "stored"
        rows.append((name, f"{stored.step_ms:,.1f} ms per step, {when}"))
    return rows


def _ranks(report: "BenchReport") -> str:
    kind = "replicated" if report.num_shards == 1 else f"{report.num_shards} shards"
    text = f"{report.num_ranks}, {kind}, {report.efficiency:.1%} of linear"
    if report.exposed_ms is not None:
        text += f", {report.exposed_ms:.1f} ms/step of communication exposed"
    return text


def _useful(report: "BenchReport") -> str:
    text = f"{report.useful_tflop:.2f} TFLOP per step, {report.useful_tflops:,.1f} TFLOP/s"
    if report.utilisation is not None:
        text += f", {report.utilisation:.0%} of the peak"
    return text
