"""Counts by brute force, over whole activations kept in lists; knows nothing of deadcheck.

A model of the zoo says in its own ``reference`` what each activation's input and output are: it calls ``keep`` with
them, arranged as (samples, positions, units). Everything is then counted with numpy, one value at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


def arranged(tensor: Tensor, sample: int, unit: int) -> np.ndarray:
    """Return the values as (samples, positions, units), by naming the two axes."""
    rest = [dim for dim in range(tensor.dim()) if dim not in (sample % tensor.dim(), unit % tensor.dim())]
    moved = tensor.detach().permute(sample % tensor.dim(), *rest, unit % tensor.dim())
    return moved.to(torch.float64, copy=True).reshape(moved.shape[0], -1, moved.shape[-1]).numpy()


@dataclass
class Kept:
    """All that one site did, as lists of whole activations."""

    on: Callable[[np.ndarray, np.ndarray], np.ndarray]
    inputs: list[np.ndarray] = field(default_factory=list)
    outputs: list[np.ndarray] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    """Index in the data of each row."""


@dataclass
class Oracle:
    """Keeps what models hand to it."""

    sites: dict[str, Kept] = field(default_factory=dict)
    first: int = 0

    def keep(
        self, key: str, z: Tensor, h: Tensor, *, sample: int = 0, unit: int = 1,
        on: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda z, h: h > 0, rows: np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """Remember one call of the site ``key`` and return its output."""
        if not z.numel():
            return h
        site = self.sites.setdefault(key, Kept(on))
        site.inputs.append(arranged(z, sample, unit))
        site.outputs.append(arranged(h, sample, unit))
        count = site.inputs[-1].shape[0]
        site.samples.append(self.first + (np.arange(count) if rows is None else rows))
        return h


class LeakyOracle(Oracle):
    """Lets a reference compute the leaky model: at the chosen sites, ``alpha * z`` instead of 0.

    ``sites`` maps a key to the units to change, or to None for all; ``changed`` gathers what was met.
    """

    def __init__(self, sites: dict[str, list[int] | None], alpha: float) -> None:
        super().__init__()
        self.chosen, self.alpha = sites, alpha
        self.changed: set[str] = set()

    def keep(self, key: str, z: Tensor, h: Tensor, *, unit: int = 1, **where: object) -> Tensor:
        if key not in self.chosen:
            return h
        self.changed.add(key)
        units = self.chosen[key]
        leaky = torch.where(z > 0, h, z * self.alpha)
        if units is None:
            return leaky
        mask = torch.zeros(z.shape[unit], dtype=torch.bool)
        mask[units] = True
        return torch.where(mask.view([-1 if dim == unit % z.dim() else 1 for dim in range(z.dim())]), leaky, h)


@dataclass(frozen=True)
class Counts:
    """What was counted at one site."""

    samples: int
    observations: int
    zeros: list[int]
    fired: list[int]
    first_fired: list[int]
    nonfinite: list[int]
    input_range: list[tuple[float, float]]
    output_range: list[tuple[float, float]]


def count(site: Kept) -> Counts:
    """Count one site by loops over its units and samples."""
    z = np.concatenate([a.reshape(-1, a.shape[2]) for a in site.inputs])
    h = np.concatenate([a.reshape(-1, a.shape[2]) for a in site.outputs])
    fired: list[set[int]] = [set() for _ in range(z.shape[1])]
    seen: set[int] = set()
    for inputs, outputs, indices in zip(site.inputs, site.outputs, site.samples, strict=True):
        on = site.on(inputs, outputs)
        for row, index in enumerate(indices):
            seen.add(int(index))
            for unit in range(on.shape[2]):
                if bool(on[row, :, unit].any()):
                    fired[unit].add(int(index))
    units = range(z.shape[1])
    return Counts(
        samples=len(seen),
        observations=len(z),
        zeros=[sum(1 for value in h[:, u] if value == 0) for u in units],
        fired=[len(fired[u]) for u in units],
        first_fired=[min(fired[u], default=-1) for u in units],
        nonfinite=[int((~np.isfinite(z[:, u]) | ~np.isfinite(h[:, u])).sum()) for u in units],
        input_range=[(float(z[:, u].min()), float(z[:, u].max())) for u in units],
        output_range=[(float(h[:, u].min()), float(h[:, u].max())) for u in units],
    )


@torch.no_grad()
def observe(reference: Callable[[Oracle, Tensor], object], data: Tensor, batch_size: int) -> dict[str, Counts]:
    """Run a model's reference over the data and count every site."""
    oracle = Oracle()
    for batch in data.split(batch_size):
        reference(oracle, batch)
        oracle.first += len(batch)
    return {key: count(site) for key, site in oracle.sites.items()}
