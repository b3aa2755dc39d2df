"""Drafts for the demo's verifier, and what an engine and this package count with them."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from speculators_cli.cli.app import run
from speculators_cli.core.algorithms.drafter import Drafter
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.drafts.trained_draft import read_draft
from speculators_cli.core.engines.engine import Prompt, Sampling
from speculators_cli.core.evaluation.draft_and_verify import draft_and_verify
from speculators_cli.core.evaluation.verifier import load_verifier
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.progress import SilentProgress
from tests.embedded_verifier_map import write_vocab_map
from tests.generated_samples import generate_samples

SERVE_FILE = Path(__file__).parent / "serve.py"
NUM_SAMPLES, NUM_PROMPTS, MAX_NEW_TOKENS = 60, 12, 48
LAYER_IDS = (2, 4, 5)  # those that engines read where none are named
SERVE_SECONDS = 600  # far more than an engine needs to start and answer


@dataclass(frozen=True)
class Variant:
    """How a draft differs from the default one."""

    train: tuple[str, ...] = ()  # flags
    layer_ids: tuple[int, ...] = LAYER_IDS
    rope_theta: float | None = None  # None: the verifier's, which is every engine's default
    # How an engine might misread it: other values of the config, with which counts must differ.
    misread: Mapping[str, Any] = field(default_factory=dict)


RESIDUAL_OFF = Variant(("--no-norm-before-residual",), misread={"norm_before_residual": True})
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VARIANTS = {
    "default": Variant(misread={"norm_before_residual": False}),
    "full vocabulary": Variant(("--full-vocab",)),
    "2 layers": Variant(("--num-layers", "2")),
    "qwen3 layers": Variant(("--draft-arch", "qwen3")),
    "qwen3 layers, 2 of them": Variant(("--draft-arch", "qwen3", "--num-layers", "2")),
    "`fc_norm`": Variant(("--fc-norm",), misread={"fc_norm": False}),
    "`norm_before_fc`": Variant(("--norm-before-fc",), misread={"norm_before_fc": False}),
    # With a residual after its norm, the next step's norm undoes all but the gains.
    "`norm_output`, `norm_before_residual` off": Variant(
        ("--norm-output", "--no-norm-before-residual"), misread={"norm_output": False}
    ),
    "`norm_before_residual` off": RESIDUAL_OFF,
    "verifier layers 1, 3, 6": Variant(
        layer_ids=(1, 3, 6), misread={"target_layer_ids": LAYER_IDS}
    ),
    # Shorter than the prompts, and than most of the answers.
    "window of 12": Variant(("--sliding-window", "12"), misread={"sliding_window": 11}),
    "window of 12, qwen3 layers, 2 of them": Variant(
        ("--sliding-window", "12", "--draft-arch", "qwen3", "--num-layers", "2"),
        misread={"sliding_window": None},
    ),
    "verifier layers 1, 3, 5, 6": Variant(layer_ids=(1, 3, 5, 6)),
    "RoPE theta 1,000": Variant(rope_theta=1000.0, misread={"rope_parameters": DEFAULT_ROPE}),
}
BLOCKS = ("--algorithm", "dflash", "--block-size", "4", "--epochs", "24", "--num-layers")
FULL = {"causal_block": True}
BLOCK_VARIANTS = {
    "1 layer": Variant((*BLOCKS, "1"), misread=FULL),
    "full vocabulary": Variant((*BLOCKS, "1", "--full-vocab"), misread={"mask_token_id": 70}),
    "2 layers": Variant((*BLOCKS, "2"), misread=FULL),
    "causal": Variant((*BLOCKS, "1", "--causal-block"), misread={"causal_block": False}),
    "window": Variant((*BLOCKS, "1", "--draft-window", "4"), misread={"draft_window": 3}),
    "causal window": Variant(
        (*BLOCKS, "1", "--draft-window", "4", "--causal-block"), misread={"draft_window": None}
    ),
    "verifier layers 1 to 5": Variant(
        (*BLOCKS, "1"), layer_ids=(1, 2, 3, 4, 5), misread={"target_layer_ids": (2, 3, 4, 5, 6)}
    ),
    "RoPE theta 1,000": Variant(
        (*BLOCKS, "1"), rope_theta=1000.0, misread={"rope_parameters": DEFAULT_ROPE}
    ),
}
# Of a few samples, all positions.
MASKS = (
    "--algorithm", "peagle", "--ttt-steps", "5", "--epochs", "24", "--down-sample-ratio", "1",
    "--num-layers",
)  # fmt: skip
MASK_VARIANTS = {
    "1 layer": Variant((*MASKS, "1"), misread={"mask_token_id": 70}),
    "full vocabulary": Variant((*MASKS, "1", "--full-vocab")),
    "2 qwen3 layers": Variant((*MASKS, "2", "--draft-arch", "qwen3")),
    "4 layers": Variant((*MASKS, "4"), misread={"norm_before_residual": False}),
    "`norm_before_fc`, `norm_before_residual` off": Variant(
        (*MASKS, "2", "--norm-before-fc", "--no-norm-before-residual"),
        misread={"norm_before_residual": True},
    ),
    # Masks further than the window from the first positions that they would see.
    "window of 4": Variant((*MASKS, "2", "--sliding-window", "4"), misread={"sliding_window": 3}),
    "verifier layers 1, 3, 5, 6": Variant(
        (*MASKS, "2"), layer_ids=(1, 3, 5, 6), misread={"target_layer_ids": (2, 3, 5, 6)}
    ),
}


class EngineError(Exception):
    """The engine did not start, or did not end."""


@dataclass(frozen=True)
class Served:
    """Answers to prompts, and how they came about."""

    answers: list[list[int]]
    accepted: list[list[int]]  # of each prompt, the draft tokens accepted in each verifier pass
    # Of each prompt, the draft tokens of each verifier pass.
    drafted: list[list[list[int]]] = field(default_factory=list)

    def row(self) -> tuple[int, list[int], float]:
        """Passes, passes that accepted their first, second and third token, acceptance length."""
        passes = [count for prompt in self.accepted for count in prompt]
        totals = [sum(count > k for count in passes) for k in range(3)]
        return len(passes), totals, 1 + sum(passes) / max(len(passes), 1)


@dataclass(frozen=True)
class Questions:
    """Prompts for a verifier."""

    verifier: str  # hub id or folder
    prompts: list[list[int]]

    def serve(self, python: str, draft: Path | None, way: str) -> Served:
        """What the engine of an interpreter answers and counts.

        Raises:
            EngineError: It does not run; with what it complained of first.
        """
        content = _read_proposal(draft) | {
            "verifier": self.verifier,
            "draft": str(draft),
            "way": way,
            "prompts": self.prompts,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_model_len": 512,
        }
        with tempfile.TemporaryDirectory() as folder:
            job, result = Path(folder, "job.json"), Path(folder, "result.json")
            job.write_text(json.dumps(content))
            _run_engine([python, str(SERVE_FILE), str(job), str(result)])
            return Served(**json.loads(result.read_text()))

    def draft_and_verify(self, draft: Path, **misread: Any) -> Served:
        """What this package answers and counts with the draft in a folder.

        Args:
            draft: The folder.
            misread: Values of its config to take in place of what it says.
        """
        source = read_draft(str(draft), Overrides(), flag="CHECKPOINT")
        config = replace(source.config, **misread)
        known = {name: x for name, x in source.weights.items() if name in config.tensor_shapes()}
        source = replace(source, config=config, weights=known)
        files = VerifierFiles(self.verifier)
        verifier = load_verifier(files, config.target_layer_ids, dtype=torch.float32)
        drafter = source.build_drafter(
            verifier.embedding, num_draft_tokens=config.num_draft_tokens, head=verifier.head
        )
        served = Served([], [])
        for prompt in self.prompts:
            # One prompt at a time, as the engine is asked.
            recorded = RecordedDrafter(drafter)
            found = draft_and_verify(
                verifier.rows,
                recorded,
                [Prompt(prompt, 0)],
                Sampling(MAX_NEW_TOKENS),
                end_ids=verifier.tokens.end_ids,
                batch_size=1,
                progress=SilentProgress(),
            )
            (answer,) = found.answers
            served.answers.append(list(answer.tokens))
            served.accepted.append(list(answer.num_accepted))
            served.drafted.append(recorded.drafted)
        return served


class RecordedDrafter:
    """A drafter of one row that keeps what it proposes."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.drafted: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)

    def propose(self) -> torch.Tensor:
        tokens = self.drafter.propose()
        self.drafted += tokens.tolist()
        return tokens


