"""Load a draft with SGLang's own model class, on CPU, and write what it computes of given inputs.

Runs in the virtual environment of the engine, which has nothing of this package:
`python compute.py FOLDER INPUTS RESULT`, the latter two safetensors files. The model, its
configuration, its loader and its layers are the engine's; three things that it has for GPUs only
are replaced: compiled operators by its own plain ones, the paged cache by attention over what was
just computed, and torchvision's operators, which are declared and never called.
"""

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional


def main(folder: str, inputs_file: str, result_file: str) -> None:
    from safetensors.torch import load_file, save_file

    leave_out_compiled_operators()
    model = load(folder)
    inputs = load_file(inputs_file)
    result = {f"parameter {name}": x.detach() for name, x in model.named_parameters()}
    if model.get_hot_token_id() is not None:
        result["kept_ids"] = model.get_hot_token_id()
    with torch.inference_mode():
        hidden = inputs["hidden_states"]
        for step in range(2):
            hidden, logits = forward(model, inputs, hidden, step)
            result[f"logits {step}"] = logits
    save_file({name: x.contiguous().clone() for name, x in result.items()}, result_file)


TORCHVISION = torch.library.Library("torchvision", "DEF")


def leave_out_compiled_operators() -> None:
    for name in ("nms", "qnms"):
        TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    compiled = types.ModuleType("vllm._custom_ops")
    for name in ("fused_add_rms_norm", "rms_norm", "rotary_embedding"):
        setattr(compiled, name, None)
    sys.modules |= {"vllm": types.ModuleType("vllm"), "vllm._custom_ops": compiled}


def load(folder: str) -> Any:
    """The engine's model with the weights of a folder; what is not loaded is not a number."""
    from safetensors.torch import load_file
    from sglang.srt.distributed import parallel_state
    from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoConfig

    publish(
        ServerArgs(model_path=folder, device="cpu", dtype="float32"),
        role="scheduler",
        ranks=SpawnRanks(world_rank=0),
    )
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        backend="gloo",
        distributed_init_method=f"file://{tempfile.mkdtemp()}/rendezvous",
    )
    parallel_state.initialize_model_parallel()
    model = LlamaForCausalLMEagle3(AutoConfig.from_pretrained(folder))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    weights = load_file(Path(folder, "model.safetensors"))
    model.load_weights(iter(weights.items()))
    for module in model.modules():
        if hasattr(module, "_forward_method"):
            module._forward_method = module.forward_native
    for layer in model.model.layers:
        layer.self_attn.attn.forward = attend_with(layer.self_attn.attn)
    return model


def attend_with(attn: Any) -> Any:
    """Causal attention over one sequence, with the engine's own sizes and scale."""

    def attend(q: Any, k: Any, v: Any, _: object) -> Any:
        q, k, v = (x.view(1, len(x), -1, attn.head_dim).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=attn.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1).flatten(1)

    return attend


def forward(model: Any, inputs: Any, hidden: Any, step: int) -> tuple[Any, Any]:
    """Hidden states for the next step, and logits over the draft vocabulary."""
    batch = types.SimpleNamespace(
        mm_input_embeds=None,
        forward_mode=types.SimpleNamespace(is_extend=lambda: False),
        spec_info=types.SimpleNamespace(hidden_states=hidden),
    )
    normed, aux = model.model(inputs["tokens"].roll(-step), inputs["positions"] + step, batch)
    return aux[0], functional.linear(normed, model.lm_head.weight)[
        :, : model.config.draft_vocab_size
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
