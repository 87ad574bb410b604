"""The instrument: sees every operator and module call of a running model, and hands the activations to its meter."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from deadcheck import activations, fused, leaps, module_calls, offloaded
from deadcheck.as_called import as_called, is_autocast
from deadcheck.boundary import tensors_in
from deadcheck.errors import ProbeError, first_line
from deadcheck.follower import Follower, tensors_of
from deadcheck.frames import NOT_THE_MODELS
from deadcheck.layout import SAMPLE, Flow, Weight, has
from deadcheck.leaps import KINDS, Calls, Leaps, Runner, runner
from deadcheck.locating import Locator, Samples
from deadcheck.meter import Args, Meter, Pass
from deadcheck.operators import GATES_INSIDE, Operator, operator_of
from deadcheck.places import PLACE, RECURRENT, Place, read
from deadcheck.preserve import nothing_fused
from deadcheck.roster import Roster, SiteRecord
from deadcheck.sites import SiteStats, Skipped
from deadcheck.stats import SiteCounter
from deadcheck.suspects import MAY_BE
from deadcheck.weights import module_names
from deadcheck.whereabouts import Whereabouts, never_ran

if TYPE_CHECKING:
    from deadcheck import _leaping

_TIME_FIRST = (
    nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer,
)  # fmt: skip

_OF_THE_ENTERED = "_mode", "_runner"
"""What only a probe has that is entered."""

_running = threading.local()

NOT_THE_MODELS.update((__file__, leaps.__file__))


Watch = Callable[["Probe", SiteRecord | None, Tensor, Flow | None], None]
"""Called at each activation with the probe, and what ``meter.Watch`` is called with."""


class Probe:
    """Context manager that measures every activation of ``model`` while its forward passes run inside ``batch()``.

    One probe at a time in a thread (a second raises ProbeError); probes on different models in different threads
    do not disturb one another. ``fork()`` gives a probe for another thread that runs the same model.

        with Probe(model) as probe:
            with probe.batch((x,), {}, samples=len(x), first_sample=0):
                model(x)
        stats = probe.stats()
    """

    _mode: _Mode
    _runner: Runner | _leaping.Runner

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
        self.warnings: dict[str, str] = {}
        self.passes = 0
        self.raised: str | None = None
        """What an operator of this pass said that raised; on its way through TorchScript an error loses its text."""

        self._names, self._aliases = module_names(model)
        self._follow = Follower(model, self._names)
        self._leaps = Leaps(activations=watch is None)
        self._roster = Roster(self._aliases)
        self._where = Whereabouts(self._names, gates=gates)
        self._meter = Meter(
            self._follow,
            self._where,
            Locator(self._roster, unit_axes),
            level=stats,
            gates=gates,
        )
        self._family_of = object()
        """Shared by the probes of one scan."""
        self._is_fork = False
        self._forks: list[Probe] = []
        self._notes: dict[tuple[str, str], str] = {}
        self._marks: dict[str, Place] = {}
        self._operators: dict[Any, Operator] = {}
        self._failure: tuple[str, nn.Module] | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Probe:
        with ExitStack() as stack:
            stack.enter_context(self._in_this_thread())
            stack.enter_context(self._armed())
            stack.enter_context(module_calls.seen_by(self._runner))
            if not self._is_fork:
                stack.enter_context(nothing_fused(self.model))
                stack.enter_context(offloaded.told(self.model, self._bring_in))
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._exit.close()

    @contextmanager
    def _armed(self) -> Iterator[None]:
        """Have what calls the probe, and not for longer: in a circle, all that was counted would stay when it is done.

        Python looks for circles by the number of objects, and never mind their megabytes.
        """
        meter = self._meter
        calls = Calls(self._watch_call, meter.run_step, meter.pass_over_step, self._failed_unwatched)
        self._mode = _Mode(self)
        self._runner = runner(self._leaps, self._follow, self._mode, meter.settled, calls)
        meter.watch = None if self.watch is None else partial(self.watch, self)
        try:
            yield
        finally:
            meter.seconds += self._runner.seconds
            meter.watch = None
            for name in _OF_THE_ENTERED:
                delattr(self, name)

    @contextmanager
    def _in_this_thread(self) -> Iterator[None]:
        before = getattr(_running, "probe", None)
        if before is not None and before._family_of is not self._family_of:
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
        fork.warnings, fork._notes, fork._forks = {}, {}, []
        fork._where, fork._follow, fork._leaps = self._where.fork(), self._follow.fork(), self._leaps.fork()
        fork._meter = self._meter.fork(fork._follow, fork._where, repeats=None if repeats is None else repeats._meter)
        fork.raised = fork._failure = None
        fork._is_fork, fork._exit = True, ExitStack()
        for name in _OF_THE_ENTERED:
            vars(fork).pop(name, None)
        return fork

    def adopt(self, fork: Probe) -> None:
        """Take what a fork counted for this probe's own."""
        self._forks.append(fork)

    def stop(self) -> None:
        """Have the pass that runs raise Stopped at its next activation."""
        self._meter.is_stopped = True

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
        self._meter.start(Samples(samples, samples - padding, first_sample), caller)
        self.passes += 1
        self.raised = self._failure = None
        self._where.start()
        self._follow.start([tensor for _, tensor in tensors_in([args, kwargs])], samples, padding)
        assert self._meter.running is not None
        may_leap = module_calls.is_only_watcher() and not self._meter.running.is_autocast
        self._runner.caller = caller if may_leap else None
        try:
            with torch.no_grad(), self._mode:
                n_modes = torch._C._len_torch_dispatch_stack()
                try:
                    yield
                finally:
                    if torch._C._len_torch_dispatch_stack() < n_modes:  # an interrupt between two lines
                        torch._C._push_on_torch_dispatch_stack(self._mode)
            self._meter.finish()
        finally:
            self._runner.caller = None
            self._meter.end()

    def aside(self) -> AbstractContextManager[None]:
        """Run operators that are not the model's, unseen."""
        return self._meter.aside()

    @property
    def failure(self) -> tuple[str, nn.Module]:
        """Path and module that ran when the forward pass raised; the model itself where it is not known."""
        return self._failure or ("", self.model)

    @property
    def path(self) -> str:
        """Path of the module that runs; empty for the model itself."""
        return self._where.path

    @property
    def place(self) -> Place | None:
        """Where a program that is not made of Python modules stands in the pass that runs."""
        return None if self._meter.running is None else self._where.place

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
        running = sum(probe._runner.seconds for probe in self._family if "_runner" in vars(probe))
        return running + sum(probe._meter.seconds for probe in self._family)

    def unmatched(self) -> tuple[str, ...]:
        """Return a sentence for each axis that the user chose for sites which never came."""
        matched = set().union(*(probe._meter.locator.matched for probe in self._family))
        return tuple(
            f"--units '{pattern}={axis}' matches no site; see the keys in the report"
            for pattern, axis in self._meter.locator.unit_axes
            if (pattern, axis) not in matched
        )

    def places(self) -> tuple[tuple[int, int], ...]:
        """Return, for each record of ``stats``, the first sample of the batch in which it first ran, and which step."""
        return tuple(record.first for record in self._roster.name(self._counted()))

    def _counted(self) -> dict[SiteRecord, list[SiteCounter]]:
        counters: dict[SiteRecord, list[SiteCounter]] = {}
        for probe in self._family:
            for record, counter in probe._meter.counters.items():
                if counter.samples:
                    counters.setdefault(record, []).append(counter)
        return counters

    def notes(self) -> tuple[str, ...]:
        """Return what ran in another way than in a deployed model, or may not be as meant, one sentence each."""
        told = dict(item for probe in self._family for item in probe.warnings.items())
        notes = dict(item for probe in self._family for item in probe._notes.items())
        counted = dict(item for probe in self._family for item in probe._meter.locator.notes.items())
        return (*told.values(), *notes.values(), *counted.values())

    def skipped(self) -> tuple[Skipped, ...]:
        """Return what ran and was not measured, and what never ran."""
        skipped = dict(item for probe in self._family for item in probe._meter.skipped.items())
        return (*skipped.values(), *never_ran(self.model, self._names, self._ran()))

    def _ran(self) -> set[str]:
        return set().union(*(probe._where.ran | probe._follow.ran for probe in self._family))

    @property
    def _family(self) -> tuple[Probe, ...]:
        return (self, *self._forks)

    # Which module runs.

    def _watch_call(self, module: nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
        running = self._meter.running
        if running is None:
            return module_calls.made(module, *args, **kwargs)
        kind, begun = type(module), None
        if self._runner.caller is not None and kind in KINDS and len(args) == 1 and not kwargs:
            started = time.perf_counter()
            begun = self._leaps.begin(module, args[0], self._follow, self._meter.place())
            self._meter.seconds += time.perf_counter() - started
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

    def _failed_unwatched(self, module: nn.Module) -> None:
        """Note that a module raised that is not among those that run."""
        self._where.enter(module)
        self._failed(module)
        self._where.leave()

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
            self._meter.see_recurrent(activations.GATED[type(module)], args[0] if args else None, output, module)

        with module.register_forward_hook(see, prepend=True):
            return module_calls.made(module, *args, **kwargs)

    def _failed(self, module: nn.Module) -> None:
        """Note where a pass raised: in the innermost module."""
        if self._failure is None:
            path, innermost = self._where.path, self._where.module
            if self._where.place is not None:  # in a program the modules are not called
                innermost = next((part for part, name in self._names.items() if name == path), None)
            self._failure = path, module if innermost is None else innermost

    def _bring_in(self, absent: Tensor, weight: Tensor) -> None:
        probe = getattr(_running, "probe", None)
        if probe is not None and probe._family_of is self._family_of:
            probe._follow.learn(weight, self._follow.look(absent))

    # What every operator does to what is known of its tensors.

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator of the model, watching it."""
        meter = self._meter
        running = meter.running
        if running is None or meter.is_aside:
            return func(*args, **kwargs)
        step = self._follow.steps.next
        if step is not None and step.met is not None and not kwargs:
            output = meter.repeat(step, func, args)
            if output is not None:
                return output
        known = self._operators.get(func)
        if known is None:
            if func in (PLACE, RECURRENT):
                return self._move(args)
            if isinstance(func, HigherOrderOperator):
                return self._run_higher_order(func, args, kwargs)
            known = self._operators[func] = operator_of(func)
        name = known.name
        is_watched = not (known.is_plain and known.unseen is None) and not _is_backward()
        if known.unseen is not None and is_watched:
            meter.skip(str(func), known.unseen)
        elif meter.gates and name in GATES_INSIDE:
            meter.skip(str(func), "runs a recurrent layer whole: its gates cannot be seen (--dtype float64 may help)")
        if not known.is_plain and is_watched:
            if name == "_nested_tensor_from_mask_left_aligned":
                return False  # or an encoder would run on nested tensors, which have no axes
            if known.in_parts is not None:
                if not any(tensor.is_nested for tensor in tensors_of(args)):
                    return self._run_in_parts(known, args, kwargs)
                meter.skip(str(func), "runs on nested tensors: an activation inside it cannot be seen")
            activation = known.resolve(args, kwargs) if known.resolve is not None else None
            if activation is not None:
                z = self._input(name, args)
                if z is not None:
                    return meter.run(activation, z, func, args, kwargs)
                meter.pass_over(args[0])
        if known.remark is not None and known.remark[0](args):
            path = self._where.path
            self._notes.setdefault((name, path), f"{path or 'the model'}: {known.remark[1]}")
        if running.is_autocast and not is_autocast(func):
            with as_called():
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        started = time.perf_counter()
        if kwargs or not self._follow.repeats(func, self._where.path, args, output):
            self._follow.carry(func, name, known.rule, self._where.path, args, kwargs, output)
        if not known.is_plain and is_watched:
            self._suspect(running, name, args, output)
        self._meter.seconds += time.perf_counter() - started
        return output

    def _run_in_parts(self, operator: Operator, args: Args, kwargs: dict[str, Any]) -> Any:
        """Run an operator as those that it hides, watching them if it is not known what they do."""
        follow, running = self._follow, self._meter.running
        assert running is not None
        may_leap = operator.in_parts is fused.encoder_layer and not (kwargs or running.is_autocast or self.watch)
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
            output: Tensor = self._meter.run_as(leap.activation, func, (z,))
            return output

        output = operator.in_parts(*args, activate=activate)
        follow.steps.go_on(leap.end, leap.last)
        follow.learn(output, leap.known)
        return output

    def _suspect(self, running: Pass, name: str, args: Args, output: Any) -> None:
        """List what may be an activation written out by hand."""
        suspect = running.suspects.see(name, args, output)
        if suspect is not None:
            if isinstance(self._follow.look(output), Flow):  # or it is of weights or constants alone
                self._meter.skip(suspect, "looks like an activation written out by hand; not measured")
        elif name in MAY_BE and isinstance(known := self._follow.look(args[0]), Flow) and known.axis_from:
            reason = f"{MAY_BE[name]} of a layer's output may be its activation; not measured"
            self._meter.skip(f"aten.{name}", reason)
        elif name in activations.BOUNDS:
            met = [self._follow.look(value) for value in args]
            has_units = any(isinstance(item, Flow) and item.axis_from for item in met)
            if has_units and any(map(self._is_learnt, args)):
                self._meter.skip(
                    f"aten.{name}", "bounds a layer's output by a weight, as an activation may; not measured"
                )

    def _move(self, args: tuple[Any, ...]) -> None:
        """Follow a mark of a program to where it stands now."""
        place = self._marks.setdefault(args[-1], read(args[-1]))
        self._where.go_to(place)
        self._runner.caller = None  # it is no model of modules
        if len(args) == 3:
            source = next((tensor for tensor in args[0] if isinstance(self._follow.look(tensor), Flow)), None)
            self._meter.see_recurrent(place.kind, source, args[1])

    def _run_higher_order(self, func: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that calls functions, watching what they do."""
        run = fused.HIGHER_ORDER.get(func.name())
        if run is None:
            self._meter.skip(func.name(), "an operator that calls functions: what they do cannot be seen")
            return func(*args, **kwargs)
        with as_called(), self._mode:
            return run(*args, **kwargs)

    def _is_learnt(self, value: Any) -> bool:
        known = self._follow.look(value)
        return isinstance(known, Weight) and known.parameter

    def _input(self, name: str, args: tuple[Any, ...]) -> Tensor | None:
        """Return the values that an activation works on; None where it works on none that depend on the data."""
        z = args[0]
        if name == "maximum":
            z, other = args if activations.is_zero(args[1]) else args[::-1]
            known = self._follow.look(other)
            if isinstance(known, Flow) and known.feeds:
                return None  # the larger of two results, not a comparison with 0
        if not z.is_floating_point() and name in activations.BOUNDS and not z.is_complex() and not z.is_quantized:
            self._meter.skip(name, "bounds integers, as an index; not taken for an activation")
            return None
        known = self._follow.look(z)
        if name in activations.BOUNDS and any(self._is_learnt(value) for value in args if value is not z):
            return None  # a threshold that is learnt, and may be 0 now
        is_bound = name in activations.BOUNDS and not self._meter.locator.is_chosen(self._where.path, name)
        is_of_no_layer = known is None or (isinstance(known, Flow) and known.axes is not None and not known.axis_from)
        if is_bound and is_of_no_layer:
            self._meter.skip(name, "bounds values that are no units of a layer; not taken for an activation")
            return None
        if is_bound and isinstance(known, Flow) and self._roster.are_positive(known.feeds):
            reason = "bounds what other activations gave, with no layer between; not taken for an activation"
            self._meter.skip(name, reason)
            return None
        if isinstance(known, Weight):
            self._meter.skip(name, "works on weights or constants alone, the same for every sample")
            return None
        return z  # type: ignore[no-any-return]


def _is_backward() -> bool:
    """Tell whether a backward pass runs, as where forces are gradients: what it computes is no activation."""
    return torch._C._current_graph_task_id() != -1


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
        try:
            return self._probe.dispatch(func, args, kwargs or {})
        except Exception as error:
            self._probe.raised = first_line(error)
            raise
