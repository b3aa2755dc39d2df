"""The training step over active rows: the same function as the plain forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.algorithms.eagle3.active_rows import ActiveRows, find_active_rows
from speculators_cli.core.algorithms.eagle3.draft import Eagle3Draft, FirstLayer
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.objective import sum_steps
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.kernels.joint_attention import joint_attention
from speculators_cli.core.kernels.linear_kl import Targets, linear_kl
from speculators_cli.core.kernels.rms_norm import rms_norm
from speculators_cli.core.kernels.rotary import rotate
from speculators_cli.core.kernels.shared import Share, SharedRows, SharedWeight, gather, join
from speculators_cli.core.kernels.spans import Spans
from speculators_cli.core.kernels.swiglu import gated_linear
from speculators_cli.core.models.layers import DecoderLayer, RMSNorm

Rope = tuple[Tensor, Tensor]


def unroll(draft: Eagle3Training, batch: Batch, targets: Targets, weights: Tensor) -> StepSums:
    """Unroll the draft over the rows that can reach a loss.

    Args:
        draft: Its weights are read once, cast to the dtype of the batch.
        batch: On the device.
        targets: Of the batch.
        weights: [steps], float32: what a position of each TTT step weighs in the loss.
    """
    config, dtype = draft.config, batch.aux_hidden_states.dtype
    share = partial(SharedWeight, dtype=dtype, in_float8=draft.multiplies_in_float8)
    mask = draft.embed_mask(dtype)
    # Masks do not depend on what the step before computed: all of them are computed at once.
    rows = find_active_rows(batch, config.ttt_steps, are_later_at_once=mask is not None)
    fc = share([draft.fc.weight])
    hidden = fc.linear(draft.normed_aux(batch.aux_hidden_states))
    layers = build_layers(draft, batch, rows, share, None if mask is None else mask[0])
    # One row stands for all of them.
    masked = None if mask is None else fc.linear(draft.normed_aux(mask[1]))
    active_positions = batch.position_ids[rows.rows]
    # Where the loss reads them.
    stacked = hidden.new_empty(len(rows.cells), config.hidden_size)
    scored = []
    for steps, place in zip(rows.passes, rows.pairs.inputs, strict=True):
        now = Pass.of(steps, rows, batch.position_ids, active_positions)
        residual = None
        for layer in layers:
            hidden, residual = layer(hidden, residual, now)
        normed, hidden = apply_norm(draft.norm, hidden, add=residual, into=stacked[place])
        scored.append(normed)
        hidden = draft.choose_fed_back(hidden, normed) if masked is None else masked
    head = share([draft.lm_head.weight])
    return score(head, rows, stacked, scored, targets, weights)


def apply_norm(
    norm: RMSNorm, x: Tensor, *, add: Tensor | None = None, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + add` normalised, and `x + add` to go on with."""
    return rms_norm(x, norm.weight, norm.eps, add=add, into=into)


@dataclass(frozen=True)
class Pass:
    """TTT steps that are computed at once, the rows of a step after those of the one before."""

    steps: range
    positions: tuple[Tensor, ...]  # of each step: of its active rows, the step's shift added
    own_positions: Tensor  # of all rows that have keys: in step 0, every position

    @classmethod
    def of(
        cls,
        steps: range,
        rows: ActiveRows,
        all_positions: Tensor,  # [seq_len]: in their documents
        active_positions: Tensor,  # [active]
    ) -> Self:
        """The pass of some steps."""
        positions = tuple(active_positions[: rows.counts[step]] + step for step in steps)
        if steps.start == 0:
            return cls(steps, positions, all_positions)
        return cls(steps, positions, torch.cat(positions))

    def split(
        self,
        x: Tensor,  # [rows, ...]
    ) -> tuple[Tensor, ...]:
        """The rows of each step."""
        if len(self.steps) == 1:
            return (x,)
        parts: tuple[Tensor, ...] = x.split([len(positions) for positions in self.positions])
        return parts


