"""Read a weight of a verifier; documented quantisation formats are dequantised."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.models.verifier_files import VerifierFiles

# Values of the 16 codes of a 4-bit float (E2M1); the highest bit is the sign.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_GROUP = 16  # values per scale in NVFP4
FP8_BLOCK = 128
# Tensors that identify unsupported formats.
_OTHER_FORMATS = {
    "g_idx": "GPTQ",
    "qzeros": "AWQ",
    "weight_shape": "compressed-tensors packed integers",
    "weight_zero_point": "compressed-tensors integers with a zero point",
    "absmax": "bitsandbytes",
    "weight.absmax": "bitsandbytes",
    "SCB": "bitsandbytes LLM.int8()",
    "weight_blocks": "MXFP4",
    "blocks": "MXFP4",
}
# Scales of activations, not needed for weights.
_UNUSED = {"input_scale", "input_global_scale", "bias", "k_scale", "v_scale"}


def read_weight(files: VerifierFiles, name: str) -> Tensor:
    """Read a weight, in its dtype, or in bfloat16 if it is quantised.

    Raises:
        SettingsError: It is quantised in an unsupported format, or damaged.
        MachineError: A download from the hub fails.
    """
    stem = name.removesuffix("weight")
    parts = {
        other.removeprefix(stem)
        for other in files.weight_map
        if other.startswith(stem) and "." not in other.removeprefix(stem).removeprefix("weight.")
    } - _UNUSED

    def read(part: str) -> Tensor:
        with files.open(stem + part) as tensors:
            return tensors.get_tensor(stem + part)

    for part, kind in _OTHER_FORMATS.items():
        if part in parts:
            raise _refuse(files, name, f"as {kind}: it has `{stem}{part}`")
    tensors = {part: read(part) for part in sorted(parts)}
    if set(tensors) == {"weight"} and _is_plain(tensors["weight"]):
        return tensors["weight"]
    for wanted, dequantise in _FORMATS.items():
        if wanted == frozenset(tensors):
            try:
                return dequantise(tensors).to(torch.bfloat16)
            except (ValueError, RuntimeError) as error:
                raise _refuse(files, name, f"and its scales do not fit: {error}") from None
    kinds = ", ".join(f"`{part}` {tensor.dtype}" for part, tensor in tensors.items())
    raise _refuse(files, name, f"in an unknown format: it has {kinds}")


def _is_plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() >= 2


def _refuse(files: VerifierFiles, name: str, why: str) -> SettingsError:
    return SettingsError(
        f"`{name}` of verifier `{files.name_or_path}` is quantised {why}",
        hint="Pass the unquantised verifier: its LM head computes the training targets",
    )


def _scaled(parts: Mapping[str, Tensor]) -> Tensor:
    """Dequantise FP8 or int8 with one scale, one per row, or one per block of 128 x 128."""
    weight = parts["weight"]
    if weight.element_size() != 1:
        raise ValueError(f"the weight is {weight.dtype}")
    scale = parts["weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"].float()
    weight = weight.float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    rows, columns = weight.shape
    if scale.numel() == rows:
        return weight * scale.reshape(rows, 1)
    if scale.dim() != 2:
        raise ValueError(f"{tuple(scale.shape)} for {tuple(weight.shape)}")
    expected = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    if scale.shape != expected:
        raise ValueError(f"{tuple(scale.shape)}, expected {expected}")
    blocks = scale.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)
    return weight * blocks[:, :columns]


def _nvfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Dequantise two 4-bit floats per byte, the lower bits first, with a scale per 16 of a row."""
    if packed.dtype is not torch.uint8:
        raise ValueError(f"the weight is {packed.dtype}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    values = torch.tensor([*FP4_VALUES, *(-x for x in FP4_VALUES)])[codes]
    rows, columns = values.shape
    if scale.shape != (rows, columns // FP4_GROUP):
        raise ValueError(f"{tuple(scale.shape)} for {tuple(values.shape)}")
    return values * scale.float().repeat_interleave(FP4_GROUP, 1)


def _compressed_nvfp4(parts: Mapping[str, Tensor]) -> Tensor:
    # compressed-tensors divides by the global scale.
    values = _nvfp4(parts["weight_packed"], parts["weight_scale"])
    return values / parts["weight_global_scale"].float().reshape(())


def _modelopt_nvfp4(parts: Mapping[str, Tensor]) -> Tensor:
    # ModelOpt multiplies by the second scale.
    return _nvfp4(parts["weight"], parts["weight_scale"]) * parts["weight_scale_2"].float()


_FORMATS: dict[frozenset[str], Callable[[Mapping[str, Tensor]], Tensor]] = {
    frozenset({"weight", "weight_scale"}): _scaled,
    frozenset({"weight", "weight_scale_inv"}): _scaled,
    frozenset({"weight_packed", "weight_scale", "weight_global_scale"}): _compressed_nvfp4,
    frozenset({"weight", "weight_scale", "weight_scale_2"}): _modelopt_nvfp4,
}
