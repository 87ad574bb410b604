"""Finds how each site of a running model can be reached: by the modules to replace, or by the way to its calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck import activations
from deadcheck.callsites import Way, way_to
from deadcheck.layout import Flow
from deadcheck.patch_plan import Calls, Place
from deadcheck.rewriting.in_modules import unshared
from deadcheck.roster import SiteRecord
from deadcheck.stand_ins import ceiling_of, keeps_relu
from deadcheck.unit_masks import layout_of

_MAX_PERIOD = 512


@dataclass(frozen=True)
class Reach:
    """How one site can be reached."""

    modules: tuple[str, ...] = ()
    calls: tuple[Calls, ...] = ()
    operators: tuple[int, ...] = ()
    reason: str | None = None
    """Why it cannot be."""


Step = tuple[str, Way]
"""Module path, and the way to a call in its code."""

LEFT = object()
"""Stands for a site at calls that nothing is counted at, as those on weights alone: they are left as they are."""

Run = tuple[Any, ...]
"""Records of sites in the order in which one way led to them in a forward pass; None for a call without rows."""


class Sightings:
    """Watches a probe: which way led to each call of an activation, and where its units were.

    ``stop`` is the code that calls the model.
    """

    def __init__(self, stop: CodeType) -> None:
        self.stop = stop
        self.records: list[SiteRecord] = []
        """The probe's records of sites, in the order in which they were seen."""

        self.layouts: dict[int, set[tuple[str | None, int]]] = {}
        """By the identity of a record: the layouts of its units and the numbers of axes."""

        self.turns: dict[Step, set[Run]] = {}
        """By module and way: the records that it led to, in order, for each different forward pass."""

        self.operators: dict[int, set[int]] = {}
        """By the identity of a record: the numbers of its operators in a program; 0 where it is a part of one."""

        self._pass: dict[Step, list[Any]] = {}
        self._number = -1

    def __call__(self, probe: Any, record: Any, z: Tensor, flow: Flow | None) -> None:
        """Take in one call of an activation."""
        if probe.passes != self._number:
            self.finish()
            self._number = probe.passes
        step = (probe.path, way_to(sys._getframe(1), self.stop))
        if record is None:
            self._pass.setdefault(step, []).append(LEFT if z.numel() else None)
            return
        self._pass.setdefault(step, []).append(record)
        if id(record) not in self.layouts:
            self.records.append(record)
        layout = layout_of(flow.axes) if flow is not None and flow.axes is not None else None
        self.layouts.setdefault(id(record), set()).add((layout, z.dim()))
        if probe.place is not None:
            self.operators.setdefault(id(record), set()).add(probe.place.number)

    def layouts_of(self, key: str) -> set[tuple[str | None, int]]:
        """Return the layouts of the units of a site, and the numbers of axes, that were met."""
        return {item for record in self.records if record.key == key for item in self.layouts[id(record)]}

    def by_module(self) -> dict[str, list[Any]]:
        """Return the records by the path of their module."""
        paths: dict[str, list[Any]] = {}
        for record in self.records:
            paths.setdefault(record.module, []).append(record)
        return paths

    def by_identity(self, origin: Mapping[str, str]) -> dict[Hashable, list[SiteRecord]]:
        """Return the records by what they are apart from their activation, the same in a changed copy of the model.

        ``origin`` gives the path at which the module at each path was first met, before the change.
        """
        sites = {record.weight: record for record in self.records}

        def place(path: str) -> str:
            while path and path not in origin:  # a part of what stands in for a module counts as it
                path = path.rpartition(".")[0]
            return origin.get(path, path)

        def feeder(weight: str) -> str:
            return f"{place(sites[weight].module)}:" if weight in sites else weight

        found: dict[Hashable, list[SiteRecord]] = {}
        for record in self.records:
            feeders = frozenset(map(feeder, record.feeds))
            found.setdefault((place(record.module), feeders, record.offset, record.units, record.turn), []).append(
                record
            )
        return found

    def finish(self) -> None:
        """End a forward pass."""
        for step, records in self._pass.items():
            self.turns.setdefault(step, set()).add(tuple(records))
        self._pass = {}