def _read_proposal(draft: Path | None) -> dict[str, Any]:
    """How an engine is told to draft, by what a draft says of itself."""
    content = {} if draft is None else json.loads((draft / "config.json").read_text())
    method = content.get("speculators_model_type", "eagle3")
    proposals = content.get("speculators_config", {}).get("proposal_methods", [{}])
    is_parallel = method == "peagle"
    return {
        "method": "eagle3" if is_parallel else method,
        "is_parallel": is_parallel,
        "num_draft_tokens": proposals[0].get("speculative_tokens", 3),
        # Of layers that one call of the engine norms the keys of.
        "num_layers": content["transformer_layer_config"]["num_hidden_layers"]
        if method == "dflash"
        else 1,
    }


def _run_engine(command: list[str]) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # In one process, so that what serve.py mends is mended.
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command,
            env=kept | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=SERVE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"no answer within {SERVE_SECONDS} seconds") from None
    if done.returncode != 0:
        # What follows the first error is processes that miss each other.
        first = re.search(r"\b(\w*(?:Error|Exception)\b.*)", done.stdout)
        raise EngineError(first[1] if first else done.stdout[-3000:])


def ask_demo() -> Questions:
    """Prompts of the demo for its verifier; drafts are trained on the same ones."""
    verifier = load_verifier(VerifierFiles(str(VERIFIER_DIR)), LAYER_IDS, dtype=torch.float32)
    prompts = [verifier.encode(text) for text in read_prompts()[:NUM_PROMPTS]]
    return Questions(str(VERIFIER_DIR), prompts)


