"""Weights in each format of quantisation, with planted values."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.verifier_files import VerifierFiles
from speculators_cli.core.models.verifier_weights import read_weight

FP8 = torch.float8_e4m3fn
NAME = "model.lm_head.weight"
# Each is a value of a 4-bit float, and of an 8-bit one.
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = torch.cat([VALUES, -VALUES])


def write(folder: Path, **parts: Tensor) -> VerifierFiles:
    stored = {f"model.lm_head.{part}": tensor for part, tensor in parts.items()}
    # A neighbour whose name begins alike.
    stored["model.lm_head_of_another_kind.weight"] = torch.ones(2)
    save_file(stored, folder / "model.safetensors")
    return VerifierFiles(str(folder))


def draw(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes of 4-bit floats, and their values."""
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(0))
    return codes, VALUES[codes]


def pack(codes: Tensor) -> Tensor:
    """Two codes in a byte, the first in its lower bits."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def test_plain_weights_keep_their_dtype(tmp_path: Path) -> None:
    weight = torch.randn(5, 3).half()

    found = read_weight(write(tmp_path, weight=weight), NAME)

    assert torch.equal(found, weight)
    assert found.dtype is torch.float16


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5], [2.0], [4.0]])],
    ids=["tensor", "tensor of one", "rows"],
)
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8], ids=str)
def test_scaled_weights(dtype: torch.dtype, scale: Tensor, tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.0], [3.0, 4.0], [0.0, 6.0]])

    found = read_weight(write(tmp_path, weight=values.to(dtype), weight_scale=scale), NAME)

    assert torch.equal(found, (values * scale).bfloat16())


def test_fp8_weights_with_a_scale_for_each_block(tmp_path: Path) -> None:
    _, values = draw(130, 257)
    scales = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])

    files = write(tmp_path, weight=values.to(FP8), weight_scale_inv=scales)
    found = read_weight(files, NAME)

    for row, column in ((0, 0), (127, 127), (0, 128), (127, 256), (128, 0), (129, 256)):
        scale = scales[row // 128, column // 128]
        assert found[row, column] == values[row, column] * scale
    assert found.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["compressed-tensors", "modelopt"])
def test_nvfp4_weights(kind: str, tmp_path: Path) -> None:
    codes, values = draw(3, 64)
    scales = torch.tensor([[1.0, 2.0, 0.5, 4.0]] * 3).to(FP8)
    if kind == "modelopt":
        parts = {"weight": pack(codes), "weight_scale_2": torch.tensor(0.25)}
    else:
        parts = {"weight_packed": pack(codes), "weight_global_scale": torch.tensor([4.0])}

    files = write(tmp_path, weight_scale=scales, input_global_scale=torch.tensor(7.0), **parts)
    found = read_weight(files, NAME)

    # The global scale of the one divides, that of the other multiplies: a quarter either way.
    expected = values.view(3, 4, 16) * scales.float()[:, :, None] / 4
    assert values.unique().numel() == 15
    assert torch.equal(found, expected.view(3, 64).bfloat16())


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"qweight": torch.int32, "qzeros": torch.int32, "g_idx": torch.int32}, "GPTQ"),
        ({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}, "AWQ"),
        ({"weight_packed": torch.int32, "weight_shape": torch.int64}, "packed integers"),
        ({"weight": torch.uint8, "weight.absmax": torch.float32}, "bitsandbytes"),
        ({"weight": torch.int8, "SCB": torch.float32}, "bitsandbytes"),
        ({"weight_blocks": torch.uint8, "weight_scales": torch.uint8}, "MXFP4"),
        ({"weight": torch.int8}, "`weight` torch.int8"),
        ({"weight": FP8}, "`weight` torch.float8_e4m3fn"),
        ({"weight": FP8, "weight_scale_inv": torch.float32}, "scales do not fit"),
        ({"weight": torch.bfloat16, "weight_scale": torch.float32}, "scales do not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x),
)
def test_other_formats_are_refused_by_name(
    parts: dict[str, torch.dtype], reason: str, tmp_path: Path
) -> None:
    files = write(tmp_path, **{part: torch.zeros(4, 6).to(dtype) for part, dtype in parts.items()})

    with pytest.raises(SettingsError, match=rf"`model\.lm_head\.weight`.*quantised.*{reason}"):
        read_weight(files, NAME)


def test_a_quantised_head_is_found_and_its_rows_are_counted(tmp_path: Path) -> None:
    codes, _ = draw(37, 32)
    stored = {
        "model.embed_tokens.weight_packed": pack(codes),
        "model.norm.weight": torch.ones(32),
        "lm_head.qweight": torch.zeros(4, 6, dtype=torch.int32),
    }
    save_file(stored, tmp_path / "model.safetensors")
    files = VerifierFiles(str(tmp_path))

    parts = files.find_parts(is_tied=False)

    assert (parts.embedding, parts.head) == ("model.embed_tokens.weight", "lm_head.weight")
    assert files.read_vocab_size() == 37
