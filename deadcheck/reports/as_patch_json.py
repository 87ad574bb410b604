"""The versioned JSON report of a patch."""

from __future__ import annotations

import json
import math
import platform
from typing import Any

from deadcheck import __version__
from deadcheck.diagnosis import SiteDiagnosis, Verdict
from deadcheck.errors import ExitCode
from deadcheck.patch_result import AlphaSearch, Drift, PatchResult, SiteEffect
from deadcheck.reports.base import RenderOptions

SCHEMA_VERSION = "1.0"
"""Raised in its first number when a key changes its name or meaning."""


def render(result: PatchResult, options: RenderOptions) -> str:
    """Render what a patch did as JSON; every number is finite, what is not is null."""
    code = result.exit_code
    seen = result.before.measurement if result.before is not None else None
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "deadcheck", "version": __version__},
        "status": "pass" if code is ExitCode.PASSED else "inconclusive",
        "exit_code": int(code),
        "model": {
            "path": result.model.path, "sha256": result.model.sha256, "bytes": result.model.bytes,
            "format": result.model.format, "read": result.model.read, "arch": result.model.arch,
        },
        "data": None if seen is None else {
            "source": seen.data.source, "sha256": seen.data.sha256, "samples": seen.data.samples,
            "synthetic": seen.data.synthetic,
        },
        "env": None if seen is None else {
            "torch": seen.env.torch, "device": seen.env.device, "dtype": seen.env.dtype, "seed": seen.env.seed,
        },
        "patch": {
            "with": result.plan.replacement.kind.value, "alpha": result.plan.replacement.alpha,
            "others": result.plan.others, "clipped": result.plan.clipped, "dry_run": result.is_dry,
        },
        "totals": _totals(result),
        "sites": [_site(site) for site in result.sites],
        "drift": None if result.drift is None else _drift(result.drift),
        "search": None if result.search is None else _search(result.search),
        "skipped": [{"what": s.what, "where": s.where, "reason": s.reason} for s in result.skipped],
        "left": [{"what": s.what, "where": s.where, "reason": s.reason} for s in result.left],
        "advice": [{"id": item.id, "message": item.message} for item in result.advice],
        "written": [{"path": w.path, "what": w.what, "needs": w.needs} for w in result.written],
        "warnings": list(result.warnings),
        "error": None,
        "run": {"seconds": round(result.seconds, 3), "host": platform.node()},
    }  # fmt: skip
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def _totals(result: PatchResult) -> dict[str, int | None]:
    pairs = [(site.before, site.after) for site in result.sites]
    return {
        "sites_changed": len(result.sites),
        "sites_not_changed": len(result.skipped),
        "dead_before": _sum(old for old, _ in pairs),
        "dead_after": _sum(new for _, new in pairs),
    }


def _sum(sites: Any) -> int | None:
    counts = [site.counts[Verdict.DEAD] for site in sites if site is not None]
    return sum(counts) if counts else None


def _site(site: SiteEffect) -> dict[str, Any]:
    change, reach = site.change, site.gradient
    return {
        "key": change.site, "activation": change.activation, "becomes": site.stand_in,
        "fed_by": list(change.fed_by),
        "reached_by": "modules" if change.modules else "calls" if change.calls else "operators",
        "modules": list(change.modules),
        "units_changed": site.units_changed,
        "changed_units": None if change.units is None else [list(pair) for pair in change.units.ranges],
        "function": "as said" if site.fault is None else site.fault,
        "before": None if site.before is None else _side(site.before),
        "after": None if site.after is None else _side(site.after),
        "gradient": None if reach is None else {
            "units": reach.units, "without_before": reach.without_before, "without_after": reach.without_after,
            "dead_mean_before": reach.dead_mean_before, "dead_mean_after": reach.dead_mean_after,
        },
        "gradient_reason": site.gradient_reason,
    }  # fmt: skip


def _side(site: SiteDiagnosis) -> dict[str, Any]:
    return {
        "key": site.key, "activation": site.stats.site.activation, "units": site.units, "samples": site.stats.samples,
        "counts": {verdict.value: count for verdict, count in site.counts.items()},
        "zero_rate": site.zero_rate, "mean_output": _finite(site.mean_output),
        "max_abs_output": _finite(site.max_abs_output), "positive_share": site.positive_share,
    }  # fmt: skip


def _drift(drift: Drift) -> dict[str, Any]:
    return {
        "samples": drift.samples, "relative": _finite(drift.relative), "largest": _finite(drift.largest),
        "nonfinite": drift.nonfinite, "decisions": drift.decisions, "decisions_changed": drift.decisions_changed,
        "right_before": drift.right_before, "right_after": drift.right_after,
    }  # fmt: skip


def _search(search: AlphaSearch) -> dict[str, Any]:
    return {
        "tolerance": search.tolerance, "alpha": search.alpha, "samples": search.samples,
        "steps": [{"alpha": alpha, "drift": _finite(drift)} for alpha, drift in search.steps],
        "verified_samples": search.verified_samples,
        "verified_drift": None if search.verified_drift is None else _finite(search.verified_drift),
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
