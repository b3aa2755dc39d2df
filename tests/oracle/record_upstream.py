"""Record what upstream `speculators` computes for one document, as a fixture of the normal suite.

Run it with an interpreter that has upstream's package, 0.9.0 or 0.3.0 (docs/contributing.md says
how to install each); it writes `upstream-{version}.safetensors` beside itself. Every name in the
file starts with the variant it belongs to; `{variant}/weights/...` have the names of a checkpoint.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors.torch import save_file
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

UPSTREAM = version("speculators")
HIDDEN, VOCAB, DRAFT_VOCAB, NUM_STEPS, DECAY = 24, 37, 19, 3, 0.8
# Upstream 0.3.0 attends in blocks of 128 tokens.
SEQ_LEN = {"0.9.0": 13, "0.3.0": 128}[UPSTREAM]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "residual-before-norm": {"norm_before_residual": False},
    "two-layers": {"num_layers": 2},
}
if UPSTREAM == "0.9.0":
    VARIANTS |= {
        "norm-before-fc": {"norm_before_fc": True},
        "fc-norm": {"fc_norm": True},
        "norm-output": {"norm_output": True},
        "qwen3": {"arch": "qwen3"},
        "rope-scaling": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    }


def layer_config(variant: dict[str, Any]) -> Any:
    kind = {"llama": LlamaConfig, "qwen3": Qwen3Config}[variant.get("arch", "llama")]
    rope = variant.get("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    return kind(
        hidden_size=HIDDEN,
        intermediate_size=40,
        num_hidden_layers=variant.get("num_layers", 1),
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        pad_token_id=None,
        **({"rope_parameters": rope} if UPSTREAM == "0.9.0" else {"rope_theta": 10000.0}),
    )


def build_model(variant: dict[str, Any], folder: Path, d2t: Tensor, t2d: Tensor) -> Any:
    """Upstream's draft, all its weights random, its lm_head trained."""
    layers = layer_config(variant)
    flags: dict[str, Any] = {
        name: variant[name]
        for name in ("norm_before_fc", "fc_norm", "norm_output")
        if name in variant
    }
    verifier = VerifierConfig(name_or_path=str(folder), architectures=["LlamaForCausalLM"])
    is_new = UPSTREAM == "0.9.0"
    layers._attn_implementation = "eager" if is_new else "simple_flex_attention"
    if is_new:
        flags["eagle_aux_hidden_state_layer_ids"] = [2, 4, 7]
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=DRAFT_VOCAB,
        norm_before_residual=variant.get("norm_before_residual", True),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=NUM_STEPS)],
            default_proposal_method="greedy",
            verifier=verifier,
        ),
        **flags,
    )
    if UPSTREAM == "0.9.0":
        model = Eagle3DraftModel(config)
        model.load_vocab_mappings(t2d, d2t)
    else:
        verifier_config = layer_config({})
        LlamaForCausalLM(verifier_config).save_pretrained(folder)
        model = Eagle3DraftModel(config, t2d=t2d, d2t=d2t)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.dim() == 1 else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.2 if parameter.dim() == 2 else 0.1)
            # Upstream 0.3.0 attends by a kernel that has no backward on CPU.
            is_trained = is_new and not name.startswith(("verifier", "embed"))
            parameter.requires_grad_(is_trained)
    return model


def record(name: str, variant: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    kept = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
    d2t = kept - torch.arange(DRAFT_VOCAB)
    with TemporaryDirectory() as folder:
        model = build_model(variant, Path(folder), d2t, t2d)
    inputs = {
        "input_ids": torch.randint(VOCAB, (1, SEQ_LEN)),
        "aux_hidden_states": torch.randn(1, SEQ_LEN, 3 * HIDDEN),
        "last_hidden_states": torch.randn(1, SEQ_LEN, HIDDEN),
        "loss_mask": torch.rand(1, SEQ_LEN) < 0.6,
    }
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: logits.append(out))
    extra: dict[str, Any] = {"document_ids": torch.zeros(1, SEQ_LEN, dtype=torch.long)}
    if UPSTREAM == "0.9.0":
        from speculators.losses.eager import kl_div_loss

        extra["loss_config"] = {"kl_div": (kl_div_loss, 1.0)}
    else:
        extra = {"use_off_policy_tokens": True}
    _, loss, metrics = model(
        hidden_states=inputs["aux_hidden_states"],
        input_ids=inputs["input_ids"],
        loss_mask=inputs["loss_mask"],
        verifier_last_hidden_states=inputs["last_hidden_states"],
        ttt_steps=NUM_STEPS,
        ttt_step_loss_decay=DECAY,
        **extra,
    )
    suffix = "_sum" if UPSTREAM == "0.9.0" else ""
    out = {f"inputs/{key}": value[0] for key, value in inputs.items()}
    out |= {
        "inputs/kept_ids": kept,
        "outputs/loss": loss.detach(),
        "outputs/losses": torch.stack([metrics[f"loss_{k}{suffix}"] for k in range(NUM_STEPS)]),
        "outputs/logits": torch.cat(logits).detach(),
    }
    if UPSTREAM == "0.9.0":
        loss.backward()
        out |= {f"gradients/{k}": p.grad for k, p in model.named_parameters() if p.requires_grad}
    out |= {f"weights/{key}": value.detach() for key, value in model.named_parameters()}
    return {f"{name}/{key}": value.clone().contiguous() for key, value in out.items()}


def main() -> None:
    tensors: dict[str, Tensor] = {}
    for name, variant in VARIANTS.items():
        tensors |= record(name, variant)
    file = Path(__file__).with_name(f"upstream-{UPSTREAM}.safetensors")
    about = {"variants": json.dumps(VARIANTS), "decay": str(DECAY), "torch": torch.__version__}
    save_file(tensors, file, about)
    sys.stdout.write(f"{file.name}: {len(tensors)} tensors\n")


if __name__ == "__main__":
    main()
