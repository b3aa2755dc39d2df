"""The P-EAGLE step against the definition: every position alone, with masks after it, in float64.

In arXiv 2602.01469, the tokens after a position are predicted by one causal pass over the positions
up to it and a mask for each further token. The reference makes that pass for each position.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.algorithms.peagle.config import PEagleConfig
from speculators_cli.core.algorithms.peagle.cost import PEagleCost
from speculators_cli.core.algorithms.peagle.depths import DepthSampling
from speculators_cli.core.algorithms.peagle.training import PEagleTraining
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.sample import Sample
from tests.tiny_drafts import KERNELS, filled_draft, make_config, make_sample, pack
from tests.tiny_peagle import KEPT_IDS, MASK, filled_peagle, make_peagle_config
from tests.unit.algorithms.eagle3.test_draft import rms, turn

DECAY = 0.7  # of `filled_draft`
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two-qwen3-layers": {"num_layers": 2, "arch": "qwen3"},
    "two-layers-five-aux-layers-five-tokens": {
        "num_layers": 2,
        "target_layer_ids": (1, 2, 3, 4, 5),
        "ttt_steps": 5,
    },
    "norm-before-fc": {"norm_before_fc": True},
    "residual-before-norm-two-layers": {"norm_before_residual": False, "num_layers": 2},
    "window": {"sliding_window": 4, "num_layers": 2},
    "drawn-depths": {"num_layers": 2, "ttt_steps": 4},
    "drawn-depths-few-anchors-window": {"num_layers": 2, "sliding_window": 4},
}
SAMPLINGS = {
    "drawn-depths": DepthSampling(0.6, 0.3),
    "drawn-depths-few-anchors-window": DepthSampling(0.6, 0.2, num_anchors=5),
}


class Reference:
    """A causal pass over some positions and masks, with loops over heads and queries."""

    def __init__(self, config: PEagleConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.w = weights

    def logits(self, embedded: Tensor, aux: Tensor) -> Tensor:
        """Logits of a sequence that begins with a document; [length, draft_vocab]."""
        if self.config.norm_before_fc:
            aux = rms(aux, self.w["input_norm.weight"])
        h = aux @ self.w["fc.weight"].T
        for index in range(self.config.num_layers):
            h = self.layer(index, embedded, h)
        return rms(h, self.w["norm.weight"]) @ self.w["lm_head.weight"].T

    def layer(self, index: int, embedded: Tensor, h: Tensor) -> Tensor:
        name, config = f"layers.{index}", self.config
        residual, x = h, rms(h, self.w[f"{name}.input_layernorm.weight"])
        if index == 0:
            normed = rms(h, self.w[f"{name}.hidden_norm.weight"])
            residual = normed if config.norm_before_residual else h
            own = rms(embedded, self.w[f"{name}.input_layernorm.weight"])
            x = torch.cat([own, normed], dim=-1)
        q, k, v = (
            (x @ self.w[f"{name}.self_attn.{kind}_proj.weight"].T).unflatten(-1, (-1, 8))
            for kind in "qkv"
        )
        if config.arch == "qwen3":
            q = rms(q, self.w[f"{name}.self_attn.q_norm.weight"])
            k = rms(k, self.w[f"{name}.self_attn.k_norm.weight"])
        q, k = (torch.stack([turn(row, i + 1) for i, row in enumerate(part)]) for part in (q, k))
        rows = []
        for i in range(len(x)):
            first = 0 if config.sliding_window is None else max(i - config.sliding_window + 1, 0)
            seen = slice(first, i + 1)
            outputs = []
            for head in range(6):
                shared = head // 3  # six query heads, two key heads
                scores = k[seen, shared] @ q[i, head] / 8**0.5
                outputs.append(scores.softmax(-1) @ v[seen, shared])
            rows.append(torch.cat(outputs))
        h = residual + torch.stack(rows) @ self.w[f"{name}.self_attn.o_proj.weight"].T
        y = rms(h, self.w[f"{name}.post_attention_layernorm.weight"])
        gate, up = (y @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        mixed: Tensor = gate * gate.sigmoid() * up
        return h + mixed @ self.w[f"{name}.mlp.down_proj.weight"].T

    def losses(
        self, sample: Sample, draft: PEagleTraining, depths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Summed KL of each step, and how many positions it scores; each [steps].

        `depths`, [positions], are the steps that each position goes through.
        """
        num_steps, verifier = self.config.ttt_steps, draft.verifier
        ids, mask = sample.input_ids[1:], sample.loss_mask[1:]
        aux = torch.cat([layer[:-1].double() for layer in sample.aux_hidden_states], dim=-1)
        last = rms(sample.last_hidden_states[1:].double(), verifier.norm_weight.double())
        targets = (last @ verifier.head[KEPT_IDS].double().T).log_softmax(-1)
        losses = [aux.new_zeros(()) for _ in range(num_steps)]
        counts = torch.zeros(num_steps, dtype=torch.int64)
        masked = self.w["mask_hidden"].flatten()
        for row in range(len(ids)):
            tokens = ids[: row + 1].tolist() + [MASK] * (num_steps - 1)
            states = torch.cat([aux[: row + 1], masked.expand(num_steps - 1, -1)])
            embedded = verifier.embedding[tokens].double()
            log_q = self.logits(embedded, states)[row:].log_softmax(-1)
            for step in range(min(int(depths[row]), len(ids) - row)):
                if mask[row + step]:
                    log_p = targets[row + step]
                    losses[step] = losses[step] + (log_p.exp() * (log_p - log_q[step])).sum()
                    counts[step] += 1
        return torch.stack(losses), counts


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_definition_on_packed_documents(
    variant: str, kernels: str, rng: torch.Generator
) -> None:
    # Traps: the true tokens read from step 1 on; a window counted from the position of step 0.
    config = make_peagle_config(**VARIANTS[variant])
    draft = filled_peagle(config, rng)
    draft.use_fast_kernels = kernels == "fast"
    draft.sampling = SAMPLINGS.get(variant, DepthSampling())
    samples = [make_sample(n, config, rng) for n in (6, 2, 8)]
    batch = draft.draw(pack(*samples, total_seq_len=15), seed=0, epoch=0)
    assert (batch.depths is not None) == (variant in SAMPLINGS)
    depths = torch.full((15,), config.ttt_steps) if batch.depths is None else batch.depths
    w = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    own_depths = depths.split([*batch.lengths, 2])
    alone = [
        Reference(config, w).losses(sample, draft, own)
        for sample, own in zip(samples, own_depths, strict=False)
    ]
    losses = torch.stack([doc_losses for doc_losses, _ in alone]).sum(0)
    counts = torch.stack([doc_counts for _, doc_counts in alone]).sum(0)
    decays = torch.tensor([DECAY**step for step in range(config.ttt_steps)]).double()
    # One weighted mean over all positions and their depths.
    ((losses * decays).sum() / (counts * decays).sum()).backward()

    num_scored = draft.count_scored(batch)
    sums = draft(batch, draft.normalise(torch.tensor(draft.loss_weights), num_scored))
    sums.loss.backward()

    assert counts.min() > 0
    assert torch.equal(num_scored, counts)
    assert torch.equal(sums.counters["num_scored"], counts)
    torch.testing.assert_close(sums.counters["losses"].double(), losses, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in draft.named_parameters()} == set(config.tensor_shapes())
    for name, parameter in draft.named_parameters():
        exact = w[name].grad
        assert parameter.grad is not None, name
        assert exact is not None, name
        # float32 rounds each of a dozen products in a row by 6e-8.
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        assert error < 1e-5, (name, float(error))


