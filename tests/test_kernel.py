"""The compiled kernel at the sizes where its loops begin and end, against NumPy in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deadcheck import kernel

pytestmark = pytest.mark.skipif(not kernel.is_built(), reason="the kernel was not built here")

ROWS = [
    (samples, units, positions)
    for positions in (2, 4, 15, 16, 17, 49, 255, 256, 257, 4095, 4096, 4097, 9000)
    for samples, units in ((1, 1), (3, 17), (5, 35), (70, 19))
    if samples * units * positions < 600_000
]
COLUMNS = [
    (samples, units, positions)
    for units in (1, 5, 16, 33, 127, 130, 300, 1030)
    for samples, positions in ((1, 1), (70, 1), (3, 30), (2, 260))
]
RECTIFIERS = (kernel.Kind.RECTIFIER, kernel.Kind.CLIPPED)
UNASKED = -1e300
"""Stands for a sum that may be anything."""

SPOILED = [None, math.nan, math.inf, -math.inf, 3e38, -0.0]


def values(samples: int, units: int, positions: int, spoilt: float | None) -> Tensor:
    """Return numbers, a unit of negative ones in three, shape (samples, units, positions)."""
    x = torch.randn(samples, units, positions, generator=torch.Generator().manual_seed(samples * units + positions))
    x[:, ::3] = -x[:, ::3].abs()
    if spoilt is not None:
        x[-1, -1, -1] = x[0, 0, 0] = x[samples // 2, units // 2, positions // 2] = spoilt
    return x


def counted(
    x: Tensor, kind: kernel.Kind, *, units_last: bool, out: Tensor | None, asked: Tensor | None = None
) -> tuple[bool, dict[str, Any]]:
    """Count a tensor whose memory is in the order of its three axes."""
    samples, units = x.shape[0], x.shape[2 if units_last else 1]
    totals = {
        name: torch.zeros(units, dtype=torch.int64 if name in kernel._COUNTS else torch.float64)
        for name in kernel.TOTALS
    }
    for name, value in (("input_min", 1), ("output_min", 1), ("input_max", -1), ("output_max", -1)):
        totals[name].fill_(value * math.inf)
    on = torch.zeros(samples, units, dtype=torch.bool)
    silent, low = torch.arange(units) % 2 == 0, 0.0 if kind in RECTIFIERS else -0.5
    done = kernel._counting.count(
        kind, units_last, x.data_ptr(), samples, units, x.shape[1 if units_last else 2],
        tuple(totals[name].data_ptr() for name in kernel.TOTALS),
        silent.data_ptr(), 0 if asked is None else asked.data_ptr(), on.data_ptr(),
        low, 0.5, 0.0, 2, 0 if out is None else out.data_ptr(),
    )  # fmt: skip
    return done, {"on": on.numpy(), **{name: total.numpy() for name, total in totals.items()}}


def expected(x: np.ndarray, kind: kernel.Kind) -> dict[str, Any]:
    """Return what is to come out for (samples, units, positions) in double precision."""
    axes = (0, 2)
    number, finite = ~np.isnan(x), np.isfinite(x)
    low = np.where(number, x, math.inf).min(axes)
    high = np.where(number, x, -math.inf).max(axes)
    if kind is kernel.Kind.OUTPUT:
        return {
            "zeros": (x == 0).sum(axes), "output_min": low, "output_max": high, "output_sum": x.sum(axes),
            "output_abs_sum": np.abs(x).sum(axes), "output_square_sum": (x * x).sum(axes),
        }  # fmt: skip
    fired = (x > 0).any(axes) & (kind is not kernel.Kind.SQUASHED)  # and its plain sums are of no use any more
    silent = np.where(fired, UNASKED, np.where(np.arange(x.shape[1]) % 2 == 0, 1.0, 0.0))
    found = {
        "positive": (x > 0).sum(axes), "input_min": low, "input_max": high, "on": (x > 0).any(2),
        "silent_input_sum": np.where(silent == 1, x.sum(axes), silent),
        "silent_input_square_sum": np.where(silent == 1, (x * x).sum(axes), silent),
    }  # fmt: skip
    if kind in RECTIFIERS:
        top = 0.5 if kind is kernel.Kind.CLIPPED else math.inf
        kept = np.where(x > 0, np.minimum(x, top), 0.0)
        kept[np.isinf(kept)] = 0.0
        return found | {
            "zeros": (x <= 0).sum(axes), "flat": ((x <= 0) | (x >= top) & (top < math.inf)).sum(axes),
            "nonfinite": (~finite).sum(axes),
            "output_min": np.where(low <= high, np.clip(low, 0, top), low),
            "output_max": np.where(low <= high, np.clip(high, 0, top), high),
            "output_sum": kept.sum(axes), "output_square_sum": (kept * kept).sum(axes),
        }  # fmt: skip
    inside = (x > -0.5) & (x < 0.5)
    found["flat"] = (~inside).sum(axes)
    return found | ({"on": inside.any(2)} if kind is kernel.Kind.SQUASHED else {})


@pytest.mark.parametrize("kind", RECTIFIERS)
@pytest.mark.parametrize("units_last", [False, True])
def test_squares_beyond_a_float_are_summed_once_beside_a_row_that_is_not_finite(
    units_last: bool, kind: kernel.Kind
) -> None:
    x = values(6, 5, 20, None)
    x[1, 2, 3], x[4, 2, 7], x[2, 2, 1] = math.inf, 3e38, math.nan
    laid = (x.transpose(1, 2) if units_last else x).clone(memory_format=torch.contiguous_format)

    done, found = counted(laid, kind, units_last=units_last, out=laid)

    assert done
    compare(found, expected(x.double().numpy(), kind), (6, 5, 20))
    assert kind is kernel.Kind.CLIPPED or found["output_square_sum"][2] == pytest.approx(9e76, rel=1e-6)


@pytest.mark.parametrize("spoilt", SPOILED)
@pytest.mark.parametrize("kind", list(kernel.Kind))
@pytest.mark.parametrize("units_last", [False, True])
def test_counts_are_those_of_numpy(kind: kernel.Kind, units_last: bool, spoilt: float | None) -> None:
    for size in COLUMNS if units_last else ROWS:
        x = values(*size, spoilt)
        laid = (x.transpose(1, 2) if units_last else x).clone(memory_format=torch.contiguous_format)
        before, rectifies = laid.clone(), kind in RECTIFIERS
        for out in (None, torch.empty_like(laid), laid) if rectifies else (None,):
            done, found = counted(laid, kind, units_last=units_last, out=out)
            if spoilt in (None, -0.0) or rectifies:
                assert done
                compare(found, expected(x.double().numpy(), kind), size)
            else:
                assert not done or spoilt == 3e38
            if out is not None:
                wanted = F.hardtanh(before, 0, 0.5) if kind is kernel.Kind.CLIPPED else torch.relu(before)
                assert torch.equal(out.view(torch.int32), wanted.view(torch.int32)), size


@pytest.mark.parametrize("spoilt", SPOILED)
@pytest.mark.parametrize("kind", list(kernel.Kind))
@pytest.mark.parametrize("units_last", [False, True])
def test_units_that_are_asked_are_counted_as_among_all_and_the_output_is_whole(
    kind: kernel.Kind, units_last: bool, spoilt: float | None
) -> None:
    for size in COLUMNS if units_last else ROWS:
        x = values(*size, spoilt)
        laid = (x.transpose(1, 2) if units_last else x).clone(memory_format=torch.contiguous_format)
        outs = [torch.empty_like(laid) if kind in RECTIFIERS else None for _ in range(2)]
        of_all = counted(laid, kind, units_last=units_last, out=outs[0])
        # One in three, as dead units are; of columns, a whole tile that is not asked too.
        asked = (torch.arange(size[1]) % 3 == 0) & (torch.arange(size[1]) // 16 != 1)
        done, found = counted(laid, kind, units_last=units_last, out=outs[1], asked=asked)
        at = asked.nonzero().squeeze(1).numpy()

        assert done or not of_all[0]
        for name, value in of_all[1].items() if of_all[0] else ():
            np.testing.assert_array_equal(found[name][..., at], value[..., at], err_msg=f"{name} of {size}")
        if outs[0] is not None:
            assert torch.equal(outs[0].view(torch.int32), outs[1].view(torch.int32)), size


def compare(found: dict[str, Any], wanted: dict[str, Any], size: tuple[int, int, int]) -> None:
    for name, value in wanted.items():
        if "sum" in name:
            value = np.where(value == UNASKED, found[name], value)
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-3, err_msg=f"{name} of {size}")
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} of {size}")
