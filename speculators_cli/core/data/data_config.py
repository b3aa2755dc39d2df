"""data_config.json beside the samples: which verifier and which of its layers they hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from speculators_cli.core.errors import DataError
from speculators_cli.core.files import replacing, write_json
from speculators_cli.core.progress import Progress
from speculators_cli.core.reading import UnreadableError, read_json_object, refusing

FILE_NAME = "data_config.json"
MAX_BYTES = 2**20
FIX = "Correct the file, or remove it and pass `--target-layer-ids`"
MAX_SHOWN = 60  # characters of a value
MAX_DIGITS = 10  # of a layer id
OUR_CONVENTION = "vllm"  # id k is the output after k decoder layers


@dataclass(frozen=True)
class DataConfig:
    """What one data_config.json says."""

    file: Path
    verifier: str | None  # name or path of the verifier the samples come from
    layer_ids: tuple[int, ...] | None  # as written: the convention is another field's matter
    convention: str | None  # `vllm` in files of our own
    is_assumed: bool  # the file itself says that its layer ids were assumed
    version: str | None  # "2.0" in the files of the generator of December 2025

    @property
    def has_known_convention(self) -> bool:
        """Whether it is known how the file counts layers."""
        return self.convention == OUR_CONVENTION or self.version == "2.0"


@dataclass(frozen=True)
class LayerIds:
    """The verifier layers that the aux hidden states come from: id k is the output after k."""

    ids: tuple[int, ...]
    is_assumed: bool  # neither the user nor the data said so

    def __str__(self) -> str:
        return _show(self.ids)


def read_data_config(file: Path) -> DataConfig:
    """Read a data_config.json.

    Raises:
        DataError: It is no JSON object, or has values of other types.
    """
    with refusing(DataError):
        content = read_json_object(file, fix=FIX, max_bytes=MAX_BYTES)
        states, model = _object(content, "hidden_states", file), _object(content, "model", file)
        convention = _text(states, "layer_ids_convention", file)
        version = content.get("version")
        return DataConfig(
            file=file,
            verifier=_text(model, "target_model_path", file),
            layer_ids=_layer_ids(states.get("layer_ids"), file),
            convention=convention or _text(content, "layer_ids_convention", file),
            is_assumed=states.get("layer_ids_assumed") is True,
            version=None if version is None else str(version),
        )


def _object(content: Mapping[str, Any], key: str, file: Path) -> Mapping[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise _unexpected(file, key, value, "an object")
    return value or {}


def _text(content: Mapping[str, Any], key: str, file: Path) -> str | None:
    value = content.get(key)
    if value is not None and not isinstance(value, str):
        raise _unexpected(file, key, value, "a text")
    return value


def _layer_ids(value: object, file: Path) -> tuple[int, ...] | None:
    """Layer ids as a list of numbers; as texts, or one text with commas, they are read too."""
    items = value.split(",") if isinstance(value, str) else value
    if items is None:
        return None
    ids = [_whole(x) for x in items] if isinstance(items, list) else [None]
    if not ids or None in ids:
        raise _unexpected(file, "layer_ids", value, "a list of whole numbers")
    return tuple(k for k in ids if k is not None)


def _whole(value: object) -> int | None:
    if isinstance(value, str) and len(value) < MAX_DIGITS and value.strip().isdecimal():
        return int(value)
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if is_whole and not isinstance(value, bool) else None  # type: ignore[call-overload]


def _unexpected(file: Path, key: str, value: object, expected: str) -> UnreadableError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return UnreadableError(file, f"has `{key}` `{shown}`, expected {expected}", hint=FIX)


def write_data_config(
    folder: Path,
    *,
    verifier: str | None,
    layer_ids: Sequence[int] | None,
    is_assumed: bool = False,
) -> None:
    """Write a data_config.json beside v1 samples; None is unknown."""
    content = {
        "model": {"target_model_path": verifier},
        "hidden_states": {
            "layer_ids": None if layer_ids is None else list(layer_ids),
            "layer_ids_convention": OUR_CONVENTION,
            "layer_ids_assumed": is_assumed,
        },
        "format": {"data_format_version": 1},
    }
    with replacing(folder / FILE_NAME) as temporary:
        write_json(content, temporary)


def default_layer_ids(num_verifier_layers: int) -> tuple[int, ...]:
    """The aux layers that vLLM captures unless told otherwise: early, middle and late."""
    n = num_verifier_layers
    return (2, n // 2, n - 3)


def guess_num_layers(configs: Sequence[DataConfig]) -> int | None:
    """Layers of a verifier that is not at hand; None where no layer is known.

    A file of version 2.0 ends its ids with the verifier's last layer.
    """
    known = [c for c in configs if c.layer_ids and c.has_known_convention]
    return max((max(c.layer_ids or ()) + 1 for c in known), default=None)


def warn_of_assumed(layer_ids: LayerIds, progress: Progress, *, whose: str) -> None:
    """Warn of layer ids that are a guess, and stay marked as one until they are confirmed.

    Args:
        layer_ids: Of the aux hidden states.
        progress: Who hears of it.
        whose: What states no layer ids, as the beginning of a sentence.
    """
    if layer_ids.is_assumed:
        progress.warn(
            f"{whose} no verifier layer ids that are known: assumed `{layer_ids}`",
            hint=f"Pass `--target-layer-ids {layer_ids}` to confirm them, or the right ones: a "
            "draft that is served with other layers than it was trained on is hardly ever accepted",
        )


def warn_of_contradiction(
    configs: Sequence[DataConfig],
    *,
    num_verifier_layers: int,
    given: tuple[int, ...] | None,
    progress: Progress,
) -> None:
    """Warn where the data states other layers than `--target-layer-ids`, which win."""
    if given is None:
        return
    for config in configs:
        # A file that the flag was passed for, since it cannot be right, is no news.
        if config.is_assumed or not config.layer_ids or not config.has_known_convention:
            continue
        if config.version == "2.0" and config.layer_ids[-1] != num_verifier_layers - 1:
            continue
        ids = _read_ids(config, num_verifier_layers)
        if ids is not None and ids != given:
            progress.warn(
                f"`{config.file}` states the verifier layers `{_show(ids)}`: `--target-layer-ids` "
                f"`{_show(given)}` is used in their place"
            )


def resolve_layer_ids(
    configs: Sequence[DataConfig],
    *,
    num_verifier_layers: int,
    num_aux_layers: int,
    data_format: str,
    given: tuple[int, ...] | None,
) -> LayerIds:
    """Choose the layer ids: the user's, else the data's, else those its generators captured.

    Args:
        configs: Every data_config.json among the samples.
        num_verifier_layers: Decoder layers of the verifier.
        num_aux_layers: Aux layers in each sample.
        data_format: Of the samples; its generators' layers are assumed where nothing is said.
        given: The value of `--target-layer-ids`.

    Raises:
        DataError: Folders disagree, or the ids do not fit the samples or the verifier.
    """
    if given is not None:
        return LayerIds(_checked(given, num_verifier_layers, num_aux_layers), is_assumed=False)
    said = [(config, _read_ids(config, num_verifier_layers)) for config in configs]
    found = {ids for _, ids in said if ids is not None}
    if len(found) > 1:
        lines = [f"  `{config.file}`: {_show(ids)}" for config, ids in said if ids is not None]
        raise DataError(
            "\n".join(["The folders of samples hold different verifier layers", *lines]),
            hint="Train on one of them at a time, or pass `--target-layer-ids` that all hold",
        )
    n = num_verifier_layers
    usual = (3, n // 2 + 1, n - 2) if data_format in ("v0", "v1") else default_layer_ids(n)
    ids = found.pop() if found else usual
    is_said = any(ids is not None and not config.is_assumed for config, ids in said)
    return LayerIds(_checked(ids, n, num_aux_layers), is_assumed=not is_said)


def _read_ids(config: DataConfig, num_verifier_layers: int) -> tuple[int, ...] | None:
    """The ids of one file in our convention; None if it says nothing."""
    if config.layer_ids is None:
        return None
    if config.convention == OUR_CONVENTION:
        return config.layer_ids
    if config.version == "2.0":
        # That generator counted the layer captured, not the layers passed, and listed the last.
        *aux, last = config.layer_ids or (-1,)
        if last != num_verifier_layers - 1:
            raise DataError(
                f"`{config.file}` ends its layer ids with {last}, expected the verifier's last "
                f"layer {num_verifier_layers - 1}",
                hint="Pass `--target-layer-ids` with the layers of the aux hidden states",
            )
        return tuple(k + 1 for k in aux)
    return None


def _checked(ids: tuple[int, ...], num_layers: int, num_aux_layers: int) -> tuple[int, ...]:
    hint = "Pass `--target-layer-ids` with the layers of the aux hidden states, ascending"
    if len(ids) != num_aux_layers:
        raise DataError(
            f"The samples hold {num_aux_layers} aux layers, the layer ids are `{_show(ids)}`",
            hint=hint,
        )
    if any(low >= high for low, high in pairwise(ids)):
        raise DataError(f"Layer ids `{_show(ids)}` are not strictly ascending", hint=hint)
    if ids[0] < 0 or ids[-1] > num_layers:
        raise DataError(
            f"Layer ids `{_show(ids)}` are not within 0 and the verifier's {num_layers} layers",
            hint=hint,
        )
    return ids


def _show(ids: tuple[int, ...]) -> str:
    return ",".join(map(str, ids))
