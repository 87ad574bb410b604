"""The versioned JSON report that other programs read."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np

from deadcheck import __version__
from deadcheck.diagnosis import VERDICTS, Diagnosis, SiteDiagnosis, Verdict
from deadcheck.errors import ExitCode
from deadcheck.reports.base import RenderOptions

SCHEMA_VERSION = "1.0"
"""Raised in its first number when a key changes its name or meaning; new keys do not raise it."""

_STATUS = {
    ExitCode.PASSED: "pass",
    ExitCode.FAILED: "fail",
    ExitCode.NOTHING_JUDGED: "inconclusive",
    ExitCode.REFUSED: "refused",
}
_COUNTS = ("dead", "silent", "rare", "faint", "saturated", "always_on", "negative_only", "invalid", "live")


def render(diagnosis: Diagnosis, options: RenderOptions) -> str:
    """Render a diagnosis as JSON; every number is finite, what is not is null."""
    seen = diagnosis.measurement
    report = _frame(ExitCode.PASSED)
    report["model"] = {
        "path": seen.model.path, "sha256": seen.model.sha256, "bytes": seen.model.bytes, "format": seen.model.format,
        "read": seen.model.read, "arch": seen.model.arch, "prefix_stripped": seen.model.prefix_stripped,
    }  # fmt: skip
    report["data"] = {
        "source": seen.data.source, "sha256": seen.data.sha256, "samples": seen.data.samples,
        "synthetic": seen.data.synthetic,
    }  # fmt: skip
    report["env"] = {
        "torch": seen.env.torch, "device": seen.env.device, "dtype": seen.env.dtype, "mode": seen.env.mode,
        "seed": seen.env.seed, "world_size": seen.env.world_size,
    }  # fmt: skip
    report["totals"] = {
        "sites": len(diagnosis.sites), "units": diagnosis.units, "dead": diagnosis.dead, "silent": diagnosis.silent,
        "dead_share": diagnosis.dead_share,
        "counts": {name: diagnosis.count(Verdict(name)) for name in _COUNTS},
        "output_constant": seen.output_constant,
    }  # fmt: skip
    report["sites"] = [_site(site, per_unit=options.per_unit) for site in diagnosis]
    report["skipped"] = [{"what": s.what, "where": s.where, "reason": s.reason} for s in seen.skipped]
    report["findings"] = [
        {"id": f.id, "level": f.level, "where": f.where, "message": f.message} for f in diagnosis.findings
    ]
    report["warnings"] = list(seen.warnings)
    report["inputs"] = [
        {
            "name": i.name, "shape": list(i.shape), "dtype": i.dtype, "min": _finite(i.min), "max": _finite(i.max),
            "mean": _finite(i.mean), "sd": _finite(i.sd), "features": i.features,
            "constant_features": i.constant_features,
        }
        for i in seen.inputs
    ]  # fmt: skip
    limits = diagnosis.thresholds
    report["thresholds"] = {
        "delta": limits.delta, "p_dead": limits.p_dead, "n_star": limits.n_star, "p_rare": limits.p_rare,
        "tau": limits.tau, "taus": list(limits.taus), "shallow": limits.shallow, "deep": limits.deep,
        "explosion_growth": limits.explosion_growth, "warn_layer_dead": limits.warn_layer_dead,
    }  # fmt: skip
    report["run"] = {"started": seen.started, "seconds": round(seen.seconds, 3), "host": platform.node()}
    return _spelled(report)


def render_failure(code: ExitCode, message: str, model: str | None) -> str:
    """Render a command that ended without a diagnosis, under the same keys."""
    report = _frame(code)
    report["model"] = {"path": model}
    report["error"] = {"code": int(code), "message": message}
    return _spelled(report)


def _frame(code: ExitCode) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "deadcheck", "version": __version__},
        "status": _STATUS.get(code, "error"),
        "exit_code": int(code),
        "model": None, "data": None, "env": None, "totals": None, "sites": [], "skipped": [], "findings": [],
        "warnings": [], "error": None, "run": None,
    }  # fmt: skip


def _spelled(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def _site(site: SiteDiagnosis, *, per_unit: bool) -> dict[str, Any]:
    stats, where = site.stats, site.stats.site
    out: dict[str, Any] = {
        "key": where.key, "module": where.module, "activation": where.activation, "fed_by": list(where.fed_by),
        "axis": where.axis, "axis_from": where.axis_from, "units": where.units, "samples": stats.samples,
        "observations": stats.observations, "zero_rate": site.zero_rate,
        "counts": {name: site.counts[Verdict(name)] for name in _COUNTS},
        "upper_bound": site.upper_bound,
        "dead_units": [list(pair) for pair in site.ranges(Verdict.DEAD)],
        "silent_units": [list(pair) for pair in site.ranges(Verdict.SILENT)],
        "aliases": list(where.aliases), "family": where.family.value, "samples_from": where.samples_from,
        "depths": dict(site.depths),
        "dormant_shares": {str(tau): share for tau, share in site.dormant_shares.items()},
        "mean_output": _finite(site.mean_output), "max_abs_output": _finite(site.max_abs_output),
        "positive_share": site.positive_share, "nonfinite": int(stats.nonfinite.sum()),
    }  # fmt: skip
    if per_unit:
        out["per_unit"] = _per_unit(site)
    return out


def _per_unit(site: SiteDiagnosis) -> dict[str, list[Any]]:
    stats = site.stats
    return {
        "zeros": stats.zeros.tolist(),
        "fired": stats.fired.tolist(),
        "first_fired": [index if index >= 0 else None for index in stats.first_fired.tolist()],
        "max": _numbers(stats.output_max),
        "min": _numbers(stats.output_min),
        "input_max": _numbers(stats.input_max),
        "input_min": _numbers(stats.input_min),
        "mean": _numbers(stats.output_sum / max(stats.observations, 1)),
        "mean_abs": _numbers(stats.mean_abs),
        "second_moment": _numbers(stats.output_square_sum / max(stats.observations, 1)),
        "positive": stats.positive.tolist(),
        "nonfinite": stats.nonfinite.tolist(),
        "margin": _numbers(stats.margin),
        "verdict": [VERDICTS[code].value for code in site.codes.tolist()],
    }


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [_finite(value) for value in np.asarray(values, np.float64).tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
