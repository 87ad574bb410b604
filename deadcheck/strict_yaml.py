"""Reads a YAML or TOML file into nodes that know their line, without tags, anchors or anything that could run."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import yaml

from deadcheck.errors import ConfigError
from deadcheck.safe_text import brief

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 256 << 10
_MAX_DEPTH = 20
_MAX_LETTERS = 4096
_SCALARS = ("str", "int", "float", "bool", "null")


class FaultError(ValueError):
    """One value is wrong; the text says how to write it."""


def read_text(path: Path) -> str:
    """Return the text of a configuration file; ConfigError for what cannot be one."""
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file; check the path given with --config")
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than 256 KiB, which no configuration is; check the path")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); check the file") from error


def yaml_root(path: Path) -> yaml.Node | None:
    """Return the root of a YAML file; None when it is empty."""
    text = read_text(path)
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError(
            f"{path}:{line}: not valid YAML: {brief(str(getattr(error, 'problem', error)))}; correct the line"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; a configuration has a few levels") from error


def toml_table(path: Path) -> Any:
    """Return the table ``tool.deadcheck`` of a TOML file; None when there is none."""
    return _toml(path)[1]


def _toml(path: Path) -> tuple[dict[str, Any], Any]:
    """Return a TOML file whole, and its table ``tool.deadcheck`` or None."""
    try:
        document = tomllib.loads(read_text(path))
        return document, document.get("tool", {}).get("deadcheck")
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; a configuration has a few levels") from error
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {brief(str(error))}; correct the file") from error


def toml_root(path: Path) -> yaml.Node:
    """Return the settings of a TOML file as nodes without lines: its table ``tool.deadcheck``, or the whole file.

    ConfigError for a pyproject.toml without the table, which holds settings of others alone.
    """
    document, table = _toml(path)
    if table is None and path.name == "pyproject.toml":
        raise ConfigError(f"{path}: holds no table [tool.deadcheck]; add it, or name the file that holds the settings")
    try:
        return yaml.SafeDumper(io.StringIO()).represent_data(document if table is None else table)
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; a configuration has a few levels") from error
    except (ValueError, yaml.YAMLError) as error:  # a number may be too long for Python
        raise ConfigError(f"{path}: not valid TOML: {brief(str(error))}; correct the file") from error


def line_of(node: yaml.Node) -> int | None:
    """Return the line of a node, from 1; None where the format does not tell."""
    mark = node.start_mark
    return None if mark is None else int(mark.line) + 1


class Plain:
    """Turns nodes into plain values; an alias, met a second time, is refused rather than unfolded."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def of(self, node: yaml.Node, depth: int = 0) -> Any:
        """Return the value of a node, without anchors, aliases and tags; FaultError for those."""
        self.met(node)
        if depth > _MAX_DEPTH:
            raise FaultError("nested too deeply")
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.of(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(keys) != len(node.value):
                raise FaultError("a key is not text")
            if len(set(keys)) != len(keys):
                raise FaultError("a key stands twice; keep one")
            return {key.value: self.of(value, depth + 1) for key, value in node.value}
        if not isinstance(node, yaml.ScalarNode) or node.tag.rpartition(":")[2] not in _SCALARS:
            raise FaultError(f"the tag {node.tag} is not allowed; write a plain value")
        if len(node.value) > _MAX_LETTERS:  # a number to base 60 of this length takes minutes
            raise FaultError(f"{brief(node.value, 20)!r} is longer than {_MAX_LETTERS} letters, so it was not read")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            raise FaultError(f"{brief(node.value)!r} cannot be read ({error})") from error

    def met(self, node: yaml.Node) -> None:
        """Remember a node; FaultError when it stands at two places."""
        if id(node) in self._seen:
            raise FaultError("aliases (*name) are not allowed; write the value out")
        self._seen.add(id(node))
