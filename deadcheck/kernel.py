"""The compiled count of one site: one pass over the memory of a call for every statistic.

It takes float32 on a CPU. Where it is not built, or a value is not finite, ``torch_kernel`` gives the same integers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deadcheck.activations import Activation
from deadcheck.sites import Family

try:
    from deadcheck import _counting
except ImportError:  # no compiler where it was installed
    _BUILT = False
else:
    _BUILT = True


def _use_threads() -> None:
    """Let the kernel run on the threads that torch's operators run on, where they are OpenMP's."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = library.GOMP_parallel, library.omp_get_thread_num
        _counting.use_threads(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions))


if _BUILT:
    _use_threads()


class Kind(IntEnum):
    """What is counted in one pass; the numbers are those of ``_counting.c``."""

    RECTIFIER = 0
    """An input whose output is ``max(x, 0)``: the output's statistics follow from it."""

    INPUT = 1
    SQUASHED = 2
    OUTPUT = 3
    CLIPPED = 4
    """A RECTIFIER with a ceiling."""


def is_built() -> bool:
    """Tell whether the compiled kernel can be used here."""
    return _BUILT


WRITTEN = {
    torch.ops.aten.relu.default: False, torch.ops.aten.relu_.default: True,
    torch.ops.aten.hardtanh.default: False, torch.ops.aten.hardtanh_.default: True,
}  # fmt: skip
"""Operators whose output the kernel can write, and whether they do so in place."""


def writes_as_torch() -> bool:
    """Tell whether the kernel writes the very bits that torch does here, zeros and tiny numbers included."""
    x = torch.tensor([-0.0, 0.0, 1.0, -1.0, 1e-42, -1e-42, math.inf, -math.inf, 6.0, 7.0] * 9)
    totals = {name: torch.zeros(1, dtype=torch.int64 if name in _COUNTS else torch.float64) for name in TOTALS}
    out, at = torch.empty_like(x), tuple(totals[name].data_ptr() for name in TOTALS)

    def is_same(kind: Kind, high: float, run: Callable[[Tensor], Tensor]) -> bool:
        _counting.count(kind, False, x.data_ptr(), 1, 1, len(x), at, 0, 0, 0, 0.0, high, 0.0, 1, out.data_ptr())
        return torch.equal(run(x.clone()).view(torch.int32), out.view(torch.int32))

    relus = all(is_same(Kind.RECTIFIER, math.inf, run) for run in (torch.relu, torch.relu_))
    clips = (lambda x: F.hardtanh(x, 0, 6), lambda x: F.hardtanh_(x, 0, 6))
    return relus and all(is_same(Kind.CLIPPED, 6.0, run) for run in clips)


TINY = 2.0**-126
"""A ceiling below this may be 0 as a float, and so is every output then."""

_MULTIPLY = ("leaky_relu", "prelu", "rrelu", "elu")
"""Rectifiers with a slope of 0, where an input of minus infinity gives 0 * -inf, which is NaN and not 0."""


