"""Device and precision of a verifier in this process."""

import torch

from speculators_cli.core.errors import MachineError
from speculators_cli.core.place import Place


def choose_device(name: str, place: Place) -> torch.device:
    """Return the device of this rank.

    Raises:
        MachineError: There is no GPU for it.
    """
    num_gpus = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if place.local_rank >= num_gpus:
        raise MachineError(
            f"Rank {place.rank} has no GPU: this machine has {num_gpus}",
            hint="Lower `--nproc-per-node`, or pass `--device cpu`",
        )
    return torch.device("cuda", place.local_rank)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of the verifier."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
