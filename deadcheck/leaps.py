"""Modules of torch that run unwatched in a pass that repeats the one before, which told what they do to the axes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, ValuesView
from operator import is_, itemgetter
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deadcheck.follower import Follower
from deadcheck.frames import NOT_THE_MODELS, place_of
from deadcheck.layout import Flow, Known
from deadcheck.roster import SiteRecord
from deadcheck.steps import Step

if TYPE_CHECKING:
    from deadcheck import _leaping

try:
    from deadcheck._leaping import Runner as _Compiled
except ImportError:  # no compiler where it was installed
    _BUILT = False
else:
    _BUILT = True

_pop_mode, _push_mode = torch._C._pop_torch_dispatch_stack, torch._C._push_on_torch_dispatch_stack

KINDS: dict[type[nn.Module], Any] = {
    kind: itemgetter("training", *getattr(kind, "__constants__", ()))
    for kind in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh,
    )
}  # fmt: skip
"""Layers that hold no activation, and activations; with what in the ``__dict__`` of each its way depends on."""


class Begun(NamedTuple):  # as _leaping.c takes it apart
    """How a module begins."""

    module: nn.Module
    place: int
    """Where in the code of the model it is called."""

    attributes: tuple[Any, ...]
    parameters: tuple[Tensor | None, ...]
    buffers: tuple[Tensor | None, ...]
    source: Flow
    """What is known of its input."""

    shape: torch.Size
    start: int
    """Steps so far."""


class Leap(NamedTuple):  # as _leaping.c takes it apart
    """What a module did, from its first operator to its last."""

    begun: Begun
    last: Step
    end: int
    """Steps so far when it ended; ``last`` is the one before."""

    known: Known | None
    """What was known of its output."""


class Fused(NamedTuple):
    """What an operator did that was run in parts, one of them an activation."""

    args: tuple[Any, ...]
    source: Flow
    shape: torch.Size
    activation: Step
    before: Step
    """The step before the activation."""

    at: int
    """Steps so far when the activation began."""

    last: Step
    end: int
    known: Known | None


class Leaps:
    """The modules of a pass that the pass before ran too, on inputs of which the very same was known."""

    def __init__(self, *, activations: bool) -> None:
        self._activations = activations
        """Whether modules that are activations may run like that too."""

        self.known: dict[int, Leap] = {}
        """By the number of steps so far when the module began."""
        self._fused: dict[int, Fused] = {}

    def fork(self) -> Leaps:
        """Return one for another thread that runs the same model."""
        fork = Leaps(activations=self._activations)
        fork.known, fork._fused = dict(self.known), dict(self._fused)
        return fork

    def begin(self, module: nn.Module, source: Any, follow: Follower, place: int) -> Begun | None:
        """Note how one of the KINDS begins that is watched."""
        known, own = follow.look(source), module.__dict__
        if type(source) is not Tensor or not isinstance(known, Flow):
            return None
        try:
            if own["training"] or not _is_as_made(own):
                return None
            attributes = KINDS[type(module)](own)
            parameters, buffers = tuple(own["_parameters"].values()), tuple(own["_buffers"].values())
        except KeyError:  # made by an older torch, or taken apart
            return None
        return Begun(module, place, attributes, parameters, buffers, known, source.shape, follow.steps.count)

    def end(self, begun: Begun, output: Any, follow: Follower) -> None:
        """Note what it did."""
        steps = follow.steps.since(begun.start)
        may_leap = self._activations or all(step.met is None for step in steps)
        is_plain = type(output) is Tensor and all(step.form is not None for step in steps)
        if steps and may_leap and is_plain and _is_one_kind(steps):
            self.known[begun.start] = Leap(begun, steps[-1], follow.steps.count, follow.look(output))

    def find_fused(self, args: tuple[Any, ...], follow: Follower) -> Fused | None:
        """Return what an operator is going to do in parts, if that is known, so that they may run unwatched."""
        fused = self._fused.get(follow.steps.count)
        if fused is None or follow.look(args[0]) is not fused.source or args[0].shape != fused.shape:
            return None
        same = len(args) == len(fused.args) and all(map(_is_same, args[1:], fused.args[1:]))
        return fused if same and follow.steps.is_at(fused.end, fused.last) else None

    def end_fused(self, start: int, args: tuple[Any, ...], known: Known | None, output: Any, follow: Follower) -> None:
        """Note what one did, of whose first argument this was known, and that began after so many steps."""
        steps = follow.steps.since(start)
        met = [number for number, step in enumerate(steps) if step.met is not None]
        if len(met) == 1 and met[0] > 0 and isinstance(known, Flow) and all(step.form is not None for step in steps):
            at = met[0]
            self._fused[start] = Fused(
                args, known, args[0].shape, steps[at], steps[at - 1], start + at, steps[-1], follow.steps.count,
                follow.look(output),
            )  # fmt: skip


class Calls(NamedTuple):
    """What a runner calls, in the order in which ``_leaping.c`` takes it."""

    watched: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
    """Runs a call of a module of which it is not known what it does."""

    activate: Callable[[Step, Tensor], Any]
    """Runs and counts the operator of a module that is an activation."""

    passed: Callable[[Step, Tensor, Any], None]
    """Is told what came out of an activation of a site that is not counted any more."""

    failed: Callable[[nn.Module], None]
    """Is told which module raised while it ran unwatched."""


class Runner:
    """Runs calls of modules, and unwatched where it is known what they do. ``_leaping.c`` does the very same.

    The ``mode`` is off while one runs unwatched. Activations of ``settled`` sites are not counted.
    """

    def __init__(self, leaps: Leaps, follow: Follower, mode: Any, settled: set[SiteRecord], calls: Calls) -> None:
        self.caller: FrameType | None = None
        """The frame that runs the model in a pass whose modules may run unwatched."""

        self.seconds = 0.0
        """Time that went into looking up what they do."""

        self._leaps, self._follow, self._mode, self._settled, self._calls = leaps, follow, mode, settled, calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of a module."""
        leap = None
        if self.caller is not None and len(args) == 1 and not kwargs:
            started = time.perf_counter()
            leap = self.find(module, args[0])
            self.seconds += time.perf_counter() - started
        is_activation = leap is not None and leap.last.met is not None
        if leap is None or (is_activation and not self._may_activate(leap, args[0])) or not self._take_mode():
            return self._calls.watched(module, args, kwargs)
        try:
            if is_activation and leap.last.met.seen.record not in self._settled:
                return self._calls.activate(leap.last, args[0])
            output = module.forward(args[0])
        except BaseException:
            self._calls.failed(module)
            raise
        finally:
            _push_mode(self._mode)
        started = time.perf_counter()
        self._follow.steps.go_on(leap.end, leap.last)
        self._follow.learn(output, leap.known)
        if is_activation:
            self._calls.passed(leap.last, args[0], output)
        self.seconds += time.perf_counter() - started
        return output

    def _may_activate(self, leap: Leap, source: Tensor) -> bool:
        """Tell whether a module that is an activation can be run as its operator, and be counted as before."""
        assert self.caller is not None
        is_seen = torch._C._len_torch_function_stack() > 0
        return not is_seen and source.dtype is leap.last.met.dtype and place_of(0, self.caller) == leap.begun.place

    def _take_mode(self) -> bool:
        """Take the probe's mode off the top of torch's stack, so that torch does not come to Python for an operator."""
        if torch._C._len_torch_dispatch_stack() == 0:
            return False
        top = _pop_mode(None)
        if top is not self._mode:  # somebody else wants to see what runs
            _push_mode(top)
        return top is self._mode

    def find(self, module: nn.Module, source: Any) -> Leap | None:
        """Return what a module is going to do, if that is known."""
        follow = self._follow
        leap = self._leaps.known.get(follow.steps.count)
        if leap is None or type(source) is not Tensor:
            return None
        before, last, end, _ = leap
        own = module.__dict__
        try:
            is_same = (
                before.module is module
                and before.source is follow.look(source)
                and before.shape == source.shape
                and follow.steps.is_at(end, last)
                and before.attributes == KINDS[type(module)](own)
                and _are_same(before.parameters, own["_parameters"].values())
                and _are_same(before.buffers, own["_buffers"].values())
                and _is_as_made(own)
            )
        except KeyError:  # somebody has taken an attribute away
            return None
        return leap if is_same else None


def runner(
    leaps: Leaps, follow: Follower, mode: Any, settled: set[SiteRecord], calls: Calls
) -> Runner | _leaping.Runner:
    """Return what runs the calls of modules of a pass: the compiled one, or ``Runner`` where that is not built."""
    if not _BUILT:
        return Runner(leaps, follow, mode, settled, calls)
    hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    held = leaps.known, follow.tracked, follow.steps, follow.steps.taken
    return _Compiled(*held, KINDS, *hooks, NOT_THE_MODELS, mode, settled, calls)


def _is_one_kind(steps: Sequence[Step]) -> bool:
    """Tell whether these are operators of a layer, or the one of an activation, which takes its input first."""
    if all(step.met is None for step in steps):
        return True
    return len(steps) == 1 and steps[0].form is not None and steps[0].form.n_before == 1


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float)) and a == b)


def _is_as_made(own: dict[str, Any]) -> bool:
    """Tell whether nothing runs in a call of a module of torch but the code of its class; this is its ``__dict__``."""
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_compiled_call_impl" in own:
        return False
    return not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _are_same(ours: Sequence[Any], theirs: ValuesView[Any]) -> bool:
    return len(ours) == len(theirs) and all(map(is_, ours, theirs))
