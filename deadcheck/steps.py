"""What each operator of a forward pass did to what is known of its tensors: the next pass need not work it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deadcheck.layout import Flow, Known

_COMPARABLE = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
"""What an argument of an operator may be that is compared by value."""

Inputs = list[tuple[Tensor, Known | None]]

_TENSORS = (Tensor, nn.Parameter)


class Form(NamedTuple):
    """An operator call in a form that the next pass is quickly compared with."""

    func: Any
    path: str
    """Path of the module that ran."""

    types: tuple[type, ...]
    """Types of the arguments."""

    tensors: tuple[tuple[int, Known | None, torch.Size], ...]
    """Which arguments are tensors, what was known of each, and its shape."""

    between: tuple[tuple[int, Any], ...]
    """The arguments before the last tensor that are none."""

    n_before: int
    """Arguments up to the last tensor."""

    rest: tuple[Any, ...]
    """The arguments after it."""

    shapes: list[torch.Size]
    """Shapes of the outputs."""

    writes: bool
    """Whether it works in place, and so on the tensor that its output may be a part of."""


class Step(NamedTuple):
    """What one operator did to what is known, so that the next forward pass need not work it out again."""

    signature: Sequence[Any]
    """The operator, where it ran, the shapes and what was known of its tensors, and its other arguments."""

    knowns: Sequence[Known | None]
    serial: int
    """Runs of layers so far."""

    held: Sequence[Any]
    """Keeps alive what the signature names by identity."""

    met: Any = None
    """How an activation is counted."""

    form: Form | None = None

    def equals(self, other: Step) -> bool:
        """Tell whether another step left the same behind; rows that were picked are never the same."""
        picked = any(isinstance(known, Flow) and known.rows is not None for known in (*self.knowns, *other.knowns))
        return not picked and self.serial == other.serial and list(self.knowns) == list(other.knowns)


class Steps:
    """The steps of a forward pass in their order, as far as the pass before did the very same."""

    def __init__(self) -> None:
        self.taken: list[Step] = []
        """Those of this pass so far, and from there on those of the pass before."""
        self.count = 0
        """Steps so far in this pass."""
        self.serial = 0
        """Runs of layers so far in this pass."""
        self._sizes: tuple[int, ...] = (0, 0)

    def start(self, *sizes: int) -> None:
        """Begin a pass; what was done to other numbers of samples says nothing of it."""
        self.count = self.serial = 0
        if self._sizes != sizes:
            self.taken.clear()
            self._sizes = sizes

    def copy(self) -> Steps:
        """Return steps of their own for another thread."""
        other = Steps()
        other.taken, other._sizes = list(self.taken), self._sizes
        return other

    @property
    def next(self) -> Step | None:
        """What the pass before did at this step."""
        return self.taken[self.count] if self.count < len(self.taken) else None

    def go(self, step: Step) -> None:
        """Go on by the step that was ``next``."""
        self.count += 1
        self.serial = step.serial

    def is_at(self, count: int, step: Step) -> bool:
        """Tell whether the pass before, as far as it is repeated, did this step as its ``count``-th."""
        return count <= len(self.taken) and self.taken[count - 1] is step

    def go_on(self, count: int, step: Step) -> None:
        """Go on by all steps up to the ``count``-th, which is this one."""
        self.count = count
        self.serial = step.serial

    def since(self, count: int) -> Sequence[Step]:
        """Return the steps of this pass that came after so many."""
        return self.taken[count : self.count]

    @property
    def last(self) -> Step:
        """The step that was taken last."""
        return self.taken[self.count - 1]

    def before(self, signature: Sequence[Any]) -> Step | None:
        """Return what this step did in the pass before, if it was the very same."""
        step = self.next
        return step if step is not None and step.signature == signature else None

    def renew(self, form: Form | None) -> Step:
        """Return the next step, of a call in another form from here on."""
        step = self.taken[self.count] = self.taken[self.count]._replace(form=form)
        return step

    def take(self, step: Step) -> Step:
        """Go on by one step: the one that was there, if this is its equal, else this one and none after it."""
        before = self.before(step.signature)
        if before is None or (before is not step and not before.equals(step)):
            del self.taken[self.count :]
            self.taken.append(step)
            before = step
        self.go(before)
        return before


def form_of(func: Any, path: str, args: tuple[Any, ...], output: Any, inputs: Inputs) -> Form | None:
    """Return the form of a call without keywords; None for one with tensors in lists or of classes of their own."""
    places = [place for place, arg in enumerate(args) if type(arg) in _TENSORS]
    plain = [(place, arg) for place, arg in enumerate(args) if place not in places]
    outputs = (output,) if isinstance(output, Tensor) else [tensor for tensor in output if tensor is not None]
    writes = func._schema.is_mutable
    if len(places) != len(inputs) or not all(_is_plain(arg) for _, arg in plain):
        return None
    if not all(type(tensor) is Tensor for tensor in outputs) or (writes and not isinstance(output, Tensor)):
        return None
    n_before = places[-1] + 1 if places else 0
    return Form(
        func,
        path,
        types=tuple(map(type, args)),
        tensors=tuple((place, known, args[place].shape) for place, (_, known) in zip(places, inputs, strict=True)),
        between=tuple((place, arg) for place, arg in plain if place < n_before and arg is not None),
        n_before=n_before,
        rest=args[n_before:],
        shapes=[tensor.shape for tensor in outputs],
        writes=writes,
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, _COMPARABLE) for item in value)
    return isinstance(value, _COMPARABLE)


def describe(values: Iterable[Any], signature: list[Any], inputs: Inputs, look: Callable[[Any], Known | None]) -> None:
    """Add to a signature what the rules may read of an operator's arguments, and to the inputs its tensors."""
    for value in values:
        if isinstance(value, Tensor):
            known = look(value)
            inputs.append((value, known))
            signature += (id(known), None if is_lazy(value) else value.shape)
        elif isinstance(value, (list, tuple)):
            signature.append(len(value))
            describe(value, signature, inputs, look)
        else:
            signature.append(value if isinstance(value, _COMPARABLE) else type(value))
