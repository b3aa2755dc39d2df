"""Time each fast kernel and its plain counterpart.

    python docs/benchmarks/parts.py
    python docs/benchmarks/parts.py --shape qwen3-8b --draft-vocab-size 151936 --only linear_kl

Each part runs forward and backward on the inputs of a training step: the packed sequence of
`speculators bench`, bfloat16 on a GPU, and all TTT steps where they share work. Prints one line of
JSON per part: `ms` is the time of its kernels on the GPU, `launch_ms` the host time to launch
them. Without a GPU, Triton's interpreter (`TRITON_INTERPRET=1`) runs each part in float32, without
meaningful times.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from rivals import draft_config
from torch import Tensor, nn

from speculators_cli.core.algorithms.eagle3.active_rows import ActiveRows, find_active_rows
from speculators_cli.core.algorithms.eagle3.attention import TTTMemory
from speculators_cli.core.algorithms.eagle3.config import Eagle3Config
from speculators_cli.core.bench.profile import profile_steps
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.bench.synthetic import SyntheticLoader
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.batch import Batch, drop_non_finite
from speculators_cli.core.data.noise import add_noise, drop_and_add_noise
from speculators_cli.core.kernels.joint_attention import joint_attention
from speculators_cli.core.kernels.linear_kl import Targets, linear_kl
from speculators_cli.core.kernels.rms_norm import rms_norm
from speculators_cli.core.kernels.rotary import rotate
from speculators_cli.core.kernels.shared import SharedRows, SharedWeight, gather
from speculators_cli.core.kernels.swiglu import gated_linear
from speculators_cli.core.models import layers
from speculators_cli.core.models.losses import kl_loss
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.settings.train import OptimizerSettings

Run = Callable[[], object]
NUM_RUNS = 10


@dataclass(frozen=True)
class Step:
    """Inputs of the parts of a step."""

    config: Eagle3Config
    batch: Batch  # on the device
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def rows(self) -> ActiveRows:
        """The active rows."""
        return find_active_rows(self.batch, self.config.ttt_steps)

    @property
    def num_active(self) -> int:
        """Number of active rows."""
        return len(self.rows.rows)

    def states(self, *shape: int) -> Tensor:
        """Random activations that require a gradient."""
        states = torch.randn(shape, device=self.device, dtype=self.dtype)
        return states.requires_grad_()

    def weight(self, *shape: int) -> nn.Parameter:
        """Float32 weights."""
        return nn.Parameter(torch.randn(shape, device=self.device) * shape[-1] ** -0.5)


def backward(compute: Callable[[], Tensor | tuple[Tensor, ...]], *leaves: Tensor) -> Run:
    """Forward and backward with a gradient of ones."""

    def run() -> None:
        out = compute()
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])

    return run


def time_rms_norm(step: Step) -> tuple[Run, Run]:
    """RMSNorm with the residual addition: active rows, all rows."""
    size, eps = step.config.hidden_size, step.config.rms_norm_eps
    plain = layers.RMSNorm(size, eps).to(step.device)
    few, all_rows = (
        [step.states(n, size) for _ in range(2)]
        for n in (step.num_active, len(step.batch.input_ids))
    )

    def norm_all() -> tuple[Tensor, Tensor]:
        residual = all_rows[0] + all_rows[1]
        return plain(residual), residual

    return (
        backward(lambda: rms_norm(few[0], plain.weight, eps, add=few[1]), *few, plain.weight),
        backward(norm_all, *all_rows, plain.weight),
    )


def time_rotate(step: Step) -> tuple[Run, Run]:
    """RoPE of the queries, with the layout by document."""
    config, positions = step.config, step.batch.position_ids
    rotary = layers.RotaryEmbedding(config).to(step.device)
    few, all_rows = (
        step.states(n, config.num_heads, config.head_dim) for n in (step.num_active, len(positions))
    )
    tables = rotary(torch.arange(int(positions.max()) + 1, device=step.device))
    own = positions[step.rows.rows]
    return (
        backward(lambda: rotate(few, tables, own, spans=step.rows.spans[-1]), few),
        backward(lambda: layers.rotate(all_rows, rotary(positions)), all_rows),
    )


def time_gated_linear(step: Step) -> tuple[Run, Run]:
    """The activation of the MLP and its second matmul."""
    size, inner = step.config.hidden_size, step.config.intermediate_size
    down = step.weight(size, inner)
    few, all_rows = (
        step.states(n, 2 * inner) for n in (step.num_active, len(step.batch.input_ids))
    )

    def plain() -> Tensor:
        gate, up = all_rows.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down.to(step.dtype))

    def fast() -> Tensor:
        return gated_linear(few, SharedWeight([down], step.dtype))

    return backward(fast, few, down), backward(plain, all_rows, down)


def time_joint_attention(step: Step) -> tuple[Run, Run]:
    """Attention of the last TTT step."""
    config, seq_len = step.config, len(step.batch.input_ids)
    key_shape = (config.num_kv_heads, config.head_dim)
    spans, later = step.rows.spans[-1], range(config.ttt_steps - 1)
    query = step.states(spans.query_bounds[-1], config.num_heads, config.head_dim)
    first = [step.states(seq_len, *key_shape) for _ in range(2)]
    own = [[step.states(step.num_active, *key_shape) for _ in later] for _ in range(2)]
    keys, values = ([one, *others] for one, others in zip(first, own, strict=True))
    whole_query = step.states(seq_len, config.num_heads, config.head_dim)
    whole = [[step.states(seq_len, *key_shape) for _ in (0, *later)] for _ in range(2)]

    def plain() -> Tensor:
        memory = TTTMemory(step.batch.lengths)
        memory.keys, memory.values = list(whole[0][:-1]), list(whole[1][:-1])
        return memory.attend(whole_query, whole[0][-1], whole[1][-1])

    return (
        backward(lambda: joint_attention(query, keys, values, spans), query, *keys, *values),
        backward(plain, whole_query, *whole[0], *whole[1]),
    )


def time_shared_weight(step: Step) -> tuple[Run, Run]:
    """The first matmul of the MLP, in all TTT steps."""
    size, inner = step.config.hidden_size, step.config.intermediate_size
    weights = [step.weight(inner, size) for _ in range(2)]
    steps = range(step.config.ttt_steps)
    few, all_rows = (
        [step.states(n, size) for _ in steps] for n in (step.num_active, len(step.batch.input_ids))
    )

    def fast() -> tuple[Tensor, ...]:
        shared = SharedWeight(weights, step.dtype)
        return tuple(shared.linear(x) for x in few)

    def plain() -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight.to(x.dtype)) for x in all_rows for weight in weights)

    return backward(fast, *few, *weights), backward(plain, *all_rows, *weights)


def time_shared_rows(step: Step) -> tuple[Run, Run]:
    """Projection of the token embeddings to keys and values, read in all TTT steps."""
    config, seq_len = step.config, len(step.batch.input_ids)
    embedded = step.states(seq_len, 2 * config.num_kv_heads * config.head_dim)
    places = step.rows.shifted_rows[1:]

    def fast() -> tuple[Tensor, ...]:
        shared = SharedRows(embedded * 1)
        inside = step.rows.num_inside[1:]
        later = (shared.read(at, num_inside=n) for at, n in zip(places, inside, strict=True))
        return shared.read(), *later

    def plain() -> tuple[Tensor, ...]:
        return embedded * 1, *(embedded.index_select(0, at) for at in places)

    return backward(fast, embedded), backward(plain, embedded)


def time_gather(step: Step) -> tuple[Run, Run]:
    """The active rows, after step 0 of the last layer."""
    x = step.states(len(step.batch.input_ids), step.config.hidden_size)
    rows, places = step.rows.rows, step.rows.places
    return backward(lambda: gather(x, rows, places), x), backward(lambda: x[rows], x)


def time_linear_kl(step: Step) -> tuple[Run, Run]:
    """LM head and loss of all TTT steps."""
    config, batch = step.config, step.batch
    size, seq_len = config.hidden_size, len(batch.input_ids)
    head = step.weight(config.draft_vocab_size, size)
    verifier_head = step.weight(config.draft_vocab_size, size).to(step.dtype).detach()
    few, all_rows = (
        [step.states(n, size) for _ in range(config.ttt_steps)] for n in (step.num_active, seq_len)
    )
    weights = torch.full((config.ttt_steps,), 1e-4, device=step.device)
    stacked = torch.stack([x.detach() for x in few], dim=1).flatten(0, 1)
    targets = Targets(
        hidden=batch.last_hidden_states,
        head=verifier_head,
        is_kept=torch.ones(len(batch.targets), dtype=torch.bool, device=step.device),
        tokens=None,
        kept_ids=torch.arange(config.draft_vocab_size, device=step.device),
        logit_scale=1.0,
        softcap=None,
    )

    def fast() -> Tensor:
        shared = SharedWeight([head], step.dtype)
        return linear_kl(stacked, few, shared, step.rows.pairs, weights, targets).loss

    def plain() -> Tensor:
        logits = F.linear(batch.last_hidden_states, verifier_head).float()
        log_probs = batch.at_positions(logits.log_softmax(-1))
        losses = [kl_loss(F.linear(x, head.to(x.dtype)), log_probs) for x in all_rows]
        return (torch.stack(losses) * weights[:, None]).sum()

    return backward(fast, *few, head), backward(plain, *all_rows, head)


def time_optimizer(step: Step) -> tuple[Run, Run]:
    """Gradient clipping and AdamW over as many weights as the MLP has."""
    size, inner = step.config.hidden_size, step.config.intermediate_size

    def build(*, use_fast_kernels: bool) -> Run:
        module = nn.Linear(size, 3 * inner, bias=False, device=step.device)
        optimizer = Optimizer(module, OptimizerSettings(), use_fast_kernels=use_fast_kernels)
        gradient = torch.randn_like(module.weight)

        def run() -> None:
            module.weight.grad = gradient
            optimizer.step(1e-4)

        return run

    return build(use_fast_kernels=True), build(use_fast_kernels=False)


def time_noise(step: Step) -> tuple[Run, Run]:
    """Check for non-finite states and noise; the fast version changes the batch in place."""

    def plain() -> object:
        kept, _ = drop_non_finite(step.batch)
        return add_noise(kept, 0.05, seed=0, epoch=0)

    return lambda: drop_and_add_noise(step.batch, 0.05, seed=0, epoch=0), plain


def time_active_rows(step: Step) -> tuple[Run, Run]:
    """Active rows of a step, found on the host; the plain version has none."""
    return lambda: find_active_rows(step.batch, step.config.ttt_steps), lambda: None


PARTS: dict[str, Callable[[Step], tuple[Run, Run]]] = {
    "noise": time_noise,
    "active_rows": time_active_rows,
    "rms_norm": time_rms_norm,
    "shared_weight": time_shared_weight,
    "shared_rows": time_shared_rows,
    "rotate": time_rotate,
    "gather": time_gather,
    "joint_attention": time_joint_attention,
    "gated_linear": time_gated_linear,
    "linear_kl": time_linear_kl,
    "optimizer": time_optimizer,
}


def main() -> None:
    """Build the inputs and time each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--supervised-fraction", type=float, default=0.6)
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--ttt-steps", type=int, default=3)
    parser.add_argument("--draft-vocab-size", type=int, default=32000)
    parser.add_argument("--only", choices=PARTS, help="time this part only")
    options = parser.parse_args()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("without a GPU, set TRITON_INTERPRET=1")
    options.algorithm, options.num_layers, options.full_vocab = "eagle3", 1, False
    step = build_step(options)
    for name in [options.only] if options.only else PARTS:
        fast, plain = PARTS[name](step)
        line = {"part": name, "fast": measure(fast, step.device)}
        line["plain"] = measure(plain, step.device)
        print(json.dumps(line), flush=True)