def reaches(
    model: nn.Module,
    sightings: Sightings,
    action: Callable[[Any], Hashable],
    look: Callable[[nn.Module], Sightings] | None = None,
) -> dict[str, Reach]:
    """Return by site key how each site with an action can be reached; sites of one action need not be told apart.

    ``action`` gives what is to be done at a record's site, None for nothing. ``look`` runs another model over the data
    once more; it is called where a module that stands at several paths serves sites of different actions.
    """
    sightings.finish()
    if sightings.operators:
        return _by_operators(sightings, action)
    aliases = _aliases(model)
    found: dict[str, Reach] = {}
    apart: dict[str, tuple[str, ...]] | None = None
    for path, records in sightings.by_module().items():
        wanted = [record for record in records if action(record) is not None]
        if not wanted:
            continue
        module = model.get_submodule(path)
        reason = _hidden(module, wanted)
        if reason is not None:
            found.update({record.key: Reach(reason=reason) for record in wanted})
            continue
        is_module = ceiling_of(module) is not None or keeps_relu(module)
        is_program = isinstance(module, torch.jit.ScriptModule)
        if (is_module or is_program) and len(set(map(action, records))) == 1:
            found.update({record.key: Reach(modules=aliases[module]) for record in wanted})
            continue
        if is_module and len(aliases[module]) > 1 and apart is None and look is not None:
            apart = _apart(model, sightings, look)
        if is_module and apart is not None and _is_split(records, apart, action):
            found.update({record.key: Reach(modules=apart[record.key]) for record in wanted})
            continue
        if is_program:
            reason = "it is inside a TorchScript module, whose ReLUs can be changed together alone"
            found.update({record.key: Reach(reason=reason) for record in wanted})
            continue
        steps = {step[1]: runs for step, runs in sightings.turns.items() if step[0] == path}
        found.update(_by_calls(wanted, steps, lambda record: None if record is LEFT else action(record)))
    return found


def _by_operators(sightings: Sightings, action: Callable[[Any], Hashable]) -> dict[str, Reach]:
    """Return the operators of each site of a program, where no other site with another action shares them."""
    serves: dict[int, set[Hashable]] = {}
    for record in sightings.records:
        for number in sightings.operators.get(id(record), ()):
            serves.setdefault(number, set()).add(action(record))
    found = {}
    for record in sightings.records:
        numbers = sightings.operators.get(id(record), set())
        if action(record) is None:
            continue
        if 0 in numbers or not numbers:
            found[record.key] = Reach(reason="the program computes it inside an operator that does more than that")
        elif any(len(serves[number]) > 1 for number in numbers):
            found[record.key] = Reach(reason="its operator in the program serves another site too")
        else:
            found[record.key] = Reach(operators=tuple(sorted(numbers)))
    return found


def _apart(
    model: nn.Module, sightings: Sightings, look: Callable[[nn.Module], Sightings]
) -> dict[str, tuple[str, ...]]:
    """Return by site key the paths through which a site runs when no two paths share a ReLU."""
    twin, origin = unshared(model)
    keys = {
        (identity, record.activation.name): record.key
        for identity, records in sightings.by_identity(origin).items()
        for record in records
    }
    paths: dict[str, tuple[str, ...]] = {}
    for identity, records in look(twin).by_identity(origin).items():
        for record in records:
            key = keys.get((identity, record.activation.name))
            if key is not None:
                paths[key] = (*paths.get(key, ()), record.module)
    return paths


def _is_split(records: Sequence[Any], apart: Mapping[str, tuple[str, ...]], action: Callable[[Any], Hashable]) -> bool:
    """Tell whether each path serves sites of one action."""
    actions: dict[str, set[Hashable]] = {}
    for record in records:
        for path in apart.get(record.key, ()):
            actions.setdefault(path, set()).add(action(record))
    return all(record.key in apart for record in records) and all(len(found) == 1 for found in actions.values())


