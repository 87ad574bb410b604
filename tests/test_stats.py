"""Running statistics equal a brute-force count over the stored values, bit for bit, in every memory layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deadcheck import activations, columns, kernel, torch_kernel
from deadcheck.activations import Activation
from deadcheck.layout import Axes, plan, positions, samples, units
from deadcheck.passes import threads_of
from deadcheck.scratch import Scratch
from deadcheck.sites import SUMS, Family, Site, SiteStats
from deadcheck.stats import Rows, SiteCounter

aten = torch.ops.aten
SITE = Site("s", "s", "relu", Family.RECTIFIER, (), 1, "linear", 1)


@pytest.fixture(scope="module", params=["compiled", "torch", "deferred"], autouse=True)
def way_of_counting(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with the compiled kernel, with torch alone, and as on a device that runs on its own."""
    if request.param == "compiled":
        if not kernel.is_built():
            pytest.skip("the kernel was not built here")
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(kernel, "is_built", lambda: False)
        else:
            patch.setattr("deadcheck.stats.runs_on_its_own", lambda device: True)
        yield


def known(operator: object, *args: object) -> Activation:
    """Return the activation that a call of an operator is."""
    activation = activations.OPERATORS[operator]((torch.zeros(1), *args), {})
    assert activation is not None
    return activation


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Activation]] = {
    "relu": (torch.relu, known(aten.relu)),
    "relu6": (F.relu6, known(aten.hardtanh, 0.0, 6.0)),
    "threshold": (lambda x: F.threshold(x, 0.25, 0.0), known(aten.threshold, 0.25, 0.0)),
    "leaky_relu": (F.leaky_relu, known(aten.leaky_relu)),
    "elu": (F.elu, known(aten.elu)),
    "gelu": (F.gelu, known(aten.gelu)),
    "silu": (F.silu, known(aten.silu)),
    "hardswish": (F.hardswish, known(aten.hardswish)),
    "hardsigmoid": (F.hardsigmoid, known(aten.hardsigmoid)),
    "sigmoid": (torch.sigmoid, known(aten.sigmoid)),
    "tanh": (torch.tanh, known(aten.tanh)),
    "hardshrink": (F.hardshrink, known(aten.hardshrink)),
}

N, C, H, W = "N", "C", "H", "W"
FORMS: dict[str, tuple[str, Callable[[int, int, int, int], Axes]]] = {
    "features": ("NC", lambda n, c, h, w: (samples(n), units(c))),
    "tokens": ("NHC", lambda n, c, h, w: (samples(n), positions(h), units(c))),
    "tokens first": ("HNC", lambda n, c, h, w: (positions(h), samples(n), units(c))),
    "maps": ("NCHW", lambda n, c, h, w: (samples(n), units(c), positions(h), positions(w))),
    "maps odd": ("HCNW", lambda n, c, h, w: (positions(h), units(c), samples(n), positions(w))),
}


def to_rows(tensor: Tensor, letters: str) -> np.ndarray:
    """Return the values as (samples, positions, units), by a permute that the letters spell."""
    order = [letters.index(N), *(i for i, x in enumerate(letters) if x not in "NC"), letters.index(C)]
    rows = tensor.double().permute(order)
    return rows.reshape(rows.shape[0], -1, rows.shape[-1]).numpy()


