"""Our EAGLE-3 step against what upstream `speculators` 0.9.0 and 0.3.0 computed.

`tests/oracle/record_upstream.py` made the records, with random weights in every parameter.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from speculators_cli.core.algorithms.draft_model import StepSums
from speculators_cli.core.algorithms.eagle3.training import Eagle3Training
from speculators_cli.core.data.batch import Batch
from tests.tiny_drafts import make_config, make_draft

ORACLE_DIR = Path(__file__).parents[3] / "oracle"
NUM_STEPS = 3

# Float32 sums of up to 96 products, taken in another order; upstream adds 1e-5 to each N_k of 5 or
# more positions, which moves its losses and gradients by 2e-6.
RTOL = 1e-5


@cache
def read_record(version: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], float]:
    with safe_open(ORACLE_DIR / f"upstream-{version}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        about = file.metadata()
    return tensors, json.loads(about["variants"]), float(about["decay"])


def variants(version: str) -> list[str]:
    return sorted(read_record(version)[1])


class Parity:
    """One recorded variant, and our draft after the same step."""

    def __init__(self, version: str, variant: str) -> None:
        tensors, flags, decay = read_record(version)
        prefix = f"{variant}/"
        self.record = {
            k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        # Upstream 0.3.0 has no final norm: its last hidden states count as normed.
        is_normed = version == "0.3.0"
        weights = self.part("weights")
        kept = self.record["inputs/kept_ids"]
        head = torch.zeros_like(weights["embed_tokens.weight"])
        head[kept] = weights["verifier_lm_head.weight"]
        self.draft: Eagle3Training = make_draft(
            make_config(**({"head_dim": 16, "rope_parameters": rope} | flags[variant])),
            embedding=weights["embed_tokens.weight"],
            head=head,
            norm_weight=weights.get("verifier_norm.weight"),
            kept_ids=kept,
            loss_decay=decay,
        )
        own = {k: x for k, x in weights.items() if not k.startswith(("verifier", "embed"))}
        self.draft.load_state_dict(own)
        self.draft.train()
        logits: list[Tensor] = []
        self.draft.lm_head.register_forward_hook(lambda _module, _args, out: logits.append(out))
        self.batch = one_document(self.part("inputs"), is_normed=is_normed)
        self.sums: StepSums = self.draft(self.batch)
        weight = torch.tensor(self.draft.loss_weights) / self.draft.count_scored(self.batch)
        self.losses = self.sums.counters["losses"] * weight
        self.losses.sum().backward()
        self.logits = torch.stack(logits).detach()

    def part(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}/"
        return {k.removeprefix(prefix): x for k, x in self.record.items() if k.startswith(prefix)}


def one_document(inputs: dict[str, Tensor], *, is_normed: bool) -> Batch:
    length = len(inputs["input_ids"])
    targets = inputs["loss_mask"].nonzero().flatten()
    return Batch(
        input_ids=inputs["input_ids"],
        aux_hidden_states=inputs["aux_hidden_states"],
        targets=targets,
        last_hidden_states=inputs["last_hidden_states"][targets],
        is_normed=torch.full(targets.shape, is_normed),
        loss_mask=inputs["loss_mask"],
        document_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=torch.arange(1, length + 1),
        host_mask=inputs["loss_mask"],
        lengths=(length,),
        sample_ids=(0,),
    )


def assert_equal_to_rounding(own: Tensor, theirs: Tensor) -> None:
    """Within RTOL of the largest value: small entries are differences of large ones."""
    scale = theirs.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(own, theirs, rtol=RTOL, atol=RTOL * scale)


@pytest.mark.parametrize(
    ("version", "variant"), [(v, name) for v in ("0.9.0", "0.3.0") for name in variants(v)]
)
def test_losses_and_logits_equal_upstreams(version: str, variant: str) -> None:
    parity = Parity(version, variant)

    torch.testing.assert_close(
        parity.losses.detach(), parity.record["outputs/losses"], rtol=RTOL, atol=0
    )
    torch.testing.assert_close(
        parity.losses.sum().detach(), parity.record["outputs/loss"], rtol=RTOL, atol=0
    )
    batch, theirs = parity.batch, parity.record["outputs/logits"]
    for step in range(NUM_STEPS):
        # Rows past the end read a padded token, each tool its own; nothing scores them.
        stop = len(batch.input_ids) - step
        assert_equal_to_rounding(parity.logits[step, :stop], theirs[step, :stop])


@pytest.mark.parametrize("variant", variants("0.9.0"))
def test_gradients_equal_upstreams(variant: str) -> None:
    parity = Parity("0.9.0", variant)

    theirs = parity.part("gradients")
    own = {name: p.grad for name, p in parity.draft.named_parameters()}
    assert own.keys() == theirs.keys()
    for name, gradient in own.items():
        assert gradient is not None
        assert_equal_to_rounding(gradient, theirs[name])


def test_agreements_are_those_of_upstreams_logits() -> None:
    # Not of its own counts: from step 1 on, its `full_acc` asks that earlier steps agreed, too.
    total = 0
    for variant in variants("0.9.0"):
        parity = Parity("0.9.0", variant)
        inputs, weights = parity.part("inputs"), parity.part("weights")
        gain = weights["verifier_norm.weight"]
        normed = F.rms_norm(inputs["last_hidden_states"], gain.shape, gain, 1e-5)
        tokens = (normed @ weights["verifier_lm_head.weight"].T).argmax(-1)
        length, mask = len(tokens), inputs["loss_mask"]
        agreed = [
            int(((logits[: length - step].argmax(-1) == tokens[step:]) & mask[step:]).sum())
            for step, logits in enumerate(parity.record["outputs/logits"])
        ]
        assert parity.sums.counters["num_agreed"].tolist() == agreed
        total += sum(agreed)
    assert total > 0
