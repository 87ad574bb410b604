"""Decides which parts of an item of the data go to the model, and how many samples they hold."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from deadcheck.batch import Batch, leaves
from deadcheck.errors import DataError, UsageError

_LABEL_NAMES = ("y", "label", "labels", "target", "targets")
_FIRST_NAMES = ("x", "input", "inputs", "image", "images", "data", "features", "arr_0")
_NUMBERS = frozenset(
    f"torch.{name}"
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool", "uint8", "uint16",
                 "uint32", "uint64", "int8", "int16", "int32", "int64")
)  # fmt: skip


class Unpacker:
    """Decides which parts of a batch are arguments of the model."""

    def __init__(self, mode: str, forward: Callable[..., Any] | None) -> None:
        if mode not in ("auto", "first", "args", "kwargs"):
            raise UsageError(f"--unpack {mode!r} is not one of auto, first, args, kwargs")
        self.mode = mode
        self.required, self._positional, self._names, self._any = _parameters(forward)
        self._placed = _by_position(forward)
        self._said: set[str] = set()

    def batch(self, item: Any, warnings: list[str]) -> Batch:
        """Return the arguments that one item of the data stands for."""
        item = as_tensors(item)
        args, kwargs, left = self._split(item)
        note = f"{_few(left)} of the data did not go to the model (--unpack changes that)"
        if left and note not in self._said:
            self._said.add(note)
            warnings.append(note)
        samples, counted = _samples(args, kwargs)
        if counted and "count" not in self._said:
            self._said.add("count")
            warnings.append(counted)
        return Batch(args, kwargs, samples, _labels(item, left, samples))

    def _split(self, item: Any) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
        if isinstance(item, Mapping):
            return self._split_mapping({str(key): value for key, value in item.items()})
        if not isinstance(item, (tuple, list)) or not item:
            return (item,), {}, []
        if self.mode == "kwargs":
            raise DataError("--unpack kwargs needs batches that are dicts, and these are tuples; use args or first")
        count = 1 if self.mode == "first" else len(item) if self.mode == "args" else self._positional_count(len(item))
        return tuple(item[:count]), {}, [f"entry {index}" for index in range(count, len(item))]

    def _positional_count(self, given: int) -> int:
        if self._any:
            return given
        return max(1, min(given, self.required))

    def _split_mapping(self, item: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], list[str]]:
        if self.mode == "args":
            return tuple(item.values()), {}, []
        if self.mode == "kwargs":
            return (), item, []
        taken = {name: value for name, value in item.items() if name in self._names}
        if self.mode == "auto" and taken:
            left = [name for name in item if name not in taken]
            args = tuple(taken.pop(name) for name in self._placed) if taken.keys() >= set(self._placed) else ()
            return args, taken, left
        first = next((name for name in _FIRST_NAMES if name in item), next(iter(item), None))
        if first is None:
            return (), {}, []
        return (item[first],), {}, [name for name in item if name != first]


class Ready:
    """Hands on arguments that need no unpacking."""

    def batch(self, item: Any, warnings: list[str]) -> Batch:
        """Return one item, a pair of arguments and keyword arguments, as one sample."""
        args, kwargs = item
        return Batch(tuple(args), dict(kwargs), 1)


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _labels(item: Any, left: list[str], samples: int) -> Tensor | None:
    """Return the labels among what does not go to the model: by their name, or the first entry after the inputs."""
    if isinstance(item, Mapping):
        value = next((item[name] for name in _LABEL_NAMES if name in left), None)
    else:
        value = item[int(left[0].rpartition(" ")[2])] if left else None
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or not value.dim():
        return None
    return value if value.shape[0] == samples else None


def _parameters(forward: Callable[..., Any] | None) -> tuple[int, int, frozenset[str], bool]:
    """Return how many arguments are required and possible, the names, and whether any number is taken."""
    try:
        parameters = list(inspect.signature(forward).parameters.values()) if forward is not None else []
    except (TypeError, ValueError):
        parameters = []
    if not parameters:
        return 1, 1, frozenset(), False
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    required = sum(p.default is p.empty for p in plain)
    return required, len(plain), names, any(p.kind is p.VAR_POSITIONAL for p in parameters)


def _by_position(forward: Callable[..., Any] | None) -> tuple[str, ...]:
    """Return the parameters of an exported program that it takes by position alone, as it was exported."""
    program = getattr(forward, "__self__", None)
    spec = getattr(program, "_in_spec", None)
    if not isinstance(program, fx.GraphModule) or spec is None:
        return ()
    keywords = spec.children()[1].context or ()
    return tuple(name for name in inspect.signature(program.forward).parameters if name not in keywords)


def as_tensors(value: Any) -> Any:
    """Turn arrays into tensors and detach; strings and other things pass."""
    if isinstance(value, Tensor):
        if str(value.dtype) not in _NUMBERS:
            raise DataError(f"a tensor of {value.dtype} cannot go to a model; give numbers of a usual type")
        return value.detach()
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            raise DataError(f"an array of {value.dtype} cannot go to a model; give numbers")
        try:
            # A copy, since a memory map of a file is read-only and torch has no such thing.
            return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), copy=True))
        except TypeError as error:
            raise DataError(f"torch has no type for an array of {value.dtype}; give float32, say") from error
    if isinstance(value, Mapping):
        return {key: as_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(as_tensors, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_tensors, value))
    return value


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, str | None]:
    """Return how many samples the arguments hold, and what has to be said about that."""
    entries = chain(leaves(list(args), "input "), leaves(dict(kwargs)))
    sizes = [(name, int(value.shape[0])) for name, value in entries if isinstance(value, Tensor) and value.dim()]
    if sizes:
        # Most inputs agree: an edge list or a mask of tokens is as long as something else.
        samples = Counter(size for _, size in sizes).most_common(1)[0][0]
        others = [f"{name} {size}" for name, size in sizes if size not in (samples, 1)]
        told = next(name for name, size in sizes if size == samples)
        note = f"samples were counted along {told} ({samples}); not as long along axis 0: {', '.join(others[:3])}"
        return samples, note if others else None
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            return len(value), None
    return 1, "the data has no tensor whose first axis counts samples; each batch counts as one sample"
