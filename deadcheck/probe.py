"""The instrument: sees every activation operator of a running model, names its site and counts its values."""

from __future__ import annotations

import copy
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from deadcheck import activations, fused, kernel, module_calls, offloaded, recurrent
from deadcheck.activations import Activation
from deadcheck.as_called import as_called, is_autocast
from deadcheck.boundary import tensors_in
from deadcheck.deferred import counter_of
from deadcheck.errors import ProbeError
from deadcheck.follower import Follower, tensors_of
from deadcheck.layout import SAMPLE, Feed, Flow, Weight, has, positions
from deadcheck.leaps import LAYERS, Leap, Leaps
from deadcheck.locating import Locator, Samples, Seen
from deadcheck.operators import Operator, operator_of
from deadcheck.places import PLACE, RECURRENT, Place, read
from deadcheck.preserve import nothing_fused
from deadcheck.roster import Roster, SiteRecord
from deadcheck.sites import SiteStats, Skipped
from deadcheck.stats import SiteCounter
from deadcheck.steps import Step, form_of
from deadcheck.suspects import Suspects
from deadcheck.weights import module_names
from deadcheck.whereabouts import Whereabouts, never_ran

Args = tuple[Any, ...]

_TIME_FIRST = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip

_running = threading.local()

_THIS_FILE = sys._getframe().f_code.co_filename

_pop_mode, _push_mode = torch._C._pop_torch_dispatch_stack, torch._C._push_on_torch_dispatch_stack


Watch = Callable[["Probe", SiteRecord, Tensor, Flow], None]
"""Called at each activation with the probe, the record of the site, its input and the axes of that."""


class Met(NamedTuple):
    """An activation call that has been met, and may be again."""

    seen: Seen
    place: int
    """Where in the code of the model it stands."""

    dtype: torch.dtype
    bends: bool
    """Whether it may be a part of an activation that is written out by hand."""


@dataclass
class _Batch:
    """What is known only while one forward pass runs."""

    samples: Samples
    met: list[Met] = field(default_factory=list)
    """Activation calls so far that were found as in an earlier batch."""
    holds_roster: bool = False
    is_autocast: bool = field(default_factory=torch._C._is_any_autocast_enabled)
    suspects: Suspects = field(default_factory=Suspects)
    caller: FrameType | None = None
    """The frame that runs the model."""


class Stopped(BaseException):
    """Ends a forward pass whose outcome is of no use any more; no model catches it by ``except Exception``."""


