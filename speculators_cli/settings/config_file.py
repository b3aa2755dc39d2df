"""read_config(): the settings file of `--config`, in TOML, YAML or JSON."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speculators_cli.core.errors import SettingsError
from speculators_cli.core.reading import UnreadableError, parse_json, read_text, refusing

if TYPE_CHECKING:
    import yaml

FIX = "Correct the file, or pass another one"
MAX_BYTES = 2**18
MAX_YAML_NODES = 10_000  # with every alias written out; a run has some hundred settings


def read_config(file: Path) -> dict[str, Any]:
    """Read a settings file; CRLF and a byte order mark are accepted.

    Raises:
        SettingsError: It cannot be read or parsed.
    """
    parse = PARSERS.get(file.suffix.lower())
    if parse is None and not file.is_dir():
        raise SettingsError(
            f"`--config`: the name of `{file}` must end in `.toml`, `.yaml`, `.yml` or `.json`",
            hint="Rename the file after the format it is in",
        )
    with refusing(SettingsError, flag="--config"):
        text = read_text(file, fix=FIX, max_bytes=MAX_BYTES)
        assert parse is not None, "a folder is no text"
        try:
            content = parse(text, file)
        except RecursionError:
            raise UnreadableError(file, "is nested too deeply", hint=FIX) from None
        if not isinstance(content, dict):
            raise UnreadableError(file, "holds no sections of settings", hint=FIX)
        return content


def _parse_toml(text: str, file: Path) -> object:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise UnreadableError(file, f"is not TOML: {error}", hint=FIX) from None


def _parse_json(text: str, file: Path) -> object:
    return parse_json(text, file, fix=FIX, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"`{next(key for key in keys if keys.count(key) > 1)}` is set twice")
    return content


def _parse_yaml(text: str, file: Path) -> object:
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_YAML_NODES:
            raise UnreadableError(file, "repeats its aliases too often", hint=FIX)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = f"is not YAML: {error.problem or error.context}{place}"
        raise UnreadableError(file, reason, hint=FIX) from None
    # PyYAML raises the rest where a tag such as `!!timestamp` stands before another kind of value.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        if isinstance(error, UnreadableError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableError(file, f"is not YAML: {reason}", hint=FIX) from None


def _count(node: "yaml.Node", known: dict[int, int]) -> int:
    """Nodes below a node and itself, with every alias written out; a key must not stand twice.

    Args:
        node: Of the graph in which an alias is an edge to the node it stands for.
        known: Counts so far, by the identity of the node.
    """
    import yaml

    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_YAML_NODES + 1  # if it is met again below itself
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"`{key}` is set twice")
    known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


PARSERS: dict[str, Callable[[str, Path], object]] = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": _parse_json,
}
