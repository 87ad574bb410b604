"""Settings from a YAML file and from flags, as one frozen record that knows where each value came from."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from deadcheck.errors import ConfigError, shown

FILE_NAME = "deadcheck.yaml"
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_MAX_SCALAR = 4096
_MAX_FAULTS = 20
_TRUST = ("trust", "allow_class", "allow_classes", "allow-class")


@dataclass(frozen=True)
class Thresholds:
    """Borders between verdicts. Shares and rates are fractions of 1."""

    delta: float = 0.05
    """Chance of being wrong that a confidence bound allows: 0.05 gives 95 % bounds."""

    p_dead: float = 0.01
    """A unit is called dead once its firing rate is known to be below this."""

    p_rare: float = 0.01
    """A unit that fires in fewer than this share of the samples is rare."""

    tau: float = 0.025
    """Faint: mean |h| at most this share of the layer's mean (dormant in Sokar et al. 2023, arXiv 2302.12902)."""

    taus: tuple[float, ...] = (0.0, 0.025, 0.1)
    """Borders at which the dormant share of a layer is reported."""

    shallow: float = -0.5
    """A silent unit whose largest input is above this many standard deviations from 0 is shallow."""

    deep: float = -2.0
    """A silent unit whose largest input is at or below this many standard deviations is deep."""

    explosion_growth: float = 1000.0
    """Largest |h| of a site over that of the first site, above which activations explode."""

    warn_layer_dead: float = 0.25
    """Share of dead units in a layer that is worth a finding."""

    @property
    def n_star(self) -> int:
        """Samples without firing after which a unit may be called dead: ceil(ln delta / ln(1 - p_dead))."""
        return math.ceil(math.log(self.delta) / math.log1p(-self.p_dead))


@dataclass(frozen=True)
class ScanSettings:
    """How the data is run through the model."""

    data: str | None = None
    """File, ``package.module:name``, ``file.py:name`` or ``random``; None for the sample beside the model."""

    batch_size: int = 64
    max_samples: int | None = None
    unpack: str = "auto"
    """What of a batch goes to the model: auto, first, args or kwargs."""

    input_shape: tuple[int, ...] | None = None
    """Shape of one sample, for ``random`` data."""

    allow_nonfinite: bool = False
    """Measure on data that holds NaN or infinite values."""

    device: str = "cpu"
    seed: int = 0
    gates: bool = False
    """Measure the gates inside LSTM and GRU too."""

    units: tuple[tuple[str, int], ...] = ()
    """Axis that holds the units, by pattern of site keys or module paths; the first match wins."""

    call: str = "forward"
    """Method of the model to run."""


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    scan: ScanSettings = ScanSettings()
    thresholds: Thresholds = Thresholds()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each value that is not a default came from: ``deadcheck.yaml:12``, or ``flag``."""


class _FaultError(ValueError):
    """One value is wrong; the text says how to write it."""


def _number(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        raise _FaultError(f"{value!r} is a string in YAML 1.1; write a dot and a sign, as 1.0e-3")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _FaultError(f"{value!r} is not a number")
    return float(value)


def _share(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", value):
        value = float(value.rstrip("% ")) / 100
    elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
        raise _FaultError(f"{value} could mean {value}% or {value} times; write {value}% or {value / 100}")
    number = _number(value)
    if not 0 <= number <= 1:
        raise _FaultError(f"{value!r} is not a share; write it as 5% or 0.05")
    return number


def _rate(value: Any) -> float:
    number = _share(value)
    if not 0 < number < 1:
        raise _FaultError(f"{value!r} must be above 0 and below 1")
    return number


def _shares(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise _FaultError(f"{value!r} is not a list; write it as [0.0, 0.025]")
    return tuple(_share(item) for item in value)


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise _FaultError(f"{value!r} is not a whole number of at least {least}")
        return value

    return read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _FaultError(f"{value!r} is not text; put it in quotes")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _FaultError(f"{value!r} is not true or false")
    return value


def _one_of(*names: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in names:
            raise _FaultError(f"{value!r} is not one of {', '.join(names)}")
        return str(value)

    return read


def _shape(value: Any) -> tuple[int, ...]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(_whole(1)(item) for item in items)


def _axes(value: Any) -> tuple[tuple[str, int], ...]:
    if isinstance(value, tuple):
        return value
    if not isinstance(value, dict) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value.values()):
        raise _FaultError(f"{value!r} is not a mapping of patterns to axes; write it as {{'encoder.*': -1}}")
    return tuple((str(pattern), axis) for pattern, axis in value.items())


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


_READERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "scan": {
        "data": _or_none(_text),
        "batch_size": _whole(1),
        "max_samples": _or_none(_whole(1)),
        "unpack": _one_of("auto", "first", "args", "kwargs"),
        "input_shape": _or_none(_shape),
        "allow_nonfinite": _flag,
        "device": _text,
        "seed": _whole(0),
        "gates": _flag,
        "units": _axes,
        "call": _text,
    },
    "thresholds": {
        "delta": _rate,
        "p_dead": _rate,
        "p_rare": _rate,
        "tau": _share,
        "taus": _shares,
        "shallow": _number,
        "deep": _number,
        "explosion_growth": _number,
        "warn_layer_dead": _share,
    },
}


def load_config(path: Path | None = None, flags: Mapping[str, object] | None = None) -> Config:
    """Read a configuration file (None: the nearest ``deadcheck.yaml`` upward) and lay flags over it.

    ``flags`` maps dotted names (``scan.batch_size``) to values. Raises ConfigError with every fault of the file, each
    with its line.
    """
    found = path if path is not None else find_config(Path.cwd())
    values, origins = _read_file(found) if found is not None else ({}, {})
    faults = []
    for name, value in (flags or {}).items():
        section, _, key = name.partition(".")
        try:
            values[name] = _READERS[section][key](value)
        except _FaultError as fault:
            faults.append(f"--{key.replace('_', '-')}: {fault}")
        origins[name] = f"--{key.replace('_', '-')}"
    _raise(faults)
    config = Config(origins=origins)
    return replace(
        config,
        scan=replace(config.scan, **_section(values, "scan")),
        thresholds=replace(config.thresholds, **_section(values, "thresholds")),
    )


def find_config(start: Path) -> Path | None:
    """Return the nearest ``deadcheck.yaml`` in ``start`` or above, up to the repository's root."""
    for folder in (start, *start.parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
        if (folder / ".git").exists():
            return None
    return None


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such configuration file; check the path given with --config")
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB, which no configuration is; check the path")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error}); check the file") from error
    try:
        root = _compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        raise ConfigError(
            f"{path}:{line}: not valid YAML: {shown(str(getattr(error, 'problem', error)))}; correct the line"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply; a configuration has two levels") from error
    reader = _Reader(path)
    values = reader.top(root)
    _raise(reader.faults)
    return values, reader.origins


def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=yaml.SafeLoader)


