"""Time the training step of other tools on the batches of `speculators bench`.

    python docs/benchmarks/rivals.py speculators --shape llama-3.1-8b --supervised-fraction 0.6
    python docs/benchmarks/rivals.py speculators --algorithm dspark --num-anchors 512 --num-layers 5
    python docs/benchmarks/rivals.py speculators --algorithm dspark --num-anchors 512 1024 --dynamic
    python docs/benchmarks/rivals.py specforge
    torchrun --standalone --nproc_per_node=4 docs/benchmarks/rivals.py speculators --wrap fsdp

The tool must be installed, `pip install speculators==0.9.0` or `specforge==0.2.0`, with a torch
that both packages support. Timed are the copy of a batch from pinned memory, forward, backward,
gradient clipping and optimizer, as in the tool's own trainer. Neither tool adds noise or checks for
non-finite states. Prints one line of JSON per number of anchors. Of several ranks, each has a batch
of its own, and upstream averages their gradients by DDP or shards the draft. Upstream compiles its
drafts of blocks for minutes, anew for each number of anchors unless `--dynamic` makes sizes
variables.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from random_verifier import write_verifier
from rival_blocks import build_blocks
from torch.nn.parallel import DistributedDataParallel

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.bench.synthetic import SyntheticLoader
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.models.verifier import VerifierConfig
from speculators_cli.core.training.inputs import fresh_config
from speculators_cli.settings.algorithms import ALGORITHM_SETTINGS
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.base import Settings
from speculators_cli.settings.train import DraftArch

CUDA = torch.device("cuda")
Step = Callable[[int, Batch], torch.Tensor]  # the number of anchors, where there are any
OwnStep = Callable[[Batch], torch.Tensor]


def main() -> None:
    """Build, warm up, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=["speculators", "specforge"])
    parser.add_argument("--algorithm", default="eagle3", choices=["eagle3", "dflash", "dspark"])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--supervised-fraction", type=float, default=0.6)
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--ttt-steps", type=int, default=3)
    parser.add_argument("--num-anchors", type=int, nargs="+", default=[512])
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--full-vocab", action="store_true")
    parser.add_argument("--freeze-head", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp", help="of several ranks")
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    verifier, vocab_size = SHAPES[options.shape]
    config = draft_config(options, verifier, vocab_size)
    loader = SyntheticLoader(
        config,
        NEXT_TOKEN,
        total_seq_len=options.total_seq_len,
        supervised_fraction=options.supervised_fraction,
        per_step=1,
        dtype=torch.bfloat16,
        pin_memory=True,
        seed=0,
    )
    # Other tools read last hidden states at every position.
    loader.batches = [
        replace(batch, last_hidden_states=batch.at_positions(batch.last_hidden_states).pin_memory())
        for batch in loader.batches
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_verifier(Path(folder), verifier, vocab_size, is_tied=False, device=CUDA)
        if options.dynamic:
            torch.compile = partial(torch.compile, dynamic=True)
        step = build(config, Path(folder), options)
    for num_anchors in options.num_anchors:
        torch.cuda.empty_cache()
        result = time_steps(partial(step, num_anchors), loader, options.steps)
        if not dist.is_initialized() or dist.get_rank() == 0:
            own = {**vars(options), "num_anchors": num_anchors, "num_ranks": num_ranks()}
            line = {**own, "device": torch.cuda.get_device_name(), **result}
            print(json.dumps(line), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def build(config: DraftConfig, folder: Path, options: argparse.Namespace) -> Step:
    """The step of the tool, on the GPU."""
    if isinstance(config, Eagle3Config):
        tools = {"speculators": build_speculators, "specforge": build_specforge}
        return tools[options.tool](config, folder, options)
    assert options.tool == "speculators", "SpecForge's blocks are not timed"
    model, arguments = build_blocks(config, folder, layer_config(config), vocab_maps(config), CUDA)
    return train_upstream(model, arguments, options.wrap, "max_anchors")


def num_ranks() -> int:
    """Number of processes that torchrun started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def time_steps(step: OwnStep, loader: SyntheticLoader, num_steps: int) -> dict[str, float]:
    """Median ms/step, tokens/s and peak memory; the first three steps are warmup."""
    batches = loader.epoch(0)
    started_at = time.perf_counter()
    step(next(batches)[0])
    torch.cuda.synchronize()
    first_step_seconds = time.perf_counter() - started_at
    for _ in range(2):
        step(next(batches)[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        loss = step(next(batches)[0])
        event.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(stop) for start, stop in pairwise(events)]
    median = statistics.median(times)
    return {
        "first_step_seconds": first_step_seconds,
        "step_ms": median,
        "step_ms_min": min(times),
        "tokens_per_second": num_ranks() * loader.batches[0].input_ids.shape[0] / median * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": float(loss),
    }


def draft_config(
    options: argparse.Namespace, verifier: VerifierConfig, vocab_size: int
) -> DraftConfig:
    """The draft that `speculators bench` times, for the sizes of batches."""
    num_kept = vocab_size if options.full_vocab else options.draft_vocab_size
    return fresh_config(
        options.algorithm,
        own_settings(options),
        verifier,
        VocabMap.choose(np.zeros(vocab_size, np.int64), num_kept),
        LayerIds(
            default_layer_ids(verifier.num_layers, ALGORITHMS[options.algorithm].num_aux_layers),
            is_assumed=True,
        ),
        arch=DraftArch.LLAMA if options.algorithm == "eagle3" else DraftArch.QWEN3,
        num_layers=options.num_layers,
    )


def own_settings(options: argparse.Namespace) -> Settings:
    """The section of the algorithm."""
    if options.algorithm == "eagle3":
        return Eagle3Settings(ttt_steps=options.ttt_steps)
    return ALGORITHM_SETTINGS[options.algorithm].model_validate({"block_size": options.block_size})


def layer_config(config: DraftConfig) -> dict[str, Any]:
    """Fields of a LlamaConfig or Qwen3Config."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    }


def vocab_maps(config: DraftConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """t2d and d2t of the lowest ids."""
    t2d = torch.arange(config.vocab_size) < config.draft_vocab_size
    return t2d, torch.zeros(config.draft_vocab_size, dtype=torch.int64)


def on_device(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch's tensors on the GPU, with a batch dimension."""
    names = (
        "input_ids",
        "aux_hidden_states",
        "last_hidden_states",
        "loss_mask",
        "document_ids",
        "position_ids",
    )
    return {name: getattr(batch, name).to(CUDA, non_blocking=True)[None] for name in names}


def build_speculators(config: Eagle3Config, folder: Path, options: argparse.Namespace) -> Step:
    """vllm-project/speculators 0.9: float32 weights, bfloat16 autocast, its eager KL."""
    from speculators.config import SpeculatorsConfig
    from speculators.config import VerifierConfig as UpstreamVerifier
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    layers = LlamaConfig(**layer_config(config))
    layers._attn_implementation = "simple_flex_attention"  # noqa: SLF001
    proposal = GreedyTokenProposalConfig(speculative_tokens=config.ttt_steps)
    verifier = UpstreamVerifier(name_or_path=str(folder), architectures=["LlamaForCausalLM"])
    upstream = Eagle3SpeculatorConfig(
        transformer_layer_config=layers,
        draft_vocab_size=config.draft_vocab_size,
        norm_before_residual=True,
        eagle_aux_hidden_state_layer_ids=list(config.target_layer_ids),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=verifier,
        ),
    )
    with torch.device(CUDA):
        model = Eagle3DraftModel(config=upstream)
        t2d, d2t = vocab_maps(config)
        model.load_vocab_mappings(t2d.to(CUDA), d2t.to(CUDA))
        model.load_verifier_weights()
    model.lm_head.weight.requires_grad_(not options.freeze_head)
    arguments = {
        "ttt_steps": config.ttt_steps,
        "ttt_step_loss_decay": 1.0,
        "loss_config": resolve_loss_config("kl_div", "eager"),
    }
    return train_upstream(model, arguments, options.wrap)


def train_upstream(
    model: Any, arguments: dict[str, Any], wrap: str, anchors: str | None = None
) -> Step:
    """The step of upstream's trainer.

    Args:
        model: Its draft.
        arguments: Of the draft's forward.
        wrap: Of several ranks, `fsdp` is its `--fsdp-shard`.
        anchors: Name of one more, the number of anchors.
    """
    from speculators.train.distributed import apply_fully_sharded
    from speculators.train.optimizers import build_optimizers

    model.to(CUDA).train()
    if dist.is_initialized() and wrap == "fsdp":
        apply_fully_sharded(model, param_dtype=torch.bfloat16)
    elif dist.is_initialized():
        model = DistributedDataParallel(model)
    settings = argparse.Namespace(
        optimizer="adamw", lr=1e-4, weight_decay=0.01, muon_lr=1e-3, muon_momentum=0.95,
        muon_weight_decay=0.1, muon_ns_steps=5, muon_adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    optimizers = build_optimizers(model, settings)

    def step(num_anchors: int, batch: Batch) -> torch.Tensor:
        own = arguments if anchors is None else {**arguments, anchors: num_anchors}
        ready = on_device(batch)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            _, loss, _ = model(
                hidden_states=ready["aux_hidden_states"],
                verifier_last_hidden_states=ready["last_hidden_states"],
                input_ids=ready["input_ids"],
                document_ids=ready["document_ids"],
                loss_mask=ready["loss_mask"],
                position_ids=ready["position_ids"],
                **own,
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        detached: torch.Tensor = loss.detach()
        return detached

    return step


def build_specforge(config: Eagle3Config, folder: Path, options: argparse.Namespace) -> Step:
    """SpecForge 0.2: bfloat16 weights, flex attention; no packing, so one document."""
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
    from specforge.modeling.target.target_head import TargetHead
    from specforge.optimizer import BF16Optimizer
    from specforge.runtime.contracts import TrainBatch
    from specforge.training.backend import FSDPTrainingBackend, ParallelConfig
    from specforge.training.strategies.base import Eagle3TrainStrategy
    from transformers import LlamaConfig

    assert not options.freeze_head, "SpecForge always trains the head"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29512")
    dist.init_process_group("nccl", rank=0, world_size=1)
    fields = layer_config(config) | {
        "draft_vocab_size": config.draft_vocab_size,
        "pretraining_tp": 1,
    }
    with torch.device(CUDA):
        draft = LlamaForCausalLMEagle3(LlamaConfig(**fields), attention_backend="flex_attention")
    draft = draft.to(torch.bfloat16)
    t2d, d2t = vocab_maps(config)
    draft.t2d.copy_(t2d)
    draft.d2t.copy_(d2t)
    draft.vocab_mapping_loaded = True
    draft.load_embedding(str(folder))
    draft.freeze_embedding()
    draft = draft.to(device=CUDA, dtype=torch.bfloat16)
    with torch.device(CUDA):
        target_head = TargetHead(str(folder)).to(dtype=torch.bfloat16)
    target_head.load_weights(str(folder))
    target_head.freeze_weights()
    target_head.eval()
    model = OnlineEagle3Model(draft, length=config.ttt_steps, attention_backend="flex_attention")
    backend = FSDPTrainingBackend(
        ParallelConfig(fsdp_process_group=dist.group.WORLD),
        optimizer_factory=lambda m: BF16Optimizer(m, lr=1e-4, max_grad_norm=1.0, total_steps=1000),
    )
    wrapped = backend.prepare_model(model, wrap=True, optimizer_target=draft)
    strategy = Eagle3TrainStrategy(wrapped, target_head=target_head)
    draft.train()

    def step(num_anchors: int, batch: Batch) -> torch.Tensor:
        del num_anchors
        ready = on_device(batch)
        tensors = {
            "hidden_state": ready["aux_hidden_states"],
            "target": ready["last_hidden_states"],
            "input_ids": ready["input_ids"],
            "loss_mask": ready["loss_mask"].long(),
            "attention_mask": torch.ones_like(ready["input_ids"]),
        }
        contract = {"target_repr": "hidden_state"}
        out = strategy.forward_loss(TrainBatch(["0"], "eagle3", tensors, contract))
        backend.backward(out.loss)
        backend.step()
        detached: torch.Tensor = out.loss.detach()
        return detached

    return step


if __name__ == "__main__":
    main()