def train(variant: Variant, folder: Path) -> Path:
    """Save path of a run on answers to the demo's prompts; what is there is not made again."""
    name = "-".join([*variant.train, *map(str, variant.layer_ids), str(variant.rope_theta)])
    save_path = folder / f"run{name}"
    if save_path.exists():
        return save_path
    data = folder / "-".join(["data", *map(str, variant.layer_ids)])
    if not data.exists():
        texts = read_prompts()[:NUM_SAMPLES]
        generate_samples(data, texts, max_new_tokens=MAX_NEW_TOKENS, layer_ids=variant.layer_ids)
        write_vocab_map(folder)
    verifier = _copy_verifier(folder, variant.rope_theta) if variant.rope_theta else VERIFIER_DIR
    _speculators(
        *("train", "--verifier-name-or-path", verifier, "--data-path", data),
        *("--d2t-path", folder / "d2t.npy", "--t2d-path", folder / "t2d.npy"),
        *("--epochs", 8, "--lr", "3e-3", "--total-seq-len", 512, "--device", "cpu"),
        *("--train-data-ratio", 1, "--log-every-steps", 1000, "--save-path", save_path),
        *variant.train,
    )
    return save_path


def export(checkpoint: Path, output_dir: Path, *flags: str) -> Path:
    """Export a checkpoint for the demo's verifier; what is there is not made again."""
    if not output_dir.exists():
        verifier = ("--verifier-name-or-path", VERIFIER_DIR)
        out = ("--output-dir", output_dir, "--dtype", "float32")
        _speculators("export", checkpoint, *out, *verifier, *flags)
    return output_dir


def _speculators(*line: object) -> None:
    assert run([*map(str, line)]) == 0


def _copy_verifier(folder: Path, rope_theta: float) -> Path:
    """A verifier that lends its draft another RoPE; its own states are those of the demo's."""
    copy = folder / f"theta-{rope_theta:g}"
    shutil.copytree(VERIFIER_DIR, copy, dirs_exist_ok=True)
    content = json.loads((copy / "config.json").read_text())
    content["rope_parameters"]["rope_theta"] = rope_theta
    (copy / "config.json").write_text(json.dumps(content))
    return copy


def write_eagle(save_path: Path, folder: Path) -> Path:
    """A checkpoint as EAGLE's own trainer leaves it: a pickled state dict, other names."""
    newest = max(save_path.glob("*/config.json"), key=lambda file: file.stat().st_mtime)
    tensors = load_file(newest.with_name("model.safetensors"))
    state: Any = OrderedDict(
        (name.replace("layers.0.", "midlayer."), tensor)
        for name, tensor in tensors.items()
        if name != "embed_tokens.weight"
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    content = json.loads(newest.read_text())
    layers = content["transformer_layer_config"]
    rope = layers.pop("rope_parameters")
    folder.mkdir()
    plain = {"architectures": ["LlamaForCausalLMEagle3"], **layers}
    plain |= {"rope_theta": rope["rope_theta"], "draft_vocab_size": content["draft_vocab_size"]}
    plain |= {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [k - 1 for k in LAYER_IDS]}}
    (folder / "config.json").write_text(json.dumps(plain))
    torch.save(state, folder / "pytorch_model.bin")
    return folder
