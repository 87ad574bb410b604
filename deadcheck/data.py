"""Turns the user's data into batches of arguments for the model."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from deadcheck.batch import Batch, leaves, mapped, part, picked
from deadcheck.data_files import read_data, sha256_of
from deadcheck.entrypoint import resolve
from deadcheck.errors import DataError, UsageError, first_line
from deadcheck.unpacking import Ready, Unpacker, as_tensors

UNSIZED_LIMIT = 10_000
"""Samples taken from data that does not say how long it is."""

_SYNTHETIC_SAMPLES = 256


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


@dataclass
class Batches:
    """Batches to run, in the order of the data. Iterate once, or more often where it ``repeats``."""

    source: str
    raw: Iterable[Any]
    unpacker: Unpacker | Ready
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
                batch = part(batch, slice(self.limit - done), self.limit - done)
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


def example_in(program: str, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> Batches:
    """Return the arguments that a program was exported with, as one sample: which axis counts more is not known."""
    note = (
        "no data was given, so the example inputs in the program were run, as one sample; often they are random "
        "numbers (--data gives a real sample)"
    )
    return Batches(f"{program}: example inputs", [arguments], Ready(), 1, synthetic=True, warnings=[note], as_one=True)


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
        arrays = [v for _, v in leaves(data) if isinstance(v, (Tensor, np.ndarray)) and v.ndim]
        if not arrays:
            raise DataError(f"{source} holds single numbers only; the first axis of the data must count samples")
        lengths = {int(array.shape[0]) for array in arrays}
        if len(lengths) > 1:
            shapes = ", ".join(f"{name or 'data'} {tuple(v.shape)}" for name, v in leaves(data) if hasattr(v, "shape"))
            raise DataError(
                f"the arrays in {source} differ in length along their first axis ({shapes}); make them agree"
            )
        self.total = lengths.pop()
        self._data, self._size = data, size
        self._maps = [a._mmap for a in arrays if isinstance(a, np.memmap) and a.mode == "r"]  # type: ignore[attr-defined]
        as_tensors(picked(data, self.total, slice(0)))  # what no model takes is told before a worker meets it

    def __len__(self) -> int:
        return -(-self.total // self._size)

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        batch = as_tensors(picked(self._data, self.total, slice(number * self._size, (number + 1) * self._size)))
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
