"""Breakdown of GPU time: kernels of a few steps, by kind."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A kernel belongs to the first kind with one of these words in its name.
KINDS = {
    "copy": ("memcpy htod", "memcpy dtoh"),
    "communication": ("nccl",),
    "attention": ("flash", "fmha", "_merge_", "_blocks_"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
    "loss": (
        "_kl_kernel",
        "_target_stats",
        "_score_kernel",
        "_gradient_kernel",
        "softmax",
        "argmax",
        "kl_div",
        "logsumexp",
    ),
}

NUM_LONGEST = 40


@dataclass(frozen=True)
class KernelTimes:
    """Times of the kernels in a step."""

    split_ms: dict[str, float]  # by kind of kernel, including `other`
    longest_ms: dict[str, float]  # by kernel, the longest ones
    num_kernels: int
    idle_share: float  # fraction of the last step without a kernel that computes
    exposed_ms: float  # of the last step: ranks communicate and nothing computes


def profile_steps(step: Callable[[], object], *, num_steps: int = 2) -> KernelTimes:
    """Profile some steps; times are means per step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    split = dict.fromkeys([*KINDS, "other"], 0.0)
    by_name: dict[str, float] = defaultdict(float)
    num_kernels = 0
    computing: list[tuple[float, float]] = []
    communicating: list[tuple[float, float]] = []
    for event in profiler.events() or ():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        milliseconds = event.device_time_total / 1e3 / num_steps
        kind = _kind(event.name)
        split[kind] += milliseconds
        by_name[event.name] += milliseconds
        if kind == "communication":
            communicating.append((event.time_range.start, event.time_range.end))
        elif kind != "copy":
            computing.append((event.time_range.start, event.time_range.end))
            num_kernels += not event.name.lower().startswith("memset")
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:NUM_LONGEST]
    # The first step still waits for its batch, and for ranks whose profilers started later; all
    # launch about the same number of kernels.
    last_step = sorted(computing)[len(computing) * (num_steps - 1) // num_steps :]
    began_at = last_step[0][0] if last_step else 0.0
    sent = [span for span in communicating if span[0] > began_at]
    exposed_ms = (time_of([*sent, *last_step]) - time_of(last_step)) / 1e3
    return KernelTimes(
        split, dict(longest), num_kernels // num_steps, share_of_gaps(last_step), exposed_ms
    )


def time_of(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans, each with its start and end."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def share_of_gaps(spans: Sequence[tuple[float, float]]) -> float:
    """Fraction of the time from the first start to the last end not covered by any span.

    Args:
        spans: Start and end of each, in the order of their starts.
    """
    if not spans:
        return 0.0
    idle, reached = 0.0, spans[0][0]
    for start, stop in spans:
        idle += max(0.0, start - reached)
        reached = max(reached, stop)
    return idle / (reached - spans[0][0])


def _kind(name: str) -> str:
    lower = name.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(word in lower for word in words)), "other"
    )
