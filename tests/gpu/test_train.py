"""The whole run on a GPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from speculators_cli.cli.app import run
from speculators_cli.core.data.batch import collate
from speculators_cli.core.data.formats import v1
from speculators_cli.core.data.sample import Sample
from speculators_cli.core.training.feed import DeviceFeed
from speculators_cli.core.training.host_copy import HostCopy
from tests.tiny_run import TinyInputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("full_vocab", [True, None])
def test_a_run_learns_on_a_gpu(tiny: TinyInputs, full_vocab: bool | None) -> None:
    flags = tiny.flags(device="cuda", epochs=6, full_vocab=full_vocab)

    code = run(["train", *flags])

    text = (tiny.save_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "val"]
    assert code == 0
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_a_run_resumes_in_mid_epoch_on_a_gpu(tiny: TinyInputs) -> None:
    flags = tiny.flags(device="cuda", checkpoint_every_steps=3)
    metrics_file = tiny.save_path / "metrics.jsonl"
    run(["train", *flags])
    whole = json.loads(metrics_file.read_text().splitlines()[-1])
    for folder in tiny.save_path.iterdir():
        if folder.is_dir() and not folder.is_symlink() and folder.name != "step-3":
            shutil.rmtree(folder)

    code = run(["train", *flags])

    resumed = json.loads(metrics_file.read_text().splitlines()[-1])
    assert code == 0
    assert resumed["step"] == whole["step"] > 3
    # The backward of attention adds up in an order of its own at each run.
    assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-2)


def test_the_copy_of_a_checkpoint_is_pinned_until_the_run_ends() -> None:
    host = HostCopy()
    large, small = torch.rand(2**20, device="cuda"), torch.rand(3, device="cuda")
    expected = large.cpu(), small.cpu()

    host.reserve([("large", large)])
    copies = host.copy([("large", large), ("small", small)])
    large.zero_()

    assert copies["large"].is_pinned()
    assert torch.equal(copies["large"], expected[0])
    assert torch.equal(copies["small"], expected[1])
    host.close()
    assert not copies["large"].is_pinned()


def test_float8_states_are_scaled_on_the_way_to_a_gpu(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    *aux, last = torch.randn(4, 50, 24, generator=generator).bfloat16()
    mask = torch.arange(50) % 3 > 0
    sample = Sample(torch.arange(50), mask, tuple(aux), last, is_normed=False)
    v1.write_sample(sample, tmp_path / "a.pt", storage_dtype="float8", supervised_only=True)
    batch = collate(
        [0],
        [v1.FORMAT.read_sample(tmp_path / "a.pt")],
        total_seq_len=64,
        num_aux_layers=3,
        hidden_size=24,
        dtype=torch.bfloat16,
        pin_memory=True,
    )
    assert batch.float8 is not None

    ((moved,),) = list(DeviceFeed(torch.device("cuda")).steps(iter([(batch,)])))

    assert moved.float8 is None
    assert moved.aux_hidden_states.is_cuda
    assert torch.equal(moved.aux_hidden_states.cpu(), batch.scale().aux_hidden_states)
    assert torch.equal(moved.last_hidden_states.cpu(), batch.scale().last_hidden_states)
