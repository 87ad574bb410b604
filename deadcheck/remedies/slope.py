"""The remedy of the slope: ReLUs become leaky, so that a unit below 0 passes something on and learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from deadcheck.diagnosis import Diagnosis, SiteDiagnosis, Verdict
from deadcheck.errors import NothingMeasured, PatchError
from deadcheck.patch_plan import PatchPlan, SiteChange, Units
from deadcheck.ranges import Ranges, count
from deadcheck.reach import Reach, Sightings, is_out_of_reach, reaches
from deadcheck.remedies.base import Choice, Planned
from deadcheck.sites import Family, Site, Skipped
from deadcheck.stand_ins import ceiling_of, keeps_relu

_NOT_A_RELU = {
    "prelu": "its slope is learnt, and is 0 only now",
    "threshold": "its border is not 0, so no slope joins it",
}


def plan_slopes(
    model: nn.Module,
    diagnosis: Diagnosis,
    sightings: Sightings,
    choice: Choice,
    look: Callable[[nn.Module], Sightings] | None = None,
) -> Planned:
    """Plan what is to change in a model that was measured while ``sightings`` watched.

    ``look`` watches another model on the same data, see ``reaches``.
    """
    borders = {record.key: record.activation.on for record in sightings.records}
    chosen: dict[str, Ranges | None] = {}
    skipped: list[Skipped] = []
    for site in diagnosis:
        where = site.stats.site
        if not _is_wanted(site, choice):
            continue
        if where.activation in _NOT_A_RELU and (where.activation == "prelu" or borders.get(site.key)):
            skipped.append(Skipped(where.activation, site.key, _NOT_A_RELU[where.activation]))
            continue
        units = _dead_units(site, choice)
        if units is None or units:
            chosen[site.key] = units

    def action(record: Any) -> Any:
        """Tell what is to be done at a site: to single units only where they are laid out alike."""
        if record.key not in chosen:
            return None
        layouts = frozenset(sightings.layouts_of(record.key))
        return "all" if chosen[record.key] is None else (chosen[record.key], record.units, layouts)

    reach = reaches(model, sightings, action, look)
    changes: list[SiteChange] = []
    for site in diagnosis:
        if site.key in chosen:
            change = _change(site.stats.site, chosen[site.key], reach[site.key], sightings)
            if isinstance(change, SiteChange):
                changes.append(change)
            else:
                skipped.append(change)
    changes += [] if choice.only_dead or choice.min_dead_share else _never_ran(model, diagnosis, choice)
    skipped += _unreachable(diagnosis.measurement.skipped) if choice.is_everything else []
    return Planned(_plan(changes, choice), tuple(skipped))


def plan_without_data(model: nn.Module, choice: Choice) -> Planned:
    """Plan from the tree of modules alone; what dead units are, and which functions are called, cannot be known."""
    if choice.only_dead or choice.min_dead_share:
        raise NothingMeasured("which units are dead is known from data alone; add --data, or --dead-from REPORT.json")
    changes = [change for change in _tree(model, choice) if matches(change.site, change.modules, choice.layers)]
    skipped = [Skipped("relu", name, reason) for name, m in model.named_modules() if (reason := is_out_of_reach(m))]
    return Planned(_plan(changes, choice), tuple(skipped))


def _plan(changes: Iterable[SiteChange], choice: Choice) -> PatchPlan:
    return PatchPlan(
        replacement=choice.replacement,
        sites=tuple(changes),
        others=choice.is_everything,
        clipped=choice.clipped,
        call=choice.call,
    )


def with_alpha(plan: PatchPlan, alpha: float) -> PatchPlan:
    """Return the plan with another alpha at every site."""
    sites = tuple(replace(change, alpha=None) for change in plan.sites)
    return replace(plan, replacement=replace(plan.replacement, alpha=alpha), sites=sites)


# Which sites.


def _is_wanted(site: SiteDiagnosis, choice: Choice) -> bool:
    where = site.stats.site
    families = (Family.RECTIFIER, Family.CLIPPED) if choice.clipped else (Family.RECTIFIER,)
    if where.family not in families or not matches(site.key, (where.module, *where.aliases), choice.layers):
        return False
    return _dead_share(site, choice) >= choice.min_dead_share


def matches(key: str, paths: Iterable[str], patterns: tuple[str, ...]) -> bool:
    """Tell whether patterns choose a site, by its key or a path of its module; those with ``!`` take it out again."""
    names = (key, *paths)
    wanted = [p for p in patterns if not p.startswith("!")]
    unwanted = [p[1:] for p in patterns if p.startswith("!")]
    if any(fnmatchcase(name, pattern) for pattern in unwanted for name in names):
        return False
    return not wanted or any(fnmatchcase(name, pattern) for pattern in wanted for name in names)


def _dead_ranges(site: SiteDiagnosis, choice: Choice) -> Ranges:
    if choice.dead is None:
        return tuple(site.ranges(Verdict.DEAD))
    ranges = choice.dead.get(site.key, ())
    if ranges and ranges[-1][1] >= site.units:
        raise PatchError(
            f"the report tells of unit {ranges[-1][1]} at {site.key}, which has {site.units}; it is of another model"
        )
    return ranges


def _dead_share(site: SiteDiagnosis, choice: Choice) -> float:
    return count(_dead_ranges(site, choice)) / max(site.units, 1)


def _dead_units(site: SiteDiagnosis, choice: Choice) -> Ranges | None:
    """Return the units to change; None for all."""
    if not choice.only_dead:
        return None
    ranges = _dead_ranges(site, choice)
    return None if ranges == ((0, site.units - 1),) else ranges


# How they are reached.


def _change(site: Site, units: Ranges | None, reach: Reach, sightings: Sightings) -> SiteChange | Skipped:
    if reach.reason is not None:
        return Skipped(site.activation, site.key, reach.reason)
    change = SiteChange(
        site=site.key,
        activation=site.activation,
        fed_by=site.fed_by,
        modules=reach.modules,
        module=site.module if reach.calls else "",
        calls=reach.calls,
        operators=reach.operators,
    )
    if units is None:
        return change
    layouts = sightings.layouts_of(site.key)
    layout = next(iter(layouts))[0]
    if layout is None or len({name for name, _ in layouts}) != 1:
        return Skipped(site.activation, site.key, "where its units stand in the tensor is not the same for all inputs")
    ranks = {rank for _, rank in layouts}
    return replace(change, units=Units(site.units, units, layout, ranks.pop() if len(ranks) == 1 else 0))


def _tree(model: nn.Module, choice: Choice) -> Iterator[SiteChange]:
    """Yield every module that is a ReLU."""
    aliases: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(path)
    for module, paths in aliases.items():
        ceiling = ceiling_of(module)
        if keeps_relu(module):
            yield SiteChange(f"{paths[0]}:relu#1", "relu", modules=tuple(paths))
        elif ceiling == math.inf or (choice.clipped and ceiling is not None):
            yield SiteChange(paths[0], type(module).__name__.lower(), modules=tuple(paths))


def _never_ran(model: nn.Module, diagnosis: Diagnosis, choice: Choice) -> Iterator[SiteChange]:
    ran = {site.stats.site.module for site in diagnosis}
    for change in _tree(model, choice):
        if change.modules[0] not in ran and matches(change.site, change.modules, choice.layers):
            yield change


_FUSED = ("written out by hand", "fused")


def _unreachable(skipped: Iterable[Skipped]) -> list[Skipped]:
    """Return what a scan saw and could not measure, and which is a ReLU all the same."""
    return [item for item in skipped if any(words in item.reason for words in _FUSED)]