def is_on(activation: Activation, z: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Return where a unit is on, from the definitions and not from the counter."""
    if activation.family is Family.SQUASHING:
        return (z > activation.low) & (z < activation.high)
    if activation.family is Family.NONZERO:
        return (h != 0) & ~np.isnan(h)
    return z > activation.on


def spoil(z: Tensor, seed: int) -> None:
    """Put one special value somewhere."""
    values = (math.nan, math.inf, -math.inf, 0.0, -0.0)
    z.view(-1)[seed % z.numel()] = values[seed % 5]


def run(
    name: str, form: str, sizes: list[tuple[int, int, int, int]], make: Callable[[tuple[int, ...]], Tensor]
) -> tuple[SiteStats, list[tuple[np.ndarray, np.ndarray]]]:
    """Feed batches through a counter; return its totals, and what a list that keeps everything holds."""
    function, activation = ACTIVATIONS[name]
    letters, axes_of = FORMS[form]
    counter = SiteCounter(activation, sizes[0][1], torch.device("cpu"), Scratch())
    kept, first = [], 0
    for n, c, h, w in sizes:
        z = make(tuple({N: n, C: c, H: h, W: w}[letter] for letter in letters))
        out = function(z)
        layout = plan(axes_of(n, c, h, w))
        counter.see_input(z, layout, Rows(n, n))
        counter.see_output(out, layout, Rows(n, n))
        counter.finish_batch(first)
        first += n
        kept.append((to_rows(z, letters), to_rows(out, letters)))
    return counter.freeze(SITE), kept


def check(name: str, stats: SiteStats, kept: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Compare every figure with a count over the kept values."""
    activation = ACTIVATIONS[name][1]
    z = np.concatenate([a.reshape(-1, a.shape[2]) for a, _ in kept])
    h = np.concatenate([b.reshape(-1, b.shape[2]) for _, b in kept])
    on = np.concatenate([is_on(activation, a, b).any(1) for a, b in kept])
    assert (stats.samples, stats.observations) == (len(on), len(z))
    assert stats.zeros.tolist() == (h == 0).sum(0).tolist()
    assert stats.positive.tolist() == (z > 0).sum(0).tolist()
    assert stats.nonfinite.tolist() == (~np.isfinite(z) | ~np.isfinite(h)).sum(0).tolist()
    assert stats.fired.tolist() == on.sum(0).tolist()
    assert stats.first_fired.tolist() == np.where(on.any(0), on.argmax(0), -1).tolist()
    clean = np.isfinite(z).all(0) & np.isfinite(h).all(0)
    for record, value in (
        ("input_min", z.min(0)),
        ("input_max", z.max(0)),
        ("output_min", h.min(0)),
        ("output_max", h.max(0)),
    ):
        assert (getattr(stats, record)[clean] + 0.0).tolist() == (value[clean] + 0.0).tolist()
    near = {"rtol": 1e-4, "atol": 1e-3 * len(z) ** 0.5}
    with np.errstate(invalid="ignore"):
        assert np.allclose(stats.output_sum[clean], h.sum(0)[clean], **near)
        assert np.allclose(stats.output_abs_sum[clean], np.abs(h).sum(0)[clean], **near)
        assert np.allclose(stats.output_square_sum[clean], (h**2).sum(0)[clean], **near)


@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    form=st.sampled_from(sorted(FORMS)),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    shift=st.sampled_from([-9.0, -1.0, 0.0, 3.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=250, deadline=None)
def test_counts_equal_brute_force(name, form, shape, batches, dtype, shift, seed) -> None:
    generator = torch.Generator().manual_seed(seed)

    def make(size: tuple[int, ...]) -> Tensor:
        z = (torch.randn(size, generator=generator) * (1 + seed % 3) + shift).to(dtype)
        if seed % 4 == 0:
            spoil(z, seed)
        return z.repeat_interleave(2, -1)[..., ::2] if seed % 7 == 0 else z

    stats, kept = run(name, form, [(n, *shape) for n in batches], make)

    check(name, stats, kept)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("most", [1 << 24, 8100])
@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("maps", (9, 5, 8100, 1)),
        ("tokens", (9, 5, 8100, 1)),  # a sample is more than a block of 2048 rows
        ("tokens", (70, 5, 81, 1)),  # a block is 16 samples
        ("features", (9000, 5, 1, 1)),
        ("features", (3, 30_000, 1, 1)),  # a row is more than a block
    ],
)
def test_counts_equal_brute_force_over_many_blocks(
    name: str, most: int, form: str, size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last block is shorter; so many positions as the smaller of the two a float may not be able to number.
    monkeypatch.setattr(torch_kernel, "_BLOCK", 20_000)
    monkeypatch.setattr(columns, "_BLOCK", 12_000)
    monkeypatch.setattr(torch_kernel, "_MOST_POSITIONS", most)
    generator = torch.Generator().manual_seed(1)
    sizes = [size, (2, *size[1:])]

    stats, kept = run(name, form, sizes, lambda shape: torch.randn(shape, generator=generator))

    check(name, stats, kept)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("features", (130, 515, 1, 1)),  # more rows than a tile of 64, more units than a chunk of 256, and odd ends
        ("tokens", (5, 259, 33, 1)),  # samples end inside a tile
        ("maps", (3, 5, 7, 1)),  # fewer positions than lanes
        ("maps", (2, 3, 5, 7)),  # 35 positions: two rounds of 16 lanes and a tail
        ("maps", (2, 2, 91, 91)),  # more positions than a block of 4096
    ],
)
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_counts_equal_brute_force_at_the_seams(
    name: str, form: str, size: tuple[int, int, int, int], shift: float
) -> None:
    generator = torch.Generator().manual_seed(2)

    def make(shape: tuple[int, ...]) -> Tensor:
        z = torch.randn(shape, generator=generator) + shift
        z[z.abs() < 0.1] = 0.0
        return z

    stats, kept = run(name, form, [size, size], make)

    check(name, stats, kept)


