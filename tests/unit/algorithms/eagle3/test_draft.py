"""The training step against EAGLE-3 written out position by position, in float64, one document."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.models.verifier import FrozenVerifier
from tests.tiny_drafts import KERNELS, filled_draft, make_config, make_draft, make_sample, pack

KEPT_IDS = torch.arange(0, 37, 2)
DECAY = 0.7
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-layers": {"num_layers": 2},
    "three-qwen3-layers": {"num_layers": 3, "arch": "qwen3"},
    "norm-before-fc": {"norm_before_fc": True},
    "fc-norm": {"fc_norm": True},
    "norm-output": {"norm_output": True},
    "residual-before-norm-one-aux-layer": {
        "norm_before_residual": False,
        "target_layer_ids": (4,),
    },
    "five-aux-layers-seven-steps": {"target_layer_ids": (1, 2, 3, 4, 5), "ttt_steps": 7},
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
    """EAGLE-3 over one document with loops; memory grows by one entry a position and TTT step."""

    def __init__(self, config: Eagle3Config, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.w = weights

    def layer(self, index: int, embedded: Tensor, h: Tensor, step: int, seen: list[Any]) -> Tensor:
        """One decoder layer of TTT step `step` over all positions."""
        config, name = self.config, f"layers.{index}"
        if index == 0:
            normed = rms(h, self.w[f"{name}.hidden_norm.weight"])
            residual = normed if config.norm_before_residual else h
            both = [rms(embedded, self.w[f"{name}.input_layernorm.weight"]), normed]
            x = torch.cat(both, dim=-1)
        else:
            residual, x = h, rms(h, self.w[f"{name}.input_layernorm.weight"])
        heads = {
            kind: (x @ self.w[f"{name}.self_attn.{kind}_proj.weight"].T).unflatten(-1, (-1, 8))
            for kind in "qkv"
        }
        if config.arch == "qwen3":
            for kind in "qk":
                heads[kind] = rms(heads[kind], self.w[f"{name}.self_attn.{kind}_norm.weight"])
        rows = []
        seen.append([(turn(heads["k"][i], i + 1 + step), heads["v"][i]) for i in range(len(x))])
        for i in range(len(x)):
            query = turn(heads["q"][i], i + 1 + step)
            visible = seen[0][: i + 1] + [own[i] for own in seen[1:]]
            outputs = []
            for head in range(6):
                shared = head // 3  # six query heads, two key heads
                scores = torch.stack([query[head] @ k[shared] / 8**0.5 for k, _ in visible])
                values = torch.stack([v[shared] for _, v in visible])
                outputs.append(scores.softmax(-1) @ values)
            rows.append(torch.cat(outputs))
        h = residual + torch.stack(rows) @ self.w[f"{name}.self_attn.o_proj.weight"].T
        y = rms(h, self.w[f"{name}.post_attention_layernorm.weight"])
        gate, up = (y @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        mixed: Tensor = gate * gate.sigmoid() * up
        return h + mixed @ self.w[f"{name}.mlp.down_proj.weight"].T

    def steps(self, sample: Sample, draft: Eagle3Training) -> tuple[list[Tensor], list[int]]:
        """Summed KL of each TTT step, and how many positions it scores."""
        config, verifier = self.config, draft.verifier
        ids, mask = sample.input_ids[1:], sample.loss_mask[1:]
        aux = torch.cat([layer[:-1].double() for layer in sample.aux_hidden_states], dim=-1)
        last = sample.last_hidden_states[1:].double()
        last = last if sample.is_normed else rms(last, verifier.norm_weight.double())
        log_target = (last @ verifier.head[KEPT_IDS].double().T).log_softmax(-1)
        if config.norm_before_fc:
            aux = rms(aux, self.w["input_norm.weight"])
        if config.fc_norm:
            parts = aux.split(24, dim=-1)
            gains = [self.w[f"fc_norm.{index}.weight"] for index in range(len(parts))]
            aux = torch.cat([rms(x, gain) for x, gain in zip(parts, gains, strict=True)], dim=-1)
        h = aux @ self.w["fc.weight"].T
        seen: list[list[Any]] = [[] for _ in range(config.num_layers)]
        losses, counts = [], []
        for step in range(config.ttt_steps):
            # Past the end nothing is scored, so any token does.
            tokens = torch.cat([ids[step:], ids.new_zeros(min(step, len(ids)))])
            embedded = verifier.embedding[tokens].double()
            for index in range(config.num_layers):
                h = self.layer(index, embedded, h, step, seen[index])
            normed = rms(h, self.w["norm.weight"])
            log_draft = (normed @ self.w["lm_head.weight"].T).log_softmax(-1)
            loss, count = h.new_zeros(()), 0
            for i in range(len(ids) - step):
                if mask[i + step]:
                    target = log_target[i + step]
                    loss = loss + (target.exp() * (target - log_draft[i])).sum()
                    count += 1
            losses.append(loss)
            counts.append(count)
            h = normed if config.norm_output else h
        return losses, counts


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_definition_on_packed_documents(
    variant: str, kernels: str, rng: torch.Generator
) -> None:
    # Traps: a neighbour's targets leak; own tokens fed back; final norm left out; head frozen.
    config = make_config(**VARIANTS[variant])
    draft = filled_draft(config, rng, kept_ids=KEPT_IDS)
    draft.use_fast_kernels = kernels == "fast"
    samples = [make_sample(n, config, rng) for n in (5, 2, 7)]
    samples.append(replace(make_sample(4, config, rng), is_normed=True))
    weights = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in draft.named_parameters()
    }
    alone = [Reference(config, weights).steps(sample, draft) for sample in samples]
    losses = torch.stack([torch.stack(doc_losses) for doc_losses, _ in alone]).sum(0)
    counts = torch.tensor([doc_counts for _, doc_counts in alone]).sum(0)
    decays = torch.tensor([DECAY**step for step in range(config.ttt_steps)])
    (losses * decays.double() / counts.clamp(min=1)).sum().backward()

    batch = pack(*samples, total_seq_len=15)
    sums = draft(batch, torch.tensor(draft.loss_weights) / counts.clamp(min=1))
    sums.loss.backward()

    assert torch.equal(sums.counters["num_scored"], counts)
    assert torch.equal(draft.count_scored(batch), counts)
    torch.testing.assert_close(sums.counters["losses"].double(), losses, rtol=1e-5, atol=1e-5)
    for name, parameter in draft.named_parameters():
        exact = weights[name].grad
        assert parameter.grad is not None, name
        assert exact is not None, name
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        assert error < 1e-5, (name, float(error))


@pytest.mark.parametrize("kernels", KERNELS)
def test_targets_of_a_verifier_with_a_layernorm_and_biases(
    kernels: str, rng: torch.Generator
) -> None:
    draft = filled_draft(make_config(ttt_steps=1), rng, kept_ids=KEPT_IDS)
    own = draft.verifier
    head_bias, norm_bias = torch.randn(37, generator=rng), torch.randn(24, generator=rng)
    config = replace(own.config, is_norm_centred=True, rms_norm_eps=1e-2, logit_scale=0.5)
    draft.verifier = FrozenVerifier(
        own.embedding, own.norm_weight, own.head, config, norm_bias=norm_bias, head_bias=head_bias
    )
    draft.use_fast_kernels = kernels == "fast"
    batch = pack(make_sample(9, make_config(), rng))

    sums = draft(batch)

    x = batch.last_hidden_states.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = rms(centred, own.norm_weight.double(), eps=1e-2) + norm_bias
    log_p = ((normed @ own.head.double().T + head_bias) / 2)[:, KEPT_IDS].log_softmax(-1)
    log_p = batch.at_positions(log_p)
    memories = [TTTMemory(batch.lengths)]
    hidden = draft.fuse(batch.aux_hidden_states)
    draft_normed, _ = draft.step(batch.input_ids, hidden, batch.position_ids, memories)
    log_q = draft.lm_head(draft_normed).double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[batch.loss_mask].sum()
    assert batch.loss_mask.any()
    torch.testing.assert_close(
        sums.counters["losses"].double(), expected[None], rtol=1e-5, atol=1e-5
    )


def test_a_document_gives_the_same_wherever_it_is_packed(rng: torch.Generator) -> None:
    draft = filled_draft(make_config(), rng, kept_ids=KEPT_IDS)
    first, second = (make_sample(n, make_config(), rng) for n in (11, 14))

    packed, alone = draft(pack(first, second)), [draft(pack(first)), draft(pack(second))]

    together = torch.stack([sums.stacked() for sums in alone]).sum(0)
    torch.testing.assert_close(packed.stacked(), together, rtol=1e-5, atol=1e-5)


def test_the_verifier_gets_no_gradient(rng: torch.Generator) -> None:
    draft = filled_draft(make_config(), rng, kept_ids=KEPT_IDS)
    frozen = (draft.verifier.head, draft.verifier.norm_weight)
    for tensor in frozen:
        tensor.requires_grad_()

    draft(pack(make_sample(12, make_config(), rng))).loss.backward()

    assert all(tensor.grad is None for tensor in frozen)
    names = {name for name, _ in draft.named_parameters()}
    assert not any("embed" in name or "verifier" in name for name in names)


def test_validation_counts_a_token_outside_the_draft_vocabulary_as_a_miss(
    rng: torch.Generator,
) -> None:
    # Trap: scored inside the draft vocabulary only, acceptance is overstated.
    draft = make_draft(
        make_config(ttt_steps=1),
        embedding=torch.randn(37, 24, generator=rng),
        # Last state `i` points at verifier token `i`; odd ones are not in the draft.
        head=torch.cat([torch.eye(24), torch.zeros(13, 24)]) * 9,
        norm_weight=torch.ones(24),
        kept_ids=KEPT_IDS,
        loss_decay=DECAY,
    )
    draft.initialise(seed=0)
    sample = make_sample(25, make_config(), rng)
    states = torch.eye(24)[torch.arange(25) % 24]
    sample = replace(sample, last_hidden_states=states, loss_mask=torch.ones(25, dtype=torch.bool))
    batch = pack(sample)

    _, in_draft = draft.train().targets(batch)
    _, of_all = draft.eval().targets(batch)

    expected = [i % 24 for i in range(1, 25)]
    assert of_all[:24].tolist() == expected
    assert all(token % 2 == 0 for token in in_draft[:24].tolist())
    kept = [i for i, token in enumerate(expected) if token % 2 == 0]
    assert in_draft[kept].tolist() == of_all[kept].tolist()
    sums = draft.eval()(batch)
    assert int(sums.counters["num_agreed"][0]) <= len(kept)


def test_fresh_weights_start_from_the_verifiers_head(rng: torch.Generator) -> None:
    draft = filled_draft(make_config(arch="qwen3"), rng, kept_ids=KEPT_IDS)

    draft.initialise(seed=3)
    once = {name: p.detach().clone() for name, p in draft.named_parameters()}
    draft.initialise(seed=3)

    assert torch.equal(draft.lm_head.weight, draft.verifier.head[KEPT_IDS])
    assert all(torch.equal(p, once[name]) for name, p in draft.named_parameters())
    assert draft.lm_head.weight.requires_grad
    assert abs(float(once["fc.weight"].std()) - 0.02) < 2e-3
