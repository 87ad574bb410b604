"""The verb of patching: plans a change to a model, makes it, and measures what it did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from deadcheck import effect
from deadcheck.advice import advise
from deadcheck.alpha_search import largest_alpha
from deadcheck.batch import Batch, halves
from deadcheck.before_after import Pairing
from deadcheck.diagnosis import Diagnosis, SiteDiagnosis
from deadcheck.errors import NothingMeasured, UsageError
from deadcheck.patch_plan import Kind, PatchPlan, Replacement, SiteChange
from deadcheck.patch_result import AlphaSearch, Drift, GradientReach, PatchResult, SideBySide, SiteEffect
from deadcheck.remedies.base import Choice, Planned
from deadcheck.remedies.slope import plan_slopes, plan_without_data, with_alpha
from deadcheck.rewriting.base import Made
from deadcheck.site_check import fault_of, responses
from deadcheck.sites import Family, Skipped
from deadcheck.stand_ins import ceiling_of, stand_in
from deadcheck.study import Study

_SEARCH_SAMPLES = 1024


@dataclass(frozen=True)
class Patched:
    """A patched copy of a model, and what was planned for it."""

    made: Made
    plan: PatchPlan
    skipped: tuple[Skipped, ...]
    search: AlphaSearch | None = None

    @property
    def model(self) -> nn.Module:
        """What runs."""
        return self.made.module


def make(study: Study, choice: Choice, *, tolerance: float | None = None, plan: PatchPlan | None = None) -> Patched:
    """Plan a change (or take a given plan) and make it in a copy that shares the model's weights.

    With a tolerance the largest slope is chosen whose drift stays within it. NothingMeasured where there is nothing
    to change.
    """
    if plan is not None:
        planned = Planned(plan, ())
        if study.has_data:
            assert study.before is not None  # measured, so that sites can be shown before and after
    elif study.has_data:
        planned = plan_slopes(study.model, study.before, study.sightings, choice, study.look)
    else:
        planned = plan_without_data(study.model, choice)
    if not planned.plan.sites:
        raise NothingMeasured(_nothing(study, choice, planned.skipped))
    search = None if tolerance is None else find_alpha(study, planned.plan, tolerance)
    done = with_alpha(planned.plan, search.alpha) if search is not None else planned.plan
    made = study.subject.made(done)
    untouched = {item.where for item in made.skipped}
    if plan is None:
        done = replace(done, sites=tuple(change for change in done.sites if change.site not in untouched))
    return Patched(made, done, (*planned.skipped, *made.skipped), search)


def _nothing(study: Study, choice: Choice, skipped: Sequence[Skipped]) -> str:
    if skipped:
        first = skipped[0]
        return f"nothing can be changed: {first.where}: {first.reason}; nothing was written"
    if choice.only_dead and study.has_data:
        silent = study.before.silent
        more = f" ({silent:,} never fired, but the samples are too few to call them dead)" if silent else ""
        return f"no unit is dead on this data{more}, so there is nothing to change; nothing was written"
    wanted = " that the options choose" if not choice.is_everything else ""
    return f"the model has no ReLU{wanted}, so there is nothing to change; nothing was written"


def find_alpha(study: Study, plan: PatchPlan, tolerance: float) -> AlphaSearch:
    """Choose the largest slope whose drift on the sample stays within the tolerance, and try it on other samples.

    Where there are no others, a slope is found without every second sample and tried on those.
    """
    if not study.has_data:
        raise UsageError("--alpha auto needs data, to see how far the outputs move; add --data, or give a number")
    batches = list(study.batches(2 * _SEARCH_SAMPLES))
    kept, others = _split(batches, _SEARCH_SAMPLES)

    def drift_of(chosen: Sequence[Batch]) -> Callable[[float], float]:
        def trial(alpha: float) -> float:
            patched = study.subject.made(with_alpha(plan, alpha)).module
            drift = study.drift(patched, chosen)
            return math.inf if drift.nonfinite else drift.relative

        return trial

    found = largest_alpha(drift_of(kept), tolerance)
    alpha = found.alpha
    if not others:
        pairs = [halves(batch) for batch in kept]
        kept_half, others = [a for a, _ in pairs], [b for _, b in pairs if b.samples]
        alpha = largest_alpha(drift_of(kept_half), tolerance).alpha if others else alpha
    return AlphaSearch(
        tolerance=tolerance,
        steps=found.steps,
        alpha=found.alpha,
        samples=sum(batch.samples for batch in kept),
        verified_samples=sum(batch.samples for batch in others),
        verified_drift=drift_of(others)(alpha) if others else None,
    )


def _split(batches: Sequence[Batch], samples: int) -> tuple[list[Batch], list[Batch]]:
    kept: list[Batch] = []
    for i, batch in enumerate(batches):
        if sum(b.samples for b in kept) >= samples:
            return kept, list(batches[i:])
        kept.append(batch)
    return kept, []


def examine(study: Study, patched: Patched) -> PatchResult:
    """Check what was made, and measure what it did."""
    started = time.perf_counter()
    if not study.has_data:
        sites = tuple(_effect(study, patched, change, None, None) for change in patched.plan.sites)
        seconds = time.perf_counter() - started
        return PatchResult(study.loaded.identity, patched.plan, sites, patched.skipped, seconds=seconds)
    after, sightings = study.after(patched.model)
    pairing = Pairing(study.model, study.sightings, sightings, patched.plan)
    gradients = study.gradients(patched.model)
    drift = study.drift(patched.model)
    skipped = (*patched.skipped, *pairing.still_there(patched.skipped))
    untouched = {item.where for item in skipped}
    sites = tuple(
        _effect(study, patched, change, pairing.after(change, after), gradients.get(change.site))
        for change in patched.plan.sites
        if change.site not in untouched
    )
    advice = advise(patched.plan, study.before, drift, patched.search, stale=study.stale_units())
    told = {change.site for change in patched.plan.sites} | {item.where for item in skipped}
    return PatchResult(
        model=study.loaded.identity,
        plan=patched.plan,
        sites=sites,
        left=tuple(_left(study.before, told, clipped=patched.plan.clipped)),
        skipped=tuple({(item.where, item.reason): item for item in skipped}.values()),
        before=study.before,
        after=after,
        drift=drift,
        search=patched.search,
        advice=tuple(advice),
        warnings=tuple(_notes(study.before, drift)),
        seconds=time.perf_counter() - started,
    )


def _notes(diagnosis: Diagnosis, drift: Drift) -> Iterator[str]:
    """Yield the warnings of the scan; that labels did not go to the model is no news where they were used."""
    for warning in diagnosis.measurement.warnings:
        if drift.right_before is None or "did not go to the model" not in warning:
            yield warning


def _left(diagnosis: Diagnosis, told: Container[str], *, clipped: bool) -> Iterator[Skipped]:
    """Yield the ReLUs that were not to change."""
    for site in diagnosis:
        where = site.stats.site
        if where.family is Family.CLIPPED and not clipped and site.key not in told:
            yield Skipped(where.activation, site.key, "with a ceiling (--clipped changes these too)")
        elif where.family in (Family.RECTIFIER, Family.CLIPPED) and site.key not in told:
            yield Skipped(where.activation, site.key, "not chosen")


def _effect(
    study: Study,
    patched: Patched,
    change: SiteChange,
    after: SiteDiagnosis | None,
    gradient: GradientReach | str | None,
) -> SiteEffect:
    before = next((site for site in study.before if site.key == change.site), None) if study.has_data else None
    return SiteEffect(
        change=change,
        stand_in=str(patched.plan.for_site(change)),
        fault=_fault(study, patched, change),
        before=before,
        after=after,
        gradient=gradient if isinstance(gradient, GradientReach) else None,
        gradient_reason=gradient if isinstance(gradient, str) else None if gradient else "it did not run",
    )


def compare(study: Study, patched: Patched) -> SideBySide:
    """Return ReLU beside what stands in for it: what a patch does, the functions themselves, and their time."""
    if not study.has_data:
        raise UsageError("a comparison is measured on data; add --data FILE, or put NAME.sample.npz beside the model")
    result = examine(study, patched)
    batch = next(study.batches())
    with study.running(study.model, patched.model) as forwards:
        before, after = effect.seconds_of(forwards, batch)
    like = _like(patched.model)
    return SideBySide(
        result=result,
        relu=responses(torch.relu, like),
        stand_in=responses(_function(patched.plan.replacement), like),
        seconds_before=before,
        seconds_after=after,
        batch=batch.samples,
    )


def _function(replacement: Replacement) -> Callable[[torch.Tensor], torch.Tensor]:
    like = Replacement(Kind.LEAKY, replacement.alpha) if replacement.kind is Kind.PRELU else replacement
    made = stand_in(like)
    return lambda x: made(x, False)


def _fault(study: Study, patched: Patched, change: SiteChange) -> str | None:
    """Return what the function at a site does wrong."""
    replacement = patched.plan.for_site(change)
    record = next((r for r in study.sightings.records if r.key == change.site), None)
    ceiling = math.inf if record is None else record.activation.high
    if record is None and change.modules:
        held = ceiling_of(study.model.get_submodule(change.modules[0]))
        ceiling = math.inf if held is None else held
    function = study.subject.function(patched.plan, change, patched.made, ceiling)
    like = _like(patched.model)
    return fault_of(function, change, replacement, ceiling=ceiling, like=like)


def _like(model: nn.Module) -> torch.Tensor:
    """Return a tensor of the device and type of a model's weights."""
    return next((tensor for tensor in model.parameters() if tensor.is_floating_point()), torch.zeros(1))
