"""Single units leak, wherever they are in a tensor; the others keep an exact ReLU."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deadcheck.errors import PatchError
from deadcheck.layout import Atom, positions, samples, units
from deadcheck.patch_plan import Kind, Replacement, SiteChange, Units
from deadcheck.site_check import fault_of, responses
from deadcheck.stand_ins import CannotStandInError, StandIn, module_for, stand_in
from deadcheck.unit_masks import layout_of

LEAKY = Replacement(Kind.LEAKY, 0.1)


@pytest.mark.parametrize(
    ("axes", "layout"),
    [
        ((samples(8), units(5)), "u5"),
        ((samples(8), positions(7), units(5)), "u5"),
        ((samples(8), units(4), positions(3), positions(2)), "u4 . ."),
        ((units(5),), "u5"),
        ((samples(8), units(3) + positions(9)), "u3*p9"),
        ((samples(8), units(3, 4), positions(7), units(4)), "u3:4 . u4"),
        ((samples(8) + positions(7) + units(3, 4), units(4)), "n*u3:4 u4"),
        # Every second unit of a slice: counted without gaps.
        ((samples(8), units(4, 2)), "u4"),
        # Pixel shuffle: channel c holds the units 4c to 4c + 3 by row and column.
        ((samples(8), units(3, 4), positions(5) + units(2, 2), positions(6) + units(2)), "u3:4 n*u2:2 n*u2"),
        ((samples(8), positions(4)), None),
        ((units(3) + samples(8),), None),
        ((samples(8), ()), None),
    ],
)
def test_layouts_are_spelled(axes: tuple[tuple[Atom, ...], ...], layout: str | None) -> None:
    assert layout_of(axes) == layout


def by_hand(x: Tensor, index: Tensor, chosen: list[int]) -> Tensor:
    mask = torch.isin(index, torch.tensor(chosen)).expand(x.shape)
    return torch.where(mask, F.leaky_relu(x, 0.1), F.relu(x))


@pytest.mark.parametrize(
    ("layout", "shape", "index"),
    [
        ("u6", (4, 6), torch.arange(6)),
        ("u6", (4, 3, 6), torch.arange(6)),
        ("u6", (6,), torch.arange(6)),
        ("u6 . .", (4, 6, 3, 2), torch.arange(6).view(6, 1, 1)),
        ("u6 . .", (6, 3, 2), torch.arange(6).view(6, 1, 1)),
        ("u6*p3", (4, 18), torch.arange(6).repeat_interleave(3)),
        ("u3:2 . u2", (4, 3, 5, 2), torch.arange(6).view(3, 1, 2)),
        ("n*u3:2 u2", (12, 2), torch.arange(6).view(3, 2).repeat(4, 1)),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_chosen_units_leak(layout: str, shape: tuple[int, ...], index: Tensor, inplace: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    function = stand_in(LEAKY, units=Units(6, ((1, 2), (5, 5)), layout))
    given = x.clone()
    got = function(given, inplace)

    assert torch.equal(got, by_hand(x, index, [1, 2, 5]))
    assert (got is given) == inplace


def test_the_others_are_exact_to_the_bit_and_at_infinity() -> None:
    x = torch.tensor([[-math.inf, -1.0, -0.0, 0.0, math.inf, math.nan]])
    got = stand_in(LEAKY, units=Units(6, ((1, 1),), "u6"))(x, False)
    wanted = F.relu(x)
    wanted[0, 1] = -0.1

    assert got.numpy().tobytes() == wanted.numpy().tobytes()


def test_units_that_cannot_be_in_a_tensor_are_refused() -> None:
    function = stand_in(LEAKY, units=Units(6, ((1, 1),), "u6"))

    with pytest.raises(PatchError, match=r"a patch for 6 units laid out as 'u6' met a tensor of shape \(2, 5\)"):
        function(torch.zeros(2, 5), False)


RELUS = (nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(0, 3), nn.Threshold(0, 0))
SOME = (None, Units(5, ((1, 2),), "u5", 2), Units(5, ((1, 2),), "u5", 3), Units(4, ((0, 0), (3, 3)), "u4 . .", 4),
        Units(3, ((1, 1),), "u3*p2", 2), Units(12, ((1, 5),), "u3:4 . u4", 4),
        Units(3, ((1, 1),), "n*u3", 1))  # fmt: skip
KINDS = (Replacement(Kind.LEAKY, 0.3), Replacement(Kind.PRELU, 0.25), Replacement(Kind.ELU, 1.0),
         Replacement(Kind.GELU, None), Replacement(Kind.SILU, None))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("replacement", KINDS, ids=str)
@pytest.mark.parametrize("some", SOME, ids=lambda some: "all" if some is None else some.layout)
def test_every_module_does_what_it_should(replacement: Replacement, some: Units | None, dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    change = SiteChange("s", "relu", modules=("m",), units=some)
    for old in RELUS:
        for keeps in {False, bool(getattr(old, "inplace", False))}:
            try:
                module = module_for(old, replacement, some, like=like, keeps_inplace=keeps)
            except CannotStandInError:
                assert replacement.kind is Kind.PRELU
                continue
            ceiling = float(getattr(old, "max_val", math.inf))
            for again in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert fault_of(again.forward, change, replacement, ceiling=ceiling, like=like) is None
            if keeps:
                shape = (2, *(int(size) for size in ((4, 1, 1) if some is SOME[3] else (5,))))
                x = torch.randn(shape).to(dtype)
                if some is None or some.layout in ("u5", "u4 . ."):
                    assert module(x) is x


def test_a_check_tells_what_is_wrong() -> None:
    change = SiteChange("s", "relu", modules=("m",))
    like = torch.zeros(1)

    assert fault_of(F.relu, change, LEAKY, like=like) == "its value at -8 is 0 and should be -0.8"
    assert (
        fault_of(lambda x: F.leaky_relu(x, 0.2), change, LEAKY, like=like)
        == "its value at -8 is -1.6 and should be -0.8"
    )
    wrong_slope = fault_of(lambda x: F.leaky_relu(x, 0.1).detach() + 0 * x, change, LEAKY, like=like)
    assert wrong_slope == "its slope at -8 is 0 and should be 0.1"
    at_zero = fault_of(lambda x: torch.where(x >= 0, x, 0.1 * x), change, LEAKY, like=like)
    assert at_zero == "its slope at 0 is 1 and should be 0.1"
    some = SiteChange("s", "relu", modules=("m",), units=Units(3, ((1, 1),), "u3"))
    assert fault_of(lambda x: F.leaky_relu(x, 0.1), some, LEAKY, like=like) == "its value at -8 is -0.8 and should be 0"
    assert fault_of(lambda x: x.sum(0), change, LEAKY, like=like) == "it turned shape (11, 1) into (1,)"


def test_what_an_activation_gives_around_zero() -> None:
    below, at, above = responses(lambda x: F.leaky_relu(x, 0.25), torch.zeros(1))

    assert (below.output, below.slope, at.slope, above.output, above.slope) == (-0.25, 0.25, 0.25, 1.0, 1.0)


def test_it_says_what_it_is() -> None:
    assert str(StandIn(LEAKY, units=Units(6, ((1, 2),), "u6"), inplace=True)) == (
        "StandIn(leaky_relu(0.1), 2 of 6 units, inplace=True)"
    )
    assert str(StandIn(Replacement(Kind.GELU, None), ceiling=6)) == "StandIn(gelu, at most 6)"