class Kernel:
    """Counts the calls of one site into totals that stay where they are."""

    def __init__(self, activation: Activation, totals: Mapping[str, Tensor]) -> None:
        self._totals = tuple(totals[name].data_ptr() for name in TOTALS)
        self._held = totals
        self._n_units = len(totals["zeros"])
        self.asked: Tensor | None = None
        """Which units are counted, shape (units,); None for all. What the totals say of others is nothing."""

        self._borders = (activation.low, activation.high, activation.on)
        if activation.family is Family.SQUASHING:
            self.input_kind = Kind.SQUASHED
        elif activation.family is Family.RECTIFIER and activation.low == 0 and activation.name not in _MULTIPLY:
            self.input_kind = Kind.RECTIFIER
        elif activation.family is Family.CLIPPED and activation.low == 0 and activation.high > TINY:
            self.input_kind = Kind.CLIPPED
        else:
            self.input_kind = Kind.INPUT

    @property
    def rectifies(self) -> bool:
        """Whether the output is counted with the input, and can be written."""
        return self.input_kind in (Kind.RECTIFIER, Kind.CLIPPED)

    def count_input(
        self, z: Tensor, rows: int, positions: int, unfired: Tensor | None, on: Tensor, *, units_last: bool
    ) -> bool:
        """Count an input and set ``on``, shape (rows, units), to what was on; if it cannot, return False.

        ``z`` is float32 and contiguous, of shape (rows, units, positions), or (rows, positions, units). Its moments are
        summed for the units that are ``unfired``.
        """
        return self._count(self.input_kind, z, rows, positions, unfired, on, None, units_last=units_last)

    def count_output(self, h: Tensor, rows: int, positions: int, *, units_last: bool) -> bool:
        """Count an output; False, with nothing counted, if it cannot. A rectifier's was counted with its input."""
        return self.rectifies or self._count(Kind.OUTPUT, h, rows, positions, None, None, None, units_last=units_last)

    def rectify(
        self, z: Tensor, rows: int, positions: int, unfired: Tensor | None, on: Tensor, out: Tensor, *, units_last: bool
    ) -> None:
        """Count a rectifier's input as ``count_input`` does; write its output to ``out``, which may be ``z``."""
        self._count(self.input_kind, z, rows, positions, unfired, on, out, units_last=units_last)

    def _count(
        self,
        kind: Kind,
        x: Tensor,
        rows: int,
        positions: int,
        unfired: Tensor | None,
        on: Tensor | None,
        out: Tensor | None,
        *,
        units_last: bool,
    ) -> bool:
        return _counting.count(
            kind,
            units_last or positions == 1,  # the same memory, and rows of 1 are slow
            x.data_ptr(),
            rows,
            self._n_units,
            positions,
            self._totals,
            0 if unfired is None else unfired.data_ptr(),
            0 if self.asked is None else self.asked.data_ptr(),
            0 if on is None else on.data_ptr(),
            *self._borders,
            torch.get_num_threads(),
            0 if out is None else out.data_ptr(),
        )


TOTALS = (
    "input_min", "input_max", "output_min", "output_max", "positive", "zeros", "flat", "nonfinite",
    "output_sum", "output_abs_sum", "output_square_sum", "silent_input_sum", "silent_input_square_sum",
)  # fmt: skip
"""Names of the totals, in the order in which ``_counting.c`` takes their addresses."""

_COUNTS = ("positive", "zeros", "flat", "nonfinite")


def moments_of(values: Tensor) -> tuple[float, float, float, float] | None:
    """Return the least and the largest of all values, their sum and the sum of their squares; None if it cannot."""
    if not _BUILT or values.dtype != torch.float32 or values.device.type != "cpu" or not values.is_contiguous():
        return None
    parts = _PARTS if values.numel() % _PARTS == 0 else 1
    reals = {name: torch.zeros(parts, dtype=torch.float64) for name in TOTALS}
    counts = {name: torch.zeros(parts, dtype=torch.int64) for name in _COUNTS}
    inf = torch.full((parts,), math.inf, dtype=torch.float64)
    totals = {**reals, **counts, "output_min": inf, "output_max": -inf}
    addresses, size = tuple(totals[name].data_ptr() for name in TOTALS), values.numel() // parts
    threads = torch.get_num_threads()
    if not _counting.count(
        Kind.OUTPUT, False, values.data_ptr(), 1, parts, size, addresses, 0, 0, 0, 0.0, 0.0, 0.0, threads, 0
    ):
        return None
    total, squares = (float(totals[name].sum()) for name in ("output_sum", "output_square_sum"))
    return float(totals["output_min"].min()), float(totals["output_max"].max()), total, squares


_PARTS = 64
"""Pieces of a tensor that are summed alone: as many whatever the number of threads, so that the sums are the same."""


def fire(on: Tensor, first_sample: int, fired: Tensor, first_fired: Tensor, unfired: Tensor) -> bool:
    """Add a batch, shape (samples, units), to the samples fired; return whether a unit is still unfired."""
    samples, units = on.shape
    return _counting.fire(
        on.data_ptr(), samples, units, first_sample, fired.data_ptr(), first_fired.data_ptr(), unfired.data_ptr()
    )


def settle(batch: Tensor, sums: Tensor, rest: Tensor) -> None:
    """Add the sums of a batch to the totals, and what rounding drops to the rest; clear the batch."""
    _counting.settle(batch.data_ptr(), sums.data_ptr(), rest.data_ptr(), batch.numel())