def test_step_0_is_that_of_eagle_3_and_the_others_are_not(rng: torch.Generator) -> None:
    draft = filled_peagle(make_peagle_config(), rng)
    eagle = filled_draft(make_config(), rng, kept_ids=KEPT_IDS)
    eagle.load_state_dict({k: x for k, x in draft.state_dict().items() if k != "mask_hidden"})
    eagle.verifier, eagle.embedding = draft.verifier, draft.embedding
    eagle.verifier_rows = draft.verifier_rows
    batch = pack(make_sample(12, draft.config, rng))

    own, other = (x(batch).counters["losses"] for x in (draft, eagle))

    assert own[0] == other[0] > 0
    assert (own[1:] != other[1:]).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_batch_without_supervised_tokens_gives_zeros(kernels: str, rng: torch.Generator) -> None:
    # A rank's last step may have nothing to read; the others wait for its gradients.
    draft = filled_peagle(make_peagle_config(), rng)
    draft.use_fast_kernels = kernels == "fast"
    batch = pack(make_sample(2, draft.config, rng, supervised_fraction=0.0), total_seq_len=8)

    draft(batch).loss.backward()

    for name, parameter in draft.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def count_saved(draft: Eagle3Training, batch: Batch) -> int:
    """Bytes that a fast step keeps for its backward pass."""
    draft.use_fast_kernels = True
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        draft(batch)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(storages.values())


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_fast_step_keeps_as_much_less_than_eagle_3_as_its_cost_model_spares(
    rng: torch.Generator,
) -> None:
    changes = {"num_layers": 2, "ttt_steps": 3}
    config = make_peagle_config(**changes)
    batch = pack(make_sample(15, config, rng, supervised_fraction=1.0), total_seq_len=14)

    eagle = count_saved(filled_draft(make_config(**changes), rng, kept_ids=KEPT_IDS), batch)
    own = count_saved(filled_peagle(config, rng), batch)

    # The model counts bfloat16, the step computes float32; it keeps some rows of the mask itself.
    spared = 2 * PEagleCost().count_spared_bytes(config, 2 * 14)
    assert spared == 4 * 2 * 14 * (24 + 2 * 2 * 8)
    assert 0 <= spared - (eagle - own) <= 4 * 10 * 24


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_fast_step_keeps_less_at_drawn_depths(rng: torch.Generator) -> None:
    config = make_peagle_config(num_layers=2, ttt_steps=4)
    draft = filled_peagle(config, rng)
    batch = pack(make_sample(21, config, rng, supervised_fraction=1.0), total_seq_len=20)
    drawn = DepthSampling(0.5, 0.1).draw(batch, 4, seed=0, epoch=0)

    # 20 positions at depth 0, and 10, 5 and 2 at the others.
    assert count_saved(draft, drawn) < 0.65 * count_saved(draft, batch)


def test_a_fresh_mask_is_drawn_and_repeats(rng: torch.Generator) -> None:
    draft = filled_peagle(make_peagle_config(), rng)

    draft.initialise(seed=3)
    once = draft.mask_hidden.detach().clone()
    draft.initialise(seed=3)

    assert torch.equal(draft.mask_hidden, once)
    assert 0.01 < float(once.std()) < 0.03
