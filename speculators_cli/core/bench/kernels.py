"""Where a GPU's time goes: kernels of a few steps, by kind."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# A kernel is of the first kind that one of these words in its name tells.
KINDS = {
    "copy": ("memcpy htod", "memcpy dtoh"),
    "attention": ("flash", "fmha", "_merge_"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
    "loss": ("_kl_kernel", "_target_stats", "softmax", "argmax", "kl_div", "logsumexp"),
}


def split_by_kind(step: Callable[[], None], *, num_steps: int = 2) -> tuple[dict[str, float], int]:
    """Profile some steps.

    Returns:
        Milliseconds a step of each kind of kernel, `other` among them; kernels launched a step.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    split = dict.fromkeys([*KINDS, "other"], 0.0)
    num_kernels = 0
    for event in profiler.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        split[_kind(event.name)] += event.device_time_total / 1e3 / num_steps
        num_kernels += 1
    return split, num_kernels // num_steps


def _kind(name: str) -> str:
    lower = name.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(word in lower for word in words)), "other"
    )