@pytest.mark.parametrize(
    ("form", "size"),
    [
        ("maps", (3, 33, 40, 41)),
        ("maps", (1, 1, 300, 400)),  # a sum to one number, which torch divides among its threads
        ("maps", (3, 7, 1, 300_000)),  # lines of which a block holds few, and the last block one
        ("features", (300, 700, 1, 1)),
        ("features", (70_000, 1, 1, 1)),
        ("tokens", (3, 70, 500, 1)),
        ("tokens", (2, 1, 90_000, 1)),
    ],
)
@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_the_number_of_threads_changes_no_bit(name: str, form: str, size: tuple[int, int, int, int]) -> None:
    values = torch.randn(math.prod(size), generator=torch.Generator().manual_seed(0)) - 2  # so that some are silent
    seen = []
    for threads in (1, 2, 3, 5):
        with threads_of(threads):
            stats, kept = run(name, form, [size, size], lambda shape: values.clone().view(shape))
        check(name, stats, kept)
        seen.append(stats)

    if SiteCounter(known(aten.relu), 1, torch.device("cpu"), Scratch())._kernels:  # else the sums are a device's
        assert all(stats.equals(seen[0]) for stats in seen)


def test_a_square_too_large_for_a_float_is_summed_all_the_same() -> None:
    # 1e20 squared is beyond float32; nothing here is infinite.
    stats, _ = run("relu", "features", [(2, 2, 1, 1)], lambda size: torch.tensor([[1e20, -1e20], [1.0, -1.0]]))

    assert stats.output_square_sum.tolist() == [pytest.approx(1e40), 0.0]
    assert stats.silent_input_square_sum[1] == pytest.approx(1e40)
    assert stats.nonfinite.tolist() == [0, 0]


def test_sums_are_those_of_the_finite_outputs_whatever_went_in() -> None:
    z = torch.tensor([[math.inf, math.nan, -math.inf, 1.0, 8.0]]).t()
    stats, _ = run("relu6", "features", [(5, 1, 1, 1)], lambda size: z.clone())

    assert (stats.output_sum.tolist(), stats.output_square_sum.tolist()) == ([13.0], [73.0])
    assert (stats.nonfinite.tolist(), stats.zeros.tolist(), stats.flat.tolist()) == ([3], [1], [3])


@pytest.mark.parametrize("is_input", [True, False])
def test_what_is_not_finite_on_both_sides_counts_once_wherever_it_lies_in_memory(is_input: bool) -> None:
    counter = SiteCounter(known(aten.hardtanh, 0.0, 6.0), 3, torch.device("cpu"), Scratch())
    layout, z = plan(FORMS["maps"][1](2, 3, 4, 5)), torch.ones(2, 3, 4, 5)
    z[0, 1, 2, 3], z[1, 1, 3, 0], z[1, 2, 0, 4] = math.nan, math.nan, math.inf
    h = F.relu6(z)
    moved = (z if is_input else h).contiguous(memory_format=torch.channels_last)

    counter.see_input(moved if is_input else z, layout, Rows(2, 2))
    counter.see_output(h if is_input else moved, layout, Rows(2, 2))
    counter.finish_batch(0)
    stats = counter.freeze(SITE)

    assert stats.nonfinite.tolist() == [0, 2, 1]
    assert stats.output_sum.tolist() == [40.0, 38.0, 45.0]
    assert stats.output_max.tolist() == [1.0, 1.0, 6.0]


@pytest.mark.parametrize("form", ["features", "maps", "tokens"])
def test_the_depth_of_a_silent_unit_with_nan_is_not_known(form: str) -> None:
    z = torch.tensor([[-1.0, -2.0, -3.0], [math.nan, -4.0, -math.inf]])

    stats, _ = run("relu", form, [(2, 3, 1, 1)], lambda size: z.reshape(size).clone())

    assert math.isnan(stats.silent_input_sum[0])
    assert math.isnan(stats.silent_input_square_sum[0])
    assert (stats.silent_input_sum[1], stats.silent_input_square_sum[1]) == (-6.0, 20.0)
    assert (stats.silent_input_sum[2], stats.silent_input_square_sum[2]) == (-math.inf, math.inf)
    assert np.isfinite(stats.rest).all()


