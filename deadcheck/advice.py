"""Says when something other than a slope would serve better, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from deadcheck.diagnosis import Diagnosis, Verdict
from deadcheck.patch_plan import Kind, PatchPlan
from deadcheck.patch_result import Advice, AlphaSearch, Drift

_SMALL_SLOPE = 3e-3
_MOVED = 0.01


def advise(
    plan: PatchPlan, before: Diagnosis, drift: Drift | None, search: AlphaSearch | None, *, stale: int | None
) -> Iterator[Advice]:
    """Yield what the numbers call for, the cause of the trouble first.

    ``stale`` counts dead units that fire once batch norms see the statistics of the batch; None without batch norms.
    """
    suspect = next((f for f in before.findings if f.id == "inputs-suspect"), None)
    if suspect is not None:
        yield Advice("data", f"{suspect.message}; if the data is at fault, no change to the model helps")
    if stale:
        yield Advice(
            "batch-norm",
            f"{stale:,} of the dead units fire when batch norm uses each batch's own statistics: the stored ones are "
            "stale, and computing them anew (forward passes in train mode) revives these units, not a slope",
        )
    whole = [site.key for site in before if site.units and site.counts[Verdict.DEAD] == site.units]
    if whole:
        yield Advice(
            "layer-dead",
            f"every unit of {', '.join(whole[:3])} is dead, so the output does not depend on the input through it: "
            "initialise that layer again, or train again with a smaller learning rate; a slope alone revives little",
        )
    if not before.dead:
        unsure = f"; {before.silent:,} never fired, on too few samples to call them dead" if before.silent else ""
        revives = "" if before.silent else " and revives nothing"
        yield Advice("nothing-dead", f"no unit was found dead{unsure}, so the patch changes the outputs{revives}")
        return
    if search is not None and search.alpha < _SMALL_SLOPE:
        yield Advice(
            "small-slope",
            f"a slope of {search.alpha:.3g} lets gradients of that size through: it keeps the outputs, and revives "
            "almost nothing by itself",
        )
    if plan.replacement.kind is Kind.LEAKY:
        yield from _goals(drift)


def _goals(drift: Drift | None) -> Iterator[Advice]:
    if drift is not None and drift.relative > _MOVED:
        yield Advice(
            "moves-outputs",
            "to ship the model as it is, removing the dead units makes it smaller and changes nothing on this data; "
            "a slope moves the outputs (--only-dead or --alpha auto move them less)",
        )
    yield Advice(
        "will-train-on",
        "to train on, giving dead units new incoming weights and outgoing weights of 0 (ReDo) keeps the outputs "
        "exactly and revives them all; a slope revives some, slowly, and taking it out later costs accuracy",
    )
