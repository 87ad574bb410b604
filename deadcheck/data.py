"""Turns the user's data into batches of arguments for the model."""

from __future__ import annotations

import inspect
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from deadcheck.data_files import read_data, sha256_of
from deadcheck.entrypoint import resolve
from deadcheck.errors import DataError, UsageError, first_line

UNSIZED_LIMIT = 10_000
"""Samples taken from data that does not say how long it is."""

_SYNTHETIC_SAMPLES = 256
_FIRST_NAMES = ("x", "input", "inputs", "image", "images", "data", "features", "arr_0")
_LABEL_NAMES = ("y", "label", "labels", "target", "targets")


@dataclass(frozen=True)
class DataOptions:
    """How data is cut into batches and handed to the model."""

    batch_size: int = 64
    max_samples: int | None = None
    unpack: str = "auto"
    """What of a batch goes to the model: auto, first, args or kwargs."""

    seed: int = 0
    input_shape: tuple[int, ...] | None = None
    """Shape of one sample, for ``random``."""

    workers: int = 0
    """Processes that read ahead; with none, batches are read when they are wanted."""

    pin: bool = False
    """Whether batches go to a GPU, and so are best read into memory that it can copy from by itself."""


@dataclass(frozen=True)
class Batch:
    """Arguments of one forward pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    samples: int
    labels: Tensor | None = None
    """Whole numbers, one a sample or more, of an entry that does not go to the model and is named or placed as labels
    are."""


@dataclass
class Batches:
    """Batches to run, in the order of the data. Iterate once, or more often where it ``repeats``."""

    source: str
    raw: Iterable[Any]
    unpacker: Unpacker | _Ready
    total: int | None = None
    """Samples to come, where that is known."""

    limit: int | None = None
    sha256: str | None = None
    synthetic: bool = False
    warnings: list[str] = field(default_factory=list)
    """Grows while batches are read."""

    as_one: bool = False
    """Whether each batch is one sample, to be run as it is."""

    pinned: bool = False
    """Whether each batch is read into pinned memory of its own: a copy to a GPU need not be waited for."""

    @property
    def repeats(self) -> bool:
        """Whether iterating again gives the same data: of a stream, that cannot be known."""
        if isinstance(self.raw, DataLoader):
            return not isinstance(self.raw.dataset, IterableDataset)
        return isinstance(self.raw, (_Slices, _Drawn, list, tuple))

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches until the data or the limit ends; DataError where the data raises."""
        done, number = 0, 0
        iterator = self._start()
        while self.limit is None or done < self.limit:
            number += 1
            try:
                item = next(iterator)
            except StopIteration:
                return
            except (
                OSError,
                ValueError,
                RuntimeError,
                TypeError,
                LookupError,
                AttributeError,
                ArithmeticError,
            ) as error:
                raise DataError(
                    f"{self.source} raised {type(error).__name__} at batch {number} ({first_line(error)}), "
                    f"after {done} samples; correct the loader"
                ) from error
            batch = self.unpacker.batch(item, self.warnings)
            if self.limit is not None and done + batch.samples > self.limit:
                batch = _part(batch, slice(self.limit - done), self.limit - done)
            done += batch.samples
            yield batch
        self._say_unsized(done)

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self.raw)
        except Exception as error:  # the user's own iterable may raise anything
            raise DataError(f"{self.source} cannot be iterated ({error}); give batches") from error

    def _say_unsized(self, done: int) -> None:
        if self.limit == UNSIZED_LIMIT and self.total is None:
            self.warnings.append(
                f"the data does not say how long it is; stopped after {done} samples (see --max-samples)"
            )


class _Ready:
    """Hands on arguments that need no unpacking."""

    def batch(self, item: Any, warnings: list[str]) -> Batch:
        args, kwargs = item
        return Batch(tuple(args), dict(kwargs), 1)


