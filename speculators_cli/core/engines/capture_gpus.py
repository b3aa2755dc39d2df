"""Which GPUs of a machine capture, and which ones train."""

from collections.abc import Mapping, Sequence

from speculators_cli.core.errors import SettingsError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def list_gpus(environment: Mapping[str, str], num_visible: int) -> list[str]:
    """Return the visible GPUs as the variable calls them.

    Args:
        environment: May have the variable.
        num_visible: GPUs that the process sees.
    """
    listed = [name.strip() for name in environment.get(VARIABLE, "").split(",") if name.strip()]
    return (listed or [str(index) for index in range(num_visible)])[:num_visible]


def choose_capture_gpus(visible: Sequence[str], num_ranks: int, num_gpus: int) -> list[str]:
    """Return the last GPUs: ranks train on the first ones.

    Args:
        visible: All of them.
        num_ranks: Ranks on this machine, each on the GPU of its number.
        num_gpus: For the capture.

    Raises:
        SettingsError: There are not enough.
    """
    if num_ranks + num_gpus > len(visible):
        raise SettingsError(
            f"`--capture-gpus {num_gpus}` and {num_ranks} training "
            f"{'rank' if num_ranks == 1 else 'ranks'} need {num_ranks + num_gpus} GPUs, "
            f"{len(visible)} are visible",
            hint="Lower `--capture-gpus` or `--nproc-per-node`",
        )
    return list(visible[-num_gpus:])
