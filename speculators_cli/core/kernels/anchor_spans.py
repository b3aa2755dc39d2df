"""What the blocks of a sequence see, and the tiles in which `block_attention` computes it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.kernels.device import move

TILE_ROWS = 128  # of a tile of blocks
FLOAT32_BLOCKS = 1  # in a tile: without tensor cores, large products take long to compile
TILE_KEYS = 64  # of the context


@dataclass(frozen=True)
class AnchorSpans:
    """What the blocks of a sequence see; anchors ascend, and tensors are on the device."""

    size: int  # tokens in a block
    window: int | None
    is_causal: bool
    first: Tensor  # [anchors], int32: the first row of the context
    limit: Tensor  # [anchors], int32: the row after the last
    readers: Tensor  # [tiles of keys, 2], int32: bounds of the anchors that may read a tile
    num_rows: int  # of the context

    @classmethod
    def of_anchors(
        cls,
        first: NDArray[np.int64],  # [anchors]
        last: NDArray[np.int64],  # [anchors], ascending: the last row of the context
        num_rows: int,
        device: torch.device,
        *,
        size: int,
        window: int | None,
        is_causal: bool,
    ) -> "AnchorSpans":
        """Plan the attention on the host; enqueues three small copies."""
        starts = np.arange(0, num_rows, TILE_KEYS)
        begin = np.searchsorted(last, starts)
        end = np.searchsorted(first, starts + TILE_KEYS)
        if window is not None:
            # The first token of a block sees the rows from `last - window + 2` on.
            end = np.minimum(end, np.searchsorted(last, starts + TILE_KEYS + window - 2))

        def moved(x: NDArray[np.int64]) -> Tensor:
            return move(torch.from_numpy(x.astype(np.int32)), device)

        return cls(
            size=size,
            window=window,
            is_causal=is_causal,
            first=moved(first),
            limit=moved(last + 1),
            readers=moved(np.stack((begin, end), axis=1)),
            num_rows=num_rows,
        )


def can_attend(size: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether a tile has room for a block and all heads that share a key head."""
    return size * num_heads // num_kv_heads <= TILE_ROWS
