"""One batch of arguments for the model, and how batches are cut and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int
    labels: Tensor | None = None
    """Whole numbers, one a sample or more, of an entry that does not go to the model and is named or placed as labels
    are."""


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same nested containers with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield everything inside nested containers that is none, with a name for where it stands."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def picked(value: Any, total: int, index: slice | list[int]) -> Any:
    """Pick samples from everything whose first axis counts them."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value[index] if value.ndim and value.shape[0] == total else value
    if isinstance(value, Mapping):
        return {key: picked(item, total, index) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(picked(item, total, index) for item in value))
    if isinstance(value, (list, tuple)):
        if len(value) == total and not any(isinstance(item, (Tensor, np.ndarray)) for item in value):
            return value[index] if isinstance(index, slice) else type(value)(value[i] for i in index)
        return type(value)(picked(item, total, index) for item in value)
    return value


def part(batch: Batch, index: slice | list[int], samples: int) -> Batch:
    """Pick samples of a batch."""
    args, kwargs = (picked(value, batch.samples, index) for value in (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, samples, None if batch.labels is None else batch.labels[index])


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Divide a batch in two; the second half is the shorter one, and empty for a single sample."""
    middle = (batch.samples + 1) // 2
    return part(batch, slice(middle), middle), part(batch, slice(middle, None), batch.samples - middle)


def _joined(first: Batch, second: Batch) -> Batch:
    """Return the samples of two batches in one."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, Tensor):
            return torch.cat([a, b]) if a.dim() and (len(a), len(b)) == (first.samples, second.samples) else a
        if isinstance(a, Mapping):
            return {key: join(item, b[key]) for key, item in a.items()}
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return type(a)(*map(join, a, b))
        if isinstance(a, (list, tuple)):
            return type(a)(map(join, a, b))
        return a

    args, kwargs = join(first.args, second.args), join(dict(first.kwargs), dict(second.kwargs))
    both = first.labels is not None and second.labels is not None
    return Batch(args, kwargs, first.samples + second.samples, join(first.labels, second.labels) if both else None)


def rebatched(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the same samples in batches of ``size``; the last one may be shorter."""
    held: Batch | None = None
    for batch in batches:
        held = batch if held is None else _joined(held, batch)
        start = 0
        while held.samples - start >= size:
            yield part(held, slice(start, start + size), size)
            start += size
        left = held.samples - start
        held = part(held, slice(start, None), left) if left else None
    if held is not None:
        yield held


def padded(batch: Batch, size: int) -> Batch:
    """Return a batch filled up to ``size`` samples with copies of its last one; ``samples`` stays what it was."""
    missing = size - batch.samples
    return part(batch, [*range(batch.samples), *[batch.samples - 1] * missing], batch.samples) if missing else batch