def example_in(program: str, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Batches:
    """Return the arguments that a program was exported with, as one sample: which axis counts more is not known."""
    note = (
        "no data was given, so the example inputs in the program were run, as one sample; often they are random "
        "numbers (--data gives a real sample)"
    )
    return Batches(f"{program}: example inputs", [arguments], _Ready(), 1, synthetic=True, warnings=[note], as_one=True)


def open_data(source: object, options: DataOptions, *, forward: Callable[..., Any] | None = None) -> Batches:
    """Open a file, a ``module:name``, ``random``, or a live object (tensor, dict, loader, dataset, iterable).

    ``forward`` is the method that will take the batches; its parameters decide what ``unpack="auto"`` hands over.
    """
    unpacker = Unpacker(options.unpack, forward)
    if isinstance(source, (str, Path)):
        if str(source) == "random":
            return _random(options, unpacker)
        if _is_entry(str(source)):
            return _opened(_called(resolve(str(source)), str(source)), str(source), options, unpacker)
        path = Path(source)
        return _opened(read_data(path), str(source), options, unpacker, sha256=sha256_of(path))
    name = type(source).__name__
    return _opened(_called(source, name), name, options, unpacker)


def _is_entry(text: str) -> bool:
    """Tell ``package.module:name`` from a path; a path that exists wins."""
    before, colon, name = text.rpartition(":")
    return bool(colon and before) and name.replace(".", "").isidentifier() and not os.path.exists(text)


def _called(value: Any, source: str) -> Any:
    """Return what a function gives that makes data, or the value itself."""
    if not _is_factory(value):
        return value
    try:
        return value()
    except Exception as error:  # the user's own function may raise anything
        raise DataError(
            f"{source} raised {type(error).__name__} when called without arguments ({first_line(error)[:200]}); "
            "give a function that needs none and returns a loader, or the loader itself"
        ) from error


def _is_factory(value: object) -> bool:
    return callable(value) and not isinstance(value, (Tensor, Dataset, DataLoader)) and not hasattr(value, "__iter__")


def _opened(
    data: Any,
    source: str,
    options: DataOptions,
    unpacker: Unpacker,
    *,
    sha256: str | None = None,
    synthetic: bool = False,
) -> Batches:
    warnings: list[str] = []
    raw: Iterable[Any]
    total: int | None
    data = tuple(data) if _is_side_by_side(data, unpacker) else data
    if isinstance(data, (Tensor, np.ndarray)) or _holds_arrays(data):
        slices = _Slices(data, source, options.batch_size)
        total, raw = slices.total, _read(slices, options) if options.workers else slices
    elif _is_map_style(data):
        total, raw = len(data), _read(data, options)
    elif options.workers:
        raise UsageError(_not_for_workers(data, source, options.workers))
    elif isinstance(data, DataLoader):
        total, raw = _loader_length(data), data
        if isinstance(data.sampler, RandomSampler):
            warnings.append("the DataLoader shuffles, so sample numbers and the sample itself change between runs")
        if data.batch_size is not None and data.batch_size != options.batch_size:
            warnings.append(f"the DataLoader's own batch size of {data.batch_size} was used")
    elif isinstance(data, IterableDataset):
        total, raw = None, DataLoader(data, options.batch_size)
    elif isinstance(data, Iterable):
        total, raw = None, data
    else:
        raise DataError(
            f"{source} is a {type(data).__name__}, not data; give a tensor, array, dict, loader, data set or iterable"
        )
    limit = options.max_samples
    sized = total is not None or isinstance(data, list)
    if limit is None and not sized:
        limit = UNSIZED_LIMIT
    if limit is not None and total is not None:
        total = min(total, limit)
    pinned = options.pin and isinstance(raw, DataLoader) and raw.pin_memory
    return Batches(source, raw, unpacker, total, limit, sha256, synthetic, warnings, pinned=pinned)


def _not_for_workers(data: object, source: str, workers: int) -> str:
    """Say why no workers can read this data."""
    if isinstance(data, DataLoader):
        return f"--workers {workers}: {source} is a DataLoader; give it num_workers, and leave --workers out"
    return (
        f"--workers {workers}: {source} is a {type(data).__name__}, which can only be read from its start to its end; "
        "give a Dataset or arrays, or leave --workers out"
    )


def _loader_length(loader: DataLoader[Any]) -> int | None:
    try:
        return len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        return None


def _holds_arrays(data: object) -> bool:
    """Tell whether a dict, tuple or list is whole data to be cut, rather than a list of batches."""
    if isinstance(data, Mapping):
        return any(isinstance(value, (Tensor, np.ndarray)) for value in data.values())
    if isinstance(data, tuple):
        return any(isinstance(value, (Tensor, np.ndarray)) for value in data)
    return False


def _is_side_by_side(data: object, unpacker: Unpacker) -> bool:
    """Tell a list of arrays of the same samples, as [x, y], from a list of batches, which differ in length alone."""
    if not isinstance(data, list) or not all(isinstance(item, (Tensor, np.ndarray)) and item.ndim for item in data):
        return False
    shapes = [tuple(item.shape) for item in data]
    same = len({shape[0] for shape in shapes}) == 1 and len(data) > 1
    return same and (len(set(shapes)) > 1 or len(data) == unpacker.required)


def _is_map_style(data: Any) -> bool:
    """Tell a data set of samples by number; it need be no subclass of Dataset."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    if isinstance(data, (DataLoader, list, tuple, Mapping, str)):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


class _Slices:
    """Arrays cut into batches along their first axis, which all of them share."""

    def __init__(self, data: Any, source: str, size: int) -> None:
        arrays = [v for _, v in _leaves(data) if isinstance(v, (Tensor, np.ndarray)) and v.ndim]
        if not arrays:
            raise DataError(f"{source} holds single numbers only; the first axis of the data must count samples")
        lengths = {int(array.shape[0]) for array in arrays}
        if len(lengths) > 1:
            shapes = ", ".join(f"{name or 'data'} {tuple(v.shape)}" for name, v in _leaves(data) if hasattr(v, "shape"))
            raise DataError(
                f"the arrays in {source} differ in length along their first axis ({shapes}); make them agree"
            )
        self.total = lengths.pop()
        self._data, self._size = data, size
        self._maps = [a._mmap for a in arrays if isinstance(a, np.memmap) and a.mode == "r"]  # type: ignore[attr-defined]
        _as_tensors(_picked(data, self.total, slice(0)))  # what no model takes is told before a worker meets it

    def __len__(self) -> int:
        return -(-self.total // self._size)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = _as_tensors(_picked(self._data, self.total, slice(number * self._size, (number + 1) * self._size)))
        for pages in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):  # what was read of the file would stay as this process's memory
                pages.madvise(mmap.MADV_DONTNEED)
        return batch


def _read(data: Any, options: DataOptions) -> DataLoader[Any]:
    """Return the batches of a data set, or arrays in batches, in the order of the data; workers read them ahead."""
    is_cut = isinstance(data, _Slices)
    each = options.batch_size if is_cut else 1
    limit = len(data) if options.max_samples is None else min(len(data), -(-options.max_samples // each))
    return DataLoader(
        data,
        None if is_cut else options.batch_size,
        sampler=range(limit),
        num_workers=options.workers,
        collate_fn=_own if is_cut else None,
        pin_memory=options.pin,
        # Else it takes its seed from the numbers that the model draws from.
        generator=torch.Generator().manual_seed(options.seed),
    )


def _own(batch: Any) -> Any:
    """Return tensors with memory of their own: of a slice, a worker would send all of what it was cut from."""
    return mapped(batch, Tensor.clone)


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


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def _picked(value: Any, total: int, index: slice | list[int]) -> Any:
    """Pick samples from everything whose first axis counts them."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value[index] if value.ndim and value.shape[0] == total else value
    if isinstance(value, Mapping):
        return {key: _picked(item, total, index) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_picked(item, total, index) for item in value))
    if isinstance(value, (list, tuple)):
        if len(value) == total and not any(isinstance(item, (Tensor, np.ndarray)) for item in value):
            return value[index] if isinstance(index, slice) else type(value)(value[i] for i in index)
        return type(value)(_picked(item, total, index) for item in value)
    return value


