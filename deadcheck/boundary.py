"""Watches what goes into the model and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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


class InputWatch:
    """Running range, mean and spread of every input tensor, and the elements that never change."""

    def __init__(self, *, allow_nonfinite: bool = False) -> None:
        self.allow_nonfinite = allow_nonfinite
        self._inputs: dict[str, _Running] = {}

    def see(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, samples: int, first_sample: int) -> None:
        """Take in one batch; DataError on NaN or infinite inputs unless they are allowed."""
        for name, tensor in tensors_in({**{f"input {i}": arg for i, arg in enumerate(args)}, **kwargs}):
            if tensor.numel() == 0 or tensor.is_complex() or tensor.is_quantized:
                continue
            running = self._inputs.setdefault(name, _Running(name))
            if not running.see(tensor.detach(), samples) and not self.allow_nonfinite:
                raise DataError(_nonfinite(name, tensor, samples, first_sample))

    def summaries(self) -> tuple[InputSummary, ...]:
        """Return one record per input tensor."""
        return tuple(running.summary() for running in self._inputs.values())


def _nonfinite(name: str, tensor: Tensor, samples: int, first_sample: int) -> str:
    bad = ~tensor.isfinite()
    where = ""
    if tensor.dim() and tensor.shape[0] == samples:
        rows = bad.reshape(samples, -1).any(1)
        where = f"; the first is sample {first_sample + int(rows.to(torch.uint8).argmax())}"
    return (
        f"the data holds NaN or infinite values: {int(bad.sum())} in {name} of the batch from sample {first_sample} on"
        f"{where}; clean the data, or add --allow-nonfinite to measure the model on it all the same"
    )


class _Running:
    def __init__(self, name: str) -> None:
        self.name = name
        self.shape: tuple[int, ...] = ()
        self.dtype = ""
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self.total = self.squares = 0.0
        self._first: Tensor | None = None
        self._changed: Tensor | None = None

    def see(self, tensor: Tensor, samples: int) -> bool:
        """Take in one batch and tell whether all of it is finite."""
        self.dtype = str(tensor.dtype).removeprefix("torch.")
        values = tensor if tensor.dtype == torch.float64 else tensor.float()
        clean = math.isfinite(float(values.sum())) or bool(values.isfinite().all())
        if not clean:
            values = values[values.isfinite()]
        if values.numel():
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.count += values.numel()
            self.total += float(values.sum(dtype=torch.float64))
            self.squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
        self._compare(tensor, samples)
        return clean

    def _compare(self, tensor: Tensor, samples: int) -> None:
        rows = tensor if tensor.dim() and tensor.shape[0] == samples else tensor.unsqueeze(0)
        if self._first is None:
            self._first, self._changed = rows[0].clone(), torch.zeros_like(rows[0], dtype=torch.bool)
            self.shape = tuple(rows[0].shape)
        if rows[0].shape == self._first.shape and self._changed is not None:
            self._changed |= (rows != self._first).any(0)

    def summary(self) -> InputSummary:
        mean = self.total / self.count if self.count else math.nan
        variance = max(self.squares / self.count - mean * mean, 0.0) if self.count else math.nan
        assert self._changed is not None
        return InputSummary(
            name=self.name,
            shape=self.shape,
            dtype=self.dtype,
            min=self.low,
            max=self.high,
            mean=mean,
            sd=math.sqrt(variance),
            features=self._changed.numel(),
            constant_features=int((~self._changed).sum()),
        )


class OutputWatch:
    """Tells whether the model gave one and the same output for every sample."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}
        self._samples = 0
        self._varies = False

    def see(self, output: Any, *, samples: int) -> None:
        """Take in the output of one batch."""
        self._samples += samples
        if self._varies:
            return
        for name, tensor in tensors_in(output, "output"):
            if not tensor.dim() or tensor.shape[0] != samples or not tensor.is_floating_point():
                continue
            first = self._first.setdefault(name, tensor[0].clone())
            if first.shape == tensor.shape[1:] and not bool((tensor == first).all()):
                self._varies = True

    @property
    def constant(self) -> bool | None:
        """Whether every sample gave the same output; None when there was nothing to compare."""
        if not self._first or self._samples < 2:
            return None
        return not self._varies