class Probe:
    """Context manager that measures every activation of ``model`` while its forward passes run inside ``batch()``.

    One probe at a time in a thread (a second raises ProbeError); probes on different models in different threads
    do not disturb one another. ``fork()`` gives a probe for another thread that runs the same model.

        with Probe(model) as probe:
            with probe.batch((x,), {}, samples=len(x), first_sample=0):
                model(x)
        stats = probe.stats()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gates: bool = False,
        unit_axes: Sequence[tuple[str, int]] = (),
        watch: Watch | None = None,
        stats: str = "full",
    ) -> None:
        self.model = model
        self.watch = watch
        self.level = stats
        self.gates = gates
        self.warnings: dict[str, str] = {}
        self._names, self._aliases = module_names(model)
        self._follow = Follower(model, self._names)
        self._leaps = Leaps()
        self._roster = Roster(self._aliases)
        self._locator = Locator(self._roster, unit_axes)
        self._root = self
        self._forks: list[Probe] = []
        self._counters: dict[SiteRecord, SiteCounter] = {}
        self._skipped: dict[tuple[str, str], Skipped] = {}
        self._notes: dict[tuple[str, str], str] = {}
        self._where = Whereabouts(self._names, gates=gates)
        self._scratch: dict[str, Tensor] = {}
        self._marks: dict[str, Place] = {}
        self._operators: dict[Any, Operator] = {}
        self._batch: _Batch | None = None
        self.passes = 0
        self._seconds = 0.0
        self._observing = False
        self._failure: tuple[str, nn.Module] | None = None
        self._mode = _Mode(self)
        self._exit = ExitStack()
        self._repeats: Probe | None = None
        self._is_stopped = False
        self._written = kernel.WRITTEN if kernel.is_built() and kernel.writes_as_torch() else {}

    def __enter__(self) -> Probe:
        with ExitStack() as stack:
            stack.enter_context(self._in_this_thread())
            stack.enter_context(module_calls.seen_by(self._see_call))
            if self._root is self:
                stack.enter_context(nothing_fused(self.model))
                stack.enter_context(offloaded.told(self.model, self._bring_in))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    @contextmanager
    def _in_this_thread(self) -> Iterator[None]:
        before = getattr(_running, "probe", None)
        if before is not None and before._root is not self._root:
            raise ProbeError("a probe is already running in this thread; scan one model at a time")
        _running.probe = self
        try:
            yield
        finally:
            _running.probe = before

    def fork(self, *, repeats: Probe | None = None) -> Probe:
        """Return a probe of the same scan for another thread; enter it there, and adopt it in the end.

        One that ``repeats`` what another counted so far raises Stopped where it counts anything else.
        """
        fork = copy.copy(self)
        fork._repeats, fork._is_stopped = repeats, False
        fork.warnings, fork._skipped, fork._notes = {}, {}, {}
        fork._counters, fork._scratch, fork._forks = {}, {}, []
        fork._where, fork._locator, fork._follow = self._where.fork(), self._locator.fork(), self._follow.fork()
        fork._leaps = self._leaps.fork()
        fork._batch = fork._failure = None
        fork._seconds = 0.0
        fork._mode, fork._exit = _Mode(fork), ExitStack()
        return fork

    def adopt(self, fork: Probe) -> None:
        """Take what a fork counted for this probe's own."""
        self._forks.append(fork)

    def stop(self) -> None:
        """Have the pass that runs raise Stopped at its next activation."""
        self._is_stopped = True

    def agrees_with(self, other: Probe) -> bool:
        """Tell whether another probe of this scan counted the very same, to the last bit."""
        own, others = self.stats(), other.stats()
        return len(own) == len(others) and all(a.equals(b) for a, b in zip(own, others, strict=True))

    @contextmanager
    def batch(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, samples: int, first_sample: int, padding: int = 0
    ) -> Iterator[None]:
        """Count what runs inside as one forward pass over ``samples`` samples of the data from ``first_sample`` on.

        The last ``padding`` of them are run and not counted.
        """
        caller = sys._getframe(2)  # above contextlib's
        self._batch = _Batch(Samples(samples, samples - padding, first_sample), caller=caller)
        self.passes += 1
        self._failure = None
        self._where.start()
        self._follow.start([tensor for _, tensor in tensors_in([args, kwargs])], samples, padding)
        try:
            with torch.no_grad(), self._mode:
                n_modes = torch._C._len_torch_dispatch_stack()
                try:
                    yield
                finally:
                    if torch._C._len_torch_dispatch_stack() < n_modes:  # an interrupt between two lines
                        _push_mode(self._mode)
            with self.aside():
                for counter in self._counters.values():
                    counter.finish_batch(first_sample)
        finally:
            if self._batch.holds_roster:
                self._roster.lock.release()
            self._batch = None

    @property
    def failure(self) -> tuple[str, nn.Module]:
        """Path and module that ran when the forward pass raised; the model itself where it is not known."""
        return self._failure or ("", self.model)

    @property
    def place(self) -> Place | None:
        """Where a program that is not made of Python modules stands in the pass that runs."""
        return None if self._batch is None else self._where.place

    def stats(self) -> tuple[SiteStats, ...]:
        """Return what was counted, a record per site, in the order in which the sites first ran."""
        counters = self._counted()
        return tuple(
            reduce(add, (counter.freeze(site) for counter in counters[record]))
            for record in self._roster.name(counters)
            for site in (self._roster.site(record),)
        )

    @property
    def seconds(self) -> float:
        """Seconds spent in counting and in following tensors, those of all threads together."""
        return sum(probe._seconds for probe in self._family)

    def unmatched(self) -> tuple[str, ...]:
        """Return a sentence for each axis that the user chose for sites which never came."""
        matched = set().union(*(probe._locator.matched for probe in self._family))
        return tuple(
            f"--units '{pattern}={axis}' matches no site; see the keys in the report"
            for pattern, axis in self._locator.unit_axes
            if (pattern, axis) not in matched
        )

    def places(self) -> tuple[tuple[int, int], ...]:
        """Return, for each record of ``stats``, the first sample of the batch in which it first ran, and which step."""
        return tuple(record.first for record in self._roster.name(self._counted()))

    def _counted(self) -> dict[SiteRecord, list[SiteCounter]]:
        counters: dict[SiteRecord, list[SiteCounter]] = {}
        for probe in self._family:
            for record, counter in probe._counters.items():
                if counter.samples:
                    counters.setdefault(record, []).append(counter)
        return counters

    def notes(self) -> tuple[str, ...]:
        """Return what ran in another way than in a deployed model, or may not be as meant, one sentence each."""
        told = dict(item for probe in self._family for item in probe.warnings.items())
        notes = dict(item for probe in self._family for item in probe._notes.items())
        counted = dict(item for probe in self._family for item in probe._locator.notes.items())
        return (*told.values(), *notes.values(), *counted.values())

    def skipped(self) -> tuple[Skipped, ...]:
        """Return what ran and was not measured, and what never ran."""
        skipped = dict(item for probe in self._family for item in probe._skipped.items())
        return (*skipped.values(), *never_ran(self.model, self._names, self._ran()))

    def _ran(self) -> set[str]:
        return set().union(*(probe._where.ran | probe._follow.ran for probe in self._family))

    @property
    def _family(self) -> tuple[Probe, ...]:
        return (self, *self._forks)

    # Which module runs.

    def _see_call(self, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
        batch = self._batch
        if batch is None:
            return module_calls.made(module, *args, **kwargs)
        kind, begun = type(module), None
        if kind in LAYERS and len(args) == 1 and not kwargs and not batch.is_autocast:
            started = time.perf_counter()
            leap = self._leaps.find(module, args[0], self._follow)
            begun = None if leap is not None else self._leaps.begin(module, args[0], self._follow)
            self._seconds += time.perf_counter() - started
            if leap is not None and torch._C._len_torch_dispatch_stack() > 0:
                top = _pop_mode(None)
                if top is self._mode:
                    return self._leap(leap, args[0])
                _push_mode(top)  # somebody else wants to see what runs
        self._where.enter(module)
        if isinstance(module, _TIME_FIRST) and not getattr(module, "batch_first", True):
            self._check_time(args[0] if args else None)
        try:
            if kind in activations.GATED:
                return self._call_gated(module, args, kwargs)
            output = module_calls.made(module, *args, **kwargs)
            if begun is not None:
                self._leaps.end(begun, output, self._follow)
            return output
        except BaseException:
            self._failed(module)
            raise
        finally:
            self._where.leave()

    def _leap(self, leap: Leap, source: Tensor) -> Any:
        """Run a layer unwatched: torch does not come to Python for each operator."""
        try:
            output = leap.begun.layer.forward(source)
        except BaseException:
            self._where.enter(leap.begun.layer)
            self._failed(leap.begun.layer)
            self._where.leave()
            raise
        finally:
            _push_mode(self._mode)
        started = time.perf_counter()
        self._leaps.land(leap, output, self._follow)
        self._seconds += time.perf_counter() - started
        return output

    def _check_time(self, source: Any) -> None:
        """Warn where a layer takes for steps in time what the data has as samples."""
        known = self._follow.look(source)
        if isinstance(known, Flow) and known.axes is not None and len(known.axes) == 3 and has(known.axes[0], SAMPLE):
            path = self._where.path or "the model"
            self.warnings.setdefault(
                "time-first",
                f"{path} takes axis 0 for steps in time (batch_first=False), and there the data has its samples, by "
                "which everything was counted; transpose the data if that is not what you mean",
            )

    def _call_gated(self, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
        """Run an LSTM or GRU, and count its output before hooks of its own see it."""

        def see(module: nn.Module, args: Args, output: Any) -> None:
            self._see_recurrent(activations.GATED[type(module)], args[0] if args else None, output, module)

        with module.register_forward_hook(see, prepend=True):
            return module_calls.made(module, *args, **kwargs)

    def _failed(self, module: nn.Module) -> None:
        """Note where a pass raised: in the innermost module."""
        if self._failure is None:
            running = self._where.module
            self._failure = self._where.path, module if running is None else running

    def _bring_in(self, absent: Tensor, weight: Tensor) -> None:
        probe = getattr(_running, "probe", None)
        if probe is not None and probe._root is self:
            probe._follow.learn(weight, self._follow.look(absent))

    # What every operator does to what is known of its tensors.

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator of the model, watching it."""
        batch = self._batch
        if batch is None or self._observing:
            return func(*args, **kwargs)
        step = self._follow.steps.next
        if step is not None and step.met is not None and not kwargs:
            output = self._activate_again(step, func, args)
            if output is not None:
                return output
        known = self._operators.get(func)
        if known is None:
            if func in (PLACE, RECURRENT):
                return self._move(args)
            if isinstance(func, HigherOrderOperator):
                return self._run_higher_order(func, args, kwargs)
            known = self._operators[func] = operator_of(func)
            if known.unseen is not None:
                self._skip(str(func), self._where.path, known.unseen)
        name = known.name
        if not known.is_plain:
            if name == "_nested_tensor_from_mask_left_aligned":
                return False  # or an encoder would run on nested tensors, which have no axes
            if known.in_parts is not None:
                if not any(tensor.is_nested for tensor in tensors_of(args)):
                    return self._run_in_parts(known, args, kwargs)
                self._skip(
                    str(func), self._where.path, "runs on nested tensors: an activation inside it cannot be seen"
                )
            activation = known.resolve(args, kwargs) if known.resolve is not None else None
            if activation is not None and (z := self._input(name, args)) is not None:
                return self._activate(func, name, activation, z, args, kwargs)
        if known.trains is not None and known.trains[0](args):
            path = self._where.path
            self._notes.setdefault((name, path), f"{path or 'the model'}: {known.trains[1]}")
        if batch.is_autocast and not is_autocast(func):
            with as_called():
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        started = time.perf_counter()
        if kwargs or not self._follow.repeats(func, self._where.path, args, output):
            self._follow.carry(func, name, known.rule, self._where.path, args, kwargs, output)
        if not known.is_plain:
            self._suspect(batch, name, args, output)
        self._seconds += time.perf_counter() - started
        return output

    def _run_in_parts(self, operator: Operator, args: Args, kwargs: dict[str, Any]) -> Any:
        """Run an operator as those that it hides, watching them if it is not known what they do."""
        follow, batch = self._follow, self._batch
        assert batch is not None
        may_leap = operator.in_parts is fused.encoder_layer and not (kwargs or batch.is_autocast or self.watch)
        leap = self._leaps.find_fused(args, follow) if may_leap else None
        if leap is None:
            start, known = follow.steps.count, follow.look(args[0]) if may_leap else None
            with as_called(), self._mode, self._where.inside(operator.name):
                output = operator.in_parts(*args, **kwargs)
            if may_leap:
                self._leaps.end_fused(start, args, known, output, follow)
            return output

        def activate(func: Any, z: Tensor) -> Tensor:
            follow.steps.go_on(leap.at, leap.before)
            (known,) = leap.activation.held
            follow.learn(z, known)
            output: Tensor = self._count_again(leap.activation, func, (z,))
            return output

        output = operator.in_parts(*args, activate=activate)
        follow.steps.go_on(leap.end, leap.last)
        follow.learn(output, leap.known)
        return output

    def _suspect(self, batch: _Batch, name: str, args: Args, output: Any) -> None:
        """List what may be an activation written out by hand."""
        suspect = batch.suspects.see(name, args, output)
        if suspect is not None:
            self._skip(suspect, self._where.path, "looks like an activation written out by hand; not measured")
        elif name == "sin" and isinstance(known := self._follow.look(args[0]), Flow) and known.axis_from:
            self._skip("aten.sin", self._where.path, "a sine of a layer's output may be its activation; not measured")

    def _move(self, args: tuple[Any, ...]) -> None:
        """Follow a mark of a program to where it stands now."""
        place = self._marks.setdefault(args[-1], read(args[-1]))
        self._where.go_to(place)
        if len(args) == 3:
            source = next((tensor for tensor in args[0] if isinstance(self._follow.look(tensor), Flow)), None)
            self._see_recurrent(place.kind, source, args[1])

    def _run_higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that calls functions, watching what they do."""
        run = fused.HIGHER_ORDER.get(func.name())
        if run is None:
            self._skip(func.name(), self._where.path, "an operator that calls functions: what they do cannot be seen")
            return func(*args, **kwargs)
        with as_called(), self._mode:
            return run(*args, **kwargs)

    def _input(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """Return the values that an activation works on; None where it works on none that depend on the data."""
        z = args[0]
        if name == "maximum":
            z, other = args if activations.is_zero(args[1]) else args[::-1]
            known = self._follow.look(other)
            if isinstance(known, Flow) and known.feeds:
                return None  # the larger of two results, not a comparison with 0
        if not z.is_floating_point() and name in activations.BOUNDS and not z.is_complex() and not z.is_quantized:
            self._skip(name, self._where.path, "bounds integers, as an index; not taken for an activation")
            return None
        if isinstance(self._follow.look(z), Weight):
            self._skip(name, self._where.path, "works on weights or constants alone, the same for every sample")
            return None
        return z  # type: ignore[no-any-return]

    # What an activation does.

    def _activate_again(self, step: Step, func: Any, args: Args) -> Any:
        """Run and count an activation that stood here in the pass before too; None, with nothing done, for any other.

        As ``Follower.repeats`` it is kept short.
        """
        form, met = step.form, step.met
        if form is None or form.func is not func or form.path != self._where.path or self.watch is not None:
            return None
        if not self._follow.takes(form, args) or args[0].dtype is not met.dtype or self._place() != met.place:
            return None
        return self._count_again(step, func, args)

    def _count_again(self, step: Step, func: Any, args: Args) -> Any:
        """Run and count an activation as this step did."""
        z, met, batch = args[0], step.met, self._batch
        assert batch is not None
        self._stop_if_told()
        started, (record, _, layout, rows, _) = time.perf_counter(), met.seen
        counter = self._counter(record)
        output = self._rectify(counter, func, args, met.seen)
        if output is None:
            counter.see_input(z, layout, rows)
            run = time.perf_counter()
            output = func(*args)
            started += time.perf_counter() - run
            counter.see_output(_first(output), layout, rows)
        if met.bends:
            batch.suspects.curve(z, _first(output))
        self._follow.steps.go(step)
        batch.met.append(met)
        for tensor in tensors_of(output):
            self._follow.learn(tensor, step.knowns[0])
        self._seconds += time.perf_counter() - started
        return output

    def _rectify(self, counter: SiteCounter, func: Any, args: Args, seen: Seen) -> Tensor | None:
        """Run and count an activation in one pass, where the kernel can; None, with nothing done, where not."""
        in_place = self._written.get(func)
        if in_place is None or (len(args) > 1 and math.copysign(1.0, args[1]) < 0):  # a border of -0 is written too
            return None
        return counter.rectify(args[0], seen.layout, seen.rows, in_place=in_place)

    def _activate(
        self, func: Any, name: str, act: Activation, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        assert self._batch is not None
        flow = self._follow.look(z)
        flow = flow if isinstance(flow, Flow) else None
        is_gate = self._where.is_gate and not self.gates
        if is_gate or z.numel() == 0 or z.is_complex():
            if z.is_complex():
                self._skip(str(func), self._where.path, "complex values have no sign; not measured")
            output = func(*args, **kwargs)
            self._pass_by(output, flow, act)
            return output
        if name == "glu":
            return self._activate_glu(func, act, args, kwargs, flow)
        seen = self._prepare(z, flow, act, None if kwargs else (func, args))
        counter = self._counter(seen.record)
        output = None
        if self.watch is None and not kwargs:
            with self.aside():
                output = self._rectify(counter, func, args, seen)
        if output is None:
            with self.aside():
                counter.see_input(z, seen.layout, seen.rows)
                if self.watch is not None:
                    self.watch(self, seen.record, z, seen.flow)
            output = func(*args, **kwargs)
            with self.aside():
                counter.see_output(_first(output), seen.layout, seen.rows)
        self._after(output)
        if act.family in activations.BENDS:
            self._batch.suspects.curve(z, _first(output))
        return output

    def _activate_glu(self, func: Any, act: Activation, args: tuple[Any, ...], kwargs: Any, flow: Flow | None) -> Any:
        """Gated linear unit: the second half of the axis gates the first, so the gate is what is on or off."""
        z = args[0]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % z.dim()
        gate = z.narrow(dim, z.shape[dim] // 2, z.shape[dim] // 2)
        output = func(*args, **kwargs)
        if flow is not None and flow.axes is not None:
            axis = flow.axes[dim]
            half = tuple(a._replace(size=a.size // 2) if i == 0 and a.size % 2 == 0 else a for i, a in enumerate(axis))
            half = half if math.prod(a.size for a in half) == output.shape[dim] else positions(output.shape[dim])
            flow = flow._replace(axes=(*flow.axes[:dim], half, *flow.axes[dim + 1 :]))
        self._count(gate, output, self._prepare(output, flow, act))
        self._after(output)
        return output

    def _count(self, z: Tensor, h: Tensor, seen: Seen) -> None:
        counter = self._counter(seen.record)
        with self.aside():
            counter.see_input(z, seen.layout, seen.rows)
            counter.see_output(h, seen.layout, seen.rows)

    def _see_recurrent(self, kind: str, source: Any, output: Any, module: nn.Module | None = None) -> None:
        """Count the output of an LSTM or GRU as one site, and say how its axes follow from the input's."""
        act = activations.recurrent(kind)
        tensor, states = recurrent.outputs(output)
        if tensor is None or tensor.numel() == 0:
            return
        known = self._follow.look(source.data if isinstance(source, PackedSequence) else source)
        flow = recurrent.carried(known, tensor, self._follow.feed(act.name, self._where.path, None), act.name)
        self._count(tensor, tensor, seen := self._prepare(tensor, flow, act))
        self._follow.learn(tensor, seen.flow)
        if module is not None:
            for state in states:
                self._follow.learn(state, recurrent.last(module, source, flow, state))

    def _prepare(
        self, tensor: Tensor, flow: Flow | None, act: Activation, call: tuple[Any, Args] | None = None
    ) -> Seen:
        """Find the site that this activation call belongs to, and the order in which to count its values.

        A ``call`` by which it may be known again is its operator and arguments.
        """
        batch = self._batch
        assert batch is not None
        self._stop_if_told()
        path, place = self._where.path, self._place()
        signature = ("activation", act.name, path, place, id(flow), tensor.shape)
        step = self._follow.steps.before(signature)
        if step is None or step.met is None:
            self._hold_roster()
            seen = self._locator.find(
                tensor, flow, act, batch.samples, self._where, place=place, step=self._follow.steps.count
            )
            weight = seen.record.weight
            after = seen.flow._replace(feeds=(Feed(weight, weight, self._follow.steps.serial + 1, False),))
            form = None
            if call is not None and flow is not None:
                form = form_of(call[0], path, call[1], tensor, [(tensor, flow)])
            met = Met(seen, place, tensor.dtype, act.family in activations.BENDS)
            step = Step(signature, (after,), self._follow.steps.serial + 1, (flow,), met, form)
        met = self._follow.steps.take(step).met
        batch.met.append(met)
        return met.seen  # type: ignore[no-any-return]

    def _stop_if_told(self) -> None:
        """End a pass whose outcome is of no use any more."""
        met = self._batch.met if self._batch is not None else ()
        if self._is_stopped or (self._repeats is not None and met and not self._repeats_still(met[-1].seen)):
            raise Stopped

    def _repeats_still(self, seen: Seen) -> bool:
        """Tell whether what was counted last may come out as it did before."""
        assert self._repeats is not None
        before = self._repeats._counters.get(seen.record)
        return before is not None and self._counters[seen.record].may_become(before)

    def _hold_roster(self) -> None:
        """Keep the roster to this thread until the batch ends, and tell it what it missed."""
        batch = self._batch
        assert batch is not None
        if batch.holds_roster:
            return
        self._roster.lock.acquire()
        batch.holds_roster = True
        self._roster.start_batch()
        for seen, place, _, _ in batch.met:
            self._roster.meet(seen.record, seen.told, place)

    def _counter(self, record: SiteRecord) -> SiteCounter:
        counter = self._counters.get(record)
        if counter is None:
            counter = self._counters[record] = counter_of(
                record.activation, record.units, record.device, self._scratch, self.level
            )
        return counter

    def _place(self) -> int:
        """Return a number for the place in the code of the model from which an activation was called."""
        assert self._batch is not None
        caller = self._batch.caller
        place = self._where.place.number if self._where.place is not None else 0
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename is _THIS_FILE:
            frame = frame.f_back
        parts = [place]
        while frame is not None:
            parts += id(frame.f_code), frame.f_lasti
            frame = frame.f_back if frame is not caller else None
        return hash(tuple(parts))

    def _after(self, output: Any) -> None:
        """What comes out of an activation keeps its axes, and is fed by the activation from here on."""
        assert self._batch is not None
        (after,) = self._follow.steps.last.knowns
        for tensor in tensors_of(output):
            self._follow.learn(tensor, after)

    def _pass_by(self, output: Any, flow: Flow | None, act: Activation) -> None:
        """Carry an activation that is not measured."""
        assert self._batch is not None
        name, serial = f"{self._where.path}:{act.name}", self._follow.steps.serial + 1
        signature = ("gate", name, id(flow))
        after = None if flow is None else flow._replace(feeds=(Feed(name, name, serial, False),))
        step = self._follow.steps.take(
            self._follow.steps.before(signature) or Step(signature, (after,), serial, (flow,))
        )
        for tensor in tensors_of(output):
            self._follow.learn(tensor, step.knowns[0])

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run operators that are not the model's, unseen."""
        started, self._observing = time.perf_counter(), True
        try:
            yield
        finally:
            self._observing = False
            self._seconds += time.perf_counter() - started

    # What was not measured.

    def _skip(self, what: str, where: str, reason: str) -> None:
        self._skipped.setdefault((what, where), Skipped(what, where, reason))


class _Mode(TorchDispatchMode):
    """Passes every operator to the probe."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._probe = probe

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default wraps the handler so that the first operator imports torch._dynamo: 1 s and 68 MB.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # torch.cond compiles what it calls, this handler too
            return func(*args, **(kwargs or {}))
        return self._probe.dispatch(func, args, kwargs or {})


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