class _Reader:
    """Turns YAML nodes into values, gathering faults with their lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.origins: dict[str, str] = {}
        self._seen: set[int] = set()

    def top(self, root: yaml.Node | None) -> dict[str, Any]:
        """Read the whole file."""
        values: dict[str, Any] = {}
        if root is None:
            return values
        for section, node in self._items(root, "", tuple(_READERS)):
            readers = _READERS[section]
            if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
                continue
            for key, item in self._items(node, f"{section}.", tuple(readers)):
                name = f"{section}.{key}"
                try:
                    values[name] = readers[key](self._plain(item))
                except _FaultError as fault:
                    self._fault(item, f"{name}: {fault}")
                self.origins[name] = f"{self.path.name}:{item.start_mark.line + 1}"
        return values

    def _items(self, node: yaml.Node, prefix: str, names: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self._fault(node, f"{prefix.rstrip('.') or 'the file'} must hold names and values, as 'name: value'")
            return
        met: set[str] = set()
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            if len(self.faults) >= _MAX_FAULTS:
                self._fault(key, "there are more faults; correct these first")
                return
            if name in met:
                self._fault(key, f"{prefix}{name} stands twice; keep one")
            elif name in _TRUST:
                self._fault(key, f"{name}: trust is given on the command line only")
            elif name not in names:
                near = difflib.get_close_matches(name[:100], names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                self._fault(key, f"unknown key {prefix}{shown(name)}; {hint}")
            else:
                yield name, value
            met.add(name)

    def _plain(self, node: yaml.Node, depth: int = 0) -> Any:
        """Return the value of a node, without anchors, aliases and tags."""
        if id(node) in self._seen:
            raise _FaultError("aliases (*name) are not allowed; write the value out")
        self._seen.add(id(node))
        if depth > _MAX_DEPTH:
            raise _FaultError("nested too deeply")
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._plain(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(keys) != len(node.value):
                raise _FaultError("a key is not text")
            if len(set(keys)) != len(keys):
                raise _FaultError("a key stands twice; keep one")
            return {key.value: self._plain(value, depth + 1) for key, value in node.value}
        if not isinstance(node, yaml.ScalarNode) or node.tag.rpartition(":")[2] not in _SCALARS:
            raise _FaultError(f"the tag {node.tag} is not allowed; write a plain value")
        if len(node.value) > _MAX_SCALAR:  # a number to base 60 takes minutes at this length
            raise _FaultError(f"{node.value[:20]}… cannot be read: longer than {_MAX_SCALAR} letters")
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            raise _FaultError(f"{node.value!r} cannot be read ({error})") from error

    def _fault(self, node: yaml.Node, text: str) -> None:
        self.faults.append(f"{self.path}:{node.start_mark.line + 1}: {text}")


_SCALARS = ("str", "int", "float", "bool", "null")

FIELDS: dict[str, tuple[str, ...]] = {
    "scan": tuple(f.name for f in fields(ScanSettings)),
    "thresholds": tuple(f.name for f in fields(Thresholds)),
}
"""Every setting by section, as a configuration file spells it."""
