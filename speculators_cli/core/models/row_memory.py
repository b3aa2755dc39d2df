"""Keys and values of a batch of sequences, its rows; slot j of a row holds position j.

A forward pass writes the positions that it computes, over whatever was there, before any query
reads them. So a rejected draft token needs no removal: the next pass begins at its position, and a
query reads no position after its own. Rows have lengths of their own, without padding, gaps, or a
mask that must be kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowPositions:
    """The positions that one forward pass computes: as many for each row.

    Args:
        firsts: First position of each row.
        num_new: Positions of a row.
        row: The only row that is computed; None: all rows of the batch.
        device: Of the computation.
    """

    firsts: tuple[int, ...]
    num_new: int
    device: torch.device
    row: int | None = None

    @property
    def num_slots(self) -> int:
        """Slots that are read: up to the highest position."""
        return max(self.firsts) + self.num_new

    @cached_property
    def ids(self) -> Tensor:
        """The positions; [rows, new], int64."""
        firsts = torch.tensor(self.firsts, device=self.device)
        return firsts[:, None] + torch.arange(self.num_new, device=self.device)

    def seen(self, window: int | None) -> Tensor | None:
        """Which slots each query reads; [rows, 1, new, slots], bool. None: all up to its own.

        Args:
            window: Number of positions that a query reads, with its own; None: all before it.
        """
        is_short = window is None or window >= self.num_slots
        if is_short and self.num_slots == self.num_new:
            return None
        if is_short:
            return self._causal
        assert window is not None, "all windows that are None are short"
        slots = torch.arange(self.num_slots, device=self.device)
        return self._causal & (slots > self.ids[:, None, :, None] - window)

    @cached_property
    def _causal(self) -> Tensor:
        slots = torch.arange(self.num_slots, device=self.device)
        return slots <= self.ids[:, None, :, None]


class RowMemory:
    """Keys and values of one layer.

    Args:
        num_rows: Rows of the batch.
        num_positions: Maximum length of a row.
        window: Number of positions that a query reads, with its own; None: all before it.
    """

    def __init__(self, num_rows: int, num_positions: int, window: int | None = None) -> None:
        self.window = window
        self._shape = (num_rows, num_positions)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def store(
        self,
        key: Tensor,  # [rows, new, kv_heads, head_dim]
        value: Tensor,  # [rows, new, kv_heads, value_dim]
        positions: RowPositions,
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values; return those of all slots that are read."""
        if self._keys is None or self._values is None:
            # Zeros: what is masked out is still multiplied by a weight of zero.
            self._keys, self._values = (
                x.new_zeros((*self._shape, *x.shape[2:])) for x in (key, value)
            )
        if positions.row is None:
            keys, values = self._keys, self._values
        else:
            here = slice(positions.row, positions.row + 1)
            keys, values = self._keys[here], self._values[here]
        rows = torch.arange(len(keys), device=positions.device)[:, None]
        keys[rows, positions.ids] = key
        values[rows, positions.ids] = value
        return keys[:, : positions.num_slots], values[:, : positions.num_slots]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""
        if self._keys is not None and self._values is not None:
            kept = torch.tensor(rows, dtype=torch.int64, device=self._keys.device)
            self._keys, self._values = self._keys[kept], self._values[kept]
        self._shape = (len(rows), self._shape[1])

    def at(self, positions: RowPositions) -> "RowPass":
        """Return the memory for one forward pass."""
        return RowPass(self, positions)


class RowPass:
    """The `AttentionMemory` of one forward pass: its rows end to end, as one sequence.

    Args:
        memory: Of the layer.
        positions: Of the pass.
    """

    def __init__(self, memory: RowMemory, positions: RowPositions) -> None:
        self._memory = memory
        self._positions = positions

    def attend(
        self,
        query: Tensor,  # [rows*new, heads, head_dim]
        key: Tensor,  # [rows*new, kv_heads, head_dim]
        value: Tensor,  # [rows*new, kv_heads, head_dim]
    ) -> Tensor:
        """Store the new keys and values, then attend causally; [rows*new, heads, head_dim]."""
        split = (-1, self._positions.num_new)
        new_key, new_value = (x.unflatten(0, split) for x in (key, value))
        keys, values = self._memory.store(new_key, new_value, self._positions)
        window = self._memory.window
        out = attend(query.unflatten(0, split), keys, values, self._positions, window=window)
        return out.flatten(0, 1)


def attend(
    query: Tensor,  # [rows, new, heads, head_dim]
    keys: Tensor,  # [rows, slots, kv_heads, head_dim]
    values: Tensor,  # [rows, slots, kv_heads, value_dim]
    positions: RowPositions,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [heads]
) -> Tensor:
    """Attend to the positions of the own row, up to the own one; [rows, new, heads, value_dim].

    Args:
        query: Of the new positions.
        keys: Of all slots that are read.
        values: The same.
        positions: The new positions.
        scale: Of the scores; default: by the head size.
        window: Number of positions that a query reads, with its own.
        softcap: Scores are squashed to (-softcap, softcap).
        sinks: One more score of each head, without a value.
    """
    seen = positions.seen(window)
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    num_heads, num_kv_heads = query.shape[1], keys.shape[1]
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, is_causal=seen is None, scale=scale,
            enable_gqa=num_heads != num_kv_heads,
        )  # fmt: skip
        return out.transpose(1, 2)
    if seen is None:
        slots = torch.arange(positions.num_slots, device=query.device)
        seen = slots <= slots[:, None]
    group = num_heads // num_kv_heads
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ keys.transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sink), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : keys.shape[2]].to(values.dtype)
    return (weights @ values).transpose(1, 2)
