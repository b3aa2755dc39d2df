"""What a launcher gives the processes that it starts."""

import socket
from collections.abc import Mapping

Environment = Mapping[str, str]


def torchrun(rank: int, num_ranks: int, port: int) -> Environment:
    """The variables of a rank, on one machine."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(
        zip(names, map(str, (rank, num_ranks, rank, num_ranks, "127.0.0.1", port)), strict=True)
    )


def choose_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
