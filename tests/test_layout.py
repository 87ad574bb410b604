"""Axes followed through views, permutes, slices and concatenations agree with tensors that carry the indices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deadcheck.layout import (
    Axes,
    Flow,
    broadcast,
    concatenate,
    drop_axes,
    guessed,
    plan,
    positions,
    reshape,
    samples,
    slice_axis,
    units,
)


def indices(axes: Axes, role: str) -> torch.Tensor:
    """Return, for each element of a tensor with these axes, its sample or unit index as the atoms tell it."""
    shape = [math.prod(atom.size for atom in axis) for axis in axes]
    total = torch.zeros(shape, dtype=torch.long)
    for dim, axis in enumerate(axes):
        inner = shape[dim]
        for atom in axis:
            inner //= atom.size
            along = (torch.arange(shape[dim]) // inner) % atom.size
            if atom.role == role:
                view = [1] * len(shape)
                view[dim] = shape[dim]
                total = total + (along * atom.stride).view(view)
    return total


def start(n: int, c: int, h: int, w: int) -> tuple[Flow, torch.Tensor, torch.Tensor]:
    """Return a convolution's output: its flow, and tensors that hold each element's sample and unit."""
    axes = (samples(n), units(c), positions(h), positions(w))
    sample = torch.arange(n).view(n, 1, 1, 1).expand(n, c, h, w).contiguous()
    unit = torch.arange(c).view(1, c, 1, 1).expand(n, c, h, w).contiguous()
    return Flow(axes, (), "conv2d"), sample, unit


def check(flow: Flow, sample: torch.Tensor, unit: torch.Tensor) -> None:
    """Compare what the atoms tell with what the tensors carry."""
    assert flow.axes is not None
    assert torch.equal(indices(flow.axes, "s"), sample)
    assert torch.equal(indices(flow.axes, "u") + flow.offset, unit)


sizes = st.integers(1, 5)


@given(st.tuples(sizes, sizes, sizes, sizes), st.data())
@settings(max_examples=300, deadline=None)
def test_a_chain_of_views_and_permutes_keeps_every_element_of_its_unit(shape, data) -> None:
    flow, sample, unit = start(*shape)
    for _ in range(4):
        assert flow.axes is not None
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(sample.dim())))
            flow = flow._replace(axes=tuple(flow.axes[dim] for dim in order))
            sample, unit = sample.permute(order).contiguous(), unit.permute(order).contiguous()
        else:
            joint = data.draw(st.integers(0, sample.dim() - 1))
            new = [*sample.shape]
            if joint + 1 < len(new):
                new[joint : joint + 2] = [new[joint] * new[joint + 1]]
            axes = reshape(flow.axes, new)
            if axes is None:  # the atoms do not merge; a guess will be announced
                return
            flow = flow._replace(axes=axes)
            sample, unit = sample.reshape(new), unit.reshape(new)
        check(flow, sample, unit)


@given(st.tuples(sizes, st.integers(1, 4), st.integers(1, 4)), st.data())
@settings(max_examples=200, deadline=None)
def test_splitting_features_into_heads_and_merging_them_back_is_exact(shape, data) -> None:
    n, heads, width = shape
    flow = Flow((samples(n), units(heads * width)), (), "linear")
    unit = torch.arange(heads * width).expand(n, -1)
    sample = torch.arange(n).view(n, 1).expand(n, heads * width)
    target = data.draw(st.sampled_from([(n, heads, width), (n * heads, width), (n, heads * width)]))
    axes = reshape(flow.axes, target)  # type: ignore[arg-type]
    assert axes is not None
    check(flow._replace(axes=axes), sample.reshape(target), unit.reshape(target))


@given(st.tuples(sizes, st.integers(2, 6), sizes, sizes), st.data())
@settings(max_examples=200, deadline=None)
def test_a_slice_of_units_knows_which_units_it_took(shape, data) -> None:
    flow, sample, unit = start(*shape)
    dim = data.draw(st.integers(1, 3))
    length = shape[dim]
    first = data.draw(st.integers(0, length - 1))
    step = data.draw(st.integers(1, 3))
    index = tuple(slice(first, None, step) if i == dim else slice(None) for i in range(4))
    taken = sample[index]
    check(slice_axis(flow, dim, first, taken.shape[dim], step), taken, unit[index])


def test_a_slice_of_samples_remembers_which_samples_it_took() -> None:
    flow, _, _ = start(6, 2, 1, 1)

    sliced = slice_axis(slice_axis(flow, 0, 1, 5), 0, 1, 2, step=2)

    # 1..5, and of these every second one from the second on: 2 and 4
    assert list(sliced.rows) == [2, 4]
    assert sliced.axes == (samples(2), units(2), (), ())


def test_halves_of_a_batch_added_together_are_no_sample_any_more() -> None:
    flow, _, _ = start(4, 2, 1, 1)
    first, second = slice_axis(flow, 0, 0, 2), slice_axis(flow, 0, 2, 2)

    mixed = broadcast([(first, (2, 2, 1, 1)), (second, (2, 2, 1, 1))], (2, 2, 1, 1))

    assert mixed.axes == (positions(2), units(2), (), ())


def test_units_side_by_side_add_up() -> None:
    a, b = (
        Flow((samples(3), units(4), positions(2)), (), "conv1d"),
        Flow((samples(3), units(5), positions(2)), (), "conv1d"),
    )

    joined = concatenate([a, b], [4, 5], 1)

    assert joined.axes == (samples(3), units(9), positions(2))


def test_flattened_maps_side_by_side_add_up_when_their_positions_agree() -> None:
    a, b = (
        Flow((samples(3), units(4) + positions(6)), (), "conv2d"),
        Flow((samples(3), units(5) + positions(6)), (), "conv2d"),
    )

    # 4 * 6 + 5 * 6 = 54 features, 9 units of 6 positions
    assert concatenate([a, b], [24, 30], 1).axes == (samples(3), units(9) + positions(6))


def test_two_crops_of_one_batch_are_the_same_samples_seen_twice() -> None:
    flow = Flow((samples(3), units(4)), (), "linear")

    doubled = concatenate([flow, flow], [3, 3], 0)

    assert doubled.axes == (positions(2) + samples(3), units(4))


def test_a_sum_over_the_units_leaves_none() -> None:
    flow, _, _ = start(2, 3, 4, 5)

    assert drop_axes(flow, [1]).axis_from is None
    assert drop_axes(flow, [2, 3]).axes == (samples(2), units(3))


def test_a_gate_of_one_value_per_channel_keeps_the_maps_axes() -> None:
    flow, _, _ = start(2, 3, 4, 5)
    gate = Flow((samples(2), units(3), (), ()), (), "linear")

    result = broadcast([(gate, (2, 3, 1, 1)), (flow, (2, 3, 4, 5))], (2, 3, 4, 5))

    assert result.axes == flow.axes


@pytest.mark.parametrize(
    ("shape", "batch", "axis"),
    [((8, 5), 8, 1), ((8, 7, 5), 8, 2), ((8, 3, 7, 5), 8, 1), ((7, 8, 5), 9, 2), ((8,), 8, None)],
)
def test_without_a_hint_the_axis_is_guessed_and_said(shape, batch, axis) -> None:
    flow = guessed(shape, None, batch)

    assert flow.axis_from == "guess"
    assert flow.axes is not None
    assert plan(flow.axes).unit_axes == (() if axis is None else (axis,))


def test_an_uneven_cut_is_refused_rather_than_guessed() -> None:
    # 3 units of 5 positions cannot be seen as 5 rows of 3.
    assert reshape((units(3) + positions(5),), (5, 3)) is None