def test_more_positions_than_a_float_can_number_are_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernel, "_MOST_POSITIONS", 9)
    monkeypatch.setattr(torch_kernel, "_Lines", None)

    stats, kept = run("tanh", "maps", [(2, 3, 3, 3)], torch.ones)

    check("tanh", stats, kept)


@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("form", ["features", "maps"])
def test_a_batch_of_nothing_but_nan_leaves_the_ends_to_the_others(name: str, form: str) -> None:
    numbers = torch.tensor([[3.0, 1.0], [-1.0, 2.0]])
    batches = iter([torch.full((2, 2), math.nan).where(torch.tensor([True, False]), numbers), numbers])

    stats, _ = run(name, form, [(2, 2, 1, 1)] * 2, lambda size: next(batches).reshape(size).clone())

    assert (stats.input_min.tolist(), stats.input_max.tolist()) == ([-1.0, 1.0], [3.0, 2.0])
    assert stats.output_max.tolist() == ACTIVATIONS[name][0](torch.tensor([3.0, 2.0])).tolist()
    assert stats.output_min.tolist() == ACTIVATIONS[name][0](torch.tensor([-1.0, 1.0])).tolist()


def test_sums_do_not_depend_on_the_order_of_the_batches() -> None:
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(7, 5, generator=generator) * 10.0**k for k in range(-4, 5)]

    def totals(order: list[int]) -> SiteStats:
        held = iter(order)
        return run("gelu", "features", [(7, 5, 1, 1)] * len(order), lambda size: batches[next(held)])[0]

    together, backwards = totals([*range(9)]), totals([*reversed(range(9))])
    apart = totals([8, 2, 5]) + (totals([0, 7]) + totals([6, 1, 4, 3]))

    for name in SUMS:
        for other in (backwards, apart):
            assert getattr(together, name).tobytes() == getattr(other, name).tobytes()


def test_channels_last_memory_is_counted_like_any_other() -> None:
    z = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last)

    stats, kept = run("relu", "maps", [(4, 6, 5, 3)], lambda size: z)

    check("relu", stats, kept)


def test_the_input_moments_are_kept_for_silent_units_alone() -> None:
    # Unit 0 holds -1, -2 and -3 and never fires; unit 1 fires in the second batch.
    batches = iter([torch.tensor([[-1.0, -1.0], [-2.0, -1.0]]), torch.tensor([[-3.0, 5.0]])])

    stats, _ = run("relu", "features", [(2, 2, 1, 1), (1, 2, 1, 1)], lambda size: next(batches))

    assert stats.silent_input_sum[0] == -6.0
    assert stats.silent_input_square_sum[0] == 14.0  # 1 + 4 + 9
    assert np.isnan(stats.silent_input_sum[1])
    assert stats.first_fired.tolist() == [-1, 2]


def test_a_call_with_no_row_that_counts_adds_nothing() -> None:
    # Both rows fill up a batch of a program that takes two samples at a time.
    counter = SiteCounter(known(aten.relu), 3, torch.device("cpu"), Scratch())
    layout, rows = plan((samples(2), units(3))), Rows(2, 0, keep=slice(0))

    counter.see_input(torch.ones(2, 3), layout, rows)
    counter.see_output(torch.ones(2, 3), layout, rows)
    counter.finish_batch(0)

    stats = counter.freeze(SITE)
    assert (stats.samples, stats.observations) == (0, 0)
    assert stats.output_min.tolist() == [math.inf] * 3
    assert stats.positive.tolist() == stats.fired.tolist() == [0] * 3


def test_counts_of_two_scans_add_up() -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(12, 4, generator=generator)
    whole[:, 1] = -1.0

    parts = [run("relu", "features", [(6, 4, 1, 1)], lambda size, p=part: p)[0] for part in whole.split(6)]
    both, _ = run("relu", "features", [(12, 4, 1, 1)], lambda size: whole)
    merged = parts[0] + parts[1]

    assert merged.samples == 12
    assert merged.zeros.tolist() == both.zeros.tolist()
    assert merged.fired.tolist() == both.fired.tolist()
    assert merged.input_max.tolist() == both.input_max.tolist()
    assert merged.silent_input_sum[1] == both.silent_input_sum[1] == -12.0
