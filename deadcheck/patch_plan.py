"""What a patch does to a model: which activation becomes what, and how it is reached."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, unique
from typing import NamedTuple

from deadcheck.ranges import Ranges, count

_AXIS = re.compile(r"\.|(n\*)?[up]\d+(:\d+)?(\*[up]\d+(:\d+)?)*")
_MAX_TABLE = 1 << 26
_LEAST = 2.0**-126


@unique
class Kind(str, Enum):
    """What may stand in for a ReLU."""

    LEAKY = "leaky_relu"
    PRELU = "prelu"
    ELU = "elu"
    GELU = "gelu"
    SILU = "silu"


class Place(NamedTuple):
    """A call in a function: its line, counted from the function's first, and its number among the calls there."""

    function: str
    line: int
    call: int
    text: str = ""
    """The line itself, for a reader, and to find the call again when lines above it were added."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells places apart."""
        return self[:3]

    def __str__(self) -> str:
        number = f".{self.call}" if self.call else ""
        return f"{self.function}+{self.line}{number}" + (f": {self.text}" if self.text else "")


def slope_fault(kind: Kind, alpha: float) -> str | None:
    """Say what is wrong with a slope below 0, or with ELU's alpha, and what to give instead; None for nothing."""
    if math.isnan(alpha):
        return "is not a number; write 0.01"
    if alpha == 0:
        return "is ReLU itself, so nothing would change; give a slope above 0, as 0.01"
    if alpha < 0:
        return "would turn negative inputs into positive outputs; give a slope above 0, as 0.01"
    if alpha < _LEAST:
        return "is no slope that float32 can hold; give one above 0, as 0.01"
    if alpha >= 1 and kind is not Kind.ELU:
        return (
            "lets negative inputs through whole, and layers without a bend between them are one linear layer; give a "
            "slope below 1, as 0.01"
        )
    return "is not finite; give a number, as 1.0" if math.isinf(alpha) else None


@dataclass(frozen=True)
class Replacement:
    """What stands in for a ReLU."""

    kind: Kind = Kind.LEAKY
    alpha: float | None = 0.01
    """Slope below 0 (leaky_relu, prelu: its first value), or ELU's alpha; None for gelu and silu."""

    def __str__(self) -> str:
        return f"{self.kind.value}({self.alpha:g})" if self.alpha is not None else self.kind.value


@dataclass(frozen=True)
class Units:
    """The units of a site that are replaced; the others keep an exact ReLU."""

    count: int
    """Units of the site."""

    ranges: Ranges
    """Those that are replaced."""

    layout: str
    """Where the units are among the last axes of a tensor, so that it holds with and without a batch axis:
    ``u256`` the features of a linear layer, ``u32 . .`` the channels of a convolution, ``u3*p9`` channels flattened
    with their nine positions, ``u3:4 . u4`` heads of four units, ``n*u3`` rows that repeat every three units."""

    rank: int = 0
    """Number of axes of the tensors that were seen; 0 where it varied."""

    @property
    def replaced(self) -> int:
        """Units that are replaced."""
        return count(self.ranges)


@dataclass(frozen=True)
class Calls:
    """Calls in a module's code, by the way that leads to them."""

    at: tuple[Place, ...] = ()
    """Places in the module's own code, innermost first, as many as tell the site apart from others; none for every
    ReLU there."""

    via: tuple[Place, ...] = ()
    """Places further out, where those of the module's own do not tell the site apart."""

    turns: tuple[int, ...] = ()
    """Which turns are meant where one place serves several sites in turn; none for all."""

    period: int = 1


@dataclass(frozen=True)
class SiteChange:
    """What becomes of one site."""

    site: str
    """Its key."""

    activation: str
    fed_by: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    """Paths of the modules to replace."""

    module: str = ""
    """Path of the module whose code holds the calls, where modules cannot be replaced."""

    calls: tuple[Calls, ...] = ()
    operators: tuple[int, ...] = ()
    """Numbers of its operators among the activations of a program, where the model is no tree of modules."""

    units: Units | None = None
    """None for all."""

    alpha: float | None = None
    """Its own alpha, where it differs from the plan's."""


@dataclass(frozen=True)
class PatchPlan:
    """What a patch file says."""

    replacement: Replacement
    sites: tuple[SiteChange, ...] = ()
    others: bool = False
    """Whether ReLUs that no site tells of are replaced too: those on branches that did not run."""

    clipped: bool = False
    """Whether ReLU6 and hardtanh(0, c) count as ReLUs; their ceiling stays."""

    call: str = "forward"
    """Method of the model that is run."""

    model: Mapping[str, str] | None = None
    """Path, format and sha256 of the model it was made for; for a reader."""

    def for_site(self, change: SiteChange) -> Replacement:
        """Return what stands in at one site."""
        alpha = self.replacement.alpha if change.alpha is None else change.alpha
        return Replacement(self.replacement.kind, alpha)


def layout_fault(layout: str, units: int) -> str | None:
    """Return what is wrong with a layout; None when it holds this many units."""
    if not all(_AXIS.fullmatch(axis) for axis in layout.split(" ")):
        return f"{layout!r} is no layout of units, as 'u32 . .' is"
    sizes = [(role, int(size)) for role, size in re.findall(r"([up])(\d{1,9})", layout)]
    if math.prod(size for role, size in sizes if role == "u") != units:
        return f"the layout {layout!r} does not hold {units} units"
    if math.prod(size for _, size in sizes) > _MAX_TABLE:
        return f"the layout {layout!r} is larger than any layer"
    return None
