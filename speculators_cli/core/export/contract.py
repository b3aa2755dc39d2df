"""Values and tensors that an engine silently relies on, checked in an exported folder.

An engine reports neither missing tensors nor values for which it has a default: it runs, and
accepts no draft token. So every value and tensor that it reads is required, and no other allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from speculators_cli.core.algorithms.draft_config import DraftConfig
from speculators_cli.core.algorithms.export_format import ExportFormat
from speculators_cli.core.algorithms.overrides import Overrides
from speculators_cli.core.drafts.trained_draft import EMBEDDING, find_algorithm
from speculators_cli.core.errors import CheckpointError, ExportError
from speculators_cli.core.export.targets import TARGETS
from speculators_cli.core.models.repo_files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from speculators_cli.core.reading import UnreadableError, open_safetensors, read_json_object

FLOATS = ("BF16", "F16", "F32")
MAP_DTYPES = {"d2t": ("I64",), "t2d": ("BOOL",)}


def find_problems(folder: Path, target: str) -> list[str]:
    """Everything in an exported folder that its engine would refuse or silently misread."""
    try:
        content = read_json_object(folder / CONFIG_NAME)
        algorithm = find_algorithm(content, str(folder))
        form, rules = TARGETS[target].find_format(algorithm), TARGETS[target].rules(algorithm)
    except UnreadableError as error:
        return [f"`{CONFIG_NAME}` {error.reason}"]
    except (CheckpointError, ExportError) as error:
        return [error.message]
    problems = [
        f"`{rule.key}` in `{CONFIG_NAME}` is `{_get(content, rule.key)}`, expected {rule.expected}"
        for rule in rules
        if not rule.holds(_get(content, rule.key))
    ]
    if problems:
        return problems
    # Some formats have no verifier in config.json, and checking tensors needs none.
    given = Overrides(verifier_name_or_path="verifier", verifier_architectures=("any",))
    try:
        config: DraftConfig = algorithm.read_config(content, given, name=str(folder))
    except CheckpointError as error:
        return [error.message]
    return [
        *_find_odd_sizes(config),
        *form.find_contradictions(config, content),
        *_find_tensor_problems(folder, config, form),
    ]


def _find_odd_sizes(config: DraftConfig) -> list[str]:
    """Sizes that are valid but contradict each other."""
    found = []
    if config.num_heads % config.num_kv_heads:
        found.append(
            f"{config.num_heads} attention heads are not a multiple of {config.num_kv_heads} "
            "key-value heads"
        )
    if config.draft_vocab_size > config.vocab_size:
        found.append(
            f"`draft_vocab_size` {config.draft_vocab_size:,} exceeds `vocab_size` "
            f"{config.vocab_size:,}"
        )
    return found


def _find_tensor_problems(folder: Path, config: DraftConfig, form: ExportFormat) -> list[str]:
    expected = _expect_shapes(config)
    own_names = {form.rename(name): name for name in expected}
    try:
        headers = _read_headers(folder)
        found = {own_names[name]: x for name, x in headers.items() if name in own_names}
        problems = [
            f"`{name}` is not a tensor that the engine reads"
            for name in headers
            if name not in own_names
        ]
        problems += _find_header_problems(found, expected, config)
        return problems or _find_map_problems(folder, found, config)
    except ValueError as error:
        return [f"the weights cannot be read: {error}"]


@dataclass(frozen=True)
class _Header:
    file: str
    dtype: str
    shape: tuple[int, ...]


def _read_headers(folder: Path) -> dict[str, _Header]:
    """Headers of all tensors, from the weights files that an engine loads."""
    index_file = folder / INDEX_NAME
    listed = [WEIGHTS_NAME]
    weight_map = None
    if index_file.exists():
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not set(map(type, weight_map.values())) <= {str}:
            raise ValueError(f"`{INDEX_NAME}` has no `weight_map` with file names")
        listed = sorted(set(weight_map.values()))
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    if present != listed:
        raise ValueError(f"the folder has {present}, expected {listed}")
    headers: dict[str, _Header] = {}
    for name in present:
        with open_safetensors(folder / name) as tensors:
            for key in tensors.names():
                part = tensors.get_slice(key)
                headers[key] = _Header(name, part.get_dtype(), tuple(part.get_shape()))
    if weight_map is not None and weight_map != {key: x.file for key, x in headers.items()}:
        raise ValueError(f"`{INDEX_NAME}` does not match the tensors in the files")
    return headers


def _expect_shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that an export may hold."""
    expected = config.tensor_shapes() | {EMBEDDING: (config.vocab_size, config.hidden_size)}
    if config.draft_vocab_size != config.vocab_size:
        expected |= {"d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
    return expected


def _find_header_problems(
    found: Mapping[str, _Header], expected: Mapping[str, tuple[int, ...]], config: DraftConfig
) -> list[str]:
    missing = expected.keys() - found.keys() - {EMBEDDING}
    problems = [f"`{name}` is missing" for name in expected if name in missing]
    if EMBEDDING not in found and config.hidden_size != config.target_hidden_size:
        problems.append(f"`{EMBEDDING}` is missing, and the verifier's has another hidden size")
    for name, header in found.items():
        dtypes = MAP_DTYPES.get(name, FLOATS)
        if header.shape != expected[name]:
            problems.append(f"`{name}` is {header.shape}, expected {expected[name]}")
        elif header.dtype not in dtypes:
            problems.append(f"`{name}` is {header.dtype}, expected {dtypes}")
    return problems


def _find_map_problems(
    folder: Path, found: Mapping[str, _Header], config: DraftConfig
) -> list[str]:
    if "d2t" not in found:
        return []
    maps = []
    for name in ("d2t", "t2d"):
        with open_safetensors(folder / found[name].file) as tensors:
            maps.append(tensors.get_tensor(name))
    d2t, t2d = maps
    ids = d2t + torch.arange(len(d2t))
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or not (ids.diff() > 0).all():
        return [
            f"`d2t` maps to ids from {int(ids.min()):,} to {int(ids.max()):,}, expected ascending "
            f"ids below {config.vocab_size:,}: it must contain offsets, not ids"
        ]
    if not torch.equal(t2d.nonzero()[:, 0], ids):
        return ["`d2t` and `t2d` contain different tokens"]
    return []


def _get(content: object, key: str) -> Any:
    for part in key.split("."):
        if isinstance(content, list):
            content = content[int(part)] if int(part) < len(content) else None
        else:
            content = content.get(part) if isinstance(content, dict) else None
    return content
