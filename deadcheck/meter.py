"""Runs the activation calls of one thread's forward passes: each finds its site and is counted, input and output."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from deadcheck import activations, kernel, recurrent
from deadcheck.activations import Activation
from deadcheck.follower import Follower, tensors_of
from deadcheck.frames import NOT_THE_MODELS, place_of
from deadcheck.layout import Feed, Flow, positions
from deadcheck.locating import Locator, Samples, Seen
from deadcheck.roster import SiteRecord
from deadcheck.scratch import Scratch
from deadcheck.sites import Skipped
from deadcheck.stats import SiteCounter
from deadcheck.steps import Step, form_of
from deadcheck.suspects import Suspects
from deadcheck.whereabouts import Whereabouts

Args = tuple[Any, ...]

Watch = Callable[[SiteRecord | None, Tensor, Flow | None], None]
"""Called at each activation with the record of the site (None where nothing is counted), its input and its axes."""

NOT_THE_MODELS.add(__file__)


class Met(NamedTuple):
    """An activation call that has been met, and may be again."""

    seen: Seen
    place: int
    """Where in the code of the model it stands."""

    dtype: torch.dtype
    bends: bool
    """Whether it may be a part of an activation that is written out by hand."""


@dataclass
class Pass:
    """What is known only while one forward pass runs."""

    samples: Samples
    caller: FrameType
    """The frame that runs the model."""

    met: list[Met] = field(default_factory=list)
    """Activation calls so far that were found as in an earlier pass."""

    holds_roster: bool = False
    is_autocast: bool = field(default_factory=torch._C._is_any_autocast_enabled)
    suspects: Suspects = field(default_factory=Suspects)


class Stopped(BaseException):
    """Ends a forward pass whose outcome is of no use any more; no model catches it by ``except Exception``."""


class Meter:
    """What one thread of a scan counted, and what ran there and was not measured.

    It is told of each activation call while the pass ``running`` is not None. Where ``is_aside``, what runs is not the
    model's.
    """

    def __init__(
        self,
        follow: Follower,
        where: Whereabouts,
        locator: Locator,
        *,
        level: str,
        gates: bool,
        repeats: Meter | None = None,
    ) -> None:
        self.locator = locator
        self.level = level
        self.gates = gates
        self.running: Pass | None = None
        self.is_aside = False
        self.is_stopped = False
        """Whether the pass that runs is to raise Stopped at its next activation."""

        self.counters: dict[SiteRecord, SiteCounter] = {}
        self.settled: set[SiteRecord] = set()
        """Sites none of whose units is asked any more."""
        self.skipped: dict[tuple[str, str], Skipped] = {}
        self.seconds = 0.0
        """Time that went into counting."""

        self.watch: Watch | None = None

        self._follow = follow
        self._where = where
        self._repeats = repeats
        self._scratch = Scratch()
        self._written = kernel.WRITTEN if kernel.is_built() and kernel.writes_as_torch() else {}

    def fork(self, follow: Follower, where: Whereabouts, *, repeats: Meter | None) -> Meter:
        """Return one for another thread; one that ``repeats`` another raises Stopped where it counts anything else."""
        locator = self.locator.fork()
        return Meter(follow, where, locator, level=self.level, gates=self.gates, repeats=repeats)

    def start(self, samples: Samples, caller: FrameType) -> None:
        """Begin a forward pass that a frame runs."""
        self.running = Pass(samples, caller)

    def finish(self) -> None:
        """Take what was counted in the pass that ran for counted."""
        assert self.running is not None
        with self.aside():
            for record, counter in self.counters.items():
                counter.finish_batch(self.running.samples.first)
                if counter.is_settled:
                    self.settled.add(record)

    def end(self) -> None:
        """End a pass, finished or not."""
        if self.running is not None and self.running.holds_roster:
            self.locator.roster.lock.release()
        self.running = None

    def skip(self, what: str, reason: str) -> None:
        """List what runs now and is not measured."""
        where = self._where.path
        self.skipped.setdefault((what, where), Skipped(what, where, reason))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run operators that are not the model's, unseen."""
        started, self.is_aside = time.perf_counter(), True
        try:
            yield
        finally:
            self.is_aside = False
            self.seconds += time.perf_counter() - started

    # Activation calls.

    def repeat(self, step: Step, func: Any, args: Args) -> Any:
        """Run and count an activation that stood here in the pass before too; None, with nothing done, for any other.

        As ``Follower.repeats`` it is kept short.
        """
        form, met = step.form, step.met
        if form is None or form.func is not func or form.path != self._where.path or self.watch is not None:
            return None
        if not self._follow.takes(form, args) or args[0].dtype is not met.dtype or self.place() != met.place:
            return None
        return self.run_as(step, func, args)

    def run_step(self, step: Step, z: Tensor) -> Any:
        """Run and count the activation of a step, which is the next, on ``z``."""
        assert step.form is not None
        return self.run_as(step, step.form.func, (z, *step.form.rest))

    def pass_over_step(self, step: Step, z: Tensor, output: Any) -> None:
        """Note that the activation of a step, whose site is settled, ran on ``z``."""
        assert self.running is not None
        met = step.met
        self.counters[met.seen.record].pass_over(met.seen.layout, met.seen.rows)
        self.running.met.append(met)
        if met.bends:
            self.running.suspects.curve(z, output)

    def run_as(self, step: Step, func: Any, args: Args) -> Any:
        """Run and count an activation as this step did, which is the next."""
        assert self.running is not None
        if self.is_stopped or self._repeats is not None:
            self._stop_if_told()
        output = self._counted(step.met.seen, args[0], func, args, {})
        self.running.met.append(step.met)
        self._follow.steps.go(step)
        self._came_out(output, step, args[0])
        return output

    def run(self, act: Activation, z: Tensor, func: Any, args: Args, kwargs: Mapping[str, Any]) -> Any:
        """Run an activation on ``z``, one of its arguments, and count it."""
        flow = self._follow.look(z)
        flow = flow if isinstance(flow, Flow) else None
        is_gate = self._where.is_gate and not self.gates
        if is_gate or z.numel() == 0 or z.is_complex():
            if z.is_complex():
                self.skip(str(func), "complex values have no sign; not measured")
            self.pass_over(z)
            output = func(*args, **kwargs)
            self._pass_by(output, flow, act)
            return output
        if act.name == "glu":
            return self._run_glu(act, func, args, kwargs, flow)
        step = self._step_of(z, flow, act, None if kwargs else (func, args))
        output = self._counted(step.met.seen, z, func, args, kwargs)
        self._came_out(output, step, z)
        return output

    def pass_over(self, z: Tensor) -> None:
        """Tell who watches of an activation call that is not counted: it takes its turn among those that are."""
        if self.watch is not None:
            self.watch(None, z, None)

    def see_recurrent(self, kind: str, source: Any, output: Any, module: nn.Module | None = None) -> None:
        """Count the output of an LSTM or GRU as one site, and say how its axes follow from the input's."""
        act = activations.recurrent(kind)
        tensor, states = recurrent.outputs(output)
        if tensor is None or tensor.numel() == 0:
            return
        known = self._follow.look(source.data if isinstance(source, PackedSequence) else source)
        flow = recurrent.carried(known, tensor, self._follow.feed(act.name, self._where.path, None), act.name)
        seen = self._step_of(tensor, flow, act).met.seen
        self._count(tensor, tensor, seen)
        self._follow.learn(tensor, seen.flow)
        if module is not None:
            for state in states:
                self._follow.learn(state, recurrent.last(module, source, flow, state))

    def _run_glu(self, act: Activation, func: Any, args: Args, kwargs: Mapping[str, Any], flow: Flow | None) -> Any:
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
        step = self._step_of(output, flow, act)
        self._count(gate, output, step.met.seen)
        self._came_out(output, step, z)
        return output

    def _pass_by(self, output: Any, flow: Flow | None, act: Activation) -> None:
        """Carry an activation that is not measured."""
        name, serial = f"{self._where.path}:{act.name}", self._follow.steps.serial + 1
        signature = ("gate", name, id(flow))
        after = None if flow is None else flow._replace(feeds=(Feed(name, name, serial, False),))
        step = self._follow.steps.take(
            self._follow.steps.before(signature) or Step(signature, (after,), serial, (flow,))
        )
        for tensor in tensors_of(output):
            self._follow.learn(tensor, step.knowns[0])

    # Which site a call belongs to.

    def _step_of(
        self, tensor: Tensor, flow: Flow | None, act: Activation, call: tuple[Any, Args] | None = None
    ) -> Step:
        """Go on by the step of this activation call, which has met its site and the order in which to count the values.

        A ``call`` by which it may be known again is its operator and arguments.
        """
        running, steps = self.running, self._follow.steps
        assert running is not None
        self._stop_if_told()
        path, place = self._where.path, self.place()
        signature = ("activation", act.name, path, place, id(flow), tensor.shape)
        form = None
        if call is not None and flow is not None:
            form = form_of(call[0], path, call[1], tensor, [(tensor, flow)])
        step = steps.before(signature)
        if step is None or step.met is None:
            self._hold_roster(running)
            seen = self.locator.find(tensor, flow, act, running.samples, self._where, place=place, step=steps.count)
            weight = seen.record.weight
            after = seen.flow._replace(feeds=(Feed(weight, weight, steps.serial + 1, False),))
            met = Met(seen, place, tensor.dtype, act.family in activations.BENDS)
            step = Step(signature, (after,), steps.serial + 1, (flow,), met, form)
        elif step.form != form:
            step = steps.renew(form)
        step = steps.take(step)
        running.met.append(step.met)
        return step

    def _stop_if_told(self) -> None:
        """End a pass whose outcome is of no use any more."""
        met = self.running.met if self.running is not None else ()
        if self.is_stopped or (self._repeats is not None and met and not self._repeats_still(met[-1].seen)):
            raise Stopped

    def _repeats_still(self, seen: Seen) -> bool:
        """Tell whether what was counted last may come out as it did before."""
        assert self._repeats is not None
        before = self._repeats.counters.get(seen.record)
        return before is not None and self.counters[seen.record].may_become(before)

    def _hold_roster(self, running: Pass) -> None:
        """Keep the roster to this thread until the pass ends, and tell it what it missed."""
        if running.holds_roster:
            return
        roster = self.locator.roster
        roster.lock.acquire()
        running.holds_roster = True
        roster.start_batch()
        for seen, place, _, _ in running.met:
            roster.meet(seen.record, seen.told, place)

    def place(self) -> int:
        """Return a number for the place in the code of the model from which this is called."""
        assert self.running is not None
        return place_of(self._where.place.number if self._where.place is not None else 0, self.running.caller)

    def _came_out(self, output: Any, step: Step, z: Tensor) -> None:
        """What comes out of an activation keeps its axes, and is fed by the activation from here on."""
        assert self.running is not None
        for tensor in (output,) if type(output) is Tensor else tensors_of(output):
            self._follow.learn(tensor, step.knowns[0])
        if step.met.bends:
            self.running.suspects.curve(z, _first(output))

    # What is counted.

    def _counted(self, seen: Seen, z: Tensor, func: Any, args: Args, kwargs: Mapping[str, Any]) -> Any:
        """Run an activation on ``z`` and count its input and output, unseen: the probe's mode is off here."""
        started, counter = time.perf_counter(), self._counter(seen.record)
        is_settled = counter.is_settled
        output = None if kwargs or is_settled or self.watch is not None else self._rectify(counter, func, args, seen)
        if output is None:
            if not is_settled:
                counter.see_input(z, seen.layout, seen.rows)
            if self.watch is not None:
                self.watch(seen.record, z, seen.flow)
            run = time.perf_counter()
            output = func(*args, **kwargs)
            started += time.perf_counter() - run
            if is_settled:
                counter.pass_over(seen.layout, seen.rows)
            else:
                counter.see_output(_first(output), seen.layout, seen.rows)
        self.seconds += time.perf_counter() - started
        return output

    def _rectify(self, counter: SiteCounter, func: Any, args: Args, seen: Seen) -> Tensor | None:
        """Run and count an activation in one pass, where the kernel can; None, with nothing done, where not."""
        in_place = self._written.get(func)
        if in_place is None or (len(args) > 1 and math.copysign(1.0, args[1]) < 0):  # a border of -0 is written too
            return None
        return counter.rectify(args[0], seen.layout, seen.rows, in_place=in_place)

    def _count(self, z: Tensor, h: Tensor, seen: Seen) -> None:
        counter = self._counter(seen.record)
        with self.aside():
            if counter.is_settled:
                counter.pass_over(seen.layout, seen.rows)
            else:
                counter.see_input(z, seen.layout, seen.rows)
                counter.see_output(h, seen.layout, seen.rows)

    def _counter(self, record: SiteRecord) -> SiteCounter:
        counter = self.counters.get(record)
        if counter is None:
            counter = self.counters[record] = SiteCounter(
                record.activation, record.units, record.device, self._scratch, self.level
            )
        return counter


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
