"""Settings from a file and from flags, as one frozen record that knows where each value came from."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from deadcheck.errors import ConfigError
from deadcheck.kinds import Kind, Rows, Section
from deadcheck.policy import Compare, Ignore, LayerPolicy, Policy
from deadcheck.safe_text import brief
from deadcheck.settings import FIELDS, SETTINGS, kind_of
from deadcheck.shares import spelled
from deadcheck.strict_yaml import FaultError, Plain, line_of, toml_root, toml_table, yaml_root

__all__ = ["FIELDS", "FILE_NAME", "Config", "ModelEntry", "ScanSettings", "Thresholds", "find_config", "load_config"]

FILE_NAME = "deadcheck.yaml"
PRESETS = ("default", "ci-strict", "ci-ratchet", "transformer")
_PROJECT = "pyproject.toml"
_MAX_EXTENDS = 5
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
    workers: int = 0
    """Processes that read a data set or arrays ahead; 0 for none."""

    unpack: str = "auto"
    """What of a batch goes to the model: auto, first, args or kwargs."""

    input_shape: tuple[int, ...] | None = None
    """Shape of one sample, for ``random`` data."""

    allow_nonfinite: bool = False
    """Measure on data that holds NaN or infinite values."""

    device: str = "cpu"
    device_map: str | None = None
    """``auto`` or ``sequential``: how accelerate spreads a saved model over the devices; None puts it on ``device``."""

    max_memory: tuple[tuple[str, str], ...] = ()
    """Size that the weights may take on a device, as ``("0", "20GiB")``; what fits nowhere goes to the disk."""

    dtype: str = "model"
    """Floating type that the weights are cast to for the scan; ``model`` leaves them as they are."""

    autocast: str | None = None
    """Floating type of ``torch.autocast``; None runs without it."""

    threads: int | None = None
    """Threads that torch may use; None for as many as it would."""

    seed: int = 0
    gates: bool = False
    """Measure the gates inside LSTM and GRU too."""

    units: tuple[tuple[str, int], ...] = ()
    """Axis that holds the units, by pattern of site keys or module paths; the first match wins."""

    call: str = "forward"
    """Method of the model to run."""

    stats: str = "full"
    """How much to measure: full, counts or verdict; see ``settings.STATS``."""


@dataclass(frozen=True)
class ModelEntry:
    """One model, or pattern of models, that a project's gate judges."""

    path: str
    arch: str | None = None
    """Code of the project that builds it; trust in the file itself cannot be given here."""

    arch_args: Mapping[str, object] = field(default_factory=dict)
    key: str | None = None
    data: str | None = None
    """As ``scan.data``, for this model; None leaves that."""

    baseline: str | None = None
    """JSON report to compare with."""


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    scan: ScanSettings = ScanSettings()
    thresholds: Thresholds = Thresholds()
    policy: Policy = field(default_factory=Policy)
    models: tuple[ModelEntry, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Where each value that is not a default came from: ``deadcheck.yaml:12``, or ``flag``."""


def load_config(path: Path | None = None, flags: Mapping[str, object] | None = None) -> Config:
    """Read a configuration file (None: the nearest one upward) and lay flags over it.

    ``flags`` maps dotted names (``scan.batch_size``) to values. Raises ConfigError with every fault of the file, each
    with its line.
    """
    found = path if path is not None else find_config(Path.cwd())
    values, origins = _read_file(found) if found is not None else ({}, {})
    faults = []
    for name, value in (flags or {}).items():
        flag = f"--{name.partition('.')[2].replace('_', '-')}"
        try:
            values[name] = kind_of(name).read(value)
        except FaultError as fault:
            faults.append(f"{flag}: {fault}")
        origins[name] = flag
    _raise(faults)
    return _built(values, origins)


def find_config(start: Path) -> Path | None:
    """Return the nearest configuration file in ``start`` or above, up to the repository's root.

    That is a ``deadcheck.yaml``, or else a ``pyproject.toml`` with a table ``tool.deadcheck``.
    """
    for folder in (start, *start.parents):
        # A folder above may be closed to this user: os.path says no there, where Path raises.
        if os.path.isfile(folder / FILE_NAME):
            return folder / FILE_NAME
        if os.path.isfile(folder / _PROJECT) and _names_us(folder / _PROJECT):
            return folder / _PROJECT
        if os.path.exists(folder / ".git"):
            return None
    return None


def _names_us(project: Path) -> bool:
    try:
        if "tool.deadcheck" not in project.read_text(encoding="utf-8", errors="replace"):
            return False
    except OSError as error:
        raise ConfigError(f"{project}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        return toml_table(project) is not None
    except ConfigError:  # whoever reads its settings says so
        return True


@dataclass(frozen=True)
class Setting:
    """One setting as it stands."""

    name: str
    spelled: str
    origin: str
    """File and line, flag, or ``default``."""


def settings_of(config: Config) -> list[Setting]:
    """Return every setting of a configuration, with where it came from."""
    out = []
    for section, names in FIELDS.items():
        part = getattr(config, section)
        out += [(f"{section}.{name}", _spelled(getattr(part, name))) for name in names]
    out += [(f"models[{i}].{name}", _spelled(getattr(entry, name))) for i, entry in enumerate(config.models)
            for name in ("path", "arch", "key", "data", "baseline") if getattr(entry, name) is not None]  # fmt: skip
    return [
        Setting(name, text, config.origins.get(name, config.origins.get(name.partition("[")[0], "default")))
        for name, text in out
    ]


def _spelled(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Fraction():
            return spelled(value)
        case Enum():
            return str(value.value)
        case LayerPolicy() | Ignore():
            parts = ((f.name, getattr(value, f.name)) for f in fields(value))
            return "{" + ", ".join(f"{name}: {_spelled(part)}" for name, part in parts if part is not None) + "}"
        case Mapping():
            return "{" + ", ".join(f"{name}: {_spelled(part)}" for name, part in value.items()) + "}"
        case tuple():
            return "[" + ", ".join(_spelled(part) for part in value) + "]"
        case _:
            return str(value)


def preset_file(name: str) -> Path:
    """Return the file of a preset: in the installed package, or in the checkout that runs."""
    package = Path(__file__).parent
    installed = package / "configs" / f"{name}.yaml"
    return installed if installed.is_file() else package.parent / "configs" / f"{name}.yaml"


def _built(values: Mapping[str, Any], origins: Mapping[str, str]) -> Config:
    thresholds = replace(Thresholds(), **_section(values, "thresholds"))
    limits = _section(values, "policy")
    if "compare" in limits:
        limits["compare"] = Compare(limits["compare"])
    if "layers" in limits:
        limits["layers"] = tuple(_layer(row) for row in limits["layers"])
    if "ignores" in limits:
        limits["ignores"] = tuple(Ignore(**row) for row in limits["ignores"])
    # The share at which the scan warns is the one at which the gate warns.
    limits["warn_layer_dead"] = Fraction(str(thresholds.warn_layer_dead))
    limits["explosion_growth"] = thresholds.explosion_growth
    return Config(
        scan=replace(ScanSettings(), **_section(values, "scan")),
        thresholds=thresholds,
        policy=replace(Policy(), **limits),
        models=tuple(ModelEntry(**row) for row in values.get("models", ())),
        origins=dict(origins),
    )


def _layer(row: Mapping[str, Any]) -> LayerPolicy:
    """Build what holds for some layers; a limit that is off there allows all of a layer, one not given is inherited."""
    given: dict[str, Any] = {name: Fraction(1) if value is None else value for name, value in row.items()}
    return LayerPolicy(**given)


def _section(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _read_file(path: Path, depth: int = 0) -> tuple[dict[str, Any], dict[str, str]]:
    reader = _Reader(path)
    own = reader.read()
    _raise(reader.faults)
    base = own.pop("extends", None)
    if base is None:
        return own, reader.origins
    if depth == _MAX_EXTENDS:
        raise ConfigError(f"{path}: extends goes round or too deep; name a preset or one file of your own")
    file = preset_file(base) if base in PRESETS else Path(base)
    if not os.path.isfile(file):
        near = difflib.get_close_matches(Path(base).name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are the presets {', '.join(PRESETS)}"
        raise ConfigError(
            f"{path.with_name(reader.origins['extends'])}: extends: no such preset or file {base!r}; {hint}"
        )
    values, origins = _read_file(file, depth + 1)
    return {**values, **own}, {**origins, **reader.origins}


def files_named_in(path: Path, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield what may be a file among the values of a configuration file, each with the name of its innermost setting.

    Those of the files that it extends too, which are themselves values of ``extends``.
    """
    try:
        own = _Reader(path).read()
    except ConfigError:  # whoever reads its settings says so
        return
    yield from _texts("", own)
    base = own.get("extends")
    if base is not None and base not in PRESETS and depth < _MAX_EXTENDS:
        yield from files_named_in(Path(base), depth + 1)


def _texts(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield every text in rows and mappings with the name under which it stands."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(str(key), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(name, item)


class _Reader:
    """Turns nodes into settings, gathering faults with their lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.origins: dict[str, str] = {}
        self._plain = Plain()

    def read(self) -> dict[str, Any]:
        """Return every setting of the file by its dotted name."""
        root = toml_root(self.path) if self.path.suffix == ".toml" else yaml_root(self.path)
        return {} if root is None else dict(self.settings(root, SETTINGS, ""))

    def settings(self, node: yaml.Node, part: Section, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield every setting under a node with its dotted name."""
        for key, item in self._items(node, prefix, tuple(part.fields)):
            name, kind = f"{prefix}{key}", part.fields[key]
            if isinstance(kind, Section):
                if not (isinstance(item, yaml.ScalarNode) and item.tag.endswith(":null")):
                    yield from self.settings(item, kind, f"{name}.")
                continue
            try:
                value = self._rows(item, kind.row, name) if isinstance(kind, Rows) else self._value(item, kind)
            except FaultError as fault:
                self._fault(item, f"{name}: {fault}")
                continue
            line = line_of(item)
            self.origins[name] = self.path.name if line is None else f"{self.path.name}:{line}"
            yield name, value

    def _items(self, node: yaml.Node, prefix: str, names: tuple[str, ...]) -> Iterator[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self._fault(node, f"{prefix.rstrip('.') or 'the file'} must hold names and values, as 'name: value'")
            return
        met: set[str] = set()
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            if len(self.faults) >= _MAX_FAULTS:
                self._fault(key, "there may be more faults; correct these first")
                return
            if name in met:
                self._fault(key, f"{prefix}{name} stands twice; keep one")
            elif name in _TRUST:
                self._fault(key, f"{name}: trust is given on the command line only")
            elif name not in names:
                near = difflib.get_close_matches(name[:100], names, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
                self._fault(key, f"unknown key {prefix}{brief(name)}; {hint}")
            else:
                yield name, value
            met.add(name)

    def _rows(self, node: yaml.Node, row: Section, name: str) -> tuple[dict[str, Any], ...]:
        self._plain.met(node)
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
            return ()
        if not isinstance(node, yaml.SequenceNode):
            raise FaultError("must be a list; begin each entry with a dash")
        return tuple(self._row(item, row, f"{name}[{i}].") for i, item in enumerate(node.value))

    def _row(self, node: yaml.Node, row: Section, prefix: str) -> dict[str, Any]:
        self._plain.met(node)
        if row.shorthand is not None and isinstance(node, yaml.ScalarNode):
            kind = row.fields[row.shorthand]
            assert isinstance(kind, Kind)
            return {row.shorthand: self._placed(kind.read(node.value))}
        values = {}
        for key, item in self._items(node, prefix, tuple(row.fields)):
            kind = row.fields[key]
            assert isinstance(kind, Kind)
            try:
                values[key] = self._value(item, kind)
            except FaultError as fault:
                values[key] = None
                self._fault(item, f"{prefix}{key}: {fault}")
        if isinstance(node, yaml.MappingNode):
            for missing in (key for key in row.required if key not in values):
                self._fault(node, f"{prefix.rstrip('.')} needs {missing}; add '{missing}: ...'")
        return values

    def _value(self, node: yaml.Node, kind: Kind) -> Any:
        if kind.raw and isinstance(node, yaml.ScalarNode):
            self._plain.met(node)
            return kind.read(node.value)
        value = kind.read(self._plain.of(node))
        return self._placed(value) if kind.place and isinstance(value, str) else value

    def _placed(self, text: str) -> str:
        """Return a path as seen from here, where it was given from the file's folder."""
        folder = self.path.parent
        name = text.partition(":")[0] if ".py:" in text else text
        is_name = text in ("random", *PRESETS) or (":" in name and not Path(name).is_absolute())
        if is_name or Path(name).is_absolute() or folder.resolve() == Path.cwd():
            return text
        return str(folder / text)

    def _fault(self, node: yaml.Node, text: str) -> None:
        line = line_of(node)
        self.faults.append(f"{self.path}: {text}" if line is None else f"{self.path}:{line}: {text}")
