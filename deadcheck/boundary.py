"""Watches what goes into the model and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deadcheck import kernel
from deadcheck.errors import DataError
from deadcheck.sites import InputSummary


def tensors_in(value: Any, name: str = "", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors inside nested containers, dataclasses and mappings, each with its name there."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items: Any = ()
    if depth and isinstance(value, Mapping):
        items = value.items()
    elif depth and isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif depth and hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        items = ((field, getattr(value, field, None)) for field in value.__dataclass_fields__)
    for key, item in items:
        yield from tensors_in(item, f"{name}.{key}" if name else str(key), depth - 1)


@dataclass
class InputState:
    """What was seen of one input tensor so far."""

    name: str
    shape: tuple[int, ...]
    """Shape of one sample."""

    dtype: str
    first: Tensor
    """The first sample of all."""

    changed: Tensor
    """Which of its elements had another value in another sample."""

    count: int = 0
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0
    rest: tuple[float, float] = (0.0, 0.0)
    """What rounding dropped from the two sums, so that they come out the same in any order."""

    same: Tensor | None = None
    """Indices of the elements that have not changed, where they were looked for."""

    def add(self, count: int, low: float, high: float, sums: tuple[float, float], rest: tuple[float, float]) -> None:
        """Add the finite values of other samples."""
        self.count += count
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total, dropped = _two_sum(self.total, sums[0])
        self.squares, dropped_square = _two_sum(self.squares, sums[1])
        self.rest = self.rest[0] + rest[0] + dropped, self.rest[1] + rest[1] + dropped_square

    def compare(self, rows: Tensor) -> None:
        """Note which elements of these samples are not as in the first; what has changed once is not asked again."""
        if rows.shape[1:] != self.first.shape:
            return
        if self.same is None:
            self.changed = self.changed | (rows != self.first).any(0)
            self.same = (~self.changed).flatten().nonzero().squeeze(1)
        elif self.same.numel():
            differ = (rows.reshape(len(rows), -1)[:, self.same] != self.first.flatten()[self.same]).any(0)
            self.changed = self.changed.flatten().index_put((self.same,), differ).view(self.first.shape)
            self.same = self.same[~differ]

    def merge(self, other: InputState) -> None:
        """Add what was seen of other samples by another watch."""
        self.add(other.count, other.low, other.high, (other.total, other.squares), other.rest)
        if self.first.shape == other.first.shape:
            self.changed = self.changed | other.changed | (self.first != other.first)
            self.same = None

    def summary(self) -> InputSummary:
        """Return the range, mean and spread."""
        total, squares = self.total + self.rest[0], self.squares + self.rest[1]
        mean = total / self.count if self.count else math.nan
        variance = max(squares / self.count - mean * mean, 0.0) if self.count else math.nan
        return InputSummary(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            min=self.low,
            max=self.high,
            mean=mean,
            sd=math.sqrt(variance),
            features=self.changed.numel(),
            constant_features=int((~self.changed).sum()),
        )


def _two_sum(a: float, b: float) -> tuple[float, float]:
    """Return a sum and what rounding drops from it (Knuth, TAOCP 2, 4.2.2)."""
    total = a + b
    back = total - a
    dropped = (a - (total - back)) + (b - back)
    return total, dropped if math.isfinite(dropped) else 0.0


class InputWatch:
    """Running range, mean and spread of every input tensor, and the elements that never change."""

    def __init__(self, *, allow_nonfinite: bool = False) -> None:
        self.allow_nonfinite = allow_nonfinite
        self.states: dict[str, InputState] = {}

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, samples: int, first_sample: int) -> None:
        """Take in one batch; DataError on NaN or infinite inputs unless they are allowed."""
        for name, tensor in tensors_in({**{f"input {i}": arg for i, arg in enumerate(args)}, **kwargs}):
            if tensor.numel() == 0 or tensor.is_complex() or tensor.is_quantized:
                continue
            if not self._add(name, tensor.detach(), samples) and not self.allow_nonfinite:
                raise DataError(_nonfinite(name, tensor, samples, first_sample))

    def _add(self, name: str, tensor: Tensor, samples: int) -> bool:
        """Take in one tensor and tell whether all of it is finite."""
        rows = tensor if tensor.dim() and tensor.shape[0] == samples else tensor.unsqueeze(0)
        state = self.states.get(name)
        if state is None:
            first = rows[0].clone()
            changed = torch.zeros_like(first, dtype=torch.bool)
            state = self.states[name] = InputState(name, tuple(first.shape), "", first, changed)
        state.dtype = str(tensor.dtype).removeprefix("torch.")
        state.compare(rows)
        values = tensor if tensor.dtype == torch.float64 else tensor.float()
        told = kernel.moments_of(values)
        if told is not None:
            state.add(values.numel(), told[0], told[1], told[2:], (0.0, 0.0))
            return True
        clean = math.isfinite(float(values.sum())) or bool(values.isfinite().all())
        if not clean:
            values = values[values.isfinite()]
        if values.numel():
            low, high = values.aminmax()
            squares = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            sums = float(values.sum(dtype=torch.float64)), squares
            state.add(values.numel(), float(low), float(high), sums, (0.0, 0.0))
        return clean

    def summaries(self) -> tuple[InputSummary, ...]:
        """Return one record per input tensor."""
        return tuple(state.summary() for state in self.states.values())


def _nonfinite(name: str, tensor: Tensor, samples: int, first_sample: int) -> str:
    bad = ~tensor.isfinite()
    where = ""
    if tensor.dim() and tensor.shape[0] == samples:
        rows = bad.reshape(samples, -1).any(1)
        where = f"; the first is sample {first_sample + int(rows.to(torch.uint8).argmax())}"
    ends = " (float16 ends at 65504)" if tensor.dtype is torch.float16 else ""
    return (
        f"the data holds NaN or infinite values: {int(bad.sum())} in {name} of the batch from sample {first_sample} on"
        f"{where}; clean the data{ends}, or add --allow-nonfinite to measure the model on it all the same"
    )


class OutputWatch:
    """Tells whether the model gave one and the same output for every sample."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.samples = 0
        self.varies = False

    def see(self, output: Any, *, samples: int) -> None:
        """Take in the output of one batch."""
        self.samples += samples
        if self.varies:
            return
        for name, tensor in tensors_in(output, "output"):
            if not tensor.dim() or tensor.shape[0] != samples or not tensor.is_floating_point():
                continue
            first = self.first.setdefault(name, tensor[0].clone())
            if first.shape == tensor.shape[1:] and not bool((tensor == first).all()):
                self.varies = True

    def merge(self, other: OutputWatch) -> None:
        """Add what another watch saw of other samples."""
        self.samples += other.samples
        self.varies |= other.varies
        for name, first in other.first.items():
            mine = self.first.setdefault(name, first)
            self.varies |= mine.shape == first.shape and not bool((mine == first).all())

    @property
    def constant(self) -> bool | None:
        """Whether every sample gave the same output; None when there was nothing to compare."""
        if not self.first or self.samples < 2:
            return None
        return not self.varies
