"""Follows what is known of each tensor (a weight, or samples, units and positions) through forward passes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from deadcheck import flows, picks
from deadcheck.calls import Call
from deadcheck.layout import Feed, Flow, Known, Weight, fresh
from deadcheck.steps import Form, Inputs, Step, Steps, describe, form_of
from deadcheck.weights import memory_of, weights_of

_OPERATOR_NAMES = {"addmm": "linear", "mm": "linear", "bmm": "linear", "_convolution": "convolution"}


class Follower:
    """What is known of the tensors of a model's forward passes, one pass at a time.

    Most passes do what the pass before did, operator by operator; what is known is then taken over.
    """

    def __init__(self, model: nn.Module, names: Mapping[nn.Module, str]) -> None:
        self._weights, self._by_memory, self._holders = weights_of(model, names)
        self.tracked: dict[int, tuple[weakref.ref[Tensor], Known]] = {}
        """What is known of each tensor that an operator of this pass made, by the tensor's identity."""
        self._samples = 0
        self.steps = Steps()
        self.ran: set[str] = set()
        """Paths of modules whose weights were used."""

    def fork(self) -> Follower:
        """Return one for another thread that runs the same model."""
        fork = copy.copy(self)
        fork.tracked, fork.steps, fork.ran = {}, self.steps.copy(), set()
        return fork

    def start(self, inputs: Sequence[Tensor], samples: int, padding: int) -> None:
        """Begin a pass over this many samples, some of them padding, that starts from these tensors."""
        self.tracked.clear()
        self._samples = samples
        self.steps.start(samples, padding)
        for tensor in inputs:
            signature = ("input", tensor.shape, tensor.dtype)
            flow = Flow(fresh(tensor.shape, samples), (Feed("input", "input", 0, False),))
            step = self.steps.before(signature) or Step(signature, (flow,), 0, ())
            self.learn(tensor, self.steps.take(step).knowns[0])

    def look(self, value: Any) -> Known | None:
        """Return what is known of a value."""
        if not isinstance(value, Tensor):
            return None
        entry = self.tracked.get(id(value))
        if entry is not None and entry[0]() is value:
            return entry[1]
        weight = self._weights.get(id(value))
        return self._by_memory.get(memory_of(value)) if weight is None else weight

    def _look_past_blanks(self, value: Any) -> Known | None:
        known = self.look(value)
        return None if isinstance(known, Flow) and known.is_blank else known

    def learn(self, tensor: Tensor, known: Known | None) -> None:
        """Note what is known of a tensor."""
        if known is None:
            self.tracked.pop(id(tensor), None)
        else:
            self.tracked[id(tensor)] = (weakref.ref(tensor), known)

    def takes(self, form: Form, args: tuple[Any, ...]) -> bool:
        """Tell whether the arguments of a call are those of a form, and the same is known of them."""
        if tuple(map(type, args)) != form.types or args[form.n_before :] != form.rest:
            return False
        for place, value in form.between:
            if args[place] != value:
                return False
        for place, known, shape in form.tensors:
            tensor = args[place]
            if self.look(tensor) is not known or tensor.shape != shape:
                return False
        return True

    def repeats(self, func: Any, path: str, args: tuple[Any, ...], output: Any) -> bool:
        """Tell whether an operator did what stood here in the pass before; if so, its outputs are known.

        This runs after every operator of every pass, on a processor whose caches are full of weights: it is kept short,
        and what it cannot tell at once goes to ``carry``.
        """
        step = self.steps.next
        form = None if step is None else step.form
        if step is None or form is None or form.func is not func or form.path != path:
            return False
        if not self.takes(form, args):
            return False
        outputs = (output,) if isinstance(output, Tensor) else [tensor for tensor in output if tensor is not None]
        if [tensor.shape for tensor in outputs] != form.shapes or (form.writes and output._base is not None):
            return False
        self.steps.go(step)
        for tensor, known in zip(outputs, step.knowns, strict=True):
            self.learn(tensor, known)
        return True

    def carry(
        self, func: Any, name: str, rule: Any, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Note what an operator did to what is known."""
        outputs = (output,) if isinstance(output, Tensor) else tuple(tensors_of(output))
        if not outputs:
            return
        signature: list[Any] = [name, path, *kwargs]
        inputs: Inputs = []
        look = self.look
        describe((*args, *kwargs.values()), signature, inputs, look)
        blanks = [isinstance(known, Flow) and known.is_blank for _, known in inputs]
        if any(blanks) and any(isinstance(known, Flow) and not known.is_blank for _, known in inputs):
            # Where a tensor meets the data that has nothing of it, the data alone tells what the axes are.
            look, signature, inputs = self._look_past_blanks, [name, path, *kwargs], []
            describe((*args, *kwargs.values()), signature, inputs, look)
        is_known = name in flows.MAKERS or any(known is not None for _, known in inputs)
        if not is_known and not (name in flows.BLANKS and flows.has_rows_of(outputs[0].shape, self._samples)):
            for tensor in outputs:
                self.learn(tensor, None)
            return
        signature += [tensor.shape for tensor in outputs]
        step = self.steps.before(signature)
        # Integers and masks may say which rows are picked, and do so anew in every batch.
        may_repeat = all(tensor.is_floating_point() for tensor, _ in inputs)
        if step is None or not may_repeat:
            feed = partial(self.feed, name, path)
            call = Call(name, args, kwargs, outputs, tuple(inputs), self._samples, look, feed)
            knowns = flows.carry(rule, call)
            form = form_of(func, path, args, output, inputs) if may_repeat and not kwargs else None
            step = Step(signature, knowns, self.steps.serial, [known for _, known in inputs], form=form)
        knowns = self.steps.take(step).knowns
        for tensor, known in zip(outputs, knowns, strict=False):
            self.learn(tensor, known)
            if name.endswith("_") and tensor._base is not None:
                base = tensor._base
                self.learn(base, picks.written(self._look_past_blanks(base), base, tensor, known, self._samples))

    def feed(self, operator: str, path: str, weight: Weight | None) -> Feed:
        """Return a new run of a layer, named by the module that holds the weight, or by the operator."""
        self.steps.serial += 1
        if weight is None:
            return Feed(path or operator, path, self.steps.serial)
        owner = path if path in self._holders[weight.name] else weight.owner
        self.ran.add(weight.owner)
        if not self._holders[weight.name]:  # a constant in the code of a frozen program
            return Feed(_OPERATOR_NAMES.get(operator, operator), weight.identity, self.steps.serial)
        name = weight.identity if weight.entry else owner or weight.name
        return Feed(name, weight.identity, self.steps.serial)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or outputs, which nest lists once at most."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
            elif isinstance(item, (list, tuple)):
                yield from (inner for inner in item if isinstance(inner, Tensor))
