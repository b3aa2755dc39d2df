"""A format is one file and one line in the table."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
import torch

from speculators_cli.core.data.data_config import resolve_layer_ids
from speculators_cli.core.data.folder import read_folders
from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.data.formats.detect import describe_names, detect, verify
from speculators_cli.core.data.formats.format import SampleFormat, get_tensor
from speculators_cli.core.data.formats.layout import Layout
from speculators_cli.core.data.sample import BadSampleError
from speculators_cli.core.errors import DataError
from speculators_cli.core.progress import SilentProgress
from speculators_cli.settings.base import FormatVersion

S, H = 7, 5


def lay_out(content: Mapping[object, object]) -> Layout:
    ids, mask = get_tensor(content, "input_ids"), get_tensor(content, "loss_mask")
    layers = tuple(get_tensor(content, key, 2) for key in ("early", "late"))
    return Layout(ids, mask, layers, is_normed=True)


MINE = SampleFormat(
    name="mine",
    suffixes=(".mine",),
    signs=frozenset({"early", "late"}),
    lay_out=lay_out,
    usual_layer_ids=lambda num_layers: (num_layers - 1,),
)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sample of a format that only this file has."""
    monkeypatch.setitem(FORMATS, "mine", MINE)
    content = {
        "input_ids": torch.arange(S),
        "loss_mask": torch.ones(S, dtype=torch.bool),
        "early": torch.randn(S, H),
        "late": torch.full((S, H), 3.0),
    }
    torch.save(content, tmp_path / "a.mine")
    return tmp_path / "a.mine"


def test_a_format_of_one_line_is_detected_and_read(file: Path) -> None:
    found = read_folders(
        [file.parent], version=1, index_file=None, max_bad_samples=None, progress=SilentProgress()
    )

    layer_ids = resolve_layer_ids(
        (), num_verifier_layers=9, num_aux_layers=1, data_format=found.format, given=None
    )
    assert found.format == "mine"
    assert detect(file)[0] == "mine"
    assert found.read(0).last_hidden_states[:].unique().tolist() == [3.0]
    assert layer_ids.ids == (8,)
    assert describe_names() == "`.pt`, `.ckpt`, `.mine` or `hs_*.safetensors`"


def test_a_file_of_another_format_is_refused_with_the_flag_that_reads_it(file: Path) -> None:
    file.rename(file.with_suffix(".pt"))

    with pytest.raises(DataError) as error:
        read_folders(
            [file.parent],
            version=0,
            index_file=None,
            max_bad_samples=None,
            progress=SilentProgress(),
        )

    assert "holds mine samples, which were read as v0" in error.value.message
    assert error.value.hint == "Pass `--data-format mine`"


def test_checksums_are_compared_where_a_format_has_any(file: Path) -> None:
    verify(file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.tensor(3.0).numpy().tobytes() * H)] ^= 1
    file.write_bytes(content)
    (file.parent / "hs_0.safetensors").write_bytes(b"without checksums")

    verify(file.parent / "hs_0.safetensors")
    with pytest.raises(BadSampleError, match="has flipped bytes"):
        verify(file)


def test_the_settings_offer_every_version() -> None:
    versions = {form.version for form in FORMATS.values()} - {None}

    assert set(get_args(get_args(FormatVersion)[0])) == versions
