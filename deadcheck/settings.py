"""Every setting a configuration file may hold: its kind, and what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deadcheck import kinds
from deadcheck.kinds import Kind, Rows, Section, one_of, or_none, whole

STATS = ("full", "counts", "verdict")
"""How much is measured: everything; no sums of numbers; or no more of a unit than its verdict needs."""

_LIMITS = {
    "max_layer_dead": "share of a layer that may be dead (DC001)",
    "max_new_dead": "share of a layer that may have died since the baseline, unit by unit (DC008)",
    "max_worse": "points by which a layer's dead share may exceed the baseline's (DC007)",
}

_LAYER = Section(
    {
        "match": kinds.TEXT,
        "level": kinds.LEVEL,
        **dict.fromkeys(_LIMITS, kinds.LIMIT),
    },
    {
        "match": "pattern of site keys or module paths",
        "level": "the most that a finding in these layers may weigh; off: not judged",
        **_LIMITS,
    },
    required=("match",),
)
_IGNORE = Section(
    {"rule": kinds.RULE, "reason": kinds.REASON, "layer": kinds.TEXT, "model": kinds.TEXT, "until": kinds.DAY},
    {
        "rule": "code or name of the rule",
        "reason": "why it is accepted",
        "layer": "pattern of site keys",
        "model": "pattern of model paths",
        "until": "the last day on which it holds, as 2030-12-31",
    },
    required=("rule", "reason"),
)
_MODEL = Section(
    {
        "path": kinds.PLACE,
        "arch": or_none(kinds.PLACE),
        "arch_args": kinds.ARGUMENTS,
        "key": or_none(kinds.TEXT),
        "data": or_none(kinds.PLACE),
        "baseline": or_none(kinds.PLACE),
    },
    {
        "path": "file, or pattern of files",
        "arch": "code that builds the model, as mynet.py:build",
        "arch_args": "keyword arguments for it",
        "key": "entry of a checkpoint that holds the model or its weights",
        "data": "as scan.data, for this model",
        "baseline": "JSON report to compare with",
    },
    required=("path",),
    shorthand="path",
)
DTYPES = ("model", "float32", "float64", "bfloat16", "float16")
"""Types that the weights may be cast to; ``model`` leaves them as they are."""

AUTOCASTS = ("bfloat16", "float16")
"""Types that ``torch.autocast`` has."""

_SCAN = Section(
    {
        "data": or_none(kinds.PLACE),
        "batch_size": whole(1),
        "max_samples": or_none(whole(1)),
        "workers": whole(0, 1024),
        "unpack": one_of("auto", "first", "args", "kwargs"),
        "input_shape": or_none(kinds.SHAPE),
        "allow_nonfinite": kinds.FLAG,
        "device": kinds.TEXT,
        "device_map": or_none(one_of("auto", "sequential")),
        "max_memory": kinds.MEMORY,
        "dtype": one_of(*DTYPES),
        "autocast": or_none(one_of(*AUTOCASTS)),
        "threads": or_none(whole(1, 1024)),
        "seed": whole(0),
        "gates": kinds.FLAG,
        "units": kinds.AXES,
        "call": kinds.TEXT,
        "stats": one_of(*STATS),
    },
    {
        "data": ".npz .npy .pt .safetensors, module:name, file.py:name; null: the sample beside the model",
        "batch_size": "samples per forward pass",
        "max_samples": "stop after this many samples",
        "workers": "processes that read a data set or arrays ahead",
        "unpack": "what of a batch goes to the model",
        "input_shape": "shape of one sample, for data: random",
        "allow_nonfinite": "measure on inputs that hold NaN or infinite values",
        "device": "where to run: cpu, cuda, mps, or auto for the best there is",
        "device_map": "how accelerate spreads a model over GPUs, memory and disk: evenly, or one full after the other",
        "max_memory": "the most that weights may take on a device, as {0: 20GiB, cpu: 60GiB}",
        "dtype": "type that the weights are cast to for the scan; model: as they are",
        "autocast": "type of torch.autocast, as a model runs that was trained in mixed precision; null: without it",
        "threads": "threads that torch may use; null: as many as it would",
        "seed": "random seed",
        "gates": "measure the gates inside LSTM and GRU too",
        "units": "axis that holds the units, by pattern",
        "call": "method of the model to run",
        "stats": "how much to measure: full; counts (no means); verdict (a unit that fired is not asked again)",
    },
)
_THRESHOLDS = Section(
    {
        "delta": kinds.RATE,
        "p_dead": kinds.RATE,
        "p_rare": kinds.RATE,
        "tau": kinds.SHARE,
        "taus": kinds.SHARES,
        "shallow": kinds.NUMBER,
        "deep": kinds.NUMBER,
        "explosion_growth": kinds.NUMBER,
        "warn_layer_dead": kinds.SHARE,
    },
    {
        "delta": "chance of being wrong that a confidence bound allows",
        "p_dead": "dead: firing rate known to be below this",
        "p_rare": "rare: fires in fewer than this share of the samples",
        "tau": "faint: mean |h| at most this share of the layer's mean",
        "taus": "borders at which the dormant share is reported",
        "shallow": "depth of silent units, in standard deviations of their input",
        "deep": "depth of silent units, in standard deviations of their input",
        "explosion_growth": "largest |h| of a layer over that of the first layer",
        "warn_layer_dead": "share of dead units in a layer that is worth a finding",
    },
)
_POLICY = Section(
    {
        "max_layer_dead": kinds.LIMIT,
        "max_model_dead": kinds.LIMIT,
        "max_new_dead": kinds.LIMIT,
        "max_worse": kinds.LIMIT,
        "compare": one_of("units", "rates"),
        "min_samples": or_none(whole(0)),
        "rules": kinds.LEVELS,
        "layers": Rows(_LAYER),
        "ignores": Rows(_IGNORE),
    },
    {
        "max_model_dead": "share of all units that may be dead (DC002)",
        "compare": "with a baseline: units (same lineage) or rates (trained anew)",
        "min_samples": "samples below which nothing is judged; null: as many as it takes to call a unit dead",
        "rules": "level of a rule: error, warn or off",
        "layers": "what holds for some layers only; the first match holds",
        "ignores": "findings that were looked at and accepted",
        **_LIMITS,
    },
)
SETTINGS = Section(
    {
        "extends": or_none(kinds.PLACE),
        "models": Rows(_MODEL),
        "scan": _SCAN,
        "thresholds": _THRESHOLDS,
        "policy": _POLICY,
    },
    {
        "extends": "a preset (default, ci-strict, ci-ratchet, transformer) or a file, laid under this one",
        "models": "what deadcheck gate judges when no model is named",
        "scan": "how the data is run through the model",
        "thresholds": "borders between verdicts",
        "policy": "what the gate allows",
    },
)

FIELDS: dict[str, tuple[str, ...]] = {
    name: tuple(part.fields) for name, part in SETTINGS.fields.items() if isinstance(part, Section)
}
"""Every setting by section, as a configuration file spells it."""


def kind_of(name: str) -> Kind:
    """Return the kind of a setting, as ``scan.batch_size``."""
    part: Kind | Section | Rows = SETTINGS
    for key in name.split("."):
        assert isinstance(part, Section)
        part = part.fields[key]
    assert isinstance(part, Kind)
    return part


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "deadcheck.yaml",
        **_schema(SETTINGS),
    }


def _schema(part: Kind | Section | Rows) -> Mapping[str, Any]:
    if isinstance(part, Kind):
        return part.schema
    if isinstance(part, Rows):
        return {"anyOf": [{"type": "array", "items": _schema(part.row)}, {"type": "null"}]}
    properties = {name: {"description": part.about[name], **_schema(item)} for name, item in part.fields.items()}
    table: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
    if part.required:
        return {
            "anyOf": [{**table, "required": list(part.required)}, *([{"type": "string"}] if part.shorthand else [])]
        }
    return {**table, "type": ["object", "null"]}
