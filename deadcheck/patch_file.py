"""The patch file: a plan as versioned YAML, for ``deadcheck.apply_patch`` and for people to read.

version: 1
replace: {with: leaky_relu, alpha: 0.01}
others: true
sites:
- {site: features.4, activation: relu, modules: [features.4]}
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from deadcheck import __version__
from deadcheck.errors import PatchError
from deadcheck.patch_plan import (
    Calls,
    Kind,
    PatchPlan,
    Place,
    Replacement,
    SiteChange,
    Units,
    layout_fault,
    slope_fault,
)
from deadcheck.strict_yaml import FaultError, Plain

VERSION = 1
FILE_NAME = "deadcheck.patch.yaml"
_MAX_BYTES = 16 << 20


def dump_plan(plan: PatchPlan) -> str:
    """Spell a plan as the text of a patch file."""
    replace: dict[str, Any] = {"with": plan.replacement.kind.value}
    if plan.replacement.alpha is not None:
        replace["alpha"] = plan.replacement.alpha
    top: dict[str, Any] = {"version": VERSION, "replace": replace, "others": plan.others}
    if plan.clipped:
        top["clipped"] = True
    if plan.call != "forward":
        top["call"] = plan.call
    if plan.model:
        top["model"] = dict(plan.model)
    top["sites"] = [_site_entry(change) for change in plan.sites]
    body = yaml.dump(top, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110)
    return (
        f"# A patch of deadcheck {__version__}. In your own code, on a model with these modules:\n"
        "#     model = deadcheck.apply_patch(model, 'this file')\n" + body
    )


class _Dumper(yaml.SafeDumper):
    """Writes short things on one line."""


def _list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    flow = not any(isinstance(item, dict) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _list)


def _site_entry(change: SiteChange) -> dict[str, Any]:
    entry: dict[str, Any] = {"site": change.site, "activation": change.activation}
    if change.fed_by:
        entry["fed_by"] = list(change.fed_by)
    if change.alpha is not None:
        entry["alpha"] = change.alpha
    if change.modules:
        entry["modules"] = list(change.modules)
    if change.calls:
        entry["module"] = change.module
        entry["calls"] = [_calls_entry(calls) for calls in change.calls]
    if change.operators:
        entry["operators"] = list(change.operators)
    if change.units is not None:
        ranges = ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in change.units.ranges)
        entry["units"] = {"of": change.units.count, "replaced": ranges, "layout": change.units.layout}
        if change.units.rank:
            entry["units"]["rank"] = change.units.rank
    return entry


def _calls_entry(calls: Calls) -> dict[str, Any]:
    entry: dict[str, Any] = {"at": [str(place) for place in calls.at]}
    if calls.via:
        entry["via"] = [str(place) for place in calls.via]
    if calls.turns:
        entry["turns"] = list(calls.turns)
        entry["period"] = calls.period
    return entry


def read_plan(path: Path) -> PatchPlan:
    """Read a patch file; PatchError says what is wrong with it."""
    try:
        if not path.is_file():
            raise PatchError(f"{path}: no such patch file; check the path")
        if path.stat().st_size > _MAX_BYTES:
            raise PatchError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, which no patch file is; check the path")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"{path}: cannot be read as text ({error}); check the file") from error
    return parse_plan(text, str(path))


def parse_plan(text: str, source: str = "the patch file") -> PatchPlan:
    """Read the text of a patch file; PatchError names the first fault."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        top = None if root is None else Plain().of(root)
    except (yaml.YAMLError, RecursionError, FaultError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise PatchError(f"{source}{line}: not a patch file: {problem}; make it again with deadcheck patch") from error
    return _Reader(source).plan(top)


class _Reader:
    """Turns plain values into a plan."""

    def __init__(self, source: str) -> None:
        self.source = source

    def plan(self, top: Any) -> PatchPlan:
        self._keys(top, "the file", "version", "replace", "others", "clipped", "call", "model", "sites")
        if top.get("version") != VERSION:
            raise self._fault(f"version {top.get('version')!r} is not {VERSION}, the one that this deadcheck reads")
        replace = top.get("replace", {})
        self._keys(replace, "replace", "with", "alpha")
        names = [kind.value for kind in Kind]
        if replace.get("with") not in names:
            raise self._fault(f"replace.with is {replace.get('with')!r}, not one of {', '.join(names)}")
        kind = Kind(replace["with"])
        model = top.get("model")
        if model is not None:
            self._keys(model, "model", "path", "format", "sha256", "arch")
        return PatchPlan(
            replacement=Replacement(kind, self._alpha(replace.get("alpha"), kind)),
            sites=tuple(self._site(entry, kind) for entry in self._list(top.get("sites", []), "sites")),
            others=self._flag(top.get("others", False), "others"),
            clipped=self._flag(top.get("clipped", False), "clipped"),
            call=self._text(top.get("call", "forward"), "call"),
            model={str(key): str(value) for key, value in model.items()} if model else None,
        )

    def _site(self, entry: Any, kind: Kind) -> SiteChange:
        names = ("site", "activation", "fed_by", "alpha", "modules", "module", "calls", "operators", "units")
        self._keys(entry, "a site", *names)
        where = f"site {entry.get('site')!r}"
        alpha = entry.get("alpha")
        change = SiteChange(
            site=self._text(entry.get("site"), "site"),
            activation=self._text(entry.get("activation", "relu"), f"{where}: activation"),
            fed_by=self._texts(entry.get("fed_by", []), f"{where}: fed_by"),
            modules=self._texts(entry.get("modules", []), f"{where}: modules"),
            module=self._text(entry.get("module", ""), f"{where}: module"),
            calls=tuple(self._calls(item, where) for item in self._list(entry.get("calls", []), f"{where}: calls")),
            operators=tuple(
                self._whole(item, f"{where}: operators")
                for item in self._list(entry.get("operators", []), f"{where}: operators")
            ),
            units=self._units(entry.get("units"), where),
            alpha=None if alpha is None else self._alpha(alpha, kind),
        )
        if not change.modules and not change.calls and not change.operators:
            raise self._fault(f"{where} names no modules, calls or operators, so nothing says what to replace")
        return change

    def _calls(self, entry: Any, where: str) -> Calls:
        self._keys(entry, where, "at", "via", "turns", "period")
        turns = tuple(self._whole(item, f"{where}: turns") for item in self._list(entry.get("turns", []), where))
        period = self._whole(entry.get("period", 1), f"{where}: period")
        at, via = (
            tuple(self._place(item, where) for item in self._texts(entry.get(name, []), f"{where}: {name}"))
            for name in ("at", "via")
        )
        return Calls(at, via, turns, max(period, 1))

    def _place(self, text: str, where: str) -> Place:
        match = re.fullmatch(r"([^+\s]+)\+(\d+)(?:\.(\d+))?(?:: (.*))?", text, re.DOTALL)
        if match is None:
            raise self._fault(f"{where}: {text!r} is no place in code, as 'forward+4: x = F.relu(x)' is")
        function, line, call, source = match.groups()
        return Place(function, int(line), int(call or 0), source or "")

    def _units(self, entry: Any, where: str) -> Units | None:
        if entry is None:
            return None
        self._keys(entry, f"{where}: units", "of", "replaced", "layout", "rank")
        count = self._whole(entry.get("of"), f"{where}: units.of")
        ranges: list[tuple[int, int]] = []
        for part in str(entry.get("replaced", "")).replace(" ", "").split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
            first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
            if not (ranges[-1][1] if ranges else -1) < first <= last < count:
                raise self._fault(f"{where}: units.replaced: {part!r} is no range of units below {count}, in order")
            ranges.append((first, last))
        layout = self._text(entry.get("layout"), f"{where}: units.layout")
        wrong = layout_fault(layout, count)
        if wrong:
            raise self._fault(f"{where}: {wrong}")
        return Units(count, tuple(ranges), layout, self._whole(entry.get("rank", 0), f"{where}: units.rank"))

    def _alpha(self, value: Any, kind: Kind) -> float | None:
        if kind in (Kind.GELU, Kind.SILU):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._fault(f"alpha is {value!r}, not a number; write it with a dot and a sign, as 1.0e-3")
        if fault := slope_fault(kind, value):
            raise self._fault(f"alpha {value:g} {fault.partition(';')[0]}")
        return float(value)

    def _keys(self, value: Any, where: str, *names: str) -> None:
        if not isinstance(value, dict):
            raise self._fault(f"{where} must hold names and values")
        unknown = [str(key) for key in value if key not in names]
        if unknown:
            raise self._fault(f"{where}: unknown key {unknown[0]!r}; there are {', '.join(names)}")

    def _list(self, value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise self._fault(f"{where} is {value!r}, not a list")
        return value

    def _text(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self._fault(f"{where} is {value!r}, not text; put it in quotes")
        return value

    def _texts(self, value: Any, where: str) -> tuple[str, ...]:
        return tuple(self._text(item, where) for item in self._list(value, where))

    def _whole(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._fault(f"{where} is {value!r}, not a whole number")
        return value

    def _flag(self, value: Any, where: str) -> bool:
        if not isinstance(value, bool):
            raise self._fault(f"{where} is {value!r}, not true or false")
        return value

    def _fault(self, what: str) -> PatchError:
        return PatchError(f"{self.source}: {what}; make the file again with deadcheck patch")
