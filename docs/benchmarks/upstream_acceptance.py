"""Train a draft with upstream's trainer on samples of `generate-data`, to compare acceptance.

    python docs/benchmarks/upstream_acceptance.py make data --output-dir upstream
    python docs/benchmarks/upstream_acceptance.py train matched upstream --epochs 10
    python docs/benchmarks/upstream_acceptance.py train defaults upstream --epochs 10
    speculators evaluate upstream/matched/checkpoint_best --prompts held-out.jsonl

Upstream must be installed, `pip install speculators==0.9.0`, with a torch that both tools support.
`make` writes the samples as upstream stores them, those that `speculators train` validates on last.
Last hidden states that are not stored, at tokens without supervision, become zeros.

`train` runs upstream's command with its default optimizer, learning rate, norms and sliding window,
or with settings that are ours: `matched` has AdamW at 1e-4, full attention, the LM head trained and
no extra norms. Upstream freezes the LM head, so its model is changed after it is built. Arguments
after `--` are passed on. Both runs validate on the same samples and use d2t.npy and t2d.npy of the
working folder. Nothing is compiled, which would take minutes and give the same draft: upstream
attends by SDPA and computes its loss in PyTorch. It trains on accelerators only: on a CPU, its
device is replaced, as in `end_to_end.py`.

What still differs with matched settings: the seed, the samples of each step, the noise that
`speculators train` adds, and that upstream also scores positions whose target is in the next
sample. Compare drafts by `evaluate`, not by the losses that are logged: upstream's are of one
batch, and in validation the mean of a few batches that it draws anew in each epoch.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from end_to_end import UPSTREAM_ON_CPU
from safetensors.torch import save_file

from speculators_cli.core.data.folder import SampleFolder, read_folders
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.source import split
from speculators_cli.core.data.supervised_rows import held_states, held_tokens
from speculators_cli.core.progress import SILENT

TRAIN_RATIO = 0.9  # the default of both tools
# Upstream's command, with a trained LM head.
TRAINED_HEAD = """
from speculators.train import cli
build = cli.build_draft_model
def build_trained(*args, **kwargs):
    model = build(*args, **kwargs)
    model.lm_head.weight.requires_grad_(True)
    return model
cli.build_draft_model = build_trained
"""
COMMAND = "import sys\nfrom speculators.cli import app\napp(sys.argv[1:])\n"
SETTINGS = {
    "matched": (
        *("--optimizer", "adamw", "--lr", "1e-4", "--full-attention-indices", "0"),
        *("--no-norm-before-fc", "--no-norm-output"),
    ),
    "defaults": (),
}
ON_CPU = ("--hidden-states-dtype", "float32", "--num-workers", "0")


def main() -> None:
    """Write samples, or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make", help="write samples as upstream stores them")
    making.add_argument("data", type=Path, help="output folder of `generate-data`")
    making.add_argument("--output-dir", type=Path, required=True)
    making.set_defaults(command=make)
    training = commands.add_parser("train", help="run upstream's trainer")
    training.add_argument("settings", choices=sorted(SETTINGS))
    training.add_argument("data", type=Path, help="folder of `make`")
    training.add_argument("--save-path", type=Path, help="default: DATA/SETTINGS")
    training.add_argument("--epochs", type=int, required=True)
    training.set_defaults(command=train)
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.flags = words[end + 1 :]
    options.command(options)


def make(options: argparse.Namespace) -> None:
    """Write the samples, training first."""
    from datasets import Dataset

    folder = read_folders(
        [options.data], version=1, index_file=None, max_bad_samples=0, progress=SILENT
    )
    table: dict[str, list[object]] = {"input_ids": [], "loss_mask": [], "seq_len": []}
    states_dir = options.output_dir / "hidden_states"
    states_dir.mkdir(parents=True)
    training, validation = split(folder, TRAIN_RATIO)
    for i, sample in enumerate(read_all(training, validation)):
        layers = [layer[:] for layer in sample.aux_hidden_states]
        last = torch.zeros_like(layers[0])
        last[held_tokens(sample.last_hidden_states)] = held_states(sample.last_hidden_states)[:]
        states = torch.stack([*layers, last], dim=1)
        save_file(
            {"token_ids": sample.input_ids, "hidden_states": states},
            states_dir / f"hs_{i}.safetensors",
        )
        table["input_ids"].append(sample.input_ids.numpy())
        table["loss_mask"].append(sample.loss_mask.long().numpy())
        table["seq_len"].append(sample.num_tokens)
    Dataset.from_dict(table).with_format("torch").save_to_disk(options.output_dir)
    verifier = folder.configs[0].verifier
    assert verifier is not None, "generate-data records it"
    (options.output_dir / "verifier.txt").write_text(verifier)
    ratio = (len(training) + 0.5) / len(folder)  # upstream rounds down
    (options.output_dir / "train-data-ratio.txt").write_text(str(ratio))
    print(f"{len(training):,} samples to train on, {len(validation):,} to validate on")


def train(options: argparse.Namespace) -> None:
    """Run upstream's trainer."""
    program = COMMAND if torch.cuda.is_available() else UPSTREAM_ON_CPU
    if options.settings == "matched":
        program = TRAINED_HEAD + program
    data: Path = options.data
    command = [
        *(sys.executable, "-c", program, "train", "--speculator-type", "eagle3"),
        *("--verifier-name-or-path", (data / "verifier.txt").read_text()),
        *("--data-path", str(data), "--on-missing", "raise", "--mask-token-id", "0"),
        *("--train-data-ratio", (data / "train-data-ratio.txt").read_text()),
        *("--d2t-path", "d2t.npy", "--t2d-path", "t2d.npy"),
        *("--save-path", str(options.save_path or data / options.settings)),
        *("--epochs", str(options.epochs)),
        *("--loss-implementation", "eager", "--draft-attn-impl", "sdpa", "--num-workers", "4"),
        *SETTINGS[options.settings],
        *(() if torch.cuda.is_available() else ON_CPU),
        *options.flags,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    sys.exit(subprocess.run(command, env=environment, check=False).returncode)  # noqa: S603


def read_all(*folders: SampleFolder) -> Iterator[Sample]:
    """Samples of folders, one open at a time."""
    for folder in folders:
        for sample_id in range(len(folder)):
            yield folder.read(sample_id)


if __name__ == "__main__":
    main()
