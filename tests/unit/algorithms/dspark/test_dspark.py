"""DSpark: its training step against the definition, its drafter, its commands."""

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.algorithms.dflash.blocks import find_blocks
from speculators_cli.core.algorithms.drafter import Verified
from speculators_cli.core.algorithms.dspark.algorithm import DSpark
from speculators_cli.core.algorithms.dspark.config import DSparkConfig
from speculators_cli.core.algorithms.dspark.training import DSparkTraining, LossParts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.errors import CheckpointError, ExportError, SettingsError
from speculators_cli.core.export.contract import find_problems
from speculators_cli.core.export.export import export
from speculators_cli.core.progress import SilentProgress
from speculators_cli.core.training.plan import plan
from speculators_cli.core.training.report import TrainReport
from speculators_cli.core.training.run import train
from speculators_cli.settings.algorithms.dspark import MARKOV_HEAD_TYPES
from speculators_cli.settings.export import ExportSettings
from speculators_cli.settings.train import TrainSettings
from tests.run_files import assert_cuts_change_nothing, read_metrics
from tests.tiny_dflash import DECAY, filled_blocks, make_block_config
from tests.tiny_drafts import KERNELS, fill_weights, make_sample, pack, read_folder, write_folder
from tests.tiny_run import TinyInputs
from tests.unit.algorithms.dflash.test_draft import Reference, rms
from tests.unit.export.test_contract import change, put

QUIET = SilentProgress()
PARTS = LossParts(ce=0.1, l1=0.9, confidence=0.7)
ONE_LAYER = {"num_layers": 1}  # others have two
VARIANTS: dict[str, dict[str, Any]] = {
    "reduced vocabulary": {},
    "full vocabulary": ONE_LAYER | {"draft_vocab_size": 37},
    "no confidence": ONE_LAYER | {"has_confidence": False},
    "window": {"draft_window": 4, "causal_block": True},
    "gated": ONE_LAYER | {"markov_head_type": "gated"},
    "rnn": ONE_LAYER | {"markov_head_type": "rnn"},
}


def make_spark_config(**changes: Any) -> DSparkConfig:
    block = make_block_config(block_size=4)
    shared = {field.name: getattr(block, field.name) for field in fields(block)}
    own = {"markov_rank": 7, "markov_head_type": "vanilla", "has_confidence": True}
    return DSparkConfig(**{**shared, **own, **changes})


def filled_spark(config: DSparkConfig, rng: torch.Generator) -> DSparkTraining:
    block = filled_blocks(make_block_config(draft_vocab_size=config.draft_vocab_size), rng)
    draft = DSparkTraining(
        config, block.verifier, block.vocab_map, parts=PARTS, weights=DECAY, num_anchors=100
    )
    fill_weights(draft, rng)
    return draft


class PlainMarkov:
    """What the second matrix reads, prediction by prediction, in float64."""

    def __init__(self, w: Mapping[str, Tensor]) -> None:
        self.w = {name.removeprefix("markov_head."): x for name, x in w.items()}
        self.state = torch.zeros(7, dtype=torch.float64)

    def read(self, before: Tensor, hidden: Tensor) -> Tensor:
        if "gate_proj.weight" in self.w:
            x = torch.cat((hidden, before))
            gate = (self.w["gate_proj.weight"] @ x + self.w["gate_proj.bias"]).sigmoid()
            return gate * before
        if "joint_proj.weight" in self.w:
            x = torch.cat((self.state, before, hidden))
            joint = self.w["joint_proj.weight"] @ x + self.w["joint_proj.bias"]
            gate = joint[:7].sigmoid()
            self.state = gate * self.state + (1 - gate) * joint[7:14].tanh()
            return joint[14:].tanh()
        return before


