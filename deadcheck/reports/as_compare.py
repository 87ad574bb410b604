"""The table ReLU beside Leaky ReLU, measured on one model: for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deadcheck import __version__
from deadcheck.diagnosis import SiteDiagnosis, Verdict
from deadcheck.patch_plan import Kind
from deadcheck.patch_result import Response, SideBySide
from deadcheck.reports.as_patch import drift_lines, share
from deadcheck.reports.base import RenderOptions
from deadcheck.reports.terminal import drawn
from deadcheck.safe_text import shown
from deadcheck.shares import percent

Row = tuple[str, str, str]
_RISKS = (Verdict.DEAD, Verdict.SILENT, Verdict.NEGATIVE_ONLY)


def render_table(comparison: SideBySide, options: RenderOptions) -> str:
    """Render the comparison for a person at a terminal."""

    def draw(console: Console) -> None:
        name = shown(comparison.result.model.path or "live module", unicode=options.unicode)
        console.print(Text("deadcheck compare  ", "bold") + Text(name, "bold cyan"), overflow="fold")
        table = Table(box=SIMPLE_HEAD if options.unicode else ASCII2, pad_edge=False, expand=False)
        for head in ("", "ReLU", str(comparison.result.plan.replacement)):
            table.add_column(head, overflow="fold", style="bold" if not head else "")
        for row in rows(comparison):
            table.add_row(*(Text(shown(cell, unicode=options.unicode)) for cell in row))
        console.print(table)
        if comparison.result.drift is not None:
            for line in drift_lines(comparison.result.drift, "→" if options.unicode else "->"):
                console.print(Text(line))

    return drawn(draw, options)


def render_markdown(comparison: SideBySide, options: RenderOptions) -> str:
    """Render the comparison as Markdown."""
    lines = [f"| | ReLU | {comparison.result.plan.replacement} |", "|---|---|---|"]
    lines += [f"| {name} | {old} | {new} |" for name, old, new in rows(comparison)]
    if comparison.result.drift is not None:
        lines += ["", *(f"- {line}" for line in drift_lines(comparison.result.drift, "→"))]
    return "\n".join(lines) + "\n"


def render_json(comparison: SideBySide, options: RenderOptions) -> str:
    """Render the comparison as JSON; the times stand in the ``run`` block, the one part that differs between runs."""
    sides = {}
    for name, responses, sites in _sides(comparison):
        units = sum(site.units for site in sites)
        sides[name] = {
            "responses": [{"x": r.x, "output": r.output, "slope": r.slope} for r in responses],
            "units": units,
            **{verdict.value: _count(sites, verdict) for verdict in _RISKS},
            "units_without_gradient": _without_gradient(comparison, name),
            "mean_activation": _finite(_mean(sites)),
            "largest_activation": _finite(_largest(sites)),
        }
    drift = comparison.result.drift
    report = {
        "schema_version": "1.0",
        "tool": {"name": "deadcheck", "version": __version__},
        "status": "pass",
        "exit_code": int(comparison.result.exit_code),
        "model": {"path": comparison.result.model.path, "sha256": comparison.result.model.sha256},
        "with": comparison.result.plan.replacement.kind.value,
        "alpha": comparison.result.plan.replacement.alpha,
        **sides,
        "drift": None if drift is None else {
            "relative": _finite(drift.relative), "largest": _finite(drift.largest), "decisions": drift.decisions,
            "decisions_changed": drift.decisions_changed,
        },
        "error": None,
        "run": {
            "seconds_relu": comparison.seconds_before, "seconds_stand_in": comparison.seconds_after,
            "batch": comparison.batch, "host": platform.node(),
        },
    }  # fmt: skip
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


COMPARISONS: dict[str, Callable[[SideBySide, RenderOptions], str]] = {
    "table": render_table,
    "json": render_json,
    "markdown": render_markdown,
}
"""Name, as ``-f`` takes it -> the function that renders it."""


def rows(comparison: SideBySide) -> Iterable[Row]:
    """Yield the lines of the table: what is compared, of ReLU, and of what stands in."""
    (_, relu, old), (_, stand_in, new) = _sides(comparison)
    replacement = comparison.result.plan.replacement
    is_straight = replacement.kind in (Kind.LEAKY, Kind.PRELU)
    yield "output for x > 0", "x", "x" if is_straight else f"{stand_in[2].output:.3g} at 1"
    yield "output for x < 0", "0", f"{replacement.alpha:g} x" if is_straight else f"{stand_in[0].output:.3g} at -1"
    yield "slope above, at, below 0", _slopes(relu), _slopes(stand_in)
    yield "risk: units that are dead", _of(old, Verdict.DEAD), _of(new, Verdict.DEAD)
    if _count(old, Verdict.SILENT) or _count(new, Verdict.SILENT):
        yield "never fired, too few samples", _of(old, Verdict.SILENT), _of(new, Verdict.SILENT)
    yield "never above 0, leak alone", _of(old, Verdict.NEGATIVE_ONLY), _of(new, Verdict.NEGATIVE_ONLY)
    units = comparison.units_with_gradient_told
    without = [_or_unknown(_without_gradient(comparison, name), units) for name in ("relu", "stand_in")]
    yield "learning: units without gradient", without[0], without[1]
    yield "asymmetry: mean activation", f"{_mean(old):.4g}", f"{_mean(new):.4g}"
    yield "largest activation", f"{_largest(old):.4g}", f"{_largest(new):.4g}"
    before, after = comparison.seconds_before, comparison.seconds_after
    took = f"{after * 1e3:.3g} ms ({after / before:.2f}x)"
    yield f"cost: {comparison.batch} samples take", f"{before * 1e3:.3g} ms", took
    if comparison.result.drift is not None:
        yield "outputs moved by", "-", share(comparison.result.drift.relative)


def _sides(comparison: SideBySide) -> list[tuple[str, tuple[Response, ...], list[SiteDiagnosis]]]:
    pairs = [(s.before, s.after) for s in comparison.result.sites if s.before is not None and s.after is not None]
    return [
        ("relu", comparison.relu, [old for old, _ in pairs]),
        ("stand_in", comparison.stand_in, [new for _, new in pairs]),
    ]


def _slopes(responses: tuple[Response, ...]) -> str:
    return ", ".join(f"{response.slope:.3g}" for response in reversed(responses))


def _count(sites: Iterable[SiteDiagnosis], verdict: Verdict) -> int:
    return sum(site.counts[verdict] for site in sites)


def _of(sites: list[SiteDiagnosis], verdict: Verdict) -> str:
    units, count = sum(site.units for site in sites), _count(sites, verdict)
    return f"{count:,} of {units:,} ({percent(count, units)})"


def _without_gradient(comparison: SideBySide, side: str) -> int | None:
    told = [site.gradient for site in comparison.result.sites if site.gradient is not None]
    if not told:
        return None
    return sum(item.without_before if side == "relu" else item.without_after for item in told)


def _or_unknown(count: int | None, units: int) -> str:
    return "not told" if count is None else f"{count:,} of {units:,} ({percent(count, units)})"


def _mean(sites: list[SiteDiagnosis]) -> float:
    """Mean over all observations of all sites."""
    observed = sum(site.stats.observations * site.units for site in sites)
    return sum(float(site.stats.output_sum.sum()) for site in sites) / max(observed, 1)


def _largest(sites: list[SiteDiagnosis]) -> float:
    return max((site.max_abs_output for site in sites), default=math.nan)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
