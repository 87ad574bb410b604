"""Counts the inputs that a model gives its activations, for a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deadcheck import pipeline
from deadcheck.config import Config
from deadcheck.curve import BINS, HIGH, LOW, Curve
from deadcheck.errors import NothingMeasured
from deadcheck.formats import LoadOptions, open_model
from deadcheck.patch_plan import Replacement
from deadcheck.remedies.slope import matches
from deadcheck.sites import Family

_FAMILIES = (Family.RECTIFIER, Family.CLIPPED, Family.LEAKY)


@dataclass
class _Counts:
    record: Any
    bins: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))
    below: int = 0
    above: int = 0
    negative: int = 0
    total: int = 0


class PreActivations:
    """Watches a probe and counts the inputs of every ReLU and leaky activation; NaN is not counted."""

    def __init__(self) -> None:
        self.counts: dict[int, _Counts] = {}

    def __call__(self, probe: Any, record: Any, z: Tensor, flow: Any) -> None:
        """Take in the inputs of one call."""
        if record is None or record.activation.family not in _FAMILIES:
            return
        seen = self.counts.setdefault(id(record), _Counts(record))
        values = z.detach().double().flatten()
        values = values[~values.isnan()]
        index = torch.floor((values - LOW) * (BINS / (HIGH - LOW))).clamp(-1, BINS).long() + 1
        # One part for what lies below the picture and one for what lies above it.
        parts = torch.bincount(index, minlength=BINS + 2).cpu()
        seen.bins += parts[1:-1]
        seen.below += int(parts[0])
        seen.above += int(parts[-1])
        seen.negative += int((values < 0).sum())
        seen.total += values.numel()


def curve_of(
    path: Path, load: LoadOptions, config: Config, replacement: Replacement, layers: tuple[str, ...] = ()
) -> Curve:
    """Run a saved model over its data and return the curve above its inputs; NothingMeasured where no site fits."""
    loaded = open_model(path, load)
    loaded.module.to(torch.device(config.scan.device))
    watch = PreActivations()
    batches = pipeline.open_data(config.scan.data, config.scan, loaded)
    measurement = pipeline.measure(loaded, batches, config.scan, watch=watch)
    chosen = [c for c in watch.counts.values() if matches(c.record.key, (c.record.module,), layers)]
    if not sum(c.total for c in chosen):
        known = ", ".join(stats.site.key for stats in measurement.sites[:5])
        which = " that --layers names" if layers else ""
        raise NothingMeasured(f"no ReLU or leaky activation{which} ran; these sites did: {known}")
    return Curve(
        model=str(path),
        replacement=replacement,
        sites=len(chosen),
        samples=measurement.data.samples,
        counts=tuple(torch.stack([c.bins for c in chosen]).sum(0).tolist()),
        below=sum(c.below for c in chosen),
        above=sum(c.above for c in chosen),
        negative=sum(c.negative for c in chosen),
        total=sum(c.total for c in chosen),
    )
