"""Time the start of a short training run and its saves, at the shape of an 8B verifier.

    python docs/benchmarks/start_up.py make /tmp/start-up
    python docs/benchmarks/start_up.py run /tmp/start-up --cold
    python docs/benchmarks/start_up.py run /tmp/start-up

`make` writes a random verifier (2.1 GB), vocabulary maps, and one sample of 8,192 tokens (0.3 GB)
with a hard link per step, so samples are read from page cache. `run` starts `speculators train`
for one epoch with a checkpoint every `--every` steps and prints one line of JSON, in seconds: the
whole command, the parts of its start (`start_up_seconds` of the report), its saves, and the median
step before the first checkpoint and while it is written. `exit` is what no part of the command's
own times covers. `--cold` clears Triton's cache and takes the verifier's files out of page cache
first. `--stacks` writes the stacks of all threads to a file, 20 times a second. Arguments after
`--` are passed to the command.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from random_verifier import write_verifier

from speculators_cli.core.bench.shapes import SHAPES
from speculators_cli.core.data.data_config import default_layer_ids, write_data_config
from speculators_cli.core.data.formats.v1 import write_sample
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.data.vocab_map import VocabMap

SUPERVISED = 0.6  # of the tokens of a sample
DRAFT_VOCAB = 32000
WITH_STACKS = """
import runpy, sys, threading, time, traceback
stacks = open(sys.argv.pop(1), "w")
def sample():
    while True:
        began_at = time.perf_counter()
        for thread, frame in sys._current_frames().items():
            if thread != threading.get_ident():
                calls = [f"{f.f_code.co_filename}:{n}:{f.f_code.co_name}"
                         for f, n in traceback.walk_stack(frame)]
                print(f"{began_at:.2f}", thread, *calls, file=stacks, flush=True)
        time.sleep(0.05)
threading.Thread(target=sample, daemon=True).start()
runpy.run_module("speculators_cli", run_name="__main__", alter_sys=True)
"""


def main() -> None:
    """Make the inputs, or time a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--total-seq-len", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=30, help="steps per checkpoint")
    parser.add_argument("--cold", action="store_true", help="clear Triton's cache first")
    parser.add_argument("--stacks", type=Path, help="file of what the threads do")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.flags = words[end + 1 :]
    options.folder = options.folder.absolute()
    (make if options.command == "make" else run)(options)


def make(options: argparse.Namespace) -> None:
    """Write verifier, maps and samples."""
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    shape, vocab_size = SHAPES[options.shape]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_verifier(folder / "verifier", shape, vocab_size, is_tied=False, device=device)
    write_data_config(
        folder / "data",
        verifier=str(folder / "verifier"),
        layer_ids=default_layer_ids(shape.num_layers),
    )
    num_tokens = options.total_seq_len
    states = torch.randn(4, num_tokens, shape.hidden_size, device=device).bfloat16().cpu()
    sample = Sample(
        input_ids=torch.randint(1, vocab_size, (num_tokens,)),
        loss_mask=torch.arange(num_tokens) >= (1 - SUPERVISED) * num_tokens,
        aux_hidden_states=tuple(states[:3]),
        last_hidden_states=states[3],
        is_normed=False,
    )
    write_sample(sample, folder / "data" / "data_0.pt")
    for i in range(1, options.steps):
        os.link(folder / "data" / "data_0.pt", folder / "data" / f"data_{i}.pt")
    counts = np.arange(vocab_size, dtype=np.int64)
    VocabMap.choose(counts, min(DRAFT_VOCAB, vocab_size // 2)).save(
        folder / "d2t.npy", folder / "t2d.npy"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command once, and print where its time went."""
    folder: Path = options.folder
    save_path, cache = folder / "run", folder / "triton"
    shutil.rmtree(save_path, ignore_errors=True)
    if options.cold:
        shutil.rmtree(cache, ignore_errors=True)
        drop_from_page_cache(folder / "verifier" / "model.safetensors")
    is_cold = not cache.exists()
    start = ["-m", "speculators_cli"]
    if options.stacks is not None:
        start = ["-c", WITH_STACKS, str(options.stacks)]
    command = [
        *(sys.executable, *start, "train", "--json"),
        *("--verifier-name-or-path", str(folder / "verifier")),
        *("--data-path", str(folder / "data"), "--train-data-ratio", "1.0"),
        *("--d2t-path", str(folder / "d2t.npy"), "--t2d-path", str(folder / "t2d.npy")),
        *("--save-path", str(save_path), "--epochs", "1", "--log-every-steps", "1"),
        *("--total-seq-len", str(options.total_seq_len)),
        *("--checkpoint-every-steps", str(options.every), "--keep-checkpoints", "1"),
        *options.flags,
    ]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    started_at = time.perf_counter()
    done = subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, check=False
    )
    total = time.perf_counter() - started_at
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\nended with {done.returncode}")
    report = json.loads(done.stdout)
    lines = map(json.loads, (save_path / "metrics.jsonl").read_text().splitlines())
    step_ms = [options.total_seq_len / line["tokens_per_second"] * 1e3 for line in lines]
    keys = ("start_up_seconds", "step", "save_wait_seconds", "duration_seconds")
    imports = report["start_up_seconds"]["imports"]
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "is_cold": is_cold,
                "total": total,
                "start_up": sum(report["start_up_seconds"].values()),
                **{key: report[key] for key in keys},
                "exit": total - imports - report["duration_seconds"],
                "step_ms": statistics.median(step_ms[options.every // 2 : options.every]),
                "step_ms_while_writing": statistics.median(step_ms[options.every :]),
                "saves": [x for x in done.stderr.splitlines() if x.startswith("Saved ")],
                "warnings": [x for x in done.stderr.splitlines() if x.startswith("warning: ")],
            }
        )
    )


def drop_from_page_cache(file: Path) -> None:
    """Let the next reader read the file from disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
