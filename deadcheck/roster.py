"""The sites of one scan: which activation calls are the same site, and what each site is called."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from deadcheck.activations import Activation
from deadcheck.layout import Feed, Flow
from deadcheck.sites import Site


class _Signature(NamedTuple):
    """What makes two activation calls the same site."""

    module: str
    activation: str
    feeders: frozenset[tuple[str, str]]
    """Names and weights: tied layers have one weight and are two."""

    offset: int
    units: int
    turn: int
    """Which of several calls on the very same values this is, in order of their places in the code."""


@dataclass(eq=False)
class SiteRecord:
    """One site while it is counted."""

    activation: Activation
    module: str
    units: int
    device: torch.device
    axis: int
    axis_from: str
    is_module: bool
    """Whether the module is the activation itself, so that its path names the site."""

    weight: str
    """Name of the site where it feeds others."""

    samples_from: str = "batch"
    first: tuple[int, int] = (sys.maxsize, 0)
    """First sample of the batch in which it first ran, and which step of it that was."""

    feeds: dict[str, str] = field(default_factory=dict)
    """Weight -> name of what feeds the site."""

    places: set[int] = field(default_factory=set)
    last: dict[str, int] = field(default_factory=dict)
    """Which run of each weight fed the last call."""

    batch: int = 0
    """Forward pass of the last call."""

    offset: int = 0
    """Index of the first unit, for a slice of a layer's units."""

    turn: int = 0
    """Which of several calls on the very same values this is."""

    key: str = ""


Make = Callable[[str, "tuple[str, ...]"], SiteRecord]
"""Makes a site, given its name as a feeder and the keys that it may get."""


class Roster:
    """Finds the site of each activation call, and names the sites in the end."""

    def __init__(self, aliases: Mapping[str, tuple[str, ...]]) -> None:
        self._aliases = aliases
        self._sites: dict[_Signature, SiteRecord] = {}
        self._same: dict[tuple[object, ...], list[int]] = {}
        self._batch = 0
        self.lock = threading.Lock()
        """Held by the one thread that finds sites anew."""

    def __iter__(self) -> Iterator[SiteRecord]:
        """Iterate over the sites in the order in which they first ran."""
        return iter(dict.fromkeys(self._sites.values()))

    def start_batch(self) -> None:
        """Begin a forward pass, in which the runs of the weights are counted anew."""
        self._batch += 1
        self._same.clear()

    def find(self, module: str, act: Activation, flow: Flow, *, units: int, place: int, make: Make) -> SiteRecord:
        """Return the site of a call: ``place`` is where in the code it stands, ``make`` makes a new site."""
        feeders = frozenset((feed.name, feed.weight) for feed in flow.feeds)
        turn = self._turn((module, act.name, flow.feeds, flow.offset), place)
        signature = _Signature(module, act.name, feeders, flow.offset, units, turn)
        record = self._sites.get(signature)
        if record is None:
            record = self._again(signature, flow.feeds, place)
            if record is None:
                record = make(f"site {len(self._sites)}", self._next_keys(module, act))
                record.offset, record.turn = flow.offset, turn
            self._sites[signature] = record
        record.feeds.update((feed.weight, feed.name) for feed in flow.feeds)
        record.places.add(place)
        self._met(record, flow)
        return record

    def are_positive(self, feeds: Sequence[Feed]) -> bool:
        """Tell whether nothing feeds a value but activations whose outputs are not negative."""
        positive = {record.weight for record in self if record.activation.is_positive}
        return bool(feeds) and all(feed.weight in positive for feed in feeds)

    def meet(self, record: SiteRecord, flow: Flow, place: int) -> None:
        """Note a call that is known to be of this site."""
        self._turn((record.module, record.activation.name, flow.feeds, flow.offset), place)
        self._met(record, flow)

    def _met(self, record: SiteRecord, flow: Flow) -> None:
        record.last = {feed.weight: feed.serial for feed in flow.feeds}
        record.batch = self._batch

    def _next_keys(self, module: str, act: Activation) -> tuple[str, str]:
        """Return the keys that a new site may get."""
        in_module = [record for record in self if record.module == module]
        alike = sum(record.activation.name == act.name for record in in_module)
        return f"{module}:{act.name}#{alike + 1}", f"{module}#{len(in_module) + 1}"

    def _turn(self, same: tuple[object, ...], place: int) -> int:
        """Number the places that apply an activation to the very same values, as in relu(x) beside relu(-x)."""
        places = self._same.setdefault(same, [])
        if place not in places:
            places.append(place)
        return places.index(place)

    def _again(self, signature: _Signature, feeds: Iterable[Feed], place: int) -> SiteRecord | None:
        """Return the site at the same place in the code one of whose feeders ran again, as in a loop with a residual.

        In a loop over layers the sums grow too, but from runs that were there before: that is another site.
        """
        for known, record in self._sites.items():
            if place not in record.places or known._replace(feeders=signature.feeders) != signature:
                continue
            for feed in feeds:
                last = record.last.get(feed.weight)
                if last is not None and (record.batch < self._batch or feed.serial > last):
                    return record
        return None

    def name(self, counted: Container[SiteRecord]) -> list[SiteRecord]:
        """Give each site its key: the path of an activation module, else the activation's number in its module."""
        records = sorted((record for record in self if record in counted), key=lambda record: record.first)
        groups: dict[tuple[str, str], list[SiteRecord]] = {}
        for record in records:
            is_path = record.is_module and record.module
            groups.setdefault((record.module, "" if is_path else record.activation.name), []).append(record)
        for (module, name), group in groups.items():
            for number, record in enumerate(group, 1):
                if name:
                    record.key = f"{module}:{name}#{number}"
                else:
                    record.key = module if len(group) == 1 else f"{module}#{number}"
        return records

    def site(self, record: SiteRecord) -> Site:
        """Return a named site as it goes into the report."""
        keys = {other.weight: other.key for other in self}
        return Site(
            key=record.key,
            module=record.module,
            activation=record.activation.name,
            family=record.activation.family,
            fed_by=tuple(dict.fromkeys(keys.get(weight, name) for weight, name in record.feeds.items())),
            axis=record.axis,
            axis_from=record.axis_from,
            units=record.units,
            aliases=self._aliases.get(record.module, ()),
            samples_from=record.samples_from,
        )
