"""The rank of this process, read from the environment variables of the launcher."""

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from speculators_cli.core.errors import SettingsError

# Ports below the ephemeral range of operating systems; each job step uses one of them.
FIRST_PORT, NUM_PORTS = 20_000, 12_000
SLURM_NAMES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")


@dataclass(frozen=True)
class Place:
    """One of a run's processes."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    address: str = ""  # of the store, on rank 0 or the launcher; empty for a single process
    port: int = 0

    @property
    def run(self) -> str:
        """What the ranks of a run have in common, and other runs at the same time have not."""
        return f"{self.address}:{self.port}"


def read_place(environment: Mapping[str, str]) -> Place:
    """The place given by `RANK`, `WORLD_SIZE` and so on; a single process if they are not set.

    Raises:
        SettingsError: They are inconsistent, or not numbers.
    """
    rank, num_ranks = _read_number(environment, "RANK"), _read_number(environment, "WORLD_SIZE")
    local_rank = _read_number(environment, "LOCAL_RANK") or 0
    num_local_ranks = _read_number(environment, "LOCAL_WORLD_SIZE") or 1
    if not rank and (num_ranks or 1) == 1:
        return Place()
    if rank is None or num_ranks is None:
        given, missing = ("RANK", "WORLD_SIZE") if num_ranks is None else ("WORLD_SIZE", "RANK")
        raise _half(f"`{given}` is `{environment[given]}`, `{missing}` is not set", given)
    if rank >= num_ranks:
        raise _half(f"`RANK` is `{rank}`, `WORLD_SIZE` is `{num_ranks}`", "RANK` and `WORLD_SIZE")
    address, port = environment.get("MASTER_ADDR", ""), _read_number(environment, "MASTER_PORT")
    if not address or not port:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise _half(f"`WORLD_SIZE` is `{num_ranks}`, `{missing}` is not set", "WORLD_SIZE")
    if port >= 2**16:
        raise SettingsError(
            f"The environment variable `MASTER_PORT` is `{port}`, above the largest port, 65535",
            hint="Set `MASTER_PORT` to a free port",
        )
    return Place(rank, num_ranks, local_rank, num_local_ranks, address, port)


def adopt_slurm(environment: MutableMapping[str, str]) -> bool:
    """Inside an `srun` step of several tasks, set what torchrun would: each task is a rank.

    A batch script has Slurm's variables but is not part of a step, so it trains in a single
    process. Variables that are already set take precedence.

    Returns:
        Whether this is such a task.
    """
    if environment.get("RANK") or not all(environment.get(name) for name in SLURM_NAMES):
        return False
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
    if not num_tasks.isdecimal() or int(num_tasks) < 2:
        return False
    nodes = environment["SLURM_STEP_NODELIST"]
    values = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_count_local_tasks(environment, nodes, num_tasks)),
        "MASTER_ADDR": first_host(nodes) if _is_several(nodes) else "127.0.0.1",
        "MASTER_PORT": str(_choose_port(environment)),
    }
    environment.update({name: environment.get(name) or value for name, value in values.items()})
    return True


def is_first_rank() -> bool:
    """Whether this process writes the result of its run; also valid before ranks connect."""
    return (os.environ.get("RANK") or "0") == "0"


def first_host(nodes: str) -> str:
    """The first host of Slurm's node list: `gpu007` of `gpu[007-012,020],cpu1`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _is_several(nodes: str) -> bool:
    return "," in nodes or re.search(r"\[[^\]]*-", nodes) is not None


def _count_local_tasks(environment: Mapping[str, str], nodes: str, num_tasks: str) -> int:
    """Tasks on this node: the one at `SLURM_NODEID` in a list such as `4(x2),3`."""
    if not _is_several(nodes):
        return int(num_tasks)
    counts: list[int] = []
    for count, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    ):
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 1


def _choose_port(environment: Mapping[str, str]) -> int:
    """The same port on all ranks of a step, different between steps."""
    numbers = [environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    job, step = (int(number) if number.isdecimal() else 0 for number in numbers)
    return FIRST_PORT + (job * 31 + step) % NUM_PORTS


def _read_number(environment: Mapping[str, str], name: str) -> int | None:
    """The value of a variable as a number; None if it is unset or empty."""
    value = environment.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdecimal()):
        raise SettingsError(
            f"The environment variable `{name}` is `{value}`, not a number",
            hint=f"Unset `{name}`, or start with torchrun or `--nproc-per-node`",
        )
    return int(value)


def _half(problem: str, names: str) -> SettingsError:
    return SettingsError(
        f"The environment variables of a distributed run are inconsistent: {problem}",
        hint=f"Unset `{names}` to train in one process, or start with torchrun or "
        "`--nproc-per-node`",
    )
