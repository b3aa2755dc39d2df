"""data_config.json of a folder of samples: their verifier and the layers captured from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from speculators_cli.core.data.formats import FORMATS
from speculators_cli.core.errors import DataError, SettingsError
from speculators_cli.core.files import replacing, write_json
from speculators_cli.core.progress import Progress
from speculators_cli.core.reading import UnreadableError, read_json_object, refusing

FILE_NAME = "data_config.json"
FIRST_BYTES = b'{\n  "model": {\n    "target_model_path": '  # of a file by `write_data_config`
MAX_BYTES = 2**20
FIX = "Correct the file, or remove it and pass `--target-layer-ids`"
MAX_SHOWN = 60  # characters of a value
MAX_DIGITS = 10  # of a layer id
OUR_CONVENTION = "vllm"  # id k is the output after k decoder layers


@dataclass(frozen=True)
class DataConfig:
    """Content of one data_config.json."""

    file: Path
    verifier: str | None  # name or path of the verifier the samples come from
    layer_ids: tuple[int, ...] | None  # as written, in the file's own convention
    convention: str | None  # `vllm` in files of this package
    is_assumed: bool  # whether the file marks its layer ids as assumed
    version: str | None  # "2.0" for the generator of December 2025

    @property
    def has_known_convention(self) -> bool:
        """Whether the file's convention for layer ids is known."""
        return self.convention == OUR_CONVENTION or self.version == "2.0"


@dataclass(frozen=True)
class LayerIds:
    """Layer ids of the aux hidden states in the verifier: id k is the output after k layers."""

    ids: tuple[int, ...]
    is_assumed: bool  # given neither by the user nor by the data

    def __str__(self) -> str:
        return _show(self.ids)


