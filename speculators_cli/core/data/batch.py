"""Batch: the tensors of one packed sequence."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One packed sequence, `seq_len` tokens long, padded at its end.

    Position `i` of a document holds token `x[i+1]` of its sample, the aux hidden states `g[i]` of
    the token before it, and the last hidden states `y[i+1]`, whose distribution predicts `x[i+2]`
    (EAGLE-3's alignment). Padding has document id -1, loss mask False and zeros elsewhere.
    """

    input_ids: Tensor  # [seq_len], int64
    aux_hidden_states: Tensor  # [seq_len, aux*hidden], float
    last_hidden_states: Tensor  # [seq_len, hidden], float
    is_normed: Tensor  # [seq_len], bool: last hidden states are after the final norm
    loss_mask: Tensor  # [seq_len], bool
    document_ids: Tensor  # [seq_len], int64: from 0 in order, -1 is padding
    position_ids: Tensor  # [seq_len], int64: from 1 in each document, 0 is padding
    lengths: tuple[int, ...]  # tokens of each document, in order
    sample_ids: tuple[int, ...]  # the sample of each document: its index in the dataset
