"""RowVerifier: the verifier in this process, one forward pass over a batch of sequences at a time.

transformers keeps no cache: the attention that is registered here does (`RowMemory`), by position.
Families whose results differ with it are computed one sequence at a time, without a cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from speculators_cli.core.engines.comparison import CHECKED_TOKENS, MAX_ERROR, median_error
from speculators_cli.core.engines.hooked_model import HookedModel, RowOutput
from speculators_cli.core.models.row_memory import RowMemory, RowPositions, attend

NAME = "speculators_rows"
NUM_CHECKED = 5  # last tokens of each, computed together


class RowVerifier(Protocol):
    """A verifier that computes new tokens of a batch of sequences, its rows."""

    @property
    def device(self) -> torch.device:
        """Where tokens are computed."""

    def limit_rows(self, num_positions: int) -> int | None:
        """Return the largest batch of rows of this length; None: any."""

    def select_layers(self, layer_ids: Sequence[int]) -> None:
        """Return aux hidden states of only these layers from now on."""

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch.

        Args:
            num_rows: Rows of the batch.
            num_positions: Maximum length of a row.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""

    def read(self, row: int, tokens: Sequence[int]) -> RowOutput:
        """Compute the beginning of a sequence, in place of what a row was."""

    def extend(self, tokens: Tensor, firsts: Sequence[int]) -> RowOutput:
        """Compute new tokens of all rows.

        Args:
            tokens: [rows, new], int64.
            firsts: Position of the first one in each row; what the row had from there on is
                replaced.
        """


class CachedRows:
    """A batch of sequences with keys and values by position.

    Args:
        model: Whose attention is the one registered here.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._memories: dict[nn.Module, RowMemory] = {}
        self._shape = (0, 0)
        self.has_window = False  # whether a layer attended within a sliding window
        self.num_layers = 0  # that attended here

    @property
    def device(self) -> torch.device:
        """Where tokens are computed."""
        return self._model.device

    def select_layers(self, layer_ids: Sequence[int]) -> None:
        """Return aux hidden states of only these layers from now on."""
        self._model.select_layers(layer_ids)

    def limit_rows(self, num_positions: int) -> int | None:
        """Return the largest batch of rows of this length: what fits on the GPU."""
        if self.device.type != "cuda":
            return None
        self._memories.clear()
        dtype: torch.dtype = self._model.model.dtype
        return max(1, self._model.parts.count_rows_that_fit(num_positions, dtype))

    def start(self, num_rows: int, num_positions: int) -> None:
        """Begin a batch."""
        self._memories.clear()
        self._shape = (num_rows, num_positions)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only some rows, in this order."""
        for memory in self._memories.values():
            memory.keep(rows)
        self._shape = (len(rows), self._shape[1])

    def read(self, row: int, tokens: Sequence[int]) -> RowOutput:
        """Compute the beginning of a sequence, in place of what a row was."""
        positions = RowPositions((0,), len(tokens), self._model.device, row)
        ids = torch.tensor([list(tokens)], device=self._model.device)
        return self._run(ids, positions, num_logits=1)

    def extend(self, tokens: Tensor, firsts: Sequence[int]) -> RowOutput:
        """Compute new tokens of all rows."""
        positions = RowPositions(tuple(firsts), tokens.shape[1], self._model.device)
        return self._run(tokens, positions, num_logits=tokens.shape[1])

    def _run(self, tokens: Tensor, positions: RowPositions, *, num_logits: int) -> RowOutput:
        with _attending(self, positions):
            return self._model.run(tokens, positions.ids, num_logits)

    def attend(
        self,
        layer: nn.Module,
        positions: RowPositions,
        query: Tensor,  # [rows, heads, new, head_dim]
        key: Tensor,  # [rows, kv_heads, new, head_dim]
        value: Tensor,  # [rows, kv_heads, new, value_dim]
        **how: Any,
    ) -> Tensor:
        """Attend in one layer of the model; [rows, new, heads, value_dim]."""
        if layer not in self._memories:
            self._memories[layer] = RowMemory(*self._shape)
        self.num_layers = len(self._memories)
        self.has_window |= how["window"] is not None
        new_key, new_value = key.transpose(1, 2), value.transpose(1, 2)
        keys, values = self._memories[layer].store(new_key, new_value, positions)
        return attend(query.transpose(1, 2), keys, values, positions, **how)


class WholeRows:
    """One sequence at a time, every token of it computed in each forward pass.

    Args:
        model: With its own attention.
    """

    def __init__(self, model: HookedModel) -> None:
        self._model = model
        self._tokens = torch.empty(0, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where tokens are computed."""
        return self._model.device

    def select_layers(self, layer_ids: Sequence[int]) -> None:
        """Return aux hidden states of only these layers from now on."""
        self._model.select_layers(layer_ids)

    def limit_rows(self, num_positions: int) -> int:  # noqa: ARG002
        """Return the largest batch: one row."""
        return 1

    def start(self, num_rows: int, num_positions: int) -> None:  # noqa: ARG002
        """Begin a batch."""
        assert num_rows <= 1

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the only row, or none."""

    def read(self, row: int, tokens: Sequence[int]) -> RowOutput:  # noqa: ARG002
        """Compute the beginning of a sequence."""
        self._tokens = torch.tensor(list(tokens), device=self._model.device)
        return self._model.run(self._tokens[None], None, 1)

    def extend(self, tokens: Tensor, firsts: Sequence[int]) -> RowOutput:
        """Compute the whole sequence, with its new tokens."""
        self._tokens = torch.cat((self._tokens[: firsts[0]], tokens[0]))
        num_new = tokens.shape[1]
        out = self._model.run(self._tokens[None], None, num_new)
        return RowOutput(out.logits, out.aux[:, -num_new:])


def open_rows(model: Any, layer_ids: Sequence[int], *, name: str) -> CachedRows | WholeRows:
    """Return what computes a model's rows: with keys and values by position if that is right.

    It is measured on random tokens.

    Args:
        model: A causal language model of transformers; its attention is replaced.
        layer_ids: Aux layers, ascending; id k is the output after k layers.
        name: Of the verifier, for error messages.

    Raises:
        SettingsError: The model has another layout than decoder layers and a final norm.
    """
    hooked = HookedModel(model, layer_ids, name=name)
    if not hooked.parts.has_known_attention:
        return WholeRows(hooked)
    own = model.config._attn_implementation  # noqa: SLF001
    expected = _compute_alone(hooked)
    try:
        model.set_attn_implementation(NAME)
        rows = CachedRows(hooked)
        if _is_right(rows, hooked, expected):
            return rows
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, ValueError, RuntimeError):  # it takes no other attention
        pass
    model.set_attn_implementation(own)
    return WholeRows(hooked)


_current: tuple[CachedRows, RowPositions] | None = None


@contextmanager
def _attending(rows: CachedRows, positions: RowPositions) -> Iterator[None]:
    """Attend to the keys and values of these rows within the block."""
    global _current
    _current = (rows, positions)
    try:
        yield
    finally:
        _current = None


def _row_attention(
    module: nn.Module,
    query: Tensor,  # [rows, heads, new, head_dim]
    key: Tensor,  # [rows, kv_heads, new, head_dim]
    value: Tensor,  # [rows, kv_heads, new, value_dim]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [heads]: attention sinks
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; [rows, new, heads, value_dim]."""
    if attention_mask is not None or _current is None:
        raise NotImplementedError("the verifier passes a mask to its attention")
    rows, positions = _current
    how = {"scale": scaling, "window": sliding_window, "softcap": softcap, "sinks": s_aux}
    return rows.attend(module, positions, query, key, value, **how), None