def read_data_config(file: Path) -> DataConfig:
    """Read a data_config.json.

    Raises:
        DataError: It is not a JSON object, or has values of other types.
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
        raise _unexpected(file, key, value, "a string")
    return value


def _layer_ids(value: object, file: Path) -> tuple[int, ...] | None:
    """Parse layer ids from a list of numbers or strings, or from a string with commas."""
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
    """Write a data_config.json for v1 samples; None means unknown."""
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


def default_layer_ids(num_verifier_layers: int, num_aux_layers: int = 3) -> tuple[int, ...]:
    """Return the default aux layers: three as in vLLM, any other number evenly from 2 to n - 2."""
    n = num_verifier_layers
    if num_aux_layers == 3:
        return (2, n // 2, n - 3)
    gaps = max(num_aux_layers - 1, 1)
    return tuple(2 + round(i * (n - 4) / gaps) for i in range(num_aux_layers))


def choose_captured_layers(
    given: tuple[int, ...] | None, num_layers: int, num_aux_layers: int = 3
) -> tuple[int, ...]:
    """Return the aux layers to capture: the given ones, or the default ones.

    Raises:
        SettingsError: The verifier does not have them.
    """
    ids = default_layer_ids(num_layers, num_aux_layers) if given is None else given
    if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] > num_layers:
        raise SettingsError(
            f"`--target-layer-ids`: layers `{_show(ids)}` are not strictly ascending between 0 and "
            f"the verifier's {num_layers} layers",
            hint="Pass `--target-layer-ids` with layers that the verifier has",
        )
    return tuple(ids)


def guess_num_layers(configs: Sequence[DataConfig]) -> int | None:
    """Infer the number of layers of a verifier that is not available; None if unknown.

    In a file of version 2.0, the last id is the verifier's last layer.
    """
    known = [c for c in configs if c.layer_ids and c.has_known_convention]
    return max((max(c.layer_ids or ()) + 1 for c in known), default=None)


def warn_of_assumed(layer_ids: LayerIds, progress: Progress, *, whose: str) -> None:
    """Warn of assumed layer ids, which stay marked as assumed until they are confirmed.

    Args:
        layer_ids: Layer ids of the aux hidden states.
        progress: Receives the warning.
        whose: Beginning of the sentence: the data without layer ids, and a verb.
    """
    if layer_ids.is_assumed:
        progress.warn(
            f"{whose} no known verifier layer ids: assumed `{layer_ids}`",
            hint=f"Pass `--target-layer-ids {layer_ids}` to confirm them, or the correct ones: a "
            "draft served with other layers than in training has a very low acceptance rate",
        )


def warn_of_contradiction(
    configs: Sequence[DataConfig],
    *,
    num_verifier_layers: int,
    given: tuple[int, ...] | None,
    progress: Progress,
) -> None:
    """Warn if the layer ids in the data differ from `--target-layer-ids`, which is used."""
    if given is None:
        return
    for config in configs:
        # The flag may have been passed because of an invalid file: no warning for that.
        if config.is_assumed or not config.layer_ids or not config.has_known_convention:
            continue
        if config.version == "2.0" and config.layer_ids[-1] != num_verifier_layers - 1:
            continue
        ids = _read_ids(config, num_verifier_layers)
        if ids is not None and ids != given:
            progress.warn(
                f"`{config.file}` has the verifier layers `{_show(ids)}`: `--target-layer-ids` "
                f"`{_show(given)}` is used instead"
            )


def resolve_layer_ids(
    configs: Sequence[DataConfig],
    *,
    num_verifier_layers: int,
    num_aux_layers: int,
    data_format: str,
    given: tuple[int, ...] | None,
) -> LayerIds:
    """Determine the layer ids: the user's, else the data's, else the default of its generator.

    Args:
        configs: Every data_config.json among the samples.
        num_verifier_layers: Decoder layers of the verifier.
        num_aux_layers: Aux layers per sample.
        data_format: Format of the samples, which decides the default.
        given: Value of `--target-layer-ids`.

    Raises:
        DataError: Folders disagree, or the ids do not match the samples or the verifier.
    """
    if given is not None:
        return LayerIds(_checked(given, num_verifier_layers, num_aux_layers), is_assumed=False)
    said = [(config, _read_ids(config, num_verifier_layers)) for config in configs]
    found = {ids for _, ids in said if ids is not None}
    if len(found) > 1:
        lines = [f"  `{config.file}`: {_show(ids)}" for config, ids in said if ids is not None]
        raise DataError(
            "\n".join(["The folders of samples have different verifier layers", *lines]),
            hint="Train on one of them at a time, or pass `--target-layer-ids` for all of them",
        )
    n = num_verifier_layers
    form = FORMATS.get(data_format)
    usual = form.usual_layer_ids(n) if form and form.usual_layer_ids else ()
    if len(usual) != num_aux_layers:
        usual = default_layer_ids(n, num_aux_layers)
    ids = found.pop() if found else usual
    is_said = any(ids is not None and not config.is_assumed for config, ids in said)
    return LayerIds(_checked(ids, n, num_aux_layers), is_assumed=not is_said)


def _read_ids(config: DataConfig, num_verifier_layers: int) -> tuple[int, ...] | None:
    """Convert the ids of one file to this package's convention; None if it has none."""
    if config.layer_ids is None:
        return None
    if config.convention == OUR_CONVENTION:
        return config.layer_ids
    if config.version == "2.0":
        # That generator used ids of the layers themselves, and included the last layer.
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
            f"The samples have {num_aux_layers} aux layers, but the layer ids are `{_show(ids)}`",
            hint=hint,
        )
    if any(low >= high for low, high in pairwise(ids)):
        raise DataError(f"Layer ids `{_show(ids)}` are not strictly ascending", hint=hint)
    if ids[0] < 0 or ids[-1] > num_layers:
        raise DataError(
            f"Layer ids `{_show(ids)}` are not between 0 and the verifier's {num_layers} layers",
            hint=hint,
        )
    return ids


def _show(ids: tuple[int, ...]) -> str:
    return ",".join(map(str, ids))