def score_anchor(
    reference: Reference, w: Mapping[str, Tensor], draft: DSparkTraining, sample: Any, anchor: int
) -> list[Tensor]:
    """The loss of each prediction that is scored at an anchor."""
    config, verifier, kept = draft.config, draft.verifier, draft.kept_ids
    aux = torch.cat([layer[:].double() for layer in sample.aux_hidden_states], dim=-1)
    head = w["lm_head.weight"] if config.owns_head else verifier.head.double()
    ids = sample.input_ids.tolist()
    normed = reference.block(aux, verifier.embedding.double(), ids[anchor], anchor)
    losses, markov = [], PlainMarkov(w)
    for s in range(config.block_size):
        t = anchor + s
        if t >= len(ids) or not sample.loss_mask[t]:
            break
        last = rms(sample.last_hidden_states[:][t].double(), verifier.norm_weight.double())
        p = (verifier.head[kept].double() @ last).softmax(-1)
        before = w["markov_head.markov_w1.weight"][ids[t]]
        read = markov.read(before, normed[s])
        q = (head @ normed[s] + w["markov_head.markov_w2.weight"] @ read).softmax(-1)
        loss = -0.1 * q[p.argmax()].log() + 0.9 * (p - q).abs().sum()
        if config.has_confidence:
            x = torch.cat((normed[s], before))
            c = (
                w["confidence_head.proj.weight"][0] @ x + w["confidence_head.proj.bias"][0]
            ).sigmoid()
            target = float(1 - (p - q).abs().sum().detach() / 2)
            loss = loss - 0.7 * (target * c.log() + (1 - target) * (1 - c).log())
        losses.append(loss)
    return losses


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_definition_on_packed_documents(
    variant: str, kernels: str, rng: torch.Generator
) -> None:
    # Traps: the token before is one off; slot 0 not scored; gradients through the target.
    config = make_spark_config(**VARIANTS[variant])
    draft = filled_spark(config, rng)
    draft.use_fast_kernels = kernels == "fast"
    samples = [make_sample(n, config, rng) for n in (5, 2, 7)]
    w = {name: p.detach().double().requires_grad_() for name, p in draft.named_parameters()}
    reference = Reference(config, w)
    scored = [
        score_anchor(reference, w, draft, sample, anchor)
        for sample in samples
        for anchor in range(1, len(sample.input_ids))
        if sample.loss_mask[anchor]
    ]
    counts = torch.tensor([sum(len(block) > s for block in scored) for s in range(4)])
    decays = [math.exp(-s / 2.0) for s in range(4)]
    expected = torch.stack(
        [loss * decays[s] for block in scored for s, loss in enumerate(block)]
    ).sum() / sum(d * int(n) for d, n in zip(decays, counts, strict=True))
    expected.backward()

    batch = draft.draw(pack(*samples, total_seq_len=14), seed=3, epoch=0)
    sums = draft(batch, draft.normalise(torch.tensor(draft.loss_weights), counts))
    sums.loss.backward()

    assert counts[0] == len(scored) > 4
    assert torch.equal(sums.counters["num_scored"], counts)
    torch.testing.assert_close(sums.loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert {name for name, _ in draft.named_parameters()} == set(config.tensor_shapes())
    for name, parameter in draft.named_parameters():
        exact = w[name].grad
        assert parameter.grad is not None, name
        assert exact is not None, name
        # float32 rounds each of a dozen products in a row by 6e-8; signs of q - p may turn.
        error = (parameter.grad.double() - exact).norm() / exact.norm()
        assert error < 2e-5, (name, float(error))


@pytest.mark.parametrize("kind", MARKOV_HEAD_TYPES)
def test_a_chain_is_drafted_by_its_own_tokens(kind: str, rng: torch.Generator) -> None:
    config = make_spark_config(markov_head_type=kind)
    draft = filled_spark(config, rng).eval()
    with torch.no_grad():
        # So that what it adds decides, and depends on the token.
        draft.markov_head.markov_w1.weight.mul_(10.0)
        draft.markov_head.markov_w2.weight.mul_(30.0)
        for name, parameter in draft.markov_head.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.zero_()
    sample = make_sample(9, config, rng, supervised_fraction=1.0)
    drafter = DSpark().build_drafter(
        config,
        dict(draft.named_parameters()),
        draft.embedding,
        draft.kept_ids,
        num_draft_tokens=4,
    )

    aux = torch.cat([layer[:4] for layer in sample.aux_hidden_states], dim=-1)
    # Beside a row whose chain is another.
    drafter.start(2, 12)
    for row, tokens in enumerate((sample.input_ids[None, 1:5], sample.input_ids[None, 2:6])):
        drafter.read(Verified(tokens, aux[None], [0], [4], row=row))
    chain, other = drafter.propose().tolist()

    # Training, where a sample has the very tokens of the chain after the anchor.
    sample.input_ids[5:9] = torch.tensor(chain)
    batch = draft.draw(pack(sample), seed=0, epoch=0)
    blocks = find_blocks(batch, 4)
    with torch.no_grad():
        normed = draft.predict(batch, blocks)
        embedded = draft.markov_head.embed(draft.tokens_before(batch, blocks), normed.dtype)
        read = draft.markov_head.steps(embedded, normed)
        logits = draft.logits(normed) + draft.markov_head(read)
        without = draft.logits(normed)
    assert draft.kept_ids[logits[3].argmax(-1)].tolist() == chain
    assert draft.kept_ids[without[3].argmax(-1)].tolist() != chain
    assert other != chain


def spark_settings(tiny: TinyInputs, **changes: Any) -> TrainSettings:
    own = {"block_size": 4, "mask_token_id": 1, "num_anchors": 12, "markov_rank": 7}
    return tiny.settings(
        draft={"algorithm": "dspark", "num_layers": 2, **changes.pop("draft", {})},
        dspark=own | changes.pop("dspark", {}),
        **changes,
    )


def run(tiny: TinyInputs, **changes: Any) -> TrainReport:
    return train(spark_settings(tiny, **changes), progress=QUIET)


def test_it_trains_resumes_in_the_same_bits_and_is_planned(
    tiny: TinyInputs, tmp_path: Path
) -> None:
    assert_cuts_change_nothing(partial(run, tiny), tmp_path, lambda _: [2])
    first, last = read_metrics(tmp_path / "whole", "val")
    assert last["loss"] < first["loss"]
    assert last["confidence_loss_3"] > 0
    found = plan(spark_settings(tiny), progress=QUIET)
    assert found.num_parameters == sum(
        x.numel() for x in read_draft(str(tmp_path / "whole")).weights.values()
    )


def test_it_starts_from_a_dflash_draft(tiny: TinyInputs, tmp_path: Path) -> None:
    block = tiny.settings(
        draft={"algorithm": "dflash", "num_layers": 2},
        dflash={"mask_token_id": 1, "num_anchors": 12},
        run={"save_path": tmp_path / "block", "epochs": 1},
    )
    source = train(block, progress=QUIET)

    run(
        tiny,
        draft={"from_checkpoint": str(source.checkpoint)},
        run={"save_path": tmp_path / "spark", "epochs": 1},
        optimizer={"lr": 1e-8},  # too little to move a weight
    )

    before, after = read_draft(str(source.checkpoint)), read_draft(str(tmp_path / "spark"))
    assert isinstance(after.config, DSparkConfig)
    assert (after.config.block_size, after.config.mask_token_id) == (4, 1)
    for name, weight in before.weights.items():
        torch.testing.assert_close(after.weights[name], weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(SettingsError, match="`--algorithm` is `eagle3`, but the draft in"):
        train(
            tiny.settings(
                draft={"from_checkpoint": str(source.checkpoint), "algorithm": "eagle3"},
                run={"save_path": tmp_path / "other"},
            ),
            progress=QUIET,
        )


FAULTS: dict[str, Any] = {
    "no sample_from_anchor": change("sample_from_anchor", None),
    "fill-in": change("sample_from_anchor", False),
    "no mask": change("mask_token_id", None),
    "no rank": change("markov_rank", None),
    "another rank": change("markov_rank", 8),
    "gated": change("markov_head_type", "gated"),
    "no confidence": change("enable_confidence_head", False),
    "confidence without tokens": change("confidence_head_with_markov", False),
    "another number of tokens": change(
        "speculators_config.proposal_methods.0.speculative_tokens", 3
    ),
    "no lm_head": put("lm_head.weight", lambda _: None),
    "no d2t": put("d2t", lambda _: None),
    "no Markov embedding": put("markov_head.markov_w1.weight", lambda _: None),
    "no bias": put("confidence_head.proj.bias", lambda _: None),
    "fewer tokens in it": put(
        "markov_head.markov_w1.weight", lambda x: x["markov_head.markov_w1.weight"][:19]
    ),
}


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_another_markov_head_trains_and_is_not_exported(
    kind: str, tiny: TinyInputs, tmp_path: Path
) -> None:
    report = run(tiny, dspark={"markov_head_type": kind}, run={"epochs": 1})
    content = {
        "source": {"checkpoint": str(report.checkpoint)},
        "export": {"output_dir": tmp_path / "served"},
    }

    with pytest.raises(ExportError, match=f"Markov head is `{kind}`, vLLM computes `vanilla`"):
        export(ExportSettings.model_validate(content), progress=QUIET)

    draft = read_draft(str(report.checkpoint))
    assert isinstance(draft.config, DSparkConfig)
    assert draft.config.markov_head_type == kind
    assert not (tmp_path / "served").exists()


def test_its_export_is_checked(tiny: TinyInputs, tmp_path: Path) -> None:
    run(tiny, run={"epochs": 1})
    content = {
        "source": {"checkpoint": str(tiny.save_path)},
        "export": {"output_dir": tmp_path / "served", "dtype": "float32"},
    }
    report = export(ExportSettings.model_validate(content), progress=QUIET)

    served = tmp_path / "served"
    config, tensors = read_folder(served)
    assert report.verification is not None
    assert read_draft(str(served)).config == read_draft(str(tiny.save_path)).config
    assert find_problems(served, "vllm") == []
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    for name, fault in FAULTS.items():
        changed, others = read_folder(served)
        fault(changed, others)
        write_folder(tmp_path / "fault", changed, others)
        assert find_problems(tmp_path / "fault", "vllm") != [], name
    with pytest.raises(CheckpointError, match="does not predict from its anchor"):
        read_draft(
            str(write_folder(tmp_path / "off", config | {"sample_from_anchor": False}, tensors))
        )
