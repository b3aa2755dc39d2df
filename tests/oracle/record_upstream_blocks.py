"""Record what upstream `speculators` 0.9.0 computes for DFlash and DSpark drafts, given anchors.

Run it as `record_upstream.py`; it writes `upstream-0.9.0-blocks.safetensors` beside itself, with
names as there. Two documents are packed; the anchors are given in place of upstream's draw.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors.torch import save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashSpeculatorConfig, core
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.models.dspark.core import DSparkDraftModel
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor
from transformers import Qwen3Config

HIDDEN, VOCAB, DRAFT_VOCAB, BLOCK, GAMMA, MASK, RANK = 24, 37, 19, 4, 4.0, 35, 7
LENGTHS, PROMPTS = (12, 15), (4, 6)  # tokens of each document, and how many are not supervised
ANCHORS = (4, 5, 7, 18, 21, 23)  # of the packed tokens; no block ends after its document
VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash-full-vocab": {"full_vocab": True},
    "dflash-dpace": {"loss": "ce", "per_position_loss_weight": "dpace"},
    "dspark": {"markov_head_type": "vanilla"},
    "dspark-gated": {"markov_head_type": "gated"},
    "dspark-rnn": {"markov_head_type": "rnn"},
}
DSPARK_LOSS = '{"ce": 0.1, "tv": 1.8}'


def build_model(variant: dict[str, Any], d2t: Tensor, t2d: Tensor) -> Any:
    """Upstream's draft, all its weights random."""
    layers = Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None,
    )
    layers._attn_implementation = "eager"
    is_dspark = "markov_head_type" in variant
    num_tokens = BLOCK if is_dspark else BLOCK - 1
    is_full = variant.get("full_vocab", False)
    fields: dict[str, Any] = {
        "transformer_layer_config": layers,
        "draft_vocab_size": VOCAB if is_full else DRAFT_VOCAB,
        "block_size": BLOCK,
        "aux_hidden_state_layer_ids": [2, 4, 7],
        "mask_token_id": MASK,
        "sample_from_anchor": is_dspark,
        "speculators_config": SpeculatorsConfig(
            algorithm="dspark" if is_dspark else "dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_tokens)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    }
    if is_dspark:
        fields |= {
            "markov_rank": RANK,
            "markov_head_type": variant["markov_head_type"],
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
        model: Any = DSparkDraftModel(DSparkSpeculatorConfig(**fields))
    else:
        model = core.DFlashDraftModel(DFlashSpeculatorConfig(**fields))
    if not is_full:
        model.load_vocab_mappings(t2d, d2t)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2 if parameter.dim() == 2 else 0.1)
            parameter.requires_grad_(not name.startswith(("verifier", "embed")))
        if is_full:
            model.lm_head.weight.copy_(model.verifier_lm_head.weight).requires_grad_(False)
    return model


def record(name: str, variant: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    kept = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
    model = build_model(variant, kept - torch.arange(DRAFT_VOCAB), t2d)
    length = sum(LENGTHS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    prompts = torch.repeat_interleave(torch.tensor(PROMPTS), torch.tensor(LENGTHS))
    inputs = {
        "input_ids": torch.randint(VOCAB - 2, (1, length)),
        "aux_hidden_states": torch.randn(1, length, 3 * HIDDEN),
        "last_hidden_states": torch.randn(1, length, HIDDEN),
        "loss_mask": (positions >= prompts)[None],
    }
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: logits.append(out))
    anchors = torch.tensor(ANCHORS)
    core.select_anchors = lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool))
    own = {k: v for k, v in variant.items() if k == "per_position_loss_weight"}
    if "markov_head_type" in variant:
        own["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]
        own["loss_config"] = resolve_loss_config(DSPARK_LOSS, "eager")
    else:
        own["loss_config"] = resolve_loss_config(variant.get("loss", "kl_div"), "eager")
    _, loss, _ = model(
        hidden_states=inputs["aux_hidden_states"],
        input_ids=inputs["input_ids"],
        loss_mask=inputs["loss_mask"],
        verifier_last_hidden_states=inputs["last_hidden_states"],
        document_ids=torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))[None],
        position_ids=positions[None],
        gamma=GAMMA,
        max_anchors=len(anchors),
        **own,
    )
    loss.backward()
    out = {f"inputs/{key}": value[0] for key, value in inputs.items()}
    out |= {
        "inputs/kept_ids": kept,
        "inputs/anchors": anchors,
        "outputs/loss": loss.detach(),
        "outputs/logits": logits[0].detach().view(len(anchors), BLOCK, -1),
    }
    out |= {f"gradients/{k}": p.grad for k, p in model.named_parameters() if p.requires_grad}
    out |= {f"weights/{key}": value.detach() for key, value in model.named_parameters()}
    return {f"{name}/{key}": value.clone().contiguous() for key, value in out.items()}


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for name, variant in VARIANTS.items():
        tensors |= record(name, variant)
    file = Path(__file__).with_name("upstream-0.9.0-blocks.safetensors")
    about = {"variants": json.dumps(VARIANTS), "gamma": str(GAMMA), "torch": torch.__version__}
    about |= {"lengths": json.dumps(LENGTHS), "mask_token_id": str(MASK)}
    save_file(tensors, file, about)
    sys.stdout.write(f"{file.name}: {len(tensors)} tensors\n")


if __name__ == "__main__":
    main()
