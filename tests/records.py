"""Hand-written records for tests of what judges and what reports; no run stands behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

from deadcheck.diagnosis import diagnose
from deadcheck.ranges import Ranges, count
from deadcheck.record import COUNTED, Record, SiteRecord, record_of
from deadcheck.reports import Outcome
from deadcheck.sites import (
    DataIdentity,
    Environment,
    Family,
    InputSummary,
    Measurement,
    ModelIdentity,
    Site,
    SiteStats,
)

_LIVE = {
    "zeros": 0.4, "positive": 0.6, "flat": 0.4, "fired": 0.6, "nonfinite": 0.0,
    "output_sum": 0.3, "output_abs_sum": 0.3, "output_square_sum": 0.2,
}  # fmt: skip
"""Of a unit that is live in every family, as shares of its samples; each sample is one observation."""

_OFF = {
    "zeros": 1.0, "positive": 0.0, "flat": 1.0, "fired": 0.0,
    "output_sum": 0.0, "output_abs_sum": 0.0, "output_square_sum": 0.0,
}  # fmt: skip


def site_stats(
    key: str = "features.1",
    *,
    family: Family = Family.RECTIFIER,
    units: int = 4,
    samples: int = 1000,
    off: Any = (),
    site: dict[str, Any] | None = None,
    **changes: Any,
) -> SiteStats:
    """Return a site of live units, of which those listed in ``off`` never fired.

    A live unit fires in 6 of 10 samples, with input in [-1, 1] and mean output 0.3. The input of one that is off has
    its largest value at -1, mean -3 and standard deviation 1: margin -1. ``changes`` replace fields, for all units
    (a number) or each (a list).
    """
    counts = {name: np.full(units, round(share * samples)) for name, share in _LIVE.items()}
    values: dict[str, Any] = {
        **{name: array.astype(np.float64) if name.startswith("output") else array for name, array in counts.items()},
        "first_fired": np.zeros(units, np.int64),
        "input_min": np.full(units, -1.0), "input_max": np.ones(units),
        "output_min": np.zeros(units), "output_max": np.ones(units),
        "silent_input_sum": np.full(units, np.nan), "silent_input_square_sum": np.full(units, np.nan),
    }  # fmt: skip
    where = list(off)
    for name, share in _OFF.items():
        values[name][where] = round(share * samples)
    values["first_fired"][where] = -1
    values["input_min"][where], values["input_max"][where], values["output_max"][where] = -5.0, -1.0, 0.0
    # The mean square is the variance and the squared mean: 1 + 9.
    values["silent_input_sum"][where], values["silent_input_square_sum"][where] = -3.0 * samples, 10.0 * samples
    for name in set(changes) & set(values):
        values[name] = np.broadcast_to(np.asarray(changes.pop(name), values[name].dtype), (units,)).copy()
    described = {
        "module": key, "activation": "relu", "fed_by": ("features.0",), "axis": 1, "axis_from": "conv2d",
        **(site or {}),
    }  # fmt: skip
    values.update({"samples": samples, "observations": samples, **changes})
    return SiteStats(site=Site(key=key, family=family, units=units, **described), **values)


def input_summary(**changes: Any) -> InputSummary:
    """Return a picture of 64 pixels from 0 to 1."""
    values: dict[str, Any] = {
        "name": "input 0", "shape": (1, 8, 8), "dtype": "float32", "min": 0.0, "max": 1.0, "mean": 0.3, "sd": 0.25,
        "features": 64, "constant_features": 0,
    }  # fmt: skip
    return InputSummary(**{**values, **changes})


def measurement(*sites: SiteStats, **changes: Any) -> Measurement:
    """Return what one scan of a model file would have seen."""
    values: dict[str, Any] = {
        "model": ModelIdentity("net.pt", "ab12", 3456, "torch-module", "rebuilt"),
        "data": DataIdentity("net.sample.npz", "cd34", max((stats.samples for stats in sites), default=0)),
        "env": Environment(torch="2.13.0", device="cpu", dtype="float32"),
        "seconds": 1.25,
        "started": "2026-01-02T03:04:05Z",
    }
    return Measurement(sites=sites, **{**values, **changes})


def record(*sites: SiteStats, **changes: Any) -> Record:
    """Return what a report would hold of that scan."""
    return record_of(diagnose(measurement(*sites, **changes)))


def outcome(seen: Measurement, *, per_unit: bool = False) -> Outcome:
    """Return the outcome of a scan that saw this, with no gate."""
    return Outcome(seen.model.path, record_of(diagnose(seen), per_unit=per_unit))


def site_record(
    key: str = "features.1",
    *,
    units: int = 100,
    samples: int = 1000,
    dead: Any = 0,
    silent: Any = 0,
    negative_only: Any = 0,
    **changes: Any,
) -> SiteRecord:
    """Return one layer as a report holds it.

    Units that are dead, silent and so on are a number (they stand one behind another, from unit 0 on) or ranges.
    """
    given = {"dead": dead, "silent": silent, "negative_only": negative_only}
    ranges: dict[str, Ranges] = {}
    start = 0
    for name, value in given.items():
        if isinstance(value, int):
            ranges[name] = ((start, start + value - 1),) if value else ()
            start += value
        else:
            ranges[name] = tuple(value)
    counts = dict.fromkeys(COUNTED, 0)
    counts.update({name: count(found) for name, found in ranges.items()})
    counts.update({name: changes.pop(name) for name in ("saturated", "invalid", "rare", "faint") if name in changes})
    counts["live"] = units - sum(counts.values())
    values: dict[str, Any] = {
        "module": key, "activation": "relu", "fed_by": ("features.0",), "axis": 1, "axis_from": "conv2d",
        "observations": samples, "zero_rate": 0.4, "upper_bound": 0.003, "family": "rectifier", "max_abs_output": 1.0,
        "zeros": round(0.4 * samples * units),
    }  # fmt: skip
    return SiteRecord(
        key=key, units=units, samples=samples, counts=counts, dead_units=ranges["dead"],
        silent_units=ranges["silent"], negative_only_units=ranges["negative_only"], **{**values, **changes},
    )  # fmt: skip


def scan_record(*sites: SiteRecord, samples: int = 1000, **changes: Any) -> Record:
    """Return a finished scan of a model file."""
    values: dict[str, Any] = {
        "model": ModelIdentity("net.pt", "ab12", 3456, "torch-module", "rebuilt"),
        "data": DataIdentity("net.sample.npz", "cd34", samples),
        "env": Environment(torch="2.13.0", device="cpu", dtype="float32"),
        "inputs": (input_summary(),),
    }
    return Record(sites=sites, **{**values, **changes})