AttentionInterface.register(NAME, _row_attention)


def _checked_tokens(hooked: HookedModel) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = hooked.parts.decoder.get_input_embeddings().weight.shape[0]
    lengths = CHECKED_TOKENS
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _compute_alone(hooked: HookedModel) -> list[RowOutput]:
    whole, outputs = WholeRows(hooked), []
    for tokens in _checked_tokens(hooked):
        whole.read(0, tokens[:-NUM_CHECKED])
        last = torch.tensor([tokens[-NUM_CHECKED:]], device=hooked.device)
        outputs.append(whole.extend(last, [len(tokens) - NUM_CHECKED]))
    return outputs


def _is_right(rows: CachedRows, hooked: HookedModel, expected: Sequence[RowOutput]) -> bool:
    """Whether rows have the logits and hidden states that each has alone."""
    sequences = _checked_tokens(hooked)
    rows.start(len(sequences), max(CHECKED_TOKENS))
    for row, tokens in enumerate(sequences):
        rows.read(row, tokens[:-NUM_CHECKED])
    firsts = [len(tokens) - NUM_CHECKED for tokens in sequences]
    last = torch.tensor([tokens[-NUM_CHECKED:] for tokens in sequences], device=hooked.device)
    rows.extend(last.flip(1), firsts)  # as rejected draft tokens, to be replaced
    found = rows.extend(last, firsts)
    is_called = rows.num_layers > 0 and rows.has_window >= hooked.parts.has_window
    rows.start(0, 0)
    errors = [
        median_error(found.logits, torch.cat([x.logits for x in expected])),
        median_error(found.aux, torch.cat([x.aux for x in expected])),
    ]
    return is_called and max(errors) <= MAX_ERROR[found.aux.dtype]
