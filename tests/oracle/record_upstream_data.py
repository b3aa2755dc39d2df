"""Write samples with upstream's own libraries, and what its data set reads from them.

Run in an environment with speculators 0.9.0, hs-connectors 0.9.0 and datasets:
    python tests/oracle/record_upstream_data.py
"""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from hs_connectors import FileTransfer
from hs_connectors.fp8_utils import quantize_tensor_to_fp8
from hs_connectors.transfer import FP8Transfer
from safetensors.torch import save_file
from speculators.train.data import ArrowDataset

FOLDER = Path(__file__).parent / "upstream-0.9.0-data"
HIDDEN, LAYERS, VOCAB = 24, 4, 37


def main() -> None:
    """Write `bf16/` and `fp8/`, each with its `expected.safetensors` beside it."""
    generator = torch.Generator().manual_seed(0)
    shutil.rmtree(FOLDER, ignore_errors=True)
    lengths = [11, 8, 14, 9]
    ids = [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]
    masks = [(torch.arange(n) > 3).long() for n in lengths]
    states = [torch.randn(n, LAYERS, HIDDEN, generator=generator).bfloat16() for n in lengths]
    rows = {
        "input_ids": [x.tolist() for x in ids],
        "loss_mask": [x.tolist() for x in masks],
        "seq_len": lengths,
    }
    for name in ("bf16", "fp8"):
        data_dir = FOLDER / name
        table = Dataset.from_dict(rows).with_format("torch")
        table.save_to_disk(data_dir, num_shards=2)
        states_dir = data_dir / "hidden_states"
        states_dir.mkdir()
        expected = {}
        # Row 2 was never captured.
        for i in (0, 1, 3):
            tensors = {"token_ids": ids[i], "hidden_states": states[i]}
            if name == "fp8":
                quantised, scales = quantize_tensor_to_fp8(states[i])
                tensors |= {"hidden_states": quantised, "hidden_states_scales": scales}
            save_file(tensors, states_dir / f"hs_{i}.safetensors")
        transfer = (FP8Transfer if name == "fp8" else FileTransfer)(states_dir)
        dataset = ArrowDataset(64, data_dir, transfer=transfer, on_missing="skip")
        for i in (0, 1, 3):
            for key, value in dataset[i].items():
                expected[f"{i}.{key}"] = value.contiguous()
        save_file(expected, FOLDER / f"{name}-expected.safetensors")


if __name__ == "__main__":
    main()
