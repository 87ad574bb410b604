"""The report of a patch in Markdown, for a pull request."""

from __future__ import annotations

from deadcheck.diagnosis import Verdict
from deadcheck.patch_result import PatchResult, SiteEffect
from deadcheck.reports.as_markdown import code_span, prose
from deadcheck.reports.as_patch import drift_lines, share
from deadcheck.reports.base import RenderOptions

_MAX_SITES = 200


def render(result: PatchResult, options: RenderOptions) -> str:
    """Render what a patch did as Markdown."""
    lines = [f"## deadcheck patch: {code_span(result.model.path or 'live module')}", ""]
    which = "dead units alone" if any(site.change.units for site in result.sites) else "every unit"
    lines += [f"ReLU → {code_span(str(result.plan.replacement))} at {len(result.sites):,} sites, {which}.", ""]
    if result.drift is not None:
        lines += ["**This changes what the model computes:**", ""]
        lines += [f"- {line}" for line in drift_lines(result.drift, "→")]
    else:
        lines += ["Without data nothing was measured."]
    if result.search is not None:
        lines += ["", f"The slope was chosen so that outputs move by {share(result.search.tolerance)} at most."]
    lines += ["", *_table(result)]
    if result.skipped:
        lines += ["", "**Not changed, though it was meant to be:**", ""]
        for item in result.skipped:
            lines.append(f"- {code_span(item.where or 'the model')} ({code_span(item.what)}): {prose(item.reason)}")
    if result.advice:
        lines += ["", "Before you use it:", ""]
        lines += [f"- {prose(item.message)}" for item in result.advice]
    return "\n".join(lines) + "\n"


def _table(result: PatchResult) -> list[str]:
    sites = result.sites[:_MAX_SITES]
    rows = [
        "| layer | was | is | units | dead | no gradient | function |",
        "|---|---|---|---:|---:|---:|---|",
        *(_row(site) for site in sites),
    ]
    more = len(result.sites) - len(sites)
    return [*rows, "", f"and {more:,} more sites"] if more else rows


def _row(site: SiteEffect) -> str:
    dead = gradient = units = "–"
    if site.before is not None:
        changed = site.units_changed
        units = f"{changed:,} of {site.before.units:,}" if changed != site.before.units else f"{changed:,}"
        after = "?" if site.after is None else f"{site.after.counts[Verdict.DEAD]:,}"
        dead = f"{site.before.counts[Verdict.DEAD]:,} → {after}"
    if site.gradient is not None:
        gradient = f"{site.gradient.without_before:,} → {site.gradient.without_after:,}"
    function = "checked" if site.fault is None else f"**wrong: {code_span(site.fault)}**"
    cells = (
        code_span(site.change.site),
        code_span(site.change.activation),
        site.stand_in,
        units,
        dead,
        gradient,
        function,
    )
    return f"| {' | '.join(cells)} |"
