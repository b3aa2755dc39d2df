"""Exports in vLLM's own engine: the verifier's output, and the very counts of draft-and-verify.

docs/contributing.md says how to install the engine; `VLLM_PYTHON` names its interpreter.
"""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from speculators_cli.cli.app import run
from speculators_cli.core.capture.capture import capture
from speculators_cli.core.demo.demo import VERIFIER_DIR, read_prompts
from speculators_cli.core.evaluation.draft_and_verify import Answer, draft_and_verify
from speculators_cli.core.models.draft_config import Given
from speculators_cli.core.models.draft_source import read_draft
from speculators_cli.core.models.drafter import Drafter
from speculators_cli.core.models.eagle3 import load_draft
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_model import VerifierModel
from speculators_cli.core.progress import SilentProgress
from tests.embedded import write_vocab_map

pytestmark = pytest.mark.vllm

SERVE_FILE = Path(__file__).parent / "serve.py"
LAYER_IDS = (2, 4, 5)
NUM_PROMPTS, MAX_NEW_TOKENS = 12, 48
RESIDUAL_OFF = ("--no-norm-before-residual",)
QUESTIONS = (
    "Explain gravity in simple terms.",
    "Write a short story about penguins.",
    "List five facts about the Moon.",
    "Write a Python function that adds two numbers.",
    "Why does sleep matter?",
    "What is the history of tea?",
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "full vocabulary": ("--full-vocab",),
    "2 layers": ("--num-layers", "2"),
    "qwen3 layers": ("--draft-arch", "qwen3"),
    "qwen3, 2 layers": ("--draft-arch", "qwen3", "--num-layers", "2"),
    "fc_norm": ("--fc-norm",),
    "norm_before_fc": ("--norm-before-fc",),
    "norm_output": ("--norm-output",),
    "norm_before_residual off": RESIDUAL_OFF,
}


