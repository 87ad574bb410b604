"""Compares a scan with an earlier one, layer by layer, and says where that would mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deadcheck.diagnosis import Verdict
from deadcheck.ranges import Ranges, mask_of, ranges_of
from deadcheck.record import STUCK, Record, SiteRecord
from deadcheck.sites import Skipped

NEVER_RAN = "never ran"
"""How the reason of what was skipped begins, when it did not run at all."""

_OFF = (Verdict.DEAD, Verdict.SILENT)
_NAMED = 3


@dataclass(frozen=True)
class LayerChange:
    """What became of one layer. Stuck units are off (dead or silent) or never leave the negative side."""

    key: str
    units: int
    before: int
    """Stuck units then."""

    off: int
    """Units that are off now."""

    after: int
    """Stuck units now."""

    newly_off: Ranges
    """Units that are off now and were not stuck then."""

    newly_stuck: Ranges
    back: Ranges
    """Units that were stuck then and are not now."""


@dataclass(frozen=True)
class Comparison:
    """An earlier scan against a later one."""

    layers: tuple[LayerChange, ...]
    """Layers of both, in the order of the later."""

    lost: tuple[str, ...] = ()
    """Layers that ran then, of parts that never ran now."""

    obstacles: tuple[str, ...] = ()
    """Why the two cannot be compared; empty when they can."""

    notes: tuple[str, ...] = ()
    """What differs and does not forbid it."""


def compare(old: Record, new: Record) -> Comparison:
    """Compare two scans of one architecture on the same data."""
    then = {site.key: site for site in old.sites}
    now = {site.key: site for site in new.sites}
    lost = tuple(key for key in then if key not in now and _never_ran(then[key], new.skipped))
    obstacles = (*_layers_differ(old, new, lost), *_data_differs(old, new), *_rules_differ(old, new))
    return Comparison(
        layers=tuple(_change(then[key], site) for key, site in now.items() if _alike(then.get(key), site)),
        lost=lost,
        obstacles=obstacles,
        notes=tuple(_notes(old, new)),
    )


def _alike(then: SiteRecord | None, now: SiteRecord) -> bool:
    return then is not None and then.units == now.units


def _never_ran(site: SiteRecord, skipped: tuple[Skipped, ...]) -> bool:
    return any(item.reason.startswith(NEVER_RAN) and f"{site.module}.".startswith(f"{item.where}.") for item in skipped)


def _change(then: SiteRecord, now: SiteRecord) -> LayerChange:
    units = now.units
    was_stuck = mask_of(then.off_units, units) | mask_of(then.negative_only_units or (), units)
    is_off = mask_of(now.off_units, units)
    is_stuck = is_off | mask_of(now.negative_only_units or (), units)
    newly_off = ranges_of(is_off & ~was_stuck)
    return LayerChange(
        key=now.key,
        units=units,
        before=then.count(*STUCK),
        off=now.count(*_OFF),
        after=now.count(*STUCK),
        newly_off=newly_off,
        newly_stuck=ranges_of(is_stuck & ~was_stuck) if now.negative_only_units else newly_off,
        back=ranges_of(was_stuck & ~is_stuck),
    )


def _layers_differ(old: Record, new: Record, lost: tuple[str, ...]) -> Iterator[str]:
    then = {site.key: site for site in old.sites}
    now = {site.key: site for site in new.sites}
    if not then:
        yield "the baseline holds no layers"
        return
    gone = [key for key in then if key not in now and key not in lost]
    added = [key for key, site in now.items() if key not in then and not _never_ran(site, old.skipped)]
    if gone:
        yield f"layers of the baseline are not in the model: {_named(gone)}"
    if added:
        yield f"layers of the model are not in the baseline: {_named(added)}"
    other = [f"{key} ({then[key].units} then, {now[key].units} now)" for key in now if key in then
             and then[key].units != now[key].units]  # fmt: skip
    if other:
        yield f"layers have another number of units: {_named(other)}"


def _data_differs(old: Record, new: Record) -> Iterator[str]:
    if old.data.synthetic or new.data.synthetic:
        which = "the baseline" if old.data.synthetic else "the model"
        yield f"{which} was scanned on random numbers"
    if old.data.sha256 is not None and new.data.sha256 is not None:
        if old.data.sha256 != new.data.sha256:
            yield f"the data is not the same ({old.data.source} then, {new.data.source} now, with other contents)"
    elif (old.data.sha256, old.data.source) != (new.data.sha256, new.data.source):
        yield f"it cannot be told whether the data is the same ({old.data.source} then, {new.data.source} now)"
    if old.data.samples != new.data.samples:
        yield f"the number of samples is not the same ({old.data.samples:,} then, {new.data.samples:,} now)"


def _rules_differ(old: Record, new: Record) -> Iterator[str]:
    if old.rules_version != new.rules_version:
        yield f"the verdicts follow other rules (version {old.rules_version} then, {new.rules_version} now)"


def _notes(old: Record, new: Record) -> Iterator[str]:
    if old.data.sha256 is None and new.data.sha256 is None and old.data.source == new.data.source:
        yield f"the data ({new.data.source}) has no fingerprint; that it is the same rests on its name"
    for name in ("dtype", "mode", "device"):
        was, is_now = getattr(old.env, name), getattr(new.env, name)
        if was != is_now:
            yield f"{name} was {was} in the baseline and is {is_now} now"
    then = {site.key: site for site in old.sites}
    swapped = [f"{site.key} ({then[site.key].activation} then, {site.activation} now)" for site in new.sites
               if site.key in then and then[site.key].activation != site.activation]  # fmt: skip
    if swapped:
        yield f"activations were replaced: {_named(swapped)}"
    if any(site.negative_only_units is None and site.count(Verdict.NEGATIVE_ONLY) for site in (*old.sites, *new.sites)):
        yield "a report does not say which units never leave the negative side; those are compared by number alone"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
