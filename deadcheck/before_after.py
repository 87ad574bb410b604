"""Finds the sites of a model again after a patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
from torch import nn

from deadcheck.diagnosis import Diagnosis, SiteDiagnosis, diagnose
from deadcheck.patch_plan import PatchPlan, SiteChange
from deadcheck.ranges import Ranges, mask_of
from deadcheck.reach import Sightings
from deadcheck.sites import Family, SiteStats, Skipped

_STILL_RUNS = "still runs: it is called where nothing can replace it, as in a TorchScript function"


class Pairing:
    """The sites of a model and of its patched copy, by what they are apart from their activation."""

    def __init__(self, model: nn.Module, before: Sightings, after: Sightings, plan: PatchPlan) -> None:
        first: dict[nn.Module, str] = {}
        origin = {p: first.setdefault(m, p) for p, m in model.named_modules(remove_duplicate=False)}
        self._plan = plan
        self._stand_ins = {plan.replacement.kind.value, "prelu"}  # nn.PReLU holds the slopes of single units
        self._before = {r.key: identity for identity, found in before.by_identity(origin).items() for r in found}
        self._now = after.by_identity(origin)

    def after(self, change: SiteChange, diagnosis: Diagnosis) -> SiteDiagnosis | None:
        """Return what a changed site is after the patch; None where it did not run."""
        records = self._now.get(self._before.get(change.site), [])
        stand_in = next((r for r in records if r.activation.name in self._stand_ins), None)
        if stand_in is None:
            return None
        site = diagnosis.site(stand_in.key)
        rest = next((r for r in records if _is_relu(r)), None)
        if change.units is None or rest is None:
            return site
        # Where some units keep their ReLU in one operator and the others run through another, each has its own counts.
        stats = _joined(site.stats, diagnosis.site(rest.key).stats, change.units.ranges)
        return diagnose(replace(diagnosis.measurement, sites=(stats,)), diagnosis.thresholds).sites[0]

    def still_there(self, known: Iterable[Skipped]) -> list[Skipped]:
        """Return the ReLUs that ran in the patched model although they were meant to go."""
        told = {self._before.get(item.where) for item in known}
        wanted = {self._before.get(change.site): change for change in self._plan.sites}
        left = []
        for identity, records in self._now.items():
            change = wanted.get(identity)
            stays = change is not None and any(r.activation.name in self._stand_ins for r in records)
            meant = change is not None or (self._plan.others and identity not in told)
            for record in records if meant and not stays else ():
                if _is_relu(record):
                    key = record.key if change is None else change.site
                    left.append(
                        Skipped(
                            record.activation.name,
                            key,
                            _STILL_RUNS,
                        )
                    )
        return left


def _is_relu(record: Any) -> bool:
    kind = record.activation
    return kind.family is Family.RECTIFIER and kind.on == 0 and kind.name != "prelu"


def _joined(changed: SiteStats, kept: SiteStats, ranges: Ranges) -> SiteStats:
    mask = mask_of(ranges, changed.site.units)
    arrays = {f.name for f in fields(changed) if isinstance(getattr(changed, f.name), np.ndarray)}
    return replace(changed, **{name: np.where(mask, getattr(changed, name), getattr(kept, name)) for name in arrays})