def _part(batch: Batch, index: slice | list[int], samples: int) -> Batch:
    """Pick samples of a batch."""
    args, kwargs = (_picked(part, batch.samples, index) for part in (batch.args, dict(batch.kwargs)))
    return Batch(args, kwargs, samples, None if batch.labels is None else batch.labels[index])


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Divide a batch in two; the second half is the shorter one, and empty for a single sample."""
    middle = (batch.samples + 1) // 2
    return _part(batch, slice(middle), middle), _part(batch, slice(middle, None), batch.samples - middle)


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
            yield _part(held, slice(start, start + size), size)
            start += size
        left = held.samples - start
        held = _part(held, slice(start, None), left) if left else None
    if held is not None:
        yield held


def padded(batch: Batch, size: int) -> Batch:
    """Return a batch filled up to ``size`` samples with copies of its last one; ``samples`` stays what it was."""
    missing = size - batch.samples
    return _part(batch, [*range(batch.samples), *[batch.samples - 1] * missing], batch.samples) if missing else batch


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
        item = _as_tensors(item)
        args, kwargs, left = self._split(item)
        if (
            left
            and (note := f"{_few(left)} of the data did not go to the model (--unpack changes that)") not in self._said
        ):
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


def _as_tensors(value: Any) -> Any:
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
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_as_tensors, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_tensors, value))
    return value


_NUMBERS = frozenset(
    f"torch.{name}"
    for name in ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool", "uint8", "uint16",
                 "uint32", "uint64", "int8", "int16", "int32", "int64")
)  # fmt: skip


def _samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, str | None]:
    """Return how many samples the arguments hold, and what has to be said about that."""
    leaves = chain(_leaves(list(args), "input "), _leaves(dict(kwargs)))
    sizes = [(name, int(value.shape[0])) for name, value in leaves if isinstance(value, Tensor) and value.dim()]
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


def _random(options: DataOptions, unpacker: Unpacker) -> Batches:
    if options.input_shape is None:
        raise UsageError("random data needs the shape of one sample; add --input-shape 3,32,32")
    if options.workers:
        raise UsageError(f"--workers {options.workers}: random numbers are drawn and not read; leave --workers out")
    total = options.max_samples or _SYNTHETIC_SAMPLES
    note = "the inputs are random numbers: they show nothing about which units are dead on real data"
    return Batches("random", _Drawn(options, total), unpacker, total, total, None, True, [note])


@dataclass(frozen=True)
class _Drawn:
    """Batches of random numbers, the same each time."""

    options: DataOptions
    total: int

    def __iter__(self) -> Iterator[Tensor]:
        generator, size = torch.Generator().manual_seed(self.options.seed), self.options.batch_size
        for start in range(0, self.total, size):
            yield torch.randn(min(size, self.total - start), *(self.options.input_shape or ()), generator=generator)