class FastLayer:
    """A decoder layer in one batch: its working weights, and the keys of the steps so far.

    Args:
        layer: Whose weights these are.
        rows: The active rows.
        rope: Cosine and sine by position.
        share: Makes the weights that its steps share.
        embedded: [seq_len, hidden]: normalised embeddings without norm weights, for a first layer.
        mask: [1, hidden]: the same of the token that all later steps read, if there is one.
        is_last: Whether step 0 leaves off the other rows once their keys are known.
        window: Positions that a query sees, its own included; None: all.
    """

    def __init__(
        self,
        layer: FirstLayer | DecoderLayer,
        rows: ActiveRows,
        rope: Rope,
        share: Share,
        *,
        embedded: Tensor | None,
        mask: Tensor | None,
        is_last: bool,
        window: int | None,
    ) -> None:
        self.layer, self.rows, self.rope, self.is_last = layer, rows, rope, is_last
        self.window = window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (projection.weight for projection in projections)
        # What the token embeddings add.
        self.query_part: EmbeddedPart | None = None
        self.kv_part: EmbeddedPart | None = None
        if isinstance(layer, FirstLayer):
            assert embedded is not None
            gain = layer.input_layernorm.weight
            halves = [weight.split(len(gain), dim=1) for weight in (q, k, v)]
            (embedding_q, q), (embedding_k, k), (embedding_v, v) = halves
            to_query = share([embedding_q], norm_weight=gain)
            to_kv = share([embedding_k, embedding_v], norm_weight=gain)
            places = (None, *rows.shifted_rows[1:])
            self.kv_part = EmbeddedPart(to_kv, embedded, places, mask)
            if is_last:
                embedded, places = embedded.index_select(0, rows.needed), rows.needed_rows
            self.query_part = EmbeddedPart(to_query, embedded, places, mask)
        self.q = share([q])
        self.kv = share([k, v])
        self.o = share([attention.o_proj.weight])
        self.gate_up = share([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.down = share([mlp.down_proj.weight])

    def __call__(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        now: Pass,
    ) -> tuple[Tensor, Tensor]:
        """Compute some TTT steps at once.

        Args:
            hidden: [seq_len, hidden] in step 0; later, of the active rows that go through each
                step; [1, hidden] if it is the same for all rows.
            residual: As `hidden`: what the next norm is to add to it; None in a first layer.
            now: The steps.

        Returns:
            Rows of `hidden`, active rows only in the last layer; what is to be added to them.
        """
        layer, rows, first = self.layer, self.rows, now.steps.start
        narrows = first == 0 and self.is_last
        keeps_all = first == 0 and not self.is_last
        if isinstance(layer, FirstLayer):
            normed, residual = apply_norm(layer.hidden_norm, hidden)
            residual = normed if layer.norm_before_residual else residual
        else:
            normed, residual = apply_norm(layer.input_layernorm, hidden, add=residual)
        key, value = self.project_kv(normed, now)
        self.keys += now.split(key)
        self.values += now.split(value)
        if narrows:
            is_shared = residual is normed
            normed = gather(normed, rows.rows, rows.places)
            residual = normed if is_shared else gather(residual, rows.rows, rows.places)
        heads = self.project_query(normed, first)
        if keeps_all:
            attended = self.attend(heads, first, now.own_positions, rows.all_spans)
        elif len(now.steps) == 1:
            attended = self.attend(heads, first, now.positions[0], rows.spans[first])
        else:
            attended = self.attend_at_once(heads, now)
        hidden = self.o.linear(attended.flatten(1))
        residual = residual.expand_as(hidden)
        normed, residual = apply_norm(layer.post_attention_layernorm, hidden, add=residual)
        return gated_linear(self.gate_up.linear(normed), self.down), residual

    def project_kv(self, normed: Tensor, now: Pass) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows of a pass, each [rows, kv_heads, head_dim]."""
        attention, positions = self.layer.self_attn, now.own_positions
        projected = self.kv.linear(normed, add=self.read(self.kv_part, now.steps.start))
        key, value = (
            x.view(len(normed), -1, attention.head_dim) for x in projected.chunk(2, dim=1)
        )
        key, value = (x.expand(len(positions), -1, -1) for x in (attention.k_norm(key), value))
        return rotate(key, self.rope, positions), value

    def project_query(self, normed: Tensor, step: int) -> Tensor:
        """Queries before RoPE, [rows, heads, head_dim]; `step` is the first of their pass."""
        attention = self.layer.self_attn
        projected = self.q.linear(normed, add=self.read(self.query_part, step))
        heads: Tensor = attention.q_norm(projected.view(len(normed), -1, attention.head_dim))
        return heads

    def attend(
        self,
        heads: Tensor,  # [rows, heads, head_dim]; [1, ...] if it is the same for all rows
        step: int,
        positions: Tensor,  # [rows]
        spans: Spans,
        into: Tensor | None = None,
    ) -> Tensor:
        """Attend from the queries of a step; [rows, heads, head_dim]."""
        laid_out = rotate(heads.expand(len(positions), -1, -1), self.rope, positions, spans=spans)
        keys, values = self.keys[: step + 1], self.values[: step + 1]
        return joint_attention(laid_out, keys, values, spans, window=self.window, into=into)

    def attend_at_once(self, heads: Tensor, now: Pass) -> Tensor:
        """Attend from the queries of several steps; [rows, heads, head_dim]."""
        # One row may stand for all.
        parts = [heads] * len(now.steps) if len(heads) == 1 else now.split(heads)
        whole = heads.new_empty(len(now.own_positions), *heads.shape[1:])
        attended = [
            self.attend(part, step, positions, self.rows.spans[step], into)
            for part, step, positions, into in zip(
                parts, now.steps, now.positions, now.split(whole), strict=True
            )
        ]
        return join(whole, attended)

    def read(self, part: "EmbeddedPart | None", step: int) -> Tensor | None:
        """What a step's rows read of the embeddings' part, if the layer has one."""
        return None if part is None else part.read(step, self.rows.num_inside)


class EmbeddedPart:
    """What the token embeddings add to a projection of the first layer, projected once.

    Args:
        weight: Of the embeddings' half.
        embedded: [rows, hidden]: normalised embeddings without norm weights.
        places: Of each step: which of these its rows read; None: all, in order.
        mask: [1, hidden]: what all later steps read in their place, if they read a mask.
    """

    def __init__(
        self,
        weight: SharedWeight,
        embedded: Tensor,
        places: Sequence[Tensor | None],
        mask: Tensor | None,
    ) -> None:
        self.places = places
        self.rows = SharedRows(weight.linear(embedded))
        self.mask = None if mask is None else SharedRows(weight.linear(mask))

    def read(self, step: int, num_inside: Sequence[int]) -> Tensor:
        """Copy what a step reads: [rows, out], or [1, out] of a mask."""
        if self.mask is not None and step > 0:
            return self.mask.read()
        return self.rows.read(self.places[step], num_inside=num_inside[step])


def build_layers(
    draft: Eagle3Draft,
    batch: Batch,
    rows: ActiveRows,
    share: Share,
    mask: Tensor | None,  # [1, hidden]: the embedding that all later steps read
) -> list[FastLayer]:
    """The draft's layers, ready for step 0."""
    normalise = partial(
        F.rms_norm, normalized_shape=(draft.config.hidden_size,), eps=draft.config.rms_norm_eps
    )
    embedded = normalise(draft.embed(batch.input_ids, batch.aux_hidden_states.dtype))
    mask = None if mask is None else normalise(mask)
    num_positions = max(batch.lengths, default=0) + draft.config.ttt_steps
    rope = draft.rotary(torch.arange(num_positions, device=batch.input_ids.device))
    num_layers = len(draft.layers)
    return [
        FastLayer(
            layer,  # type: ignore[arg-type]
            rows,
            rope,
            share,
            embedded=embedded if index == 0 else None,
            mask=mask if index == 0 else None,
            is_last=index == num_layers - 1,
            window=draft.config.windows[index],
        )
        for index, layer in enumerate(draft.layers)
    ]


def score(
    head: SharedWeight,
    rows: ActiveRows,
    stacked: Tensor,  # [pairs, hidden]: after the final norm, what the next argument shares
    parts: Sequence[Tensor],  # of each pass, [rows, hidden]
    targets: Targets,
    weights: Tensor,  # [steps]
) -> StepSums:
    """Losses and agreement of all steps at once."""
    scores = linear_kl(stacked, parts, head, rows.pairs, weights, targets)
    # What no step scores adds nothing, so the active rows stand for all positions.
    losses, agreed, scored = map(rows.by_step, (scores.losses, scores.agreed, scores.scored))
    return sum_steps(losses, agreed, scored)._replace(loss=scores.loss)
