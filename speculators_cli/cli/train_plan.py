"""`speculators train --plan`."""

from typing import TYPE_CHECKING

from speculators_cli.cli.imports import importing
from speculators_cli.cli.output import Output, format_duration
from speculators_cli.core.files import format_bytes
from speculators_cli.settings.train import TrainSettings

if TYPE_CHECKING:
    from speculators_cli.core.data.disk_speed import DiskSpeed
    from speculators_cli.core.training.capture_options import CaptureOption
    from speculators_cli.core.training.plan import TrainPlan


def show_plan(settings: TrainSettings, output: Output, *, num_ranks: int | None) -> None:
    """Write what a run will take."""
    with importing():
        from speculators_cli.core.training.plan import plan

    try:
        found = plan(settings, num_ranks=num_ranks, progress=output)
    finally:
        output.close()
    if output.is_json:
        output.result("train", {"plan": found.to_json()})
        return
    unknown = "only estimated for the fast kernels in bfloat16 on a GPU"
    rows = [
        ("samples", f"{found.num_samples:,}, {found.num_validation_samples:,} for validation"),
        (
            "tokens",
            f"{found.tokens_per_epoch:,} predicted per epoch, "
            f"{found.supervised_fraction:.0%} supervised",
        ),
        ("steps", f"{found.total_steps:,}, {found.steps_per_epoch:,} per epoch"),
        ("draft", f"{found.num_parameters / 1e6:,.1f}M parameters"),
        ("time", format_duration(found.seconds) if found.seconds else unknown),
        ("memory", _memory(found.memory_bytes_per_gpu, found.gpu_memory_bytes) or unknown),
        *_capture(found),
        ("samples on disk", format_bytes(found.data_bytes)),
        (
            "checkpoints",
            f"{found.num_checkpoints:,} of {format_bytes(found.checkpoint_bytes)}, "
            f"{format_bytes(found.free_bytes)} free",
        ),
        ("host memory", _host_memory(found)),
    ]
    if found.bytes_per_second and found.capture is None:
        rows.insert(-2, ("read from disk", f"{format_bytes(int(found.bytes_per_second))}/s"))
    output.panel("Plan", rows)


def _host_memory(found: "TrainPlan") -> str:
    text = f"{format_bytes(found.host_copy_bytes)} to write checkpoints from"
    if found.host_prefetch_bytes:
        size = format_bytes(found.host_prefetch_bytes)
        text += f", up to {size} of prefetched samples per rank"
    return text


def _capture(found: "TrainPlan") -> list[tuple[str, str]]:
    capture = found.capture
    if capture is None:
        return []
    rows = []
    if capture.seconds is not None and found.seconds:
        share = capture.seconds / found.seconds
        rows.append(("capture", f"{format_duration(capture.seconds)}, {share:.0%} of the time"))
    if capture.cache_bytes:
        size = format_bytes(capture.cache_bytes)
        rows.append(("cache", f"{size}, {capture.cached_share:.0%} of the tokens"))
    stored = f"{format_bytes(capture.stored_bytes)} on disk"
    if capture.seconds_if_all_were_stored is not None:
        stored += f", {format_duration(capture.seconds_if_all_were_stored)} with their capture"
    rows.append(("if states were stored", stored))
    if capture.disk is not None:
        rows.append(("disk", describe_disk(capture.disk)))
    return rows + [_option(option, capture.best_option) for option in capture.options]


def _option(option: "CaptureOption", best: str | None) -> tuple[str, str]:
    text = format_duration(option.seconds)
    if option.disk_bytes:
        text += f", {format_bytes(option.disk_bytes)}"
    if option.name == best:
        text += " (best)"
    elif not option.fits:
        text += " (does not fit on this disk)"
    return option.name, text


def describe_disk(disk: "DiskSpeed") -> str:
    """Return the measured speed of a disk."""
    read, written = disk.read_bytes_per_second, disk.written_bytes_per_second
    cache = "" if disk.bypasses_cache else "; the page cache was not bypassed"
    return f"{format_bytes(int(read))}/s read, {format_bytes(int(written))}/s written{cache}"


def _memory(needed: int | None, available: int | None) -> str | None:
    if needed is None or available is None:
        return None
    return f"{format_bytes(needed)} of {format_bytes(available)} on each GPU"
