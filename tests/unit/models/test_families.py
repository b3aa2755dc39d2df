"""Every family of transformers: its logits from saved files, and its row of the reference page."""

import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speculators_cli.core.errors import SpeculatorsError
from speculators_cli.core.models.family import Family
from speculators_cli.core.models.family_code import build_small, model_classes
from speculators_cli.core.models.readout import Readout
from speculators_cli.core.models.readout_measurement import (
    NUM_ROWS,
    UnsupportedReadoutError,
    measure_readout,
)
from speculators_cli.core.models.verifier import load_frozen_verifier, read_verifier_config
from speculators_cli.core.models.verifier_files import VerifierFiles

TABLE = Path(__file__).parents[3] / "docs" / "write_verifier_table.py"
MAX_PARAMETERS = 50_000_000  # of a model without layers: larger towers are not written to disk


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_of_verifiers_is_not_stale() -> None:
    script = runpy.run_path(str(TABLE))

    assert script["PAGE"].read_text("utf-8") == script["page"](), f"run `python docs/{TABLE.name}`"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_logits_of_every_trained_family_are_its_own(tmp_path: Path) -> None:
    script = runpy.run_path(str(TABLE))
    errors: dict[str, float | str] = {}

    for family in script["families"]():
        try:
            readout = measure_readout(family)
        except UnsupportedReadoutError:
            continue
        folder = tmp_path / family.name
        expected = save_small(family, readout, folder)
        if expected is None:
            continue
        try:
            errors[family.name] = relative_error(folder, *expected)
        except SpeculatorsError as error:
            errors[family.name] = error.message
        shutil.rmtree(folder)

    # Its embedding has a row more than its LM head.
    assert "is (64, 4096), expected (65, 4096)" in str(errors.pop("moshi"))
    # Both round in float32, over widths of up to some thousands.
    assert {k: x for k, x in errors.items() if isinstance(x, str) or not x <= 2e-6} == {}
    assert len(errors) > 150
    assert {"llama", "gemma3", "cohere2", "granite", "qwen3_vl", "phi"} <= set(errors)


def relative_error(folder: Path, states: Tensor, logits: Tensor) -> float:
    """Of the logits of a saved verifier, to the largest."""
    files = VerifierFiles(str(folder))
    verifier = load_frozen_verifier(files, read_verifier_config(files, trust_remote_code=False))
    normed = verifier.normed(states, torch.zeros(NUM_ROWS, dtype=torch.bool))
    own = verifier.logits(normed, verifier.head)
    return float((own - logits).abs().max() / logits.abs().max())


@torch.no_grad()
def save_small(family: Family, readout: Readout, folder: Path) -> tuple[Tensor, Tensor] | None:
    """Save the family's model without layers; states before its final norm, and its logits of them.

    None if it needs layers, or is too large.
    """
    torch.manual_seed(1)
    for model_class, config in model_classes(family):
        try:
            model = build_small(model_class, config, num_layers=0)
            names = dict(model.named_modules())
            if readout.head not in names or readout.embedding not in names:
                continue
            if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
                continue
            for parameter in model.parameters():
                parameter.normal_(0.3, 0.5)
            states = torch.randn(NUM_ROWS, config.get_text_config(decoder=True).hidden_size)
            logits = run(model, states)
            model.save_pretrained(folder)
            config.architectures = [model_class.__name__]
            config.save_pretrained(folder)
        except Exception:  # noqa: BLE001, S112 - of code that is not ours: it needs layers or images
            continue
        return states, logits
    return None


def run(model: Any, states: Tensor) -> Tensor:
    """Logits with these states in place of what the last norm reads."""
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    called: list[Any] = []
    hooks = [m.register_forward_pre_hook(lambda m, _: called.append(m)) for m in norms]
    ids = torch.arange(3, 3 + NUM_ROWS)[None]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    last = called[-1]
    last.register_forward_pre_hook(lambda _, args: (states.view(args[0].shape), *args[1:]))
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.reshape(NUM_ROWS, -1)
    return logits
