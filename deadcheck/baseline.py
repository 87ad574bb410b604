"""What a baseline accepts: a report, less what has healed since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deadcheck.comparison import Comparison, LayerChange
from deadcheck.diagnosis import Verdict
from deadcheck.policy import Compare
from deadcheck.ranges import Ranges, count, mask_of, ranges_of
from deadcheck.record import Record, SiteRecord


def trimmed(record: Record) -> Record:
    """Return a report as a baseline holds it: the counts, and nothing that changes from run to run."""
    return replace(record, findings=(), warnings=(), run=None, per_unit=())


def worse(comparison: Comparison, how: Compare) -> list[LayerChange]:
    """Return the layers in which more units are stuck than were, or, compared by units, other ones are."""
    by_units = how is Compare.UNITS
    return [c for c in comparison.layers if c.after > c.before or (by_units and c.newly_stuck)]


def pruned(old: Record, changes: Sequence[LayerChange]) -> Record:
    """Return a baseline in which units that came back are accepted no longer; they count as live."""
    back = {change.key: change.back for change in changes if change.back}
    return replace(old, sites=tuple(_without(site, back.get(site.key, ())) for site in old.sites))


def _without(site: SiteRecord, back: Ranges) -> SiteRecord:
    if not back:
        return site
    keep = ~mask_of(back, site.units)

    def kept(ranges: Ranges) -> Ranges:
        return ranges_of(mask_of(ranges, site.units) & keep)

    dead, silent = kept(site.dead_units), kept(site.silent_units)
    leaking = None if site.negative_only_units is None else kept(site.negative_only_units)
    counts = dict(site.counts)
    counts[Verdict.DEAD.value], counts[Verdict.SILENT.value] = count(dead), count(silent)
    if leaking is not None:
        counts[Verdict.NEGATIVE_ONLY.value] = count(leaking)
    others = site.units - sum(count or 0 for count in counts.values())
    counts[Verdict.LIVE.value] = (counts.get(Verdict.LIVE.value) or 0) + others
    return replace(site, counts=counts, dead_units=dead, silent_units=silent, negative_only_units=leaking)