@dataclass(frozen=True)
class Inputs:
    """What drafts are trained on, and what they are asked."""

    folder: Path
    verifier: VerifierModel
    prompts: list[list[int]]
    verifier_name: str = str(VERIFIER_DIR)

    def train(self, *flags: str) -> Path:
        """Save path of a run on the very prompts that are drafted afterwards."""
        save_path = self.folder / "-".join(["run", *flags])
        assert (
            run(
                [
                    *("train", "--verifier-name-or-path", str(VERIFIER_DIR), "--epochs", "8"),
                    *("--data-path", str(self.folder / "data"), "--total-seq-len", "512"),
                    *(
                        "--d2t-path",
                        str(self.folder / "d2t.npy"),
                        "--device",
                        "cpu",
                        "--lr",
                        "3e-3",
                    ),
                    *("--t2d-path", str(self.folder / "t2d.npy"), "--save-path", str(save_path)),
                    *("--log-every-steps", "1000", "--train-data-ratio", "1", *flags),
                ]
            )
            == 0
        )
        return save_path

    def draft_and_verify(self, draft: Path) -> list[Answer]:
        """What this package answers and counts with the draft in a folder."""
        source = read_draft(str(draft), Given(), flag="CHECKPOINT")
        files = VerifierFiles(self.verifier_name)
        config = read_verifier_config(files, trust_remote_code=False)
        drafter = Drafter(load_draft(source, load_frozen_verifier(files, config)), 3)
        return [
            draft_and_verify(self.verifier, drafter, prompt, MAX_NEW_TOKENS)
            for prompt in self.prompts
        ]

    def serve(self, draft: Path | None, way: str) -> tuple[list[list[int]], list[list[int]]]:
        """What the engine answers to each prompt, and what it counts of each."""
        job, result = self.folder / "job.json", self.folder / "result.json"
        content = {
            "verifier": self.verifier_name,
            "draft": str(draft),
            "way": way,
            "prompts": self.prompts,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_model_len": 512,
        }
        job.write_text(json.dumps(content))
        done = subprocess.run(
            [os.environ["VLLM_PYTHON"], str(SERVE_FILE), str(job), str(result)],
            env={
                **{k: x for k, x in os.environ.items() if k != "PYTHONPATH"},
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        served = json.loads(result.read_text())
        counts = np.diff(np.array(served["counts"]), axis=0).tolist()
        return served["answers"], counts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("vllm")
    verifier = VerifierModel(str(VERIFIER_DIR), LAYER_IDS, dtype=torch.float32)
    prompts = [verifier.encode(text) for text in read_prompts()[:60]]
    write_vocab_map(folder)
    capture(
        verifier,
        prompts,
        folder / "data",
        verifier_name=VERIFIER_DIR.name,
        max_new_tokens=MAX_NEW_TOKENS,
        progress=SilentProgress(),
    )
    return Inputs(folder, verifier, prompts[:NUM_PROMPTS])


@pytest.fixture(scope="module")
def alone(inputs: Inputs) -> list[list[int]]:
    """The engine's answers without a draft."""
    return inputs.serve(None, "alone")[0]


def check(
    inputs: Inputs,
    alone: list[list[int]],
    export_dir: Path,
    way: str,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Serve an export, compare everything, write a row of the table in the docs."""
    answers, counts = inputs.serve(export_dir, way)

    expected = inputs.draft_and_verify(export_dir)
    own_counts = [
        [len(x.num_accepted), *(sum(n > k for n in x.num_accepted) for k in range(3))]
        for x in expected
    ]
    passes, *accepted = np.array(counts).sum(axis=0).tolist()
    with capsys.disabled():
        rates = " | ".join(f"{n}" for n in accepted)
        length = f"{1 + sum(accepted) / passes:.3f}"
        sys.stdout.write(f"\n| {name} | {way} | {passes} | {rates} | {length} |\n")
    assert answers == alone
    assert answers == [list(x.tokens) for x in expected]
    assert counts == own_counts
    # A draft that is never accepted would agree too.
    assert sum(accepted) > passes / 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_counts_what_we_count(
    inputs: Inputs,
    alone: list[list[int]],
    variant: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_path = inputs.train(*VARIANTS[variant])
    out = inputs.folder / f"served-{variant}"
    assert run(["export", str(save_path), "--output-dir", str(out), "--dtype", "float32"]) == 0

    check(inputs, alone, out, "explicit", variant, capsys)


@pytest.mark.parametrize("flags", [[], ["--without-embeddings"]])
def test_the_folder_alone_is_enough(
    inputs: Inputs, alone: list[list[int]], flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = inputs.folder / "-".join(["alone", *flags])
    save_path = inputs.train()
    line = ["export", str(save_path), "--output-dir", str(out), "--dtype", "float32", *flags]
    assert run([*line, "--max-shard-size", "1MB"]) == 0

    check(inputs, alone, out, "folder", " ".join(["shards", *flags]), capsys)


@pytest.mark.parametrize("target", ["vllm", "eagle"])
def test_an_eagle_checkpoint_is_served(
    inputs: Inputs, alone: list[list[int]], target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_eagle(inputs.train(*RESIDUAL_OFF), inputs.folder / f"eagle-{target}")
    out = inputs.folder / f"from-eagle-{target}"
    line = ["export", str(source), "--output-dir", str(out), "--dtype", "float32"]
    verifier = ["--verifier-name-or-path", str(VERIFIER_DIR), "--target", target]
    assert run([*line, *verifier]) == 0

    if target == "vllm":
        check(inputs, alone, out, "explicit", "from an EAGLE-3 checkpoint", capsys)
    else:
        answers, counts = inputs.serve(out, "explicit")
        twin = inputs.folder / "from-eagle-vllm"
        assert answers == alone
        assert counts == inputs.serve(twin, "explicit")[1]


@pytest.mark.skipif("VLLM_DRAFT" not in os.environ, reason="`VLLM_DRAFT` names no draft")
def test_a_draft_of_ones_own_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = os.environ["VLLM_DRAFT"], tmp_path / "served"
    assert run(["export", source, "--output-dir", str(out), "--dtype", "float32"]) == 0
    config = read_draft(str(out), Given(), flag="CHECKPOINT").config
    name = config.verifier_name_or_path
    verifier = VerifierModel(name, config.target_layer_ids, dtype=torch.float32)
    prompts = [
        list(
            verifier.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True
            )["input_ids"]
        )
        for text in QUESTIONS
    ]
    own = Inputs(tmp_path, verifier, prompts, name)

    alone = own.serve(None, "alone")[0]

    check(own, alone, out, "folder", source, capsys)


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
