"""One operator call, as the rules see it that carry axes through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deadcheck.layout import Axes, Feed, Flow, Known, Weight, fresh


@dataclass(frozen=True)
class Call:
    """One operator call, seen from the rules."""

    name: str
    """Operator, without namespace and overload."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Any, ...]
    """Output tensors."""

    inputs: tuple[tuple[Any, Known | None], ...]
    """Input tensors, in order, with what is known of each."""

    batch: int
    """Samples in this forward pass."""

    look: Callable[[Any], Known | None]
    """What is known of a tensor."""

    feed: Callable[[Weight | None], Feed]
    """A new run of the layer that holds this weight (None: of the module that runs)."""

    def flow(self, position: int) -> Flow | None:
        """Return the flow of an argument, or None where it does not depend on the data."""
        known = self.look(self.args[position]) if len(self.args) > position else None
        return known if isinstance(known, Flow) else None

    def weight(self, position: int) -> Weight | None:
        """Return the weight that an argument is, or None."""
        known = self.look(self.args[position]) if len(self.args) > position else None
        return known if isinstance(known, Weight) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def feeds(self, weight: Weight | None) -> tuple[Feed, ...]:
        """Return new runs of the layers that hold this weight and those beside it."""
        return (self.feed(weight), *map(self.feed, weight.others if weight is not None else ()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return tuple(self.outputs[0].shape)


Result = Sequence[Known | None]
Rule = Callable[[Call], Result | None]


def moved(move: Callable[[Flow, Call], Flow | None], *, takes_part: bool = False) -> Rule:
    """Make a rule of a function that moves the axes of the first argument, or that ``takes_part`` of it, a view."""
    return parted(lambda flow, call: [move(flow, call)], takes_part=takes_part)


def parted(move: Callable[[Flow, Call], Sequence[Flow | None]], *, takes_part: bool = True) -> Rule:
    """Make a rule of a function that takes the first argument apart into its outputs, which are views."""

    def rule(call: Call) -> Result | None:
        known = call.look(call.args[0])
        if isinstance(known, Weight):
            if takes_part:
                return [_part(known, call.args[0], out) for out in call.outputs]
            return [known._replace(size=min(known.size, out.numel())) for out in call.outputs]
        if known is None or known.axes is None:
            return [known] * len(call.outputs)
        return move(known, call)

    return rule


def _part(known: Weight, whole: Any, view: Any) -> Weight:
    """Return what is known of a view of a weight."""
    try:
        return known.part(view.storage_offset() - whole.storage_offset(), view.shape, view.stride())
    except RuntimeError:  # no memory to look at, as of a sparse tensor
        return known._replace(size=min(known.size, view.numel()))


def axes_of(flow: Flow) -> Axes:
    """Return the axes of a flow that has them."""
    assert flow.axes is not None
    return flow.axes


def axes_or_fresh(known: Known | None, tensor: Any, batch: int) -> Axes:
    """Return the axes of a tensor, or those of an input where none are known."""
    return known.axes if isinstance(known, Flow) and known.axes is not None else fresh(tensor.shape, batch)


def rows_of(known: Known | None) -> Any:
    """Return the sample of each row, where rows were picked."""
    return known.rows if isinstance(known, Flow) else None