def build_step(options: argparse.Namespace) -> Step:
    """The first batch of `speculators bench`, on the device."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    dtype = torch.bfloat16 if has_gpu else torch.float32
    config = draft_config(options, *SHAPES[options.shape])
    assert isinstance(config, Eagle3Config)
    loader = SyntheticLoader(
        config,
        NEXT_TOKEN,
        total_seq_len=options.total_seq_len,
        supervised_fraction=options.supervised_fraction,
        per_step=1,
        dtype=dtype,
        pin_memory=has_gpu,
        seed=0,
    )
    return Step(config, loader.batches[0].to(device), device, dtype)


def measure(run: Run, device: torch.device) -> dict[str, float | int | None]:
    """Milliseconds on the GPU and on the host, and the number of kernel launches."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    times = []
    for _ in range(NUM_RUNS if device.type == "cuda" else 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started_at = time.perf_counter()
        run()
        times.append((time.perf_counter() - started_at) * 1e3)
    launch_ms = round(statistics.median(times), 3)
    if device.type != "cuda":
        return {"ms": None, "launch_ms": launch_ms, "num_kernels": None}
    kernels = profile_steps(run, num_steps=NUM_RUNS)
    ms = round(sum(kernels.split_ms.values()), 4)
    return {"ms": ms, "launch_ms": launch_ms, "num_kernels": kernels.num_kernels}


if __name__ == "__main__":
    main()
