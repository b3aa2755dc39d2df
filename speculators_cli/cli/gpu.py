"""Connecting to a GPU while Python imports what computes on it."""

import ctypes
import os
import threading
from collections.abc import Mapping

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")  # of torchrun and Slurm


def start_gpu(device: str) -> None:
    """Connect to this process's GPU in a thread, unless the device is `cpu`.

    CUDA's context of a device is one per process, and takes about as long as importing torch, which
    finds it made. Without a GPU, or where it is in use, nothing happens: torch tells why.
    """
    if device != "cpu":
        threading.Thread(target=_connect, args=(_read_rank(os.environ),), daemon=True).start()


def _read_rank(environment: Mapping[str, str]) -> int:
    given = next((environment[name] for name in LOCAL_RANKS if environment.get(name)), "0")
    return int(given) if given.isascii() and given.isdecimal() else 0


def _connect(local_rank: int) -> bool:
    """Make the context of a GPU; returns whether there is one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return False
    # A task of Slurm may see its own GPU only.
    index = local_rank if local_rank < count.value else 0
    if cuda.cuDeviceGet(ctypes.byref(device), index):
        return False
    return not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