def is_out_of_reach(module: nn.Module) -> str | None:
    """Return why a ReLU inside a module cannot be changed; None when it can, or there is none."""
    if isinstance(module, nn.RNN) and module.nonlinearity == "relu":
        return "nn.RNN computes it inside one operator; write the recurrence with nn.RNNCell to reach it"
    return None


def _aliases(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    aliases: dict[nn.Module, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        aliases[module] = (*aliases.get(module, ()), path)
    return aliases


def _hidden(module: nn.Module, records: Sequence[Any]) -> str | None:
    """Return why the sites of a module lie out of reach."""
    reason = is_out_of_reach(module)
    if reason is not None:
        return reason
    if any(record.is_module for record in records) and not isinstance(module, activations.MODULES):
        return "it is in a module that the model does not register, as one in a plain list"
    return None


def _by_calls(
    wanted: Sequence[Any], steps: Mapping[Way, set[Run]], action: Callable[[Any], Hashable]
) -> dict[str, Reach]:
    calls: dict[int, list[Calls]] = {id(record): [] for record in wanted}
    reasons = {id(r): way.reason for way, runs in steps.items() if way.reason for r in _met(runs)}
    open_ways = {way: runs for way, runs in steps.items() if not way.reason}
    for leaf in _split(open_ways, 0, action) if open_ways else ():
        for record in leaf.records:
            if leaf.reason is not None:
                reasons[id(record)] = leaf.reason
            elif id(record) in calls:
                turns = tuple(i for i, met in enumerate(leaf.turns) if record in met)
                at, via = leaf.places[: leaf.own], leaf.places[leaf.own :]
                calls[id(record)].append(Calls(at, via, turns, max(len(leaf.turns), 1)))
    out = {}
    for record in wanted:
        reason = reasons.get(id(record))
        out[record.key] = Reach(calls=tuple(calls[id(record)]) if reason is None else (), reason=reason)
    return out


@dataclass(frozen=True)
class _Leaf:
    """Ways that begin alike, need not be told apart further, or cannot be."""

    places: tuple[Place, ...]
    own: int
    records: tuple[Any, ...]
    turns: tuple[Run, ...] = ()
    """The records at each turn, where one way leads to several; empty where all are treated alike."""

    reason: str | None = None


def _split(steps: Mapping[Way, set[Run]], length: int, action: Callable[[Any], Hashable]) -> Iterable[_Leaf]:
    """Tell ways apart by as few places as possible, from the call outward."""
    first = next(iter(steps))
    places, own = first.places[:length], min(first.own, length)
    records = tuple(dict.fromkeys(record for runs in steps.values() for record in _met(runs)))
    if len(set(map(action, records))) <= 1:
        yield _Leaf(places, own, records)
    elif len(steps) == 1:
        turns = _period(next(iter(steps.values())), action)
        why = None if turns else "it cannot be told apart from another site that shares its line of code"
        yield _Leaf(places, own, records, turns, why)
    elif any(len(way.places) == length for way in steps):
        yield _Leaf(places, own, records, reason="it cannot be told apart from a call that leads to it too")
    else:
        groups: dict[Any, dict[Way, set[Run]]] = {}
        for way, runs in steps.items():
            groups.setdefault(way.places[length].key, {})[way] = runs
        for group in groups.values():
            yield from _split(group, length + 1, action)


def _met(runs: Iterable[Run]) -> Iterator[Any]:
    """Yield the records in some runs."""
    return (record for run in runs for record in run if record is not None)


def _period(runs: Collection[Run], action: Callable[[Any], Hashable]) -> tuple[Run, ...]:
    """Return the records at each turn of the shortest period that all runs repeat; empty where they have none."""
    for size in range(1, min(max(map(len, runs)), _MAX_PERIOD) + 1):
        turns = tuple(tuple(dict.fromkeys(_met(run[i::size] for run in runs))) for i in range(size))
        if all(len(set(map(action, met))) <= 1 for met in turns):
            return turns
    return ()
