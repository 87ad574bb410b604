"""The kinds of values a setting takes: how each is read, and how an editor's schema describes it."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from deadcheck.errors import UsageError
from deadcheck.policy import Level
from deadcheck.rules import RULES, find_rule
from deadcheck.shares import share
from deadcheck.strict_yaml import FaultError

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """One value."""

    read: Callable[[Any], Any]
    """Returns the value as the settings hold it; FaultError says how to write it."""

    schema: Schema
    raw: bool = False
    """Read from a scalar's own text, as a date is."""

    place: bool = False
    """A path, or a name that may begin with one, from the folder of the file."""


@dataclass(frozen=True)
class Section:
    """A mapping with known keys."""

    fields: Mapping[str, Kind | Section | Rows]
    about: Mapping[str, str]
    """What each key is for, in one phrase."""

    required: tuple[str, ...] = ()
    shorthand: str | None = None
    """Key that a bare text stands for."""


@dataclass(frozen=True)
class Rows:
    """A list of mappings with known keys."""

    row: Section


def _number(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        raise FaultError(f"{value!r} is a string in YAML 1.1; write a dot and a sign, as 1.0e-3")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63:
        return float(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise FaultError(f"{value!r} is not a number")
    return value


def _share(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", value):
        value = float(value.rstrip("% ")) / 100
    elif isinstance(value, int) and not isinstance(value, bool) and 1 < value <= 100:
        raise FaultError(f"{value} could mean {value}% or {value} times; write {value}% or {value / 100}")
    number = _number(value)
    if not 0 <= number <= 1:
        raise FaultError(f"{value!r} is not a share; write it as 5% or 0.05")
    return number


def _rate(value: Any) -> float:
    number = _share(value)
    if not 0 < number < 1:
        raise FaultError(f"{value!r} must be above 0 and below 1")
    return number


def _limit(value: Any) -> Fraction | None:
    """Read a limit exactly: a decimal is taken as it is written, not as the nearest binary fraction."""
    if value is None or value is False or value == "off":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise FaultError(f"{value!r} is not a share; write it as 5%, 0.05 or off")
    if isinstance(value, int) and 0 < value <= 100:
        raise FaultError(f"{value} could mean {value}% or {value} times; write {value}% or {value / 100:g}")
    try:
        return share(str(value))
    except UsageError as error:
        raise FaultError(str(error)) from error


def _shares(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise FaultError(f"{value!r} is not a list; write it as [0.0, 0.025]")
    return tuple(_share(item) for item in value)


_LARGEST = (1 << 63) - 1


def _whole(least: int, most: int = _LARGEST) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FaultError(f"{value!r} is not a whole number of at least {least}")
        if value > most:
            raise FaultError(f"{value!r} is more than {most}, the most that is taken")
        return value

    return read


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FaultError(f"{value!r} is not text; put it in quotes")
    return value


def _reason(value: Any) -> str:
    if not _text(value).strip():
        raise FaultError("say why, in a few words")
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in (value if isinstance(value, list) else [value]))


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise FaultError(f"{value!r} is not true or false")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return tuple(_whole(1)(item) for item in items)


def _axes(value: Any) -> tuple[tuple[str, int], ...]:
    if isinstance(value, tuple):
        return value
    if not isinstance(value, dict) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value.values()):
        raise FaultError(f"{value!r} is not a mapping of patterns to axes; write it as {{'encoder.*': -1}}")
    return tuple((str(pattern), axis) for pattern, axis in value.items())


def _memory(value: Any) -> tuple[tuple[str, str], ...]:
    pairs = dict(value) if isinstance(value, tuple) else value
    if not isinstance(pairs, dict) or not all(_SIZE.fullmatch(str(size)) for size in pairs.values()):
        raise FaultError(f"{value!r} is not a mapping of devices to sizes; write it as {{0: 20GiB, cpu: 60GiB}}")
    return tuple((str(device), str(size)) for device, size in pairs.items())


_SIZE = re.compile(r"\d+(\.\d+)? ?[KMGT]i?B")


def _arguments(value: Any) -> dict[str, object]:
    if not isinstance(value, dict) or not all(str(name).isidentifier() for name in value):
        raise FaultError(f"{value!r} is not a mapping of names to values; write it as {{width: 128}}")
    return value


def _level(value: Any) -> Level:
    # YAML 1.1 reads a bare off as false.
    name = "off" if value is False else value
    if name not in [level.value for level in Level]:
        raise FaultError(f"{value!r} is not one of error, warn, off")
    return Level(name)


def _rule(value: Any) -> str:
    try:
        return find_rule(_text(value)).code
    except UsageError as error:
        raise FaultError(str(error)) from error


def _levels(value: Any) -> dict[str, Level]:
    if not isinstance(value, dict):
        raise FaultError(f"{value!r} is not a mapping of rules to levels; write it as {{saturated: error}}")
    levels = {_rule(name): _level(level) for name, level in value.items()}
    fixed = [rule.name for rule in RULES if rule.code in levels and not rule.adjustable]
    if fixed:
        raise FaultError(f"{fixed[0]} has no level: without it nothing could be judged")
    return levels


def _date(value: Any) -> datetime.date:
    try:
        return datetime.date.fromisoformat(str(value))
    except ValueError as error:
        raise FaultError(f"{value!r} is not a day; write it as 2030-12-31") from error


def one_of(*names: str) -> Kind:
    """Return the kind of a closed choice."""

    def read(value: Any) -> str:
        if value not in names:
            raise FaultError(f"{value!r} is not one of {', '.join(names)}")
        return str(value)

    return Kind(read, {"enum": list(names)})


def or_none(kind: Kind) -> Kind:
    """Return the kind that also takes null."""

    def read(value: Any) -> Any:
        return None if value is None else kind.read(value)

    return Kind(read, {"anyOf": [kind.schema, {"type": "null"}]}, kind.raw, kind.place)


def whole(least: int, most: int = _LARGEST) -> Kind:
    """Return the kind of whole numbers from ``least`` to ``most``."""
    limit = {} if most == _LARGEST else {"maximum": most}
    return Kind(_whole(least, most), {"type": "integer", "minimum": least, **limit})


_PERCENT = {"type": "string", "pattern": r"^\d+(\.\d+)?\s*%$"}
_FRACTION = {"type": "number", "minimum": 0, "maximum": 1}
_SHARE = {"anyOf": [_PERCENT, _FRACTION]}
_LEVELS = {"enum": ["error", "warn", "off", False]}
_RULES = sorted([rule.code for rule in RULES] + [rule.name for rule in RULES])

NUMBER = Kind(_number, {"type": "number"})
SHARE = Kind(_share, _SHARE)
RATE = Kind(_rate, {"anyOf": [_PERCENT, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]})
SHARES = Kind(_shares, {"type": "array", "items": _SHARE})
LIMIT = Kind(_limit, {"anyOf": [_PERCENT, _FRACTION, {"enum": ["off", False, None]}]})
TEXT = Kind(_text, {"type": "string"})
REASON = Kind(_reason, {"type": "string", "minLength": 1})
TEXTS = Kind(_texts, {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
PLACE = Kind(_text, {"type": "string"}, place=True)
FLAG = Kind(_flag, {"type": "boolean"})
SHAPE = Kind(
    _shape,
    {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "integer", "minimum": 1}}]},
)
MEMORY = Kind(_memory, {"type": "object", "additionalProperties": {"type": "string"}})
AXES = Kind(_axes, {"type": "object", "additionalProperties": {"type": "integer"}})
ARGUMENTS = Kind(_arguments, {"type": "object"})
LEVEL = Kind(_level, _LEVELS)
LEVELS = Kind(
    _levels,
    {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: _LEVELS for name in _RULES if any(r.adjustable for r in RULES if name in (r.code, r.name))
        },
    },
)
RULE = Kind(_rule, {"enum": _RULES})
DAY = Kind(_date, {"type": "string", "format": "date"}, raw=True)
