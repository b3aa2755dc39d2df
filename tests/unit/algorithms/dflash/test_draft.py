"""The training step against DFlash written out anchor by anchor, in float64, one document."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.dflash import training
from speculators_cli.core.algorithms.dflash.algorithm import DFlash
from speculators_cli.core.algorithms.dflash.blocks import find_blocks
from speculators_cli.core.algorithms.dflash.config import DFlashConfig
from speculators_cli.core.algorithms.dflash.drafter import BlockDrafter
from speculators_cli.core.algorithms.dflash.loss_weights import LossWeights
from speculators_cli.core.algorithms.dflash.training import DFlashTraining
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.errors import SettingsError
from speculators_cli.settings.algorithms.dflash import DFlashSettings
from tests.tiny_dflash import DECAY, MASK, filled_blocks, make_block_config
from tests.tiny_drafts import KERNELS, make_sample, pack

ONE_LAYER = {"num_layers": 1}  # others have two
VARIANTS: dict[str, dict[str, Any]] = {
    "reduced vocabulary": {},
    "full vocabulary": ONE_LAYER | {"draft_vocab_size": 37},
    "one aux layer": ONE_LAYER | {"target_layer_ids": (4,)},
    "five aux layers": ONE_LAYER | {"target_layer_ids": (1, 2, 3, 4, 5)},
    "causal": ONE_LAYER | {"causal_block": True},
    "window": {"draft_window": 4},
    "causal window": ONE_LAYER | {"draft_window": 3, "causal_block": True},
    "long blocks": ONE_LAYER | {"block_size": 16},
}


def rms(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * gain


def turn(x: Tensor, position: int) -> Tensor:
    """RoPE at theta 500,000 on [heads, head_dim]: pairs are halves apart."""
    half = x.shape[-1] // 2
    angles = position * 500000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = x[:, :half], x[:, half:]
    return torch.cat(
        [
            first * angles.cos() - second * angles.sin(),
            second * angles.cos() + first * angles.sin(),
        ],
        dim=-1,
    )


class Reference:
    """DFlash at one anchor of one sample, with loops, in tokens and states of the sample."""

    def __init__(self, config: DFlashConfig, weights: Mapping[str, Tensor]) -> None:
        self.config, self.w = config, weights

    def project(self, name: str, kind: str, x: Tensor) -> Tensor:
        """Heads of one row, after their norm; [heads, head_dim]."""
        heads = (self.w[f"{name}.self_attn.{kind}_proj.weight"] @ x).view(-1, 8)
        if kind == "v":
            return heads
        return rms(heads, self.w[f"{name}.self_attn.{kind}_norm.weight"])

    def sees(self, query: int, key: int, anchor: int) -> bool:
        window, is_causal = self.config.draft_window, self.config.causal_block
        if window is not None and abs(query - key) >= window:
            return False
        return key < anchor or not is_causal or key <= query

    def block(self, aux: Tensor, embedding: Tensor, token: int, anchor: int) -> Tensor:
        """After the final norm, what the LM head reads at each token of a block."""
        size = self.config.block_size
        context = [
            rms(self.w["fc.weight"] @ aux[t], self.w["hidden_norm.weight"]) for t in range(anchor)
        ]
        h = [embedding[token]] + [embedding[MASK]] * (size - 1)
        for index in range(self.config.num_layers):
            name = f"layers.{index}"
            u = [rms(x, self.w[f"{name}.input_layernorm.weight"]) for x in h]
            rows = [*context, *u]
            keys = [turn(self.project(name, "k", x), t) for t, x in enumerate(rows)]
            values = [self.project(name, "v", x) for x in rows]
            new = []
            for j in range(size):
                query = turn(self.project(name, "q", u[j]), anchor + j)
                seen = [t for t in range(len(rows)) if self.sees(anchor + j, t, anchor)]
                outputs = []
                for head in range(6):
                    shared = head // 3  # six query heads, two key heads
                    scores = torch.stack([query[head] @ keys[t][shared] / 8**0.5 for t in seen])
                    outputs.append(
                        scores.softmax(-1) @ torch.stack([values[t][shared] for t in seen])
                    )
                x = h[j] + self.w[f"{name}.self_attn.o_proj.weight"] @ torch.cat(outputs)
                y = rms(x, self.w[f"{name}.post_attention_layernorm.weight"])
                gate, up = (self.w[f"{name}.mlp.{part}_proj.weight"] @ y for part in ("gate", "up"))
                mixed = gate * gate.sigmoid() * up
                new.append(x + self.w[f"{name}.mlp.down_proj.weight"] @ mixed)
            h = new
        return torch.stack([rms(x, self.w["norm.weight"]) for x in h])

    def losses(self, sample: Sample, draft: DFlashTraining, anchor: int) -> list[Tensor]:
        """KL of each prediction that is scored at an anchor."""
        verifier, kept = draft.verifier, draft.kept_ids
        aux = torch.cat([layer[:].double() for layer in sample.aux_hidden_states], dim=-1)
        embedding, head = verifier.embedding.double(), self.w.get("lm_head.weight")
        head = verifier.head.double() if head is None else head
        token = int(sample.input_ids[anchor])
        normed = self.block(aux, embedding, token, anchor)
        losses = []
        for s in range(self.config.block_size - 1):
            t = anchor + s
            if t >= len(sample.input_ids) or not sample.loss_mask[t]:
                break
            last = sample.last_hidden_states[:][t].double()
            last = last if sample.is_normed else rms(last, verifier.norm_weight.double())
            log_p = (verifier.head[kept].double() @ last).log_softmax(-1)
            log_q = (head @ normed[s + 1]).log_softmax(-1)
            losses.append((log_p.exp() * (log_p - log_q)).sum())
        return losses


def draw(draft: DFlashTraining, batch: Batch, epoch: int = 0) -> Batch:
    return draft.draw(batch, seed=3, epoch=epoch)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_definition_on_packed_documents(
    variant: str, kernels: str, rng: torch.Generator
) -> None:
    # Traps: states of the anchor itself; one token late; input norm on the context; a window from
    # the anchor; positions counted from 1.
    config = make_block_config(**VARIANTS[variant])
    draft = filled_blocks(config, rng)
    draft.use_fast_kernels = kernels == "fast"
    samples = [make_sample(n, config, rng) for n in (4, 2, 7, 1)]
    samples.append(replace(make_sample(4, config, rng), is_normed=True))
    weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in draft.named_parameters()
    }
    reference = Reference(config, weights)
    scored = [
        reference.losses(sample, draft, anchor)
        for sample in samples
        for anchor in range(1, len(sample.input_ids))
        if sample.loss_mask[anchor]
    ]
    steps = config.num_draft_tokens
    counts = torch.tensor([sum(len(block) > s for block in scored) for s in range(steps)])
    losses = torch.stack(
        [
            sum((b[s] for b in scored if len(b) > s), torch.zeros((), dtype=torch.float64))
            for s in range(steps)
        ]
    )
    decays = torch.tensor([math.exp(-s / 2.0) for s in range(steps)], dtype=torch.float64)
    expected = (losses * decays).sum() / (decays * counts).sum()
    expected.backward()

    batch = draw(draft, pack(*samples, total_seq_len=17))
    sums = draft(batch, draft.normalise(torch.tensor(draft.loss_weights), counts))
    sums.loss.backward()

    assert counts[0] == len(scored) > 4
    assert torch.equal(sums.counters["num_scored"], counts)
    assert torch.equal(draft.count_scored(batch), counts)
    torch.testing.assert_close(sums.loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        sums.counters["losses"].double(), losses.detach(), rtol=1e-5, atol=1e-5
    )
    for name, parameter in draft.named_parameters():
        exact = weights[name].grad
        assert parameter.grad is not None, name
        assert exact is not None, name
        # float32 rounds each of a dozen products in a row by 6e-8.
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        assert error < 2e-5, (name, float(error))


def verify(sample: Sample, start: int, stop: int) -> Verified:
    """Positions of a sample, as of one row that a verifier pass verified."""
    aux = torch.cat([layer[start:stop] for layer in sample.aux_hidden_states], dim=-1)
    tokens = sample.input_ids[None, start + 1 : stop + 1]
    return Verified(tokens, aux[None], [start], [stop - start])


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_anchor_predicts_in_a_packed_sequence_what_it_drafts_alone(
    variant: str, rng: torch.Generator
) -> None:
    config = make_block_config(**VARIANTS[variant])
    draft = filled_blocks(config, rng).eval()
    samples = [make_sample(n, config, rng, supervised_fraction=1.0) for n in (7, 3, 9)]
    batch = draw(draft, pack(*samples))
    blocks = find_blocks(batch, config.num_draft_tokens)
    drafter = load_drafter(draft)

    with torch.no_grad():
        packed = draft.logits(draft.predict(batch, blocks))

    alone = []
    for sample in samples:
        length = len(sample.input_ids)
        drafter.start(1, length + config.num_draft_tokens)
        # The first tokens at once, as of a prompt, then one token for each verifier pass.
        for start, stop in ((0, 2), *((t, t + 1) for t in range(2, length - 1))):
            drafter.read(verify(sample, start, stop))
            alone.append(drafter.compute_logits()[0])
    rows = batch.position_ids[blocks.anchors]
    later = packed[rows > 1]  # the drafter read the first two positions together
    assert len(later) == len(alone) == 5 + 1 + 7
    torch.testing.assert_close(later, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_of_a_batch_is_drafted_as_that_row_alone(
    variant: str, rng: torch.Generator
) -> None:
    config = make_block_config(**VARIANTS[variant])
    drafter = load_drafter(filled_blocks(config, rng))
    samples = [make_sample(n, config, rng, supervised_fraction=1.0) for n in (13, 12, 14, 11)]
    ends = (3, 5, 4, 7)

    def draft_alone(sample: Sample, *spans: tuple[int, int]) -> Tensor:
        drafter.start(1, 20)
        for start, stop in spans:
            drafter.read(verify(sample, start, stop))
        return drafter.compute_logits()[0]

    expected = [
        draft_alone(samples[2], (0, 4), (4, 6)),
        draft_alone(samples[3], (0, 3)),  # began where row 0 had ended
        draft_alone(samples[2], (0, 4), (4, 6), (6, 9)),
        draft_alone(samples[3], (0, 3), (3, 4)),
    ]

    drafter.start(3, 20)
    for row, end in enumerate(ends[:3]):
        drafter.read(replace(verify(samples[row], 0, end), row=row))
    # Rows verify three, one and two of three positions.
    new = [verify(samples[row], ends[row], ends[row] + 3) for row in range(3)]
    drafter.read(merge(new, counts=(3, 1, 2)))
    drafter.read(replace(verify(samples[3], 0, 3), row=0))
    drafter.keep((2, 0))
    found = [*drafter.compute_logits()]
    drafter.read(merge([verify(samples[2], 6, 9), verify(samples[3], 3, 6)], counts=(3, 1)))
    found += [*drafter.compute_logits()]

    # float32 rounds products of other shapes in another order.
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)


def load_drafter(draft: DFlashTraining) -> BlockDrafter:
    return DFlash().build_drafter(
        draft.config,
        dict(draft.named_parameters()),
        draft.embedding,
        draft.kept_ids,
        num_draft_tokens=draft.config.num_draft_tokens,
        head=draft.verifier.head,
    )


def merge(rows: Sequence[Verified], counts: Sequence[int]) -> Verified:
    tokens, aux = (torch.cat([getattr(x, name) for x in rows]) for name in ("tokens", "aux"))
    return Verified(tokens, aux, [x.firsts[0] for x in rows], counts)


def test_an_anchor_reads_nothing_at_its_token_or_later_or_of_other_documents(
    rng: torch.Generator,
) -> None:
    config = make_block_config()
    draft = filled_blocks(config, rng).eval()
    samples = [make_sample(n, config, rng, supervised_fraction=1.0) for n in (7, 9)]
    anchor = 4  # of the second sample: row 3 of its document
    row = 6 + anchor - 1

    def predict(changed: Sample) -> Tensor:
        batch = replace(pack(samples[0], changed), anchors=torch.tensor([row]))
        with torch.no_grad():
            return draft.predict(batch, find_blocks(batch, config.num_draft_tokens))

    def change(tokens: slice, states: slice) -> Sample:
        ids, layers = (
            samples[1].input_ids.clone(),
            [x[:].clone() for x in samples[1].aux_hidden_states],
        )
        ids[tokens] = (ids[tokens] + 1) % 34
        for layer in layers:
            layer[states] += 1.0
        return replace(samples[1], input_ids=ids, aux_hidden_states=tuple(layers))

    nothing, end = slice(0, 0), slice(anchor + 1, None)
    before = predict(samples[1])
    later = predict(change(end, slice(anchor, None)))
    others = replace(samples[0], input_ids=(samples[0].input_ids + 1) % 34)
    samples[0] = replace(
        others, aux_hidden_states=tuple(x[:] + 1 for x in others.aux_hidden_states)
    )
    of_others = predict(samples[1])

    assert torch.equal(later, before)
    assert torch.equal(of_others, before)
    # What it does read.
    assert not torch.equal(predict(change(slice(anchor, anchor + 1), nothing)), before)
    assert not torch.equal(predict(change(nothing, slice(anchor - 1, anchor))), before)


@pytest.mark.parametrize("loss", ["ce", "tv"])
def test_other_losses_equal_their_definition(loss: str, rng: torch.Generator) -> None:
    config = make_block_config()
    draft = filled_blocks(config, rng, loss=loss)
    batch = draw(draft, pack(make_sample(12, config, rng)))
    blocks = find_blocks(batch, config.num_draft_tokens)

    sums = draft(batch)

    q = draft.logits(draft.predict(batch, blocks)).double().softmax(-1)
    p = draft.targets_of(batch, blocks, 0, len(q))[0].double().exp()
    scored = blocks.targets >= 0
    q, p = q[scored], p[scored]
    each = (
        -q[torch.arange(len(q)), p.argmax(-1)].log() if loss == "ce" else (p - q).abs().sum(-1) / 2
    )
    assert len(each) > 10
    torch.testing.assert_close(sums.loss.double(), each.sum(), rtol=1e-5, atol=0)


def test_dpace_weighs_a_prediction_by_the_prefixes_that_it_is_part_of(
    rng: torch.Generator,
) -> None:
    config = make_block_config()
    weights = LossWeights(gamma=None, alpha=0.25)
    draft = filled_blocks(config, rng, loss="ce", weights=weights)
    batch = draw(draft, pack(make_sample(12, config, rng)))
    blocks = find_blocks(batch, config.num_draft_tokens)

    sums = draft(
        batch, draft.normalise(torch.tensor(draft.loss_weights), draft.count_scored(batch))
    )
    sums.loss.backward()

    logits = draft.logits(draft.predict(batch, blocks)).detach().double()
    best = draft.targets_of(batch, blocks, 0, len(logits))[0].argmax(-1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, tokens, targets in zip(logits, best, blocks.targets.tolist(), strict=True):
        ces = [-row[s].log_softmax(-1)[tokens[s]] for s, t in enumerate(targets) if t >= 0]
        q = [0.75 * float((-ce).exp()) + 0.25 for ce in ces]
        prefixes = [math.prod(q[: m + 1]) for m in range(len(q))]
        total = total + sum(ce * sum(prefixes[s:]) for s, ce in enumerate(ces))
        count += len(ces)
    assert count > 10
    torch.testing.assert_close(sums.loss.double(), total / count, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_anchors_are_scored_some_at_a_time(
    loss: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_block_config()
    draft = filled_blocks(config, rng, loss=loss)
    batch = draw(draft, pack(*(make_sample(n, config, rng) for n in (9, 14))))

    whole = draft(batch)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in draft.named_parameters() if p.grad is not None}
    draft.zero_grad()
    monkeypatch.setattr(training, "MAX_LOGITS", 3 * 4 * 19)  # three anchors
    parts = draft(batch)
    parts.loss.backward()

    assert batch.anchors is not None
    assert len(batch.anchors) > 6
    # float32 sums in another order.
    torch.testing.assert_close(parts.stacked(), whole.stacked(), rtol=1e-5, atol=1e-5)
    for name, p in draft.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_supervised_gives_a_loss_of_zero_with_gradients(
    kernels: str, rng: torch.Generator
) -> None:
    config = make_block_config()
    draft = filled_blocks(config, rng)
    draft.use_fast_kernels = kernels == "fast"
    batch = draw(draft, pack(make_sample(9, config, rng, supervised_fraction=0.0)))

    counts = draft.count_scored(batch)
    sums = draft(batch, draft.normalise(torch.tensor(draft.loss_weights), counts))
    sums.loss.backward()

    assert counts.tolist() == [0] * 4
    assert sums.loss.item() == 0.0
    assert all(float(p.grad.abs().sum()) == 0.0 for p in draft.parameters() if p.grad is not None)


def test_a_head_with_a_bias_is_not_borrowed(rng: torch.Generator) -> None:
    draft = filled_blocks(make_block_config(draft_vocab_size=37), rng)
    draft.verifier.head_bias = torch.zeros(37)

    with pytest.raises(SettingsError, match="has a bias"):
        training.DFlashTraining(
            draft.config,
            draft.verifier,
            draft.vocab_map,
            loss=draft.loss,
            weights=DECAY,
            num_anchors=4,
        )


def test_the_verifier_gets_no_gradient_and_lends_its_head(rng: torch.Generator) -> None:
    config = make_block_config(draft_vocab_size=37)
    draft = filled_blocks(config, rng, weights=DECAY)
    for tensor in (draft.verifier.head, draft.verifier.norm_weight, draft.verifier.embedding):
        tensor.requires_grad_(False)

    draft(draw(draft, pack(make_sample(12, config, rng)))).loss.backward()

    assert {name for name, _ in draft.named_parameters()} == set(config.tensor_shapes())
    assert "lm_head.weight" not in config.tensor_shapes()
    assert draft.verifier.head.grad is None


def test_blocks_without_room_in_a_tile_are_computed_by_plain_kernels() -> None:
    settings = DFlashSettings()
    fits = make_block_config(block_size=42)  # three query heads per key head
    large = make_block_config(block_size=43)

    assert ALGORITHMS["dflash"].find_unsupported(fits, settings) is None
    reason = ALGORITHMS["dflash"].find_unsupported(large, settings)
    assert reason == "blocks of 43 tokens with 3 query heads per key head"
