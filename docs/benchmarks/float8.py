"""Compare drafts trained in bfloat16 and in float8, on a wide verifier of random weights.

    python docs/benchmarks/float8.py
    python docs/benchmarks/float8.py --steps 600 --seeds 0 1 2 --verifier-layers 8

For each seed and each precision, an EAGLE-3 draft is trained on the hidden states that the verifier
computes in the step, for random tokens that are the same in both. Then the drafts predict the
verifier's tokens on sequences that no step has seen, with teacher forcing. One line of JSON per
draft has its simulated acceptance length and its loss; one per seed has the differences to the
draft trained in bfloat16. Intervals (95 %) are bootstrapped over sequences, the same ones for both.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from speculators_cli.core.algorithms import ALGORITHMS
from speculators_cli.core.algorithms.draft_model import DraftModel
from speculators_cli.core.bench.random_engine import build_engine
from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.alignment import NEXT_TOKEN
from speculators_cli.core.data.batch import Batch
from speculators_cli.core.data.data_config import LayerIds, default_layer_ids
from speculators_cli.core.data.live_batch import LiveSample, collate_live, without_states
from speculators_cli.core.data.vocab_map import VocabMap
from speculators_cli.core.engines.transformers_engine import TransformersEngine
from speculators_cli.core.models.verifier import FrozenVerifier, VerifierConfig
from speculators_cli.core.training.distributed import Ranks
from speculators_cli.core.training.inputs import fresh_config
from speculators_cli.core.training.optimizer import Optimizer
from speculators_cli.core.training.optimizer_step import NoLog, OptimizerStep
from speculators_cli.core.training.states import LiveStates
from speculators_cli.core.training.weights import DraftWeights
from speculators_cli.settings.algorithms.eagle3 import Eagle3Settings
from speculators_cli.settings.train import DraftArch, OptimizerSettings

NUM_DOCUMENTS = 8  # in a sequence
WARMUP_SHARE = 0.1
NUM_RESAMPLES = 2000
COUNTERS = ("num_chains", "num_agreed_chains", "losses", "num_scored")
EVALUATION_SEED = 2**31  # of tokens; training has the numbers of its steps


class Task:
    """A verifier of random weights, and sequences of random tokens.

    Args:
        given: The flags.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = torch.device(given.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        shape, _ = SHAPES[given.shape]
        self.verifier: VerifierConfig = replace(shape, num_layers=given.verifier_layers)
        self.vocab_size, self.seq_len = given.vocab_size, given.total_seq_len
        ids = default_layer_ids(given.verifier_layers, 3)
        torch.manual_seed(0)
        self.engine: TransformersEngine = build_engine(
            self.verifier, given.vocab_size, ids, dtype=self.dtype, device=self.device,
            is_float8=False,
        )  # fmt: skip
        embedding = self.engine.model.get_input_embeddings().weight.detach()
        head = self.engine.model.get_output_embeddings().weight.detach()
        make_learnable(self.engine.model, logit_std=given.logit_std)
        gain = torch.ones(self.verifier.hidden_size, device=self.device)
        self.frozen = FrozenVerifier(embedding, gain, head, self.verifier)
        self.config = fresh_config(
            "eagle3",
            Eagle3Settings(),
            self.verifier,
            VocabMap.full(given.vocab_size),
            LayerIds(ids, is_assumed=True),
            arch=DraftArch.LLAMA,
            num_layers=1,
        )
        self.states = LiveStates(self.engine, weights_bytes=0)

    def draw(self, seed: int) -> Batch:
        """A sequence of documents whose tokens are random and all supervised; without states."""
        generator = torch.Generator().manual_seed(seed)
        num_tokens = self.seq_len // NUM_DOCUMENTS
        ids = torch.randint(
            self.vocab_size, (NUM_DOCUMENTS, num_tokens + NEXT_TOKEN.shift), generator=generator
        )
        samples = [LiveSample(without_states(row, torch.ones_like(row).bool())) for row in ids]
        is_cuda = self.device.type == "cuda"
        batch = collate_live(
            range(NUM_DOCUMENTS), samples, total_seq_len=self.seq_len, alignment=NEXT_TOKEN,
            pin_memory=is_cuda, pads=is_cuda,
        )  # fmt: skip
        return batch.to(self.device)

    def train(self, seed: int, num_steps: int, lr: float, *, in_float8: bool) -> DraftModel:
        """A draft after some steps; the learning rate rises, then falls to zero linearly."""
        draft = ALGORITHMS["eagle3"].build(
            self.config, self.frozen, VocabMap.full(self.vocab_size), Eagle3Settings(),
            use_fast_kernels=True, seed=seed,
        )  # fmt: skip
        draft.use_float8 = in_float8
        weights = DraftWeights(draft)
        optimizer = Optimizer(weights, OptimizerSettings(), use_fast_kernels=True)
        step = OptimizerStep(
            weights, Ranks(0, 1, 0, 1, self.device, None), optimizer, compute_dtype=self.dtype,
            noise_std=0.05, seed=seed, filler=self.states,
        )  # fmt: skip
        for index in range(num_steps):
            warmup = min(1.0, (index + 1) / max(WARMUP_SHARE * num_steps, 1))
            batch = self.draw(seed * num_steps + index)
            step.run([batch], NoLog(), epoch=0, lr=lr * warmup * (1 - index / num_steps))
        return draft

    def evaluate(self, draft: DraftModel, num_sequences: int) -> NDArray[np.float64]:
        """Of each sequence and TTT step, the counters of `COUNTERS`; [sequences, 4, steps]."""
        draft.eval()
        found = list(self._count(draft, num_sequences))
        draft.train()
        return torch.stack(found).cpu().numpy()

    @torch.no_grad()
    def _count(self, draft: DraftModel, num_sequences: int) -> Iterator[Tensor]:
        for index in range(num_sequences):
            batch = self.states.fill(self.draw(EVALUATION_SEED + index)).cast(self.dtype)
            counters = draft(batch).counters
            yield torch.stack([counters[name].double() for name in COUNTERS])


@torch.no_grad()
def make_learnable(model: Any, *, logit_std: float) -> None:
    """Rescale random weights: a token decides most of what follows it, its context some.

    As they are initialised, contexts decide all, and all tokens are nearly as likely.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    head.mul_(logit_std / (head.float().std() * head.shape[1] ** 0.5))
    embedding.div_(embedding.float().std())
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.mul_(0.3)


def resample(counts: NDArray[np.float64], *, seed: int = 0) -> NDArray[np.float64]:
    """Sums over all sequences, then over each resample; [1 + resamples, 4, steps]."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))
    sums: NDArray[np.float64] = np.concatenate([counts.sum(0)[None], counts[drawn].sum(1)])
    return sums


def measures_of(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Simulated acceptance length, and mean loss in nats, of each row of sums."""
    chains, agreed, losses, scored = sums.transpose(1, 0, 2)
    return {
        "simulated_acceptance_length": 1 + (agreed / chains).sum(-1),
        "loss": losses.sum(-1) / scored.sum(-1),
    }


def describe(values: NDArray[np.float64]) -> dict[str, object]:
    """The first value, and the interval of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    interval = [round(float(bound), 4) for bound in (low, high)]
    return {"value": round(float(values[0]), 4), "interval": interval}


def main() -> None:
    """Train, evaluate and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--verifier-layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--logit-std", type=float, default=4.0)
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--sequences", type=int, default=30, help="to evaluate on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    task = Task(given)
    for seed in given.seeds:
        found = {}
        for name in ("bfloat16", "float8"):
            started_at = time.perf_counter()
            draft = task.train(seed, given.steps, given.lr, in_float8=name == "float8")
            found[name] = measures_of(resample(task.evaluate(draft, given.sequences)))
            line = {
                "gemm_dtype": name,
                "seed": seed,
                "seconds": round(time.perf_counter() - started_at, 1),
                **{key: describe(values) for key, values in found[name].items()},
            }
            print(json.dumps(line), flush=True)
        differences = {
            key: describe(values - found["bfloat16"][key])
            for key, values in found["float8"].items()
        }
        print(json.dumps({"seed": seed, "float8_minus_bfloat16": differences}), flush=True)


if __name__ == "__main__":
    main()
