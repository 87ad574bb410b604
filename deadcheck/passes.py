"""Runs the data through the model, one batch at a time or two side by side."""

from __future__ import annotations

import copy
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deadcheck.batch import Batch, mapped, padded, rebatched
from deadcheck.boundary import InputWatch, OutputWatch, tensors_in
from deadcheck.casting import FloatType, name_of
from deadcheck.config import ScanSettings
from deadcheck.data import Batches
from deadcheck.errors import DeadcheckError, ForwardError, UsageError, first_line
from deadcheck.module_tree import held_in
from deadcheck.out_of_memory import DoesNotFit, is_lack_of_memory
from deadcheck.preserve import Held, Randomness
from deadcheck.probe import Probe
from deadcheck.shard import Shard
from deadcheck.side_by_side import may_run_side_by_side
from deadcheck.sites import Spent

Progress = Callable[[int, "int | None"], None]
"""Called after each batch with the samples done and the samples to come (None when unknown)."""

_SIDE_BY_SIDE = 2
"""Batches that run at a time; more would take more memory than they save time."""

LONG = 64
"""Batches from which on it is worth trying: the trial takes the time of two, and may end in a no."""

SLOW = 0.07
"""Seconds of a forward pass from which on it is worth trying: two quick passes wait for one another's Python."""

GAIN = 0.97
"""Share of the time that batches take one after the other in which they have to run side by side to go on like that."""

_ALONE = 3
"""Batches that run one after the other before, whose middle time is what the others are held against."""

_WARM, _FEW = 4, 8
"""Batches after which the time is taken, since each thread has things to set up, and over how many."""

KEEP_EVERY = 20.0
"""Seconds between two writes of a checkpoint."""


class Course(NamedTuple):
    """Which batches are run, and who is told."""

    shard: Shard
    skip: int
    """Batches of the shard that were counted before."""

    keep: Callable[[Probe], None]
    """Called from time to time, when no batch is running."""

    progress: Progress | None


class _Piece(NamedTuple):
    """One forward pass to run."""

    batch: Batch
    rows: int
    """Samples that run, those that only fill up the batch included."""

    first_sample: int
    ends_batch: bool
    """Whether it is the last, or the only, piece of a batch of the data."""

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the tensors that go in."""
        return [tensor.shape for _, tensor in tensors_in([self.batch.args, self.batch.kwargs])]

    @property
    def versions(self) -> list[int]:
        """How often each of them was written to."""
        tensors = tensors_in([self.batch.args, self.batch.kwargs])
        return [0 if tensor.is_inference() else tensor._version for _, tensor in tensors]


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    """Let torch use this many threads inside an operator."""
    before = torch.get_num_threads()
    if number != before:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number != before:
            torch.set_num_threads(before)


class _Clock:
    """Tells when it is time to keep what was counted."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Tell whether enough time has gone by, and start anew if it has."""
        now = time.monotonic()
        is_due = now - self._last >= KEEP_EVERY
        self._last = now if is_due else self._last
        return is_due


def _drained(running: deque[Future[_Piece]]) -> Iterator[_Piece]:
    """Yield what still runs, when it is done."""
    while running:
        yield running.popleft().result()


def _after(running: deque[Future[_Piece]], work: Iterator[_Piece]) -> Iterator[_Piece]:
    """Yield pieces of work; where the data ends in an error, one in a batch before it comes first."""
    try:
        yield from work
    except DeadcheckError:
        for _ in _drained(running):
            pass
        raise


class Passes:
    """The forward passes of one scan."""

    def __init__(self, model: nn.Module, settings: ScanSettings, *, fixed: int | None = None) -> None:
        self.model = model
        self.entry = model if settings.call == "forward" else entry_of(model, settings.call)
        self.settings = settings
        self.fixed = fixed
        self.samples = self.batches = 0
        self.inputs = InputWatch(allow_nonfinite=settings.allow_nonfinite)
        self.outputs = OutputWatch()
        self.float_type = FloatType(model, settings)
        self._cast: set[str] = set()
        self._lock = threading.Lock()
        self._seconds = self._seconds_data = self._counting = 0.0
        self._pinned = False
        self._too_many: int | None = None
        """Samples that did not fit into memory at a time."""
        self._most: int | None = None
        """Samples that may run at a time since."""
        self._writes_inputs = False
        """Whether the model wrote into what it was given, which may be the user's own data."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was done to the data on its way in."""
        fixed = (
            f"the program takes {self.fixed} samples at a time, so the data was cut to that and filled up at the end"
        )
        cut = [fixed] if self.fixed is not None else []
        if self._too_many is not None:
            cut.append(f"{self._too_many} samples at a time did not fit into memory, so at most {self._most} were run")
        return (
            *cut,
            *(
                f"inputs of {name} were cast to {name_of(self.float_type.takes)}, the model's own type"
                for name in sorted(self._cast)
            ),
        )

    @property
    def spent(self) -> Spent:
        """Where the time went; with batches side by side, as the thread saw it that reads the data."""
        is_cpu = torch.device(self.settings.device).type == "cpu"  # elsewhere counting is not waited for
        return Spent(self._seconds_data, self._seconds - self._seconds_data, self._counting if is_cpu else None)

    def start_over(self, most: int) -> None:
        """Forget what was run, to run it again with at most so many samples at a time."""
        self._too_many, self._most = self._too_many or 2 * most, most
        self.samples = self.batches = 0
        self.inputs, self.outputs = InputWatch(allow_nonfinite=self.settings.allow_nonfinite), OutputWatch()

    def through(self, batches: Batches, probe: Probe, held: Held, course: Course) -> None:
        """Run every batch of the course through the model; two side by side where that changes no bit."""
        started = time.perf_counter()
        self._pinned = batches.pinned
        try:
            self._run(batches, probe, held, course)
            if (device := torch.device(self.settings.device)).type in ("cuda", "mps"):
                torch.accelerator.synchronize(device)  # what still runs there belongs to the forward passes
        finally:
            self._seconds += time.perf_counter() - started
            self._counting += probe.seconds

    def _run(self, batches: Batches, probe: Probe, held: Held, course: Course) -> None:
        def done(piece: _Piece) -> None:
            self.samples += piece.batch.samples
            self.batches += piece.ends_batch
            if course.progress is not None:
                course.progress(piece.first_sample + piece.batch.samples, batches.total)

        clock = _Clock()
        work = self._timed(self._work(batches, course))
        for first in islice(work, int(probe.watch is None and self._is_long(batches, course))):
            spare, randomness, started = copy.deepcopy(first), Randomness(), time.monotonic()  # it may be written into
            self._forward(first, probe)
            is_slow = time.monotonic() - started >= SLOW
            done(first)
            if is_slow and not (self._writes_inputs or randomness.moved() or held.differs()):
                # Closed whatever happens: no batch may run on while the model is put back as it was.
                with closing(self._side_by_side(work, spare, probe, course.keep)) as pieces:
                    for piece in pieces:
                        done(piece)
        for piece in work:
            self._forward(piece, probe)
            done(piece)
            if piece.ends_batch and clock.is_due():
                course.keep(probe)

    def _is_long(self, batches: Batches, course: Course) -> bool:
        """Tell whether to try running batches side by side."""
        return (
            (batches.total or 0) >= LONG * self.settings.batch_size * course.shard.count
            and torch.get_num_threads() >= _SIDE_BY_SIDE
            and torch.device(self.settings.device).type == "cpu"
            and may_run_side_by_side(self.model, self.entry)
        )

    def _timed(self, work: Iterator[_Piece]) -> Iterator[_Piece]:
        """Yield pieces of work, and add up how long each was waited for."""
        while True:
            started = time.perf_counter()
            piece = next(work, None)
            self._seconds_data += time.perf_counter() - started
            if piece is None:
                return
            yield piece

    def _work(self, batches: Batches, course: Course) -> Iterator[_Piece]:
        """Yield the batches of the course as they go into the model."""
        first_sample = 0
        whole = (b for b in (batches if self.fixed is None else rebatched(batches, self.fixed)) if b.samples)
        for number, batch in enumerate(whole):
            if not course.shard.takes(number) or number // course.shard.count < course.skip:
                first_sample += batch.samples
                continue
            parts = self._divided(batch)
            for place, part in enumerate(parts, 1):
                yield self._piece(part, first_sample, ends_batch=place == len(parts))
                first_sample += part.samples

    def _divided(self, batch: Batch) -> list[Batch]:
        """Divide a batch of more samples than may run at a time, where it can be."""
        if self._most is None or batch.samples <= self._most or not _can_be_divided(batch):
            return [batch]
        return list(rebatched([batch], self._most))

    def _piece(self, batch: Batch, first_sample: int, *, ends_batch: bool) -> _Piece:
        """Return a forward pass to run, its tensors on the device."""
        # Looked at where it lies: on a GPU that would wait for the batches before it.
        args, kwargs = mapped((batch.args, dict(batch.kwargs)), self._cast_to_model)
        self.inputs.see(args, kwargs, samples=batch.samples, first_sample=first_sample)
        rows = self.fixed or batch.samples
        try:
            placed = Batch(self.placed(args), self.placed(kwargs), batch.samples)
        except (RuntimeError, MemoryError) as error:
            if is_lack_of_memory(error):
                raise self._no_room(error, batch, f"on {self.settings.device}") from error
            raise
        return _Piece(padded(placed, rows), rows, first_sample, ends_batch)

    def _no_room(self, error: Exception, batch: Batch, where: str) -> DoesNotFit:
        count = self.fixed or batch.samples
        is_rows = self.fixed is None and count > 1 and _can_be_divided(batch)
        # What was to be divided and was not would fail for ever.
        can_be_halved = is_rows and count <= (self._most or count) and not self._writes_inputs
        todo = "choose a smaller --batch-size, or make the batches of your own loader smaller"
        if self.fixed is not None or count == 1:
            todo = "use a machine or a --device with more memory"
        return DoesNotFit(
            f"{count} sample{'s' * (count > 1)} at a time do{'es' * (count == 1)} not fit into memory, {where}: "
            f"{first_line(error)[:200]}; {todo}",
            count,
            can_be_halved=can_be_halved,
        )

    def _side_by_side(
        self, work: Iterator[_Piece], first: _Piece, probe: Probe, keep: Callable[[Probe], None]
    ) -> Generator[_Piece, None, None]:
        """Run batches two at a time if it is right and faster; yield each piece when it and all before it are done."""
        own, seconds = probe.fork(), list[float]()
        for piece in islice(work, _ALONE):
            started = time.monotonic()
            with own:
                self._forward(piece, own)
            seconds.append(time.monotonic() - started)
            yield piece
        alone = statistics.median(seconds) if seconds else 0.0
        ahead = next(work, None) if alone >= SLOW else None
        with ThreadPoolExecutor(_SIDE_BY_SIDE, "deadcheck") as pool:
            try:
                fork = None
                if ahead is not None and ahead.shapes == first.shapes:
                    fork = self._tried(pool, first, ahead, probe)
                probe.adopt(own)  # not before: what is tried is compared with the first batch
                if ahead is None:
                    return
                if fork is None:
                    self._forward(ahead, probe)
                    yield ahead
                    return
                probe.adopt(fork)
                yield ahead
                yield from self._in_pairs(pool, work, first.shapes, probe, (own, fork), keep, alone)
            finally:
                pool.shutdown(cancel_futures=True)

    def _tried(self, pool: Executor, first: _Piece, ahead: _Piece, probe: Probe) -> Probe | None:
        """Return the fork that counted the batch ahead, run beside the first; None where it is not to count.

        An operator may add up in another order on fewer threads, and give other last bits. So the first batch is run
        once more, and as soon as anything at all is different, no batch is run like that.
        """
        half = torch.get_num_threads() // _SIDE_BY_SIDE
        again, fork = probe.fork(repeats=probe), probe.fork()
        with threads_of(half):
            repeated = pool.submit(self._run_in_thread, first, again, half, watch=False)
            guessed = pool.submit(self._run_in_thread, copy.deepcopy(ahead), fork, half, watch=False)
            if repeated.exception() is not None:
                fork.stop()
            if guessed.exception() is not None or repeated.exception() is not None:
                return None  # an error that is the model's own comes again
        if self._writes_inputs or not probe.agrees_with(again):
            return None
        self._see_output(guessed.result(), ahead.rows, probe)
        return fork

    def _in_pairs(
        self,
        pool: Executor,
        work: Iterator[_Piece],
        shapes: list[torch.Size],
        probe: Probe,
        forks: tuple[Probe, ...],
        keep: Callable[[Probe], None],
        alone: float,
    ) -> Generator[_Piece, None, None]:
        """Run the batches that have these shapes two at a time, unless the first few take no less time than alone."""
        threads = torch.get_num_threads()
        half = threads // len(forks)
        free: queue.SimpleQueue[Probe] = queue.SimpleQueue()
        for fork in forks:
            free.put(fork)

        def run(piece: _Piece) -> _Piece:
            fork = free.get()
            try:
                self._run_in_thread(piece, fork, half)
                return piece
            finally:
                free.put(fork)

        clock, is_faster, started = _Clock(), True, 0.0
        running: deque[Future[_Piece]] = deque()
        with threads_of(half):
            for number, piece in enumerate(_after(running, work)):
                if piece.shapes == shapes and is_faster:
                    running.append(pool.submit(run, piece))
                    if len(running) > len(forks):
                        yield running.popleft().result()
                    if number == _WARM:
                        started = time.monotonic()
                    elif number == _WARM + _FEW:
                        is_faster = time.monotonic() - started < _FEW * alone * GAIN
                else:  # with these shapes it was not tried
                    yield from _drained(running)
                    with threads_of(threads):
                        self._forward(piece, probe)
                    yield piece
                if piece.ends_batch and clock.is_due():
                    yield from _drained(running)
                    keep(probe)
            yield from _drained(running)

    def _run_in_thread(self, piece: _Piece, fork: Probe, threads: int, *, watch: bool = True) -> Any:
        torch.set_num_threads(threads)  # a number of each thread's own
        with fork:
            return self._forward(piece, fork, watch=watch)

    def _see_output(self, output: Any, rows: int, probe: Probe) -> None:
        with probe.aside(), self._lock:
            self.outputs.see(output, samples=rows)

    def _forward(self, piece: _Piece, probe: Probe, *, watch: bool = True) -> Any:
        """Run one forward pass, watch what comes out, and return it."""
        batch, rows, first_sample, _ = piece
        args, kwargs, padding = batch.args, batch.kwargs, rows - batch.samples
        versions = piece.versions
        try:
            counted = probe.batch(args, kwargs, samples=rows, first_sample=first_sample, padding=padding)
            with self.float_type.autocast(), counted:
                output = self.entry(*args, **kwargs)
                if watch:
                    self._see_output(output, rows, probe)
            self._writes_inputs |= versions != piece.versions
            return output
        except DeadcheckError:
            raise
        except Exception as error:  # the model's own code runs here, and may raise anything
            if is_lack_of_memory(error):
                self._writes_inputs |= versions != piece.versions
                raise self._no_room(error, batch, f"in {_failed_in(probe)}") from error
            raise ForwardError(_explained(error, probe, args, kwargs, first_sample)) from error

    def placed(self, value: Any) -> Any:
        """Move tensors to the device, and floating ones to the model's own floating type."""
        return mapped(value, self._placed)

    def _placed(self, tensor: Tensor) -> Tensor:
        # A copy that is not waited for needs memory that nobody writes to in the meantime.
        return self._cast_to_model(tensor).to(self.settings.device, non_blocking=self._pinned)

    def _cast_to_model(self, tensor: Tensor) -> Tensor:
        takes = self.float_type.takes
        if not tensor.is_floating_point() or takes is None or tensor.dtype == takes:
            return tensor
        if not self.float_type.is_chosen:
            self._cast.add(name_of(tensor.dtype))
        return tensor.to(takes)


def forward_of(model: nn.Module, settings: ScanSettings, fixed: int | None = None) -> Callable[[Batch], list[Tensor]]:
    """Return the function that runs a batch through a model as a scan does, and gives the tensors that come out.

    The batch stays as it was. ``fixed`` is the number of samples that the model takes, where there is one.
    """
    run = Passes(model, settings)

    def forward(batch: Batch) -> list[Tensor]:
        filled = placed(model, settings, padded(batch, fixed or batch.samples))
        with run.float_type.autocast():
            outputs = [tensor for _, tensor in tensors_in(run.entry(*filled.args, **filled.kwargs))]
        return [t[: batch.samples] if fixed and t.dim() and t.shape[0] == fixed else t for t in outputs]

    return forward


def placed(model: nn.Module, settings: ScanSettings, batch: Batch) -> Batch:
    """Return a batch of its own, on the device and in the floating type of the model."""
    run = Passes(model, settings)
    args, kwargs = copy.deepcopy((run.placed(batch.args), run.placed(dict(batch.kwargs))))
    return Batch(args, kwargs, batch.samples, batch.labels)


CALLS_MODEL = Passes._forward.__code__
"""The code that calls the model during a scan."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside data-parallel, averaging and compiled wrappers."""
    while (holder := held_in(module)) is not None and (inner := module._modules.get(holder)) is not None:
        module = inner
    return module


def entry_of(module: nn.Module, call: str) -> Callable[..., Any]:
    """Return the method of a model that a scan calls."""
    inner = unwrapped(module)
    entry = getattr(inner, call, None)
    if not callable(entry):
        raise UsageError(f"the model ({type(inner).__name__}) has no method {call!r} to call; name one with --call")
    return entry  # type: ignore[no-any-return]


def _can_be_divided(batch: Batch) -> bool:
    """Tell whether every tensor has a row for each sample: of a graph, or of a state, some have not."""
    return all(not t.dim() or len(t) == batch.samples for _, t in tensors_in([batch.args, dict(batch.kwargs)]))


def _explained(error: Exception, probe: Probe, args: Any, kwargs: Any, sample: int) -> str:
    """Say where a forward pass failed, on what input, and what that place expected."""
    module = probe.failure[1]
    given = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for _, t in tensors_in([args, kwargs]))
    reason = first_line(error)
    if reason.endswith("Error:"):  # its text was lost on the way through a program
        reason = probe.raised or reason
    expected = next(
        (
            f"; {name}={getattr(module, name)} is what that layer expects"
            for name in _EXPECTS
            if isinstance(getattr(module, name, None), (int, tuple))
        ),
        "",
    )
    tensors = [tensor for _, tensor in tensors_in([args, kwargs])]
    todo = "check the shape and type of the data (one sample along the first axis)"
    if "type" in reason and tensors and not any(tensor.is_floating_point() for tensor in tensors):
        todo = "the model takes floats, so give floats, scaled as in training (images of 0..255 often become 0..1)"
    at = f"at sample {sample}, given {given or 'no tensors'}{expected}"
    return f"the forward pass failed in {_failed_in(probe)} {at}: {reason}; {todo}"


def _failed_in(probe: Probe) -> str:
    path, module = probe.failure
    kind = getattr(module, "original_name", type(module).__name__)  # the name that a program remembers
    return f"{path} ({kind})" if path else str(kind)


_EXPECTS = (
    "in_features",
    "in_channels",
    "num_features",
    "num_channels",
    "normalized_shape",
    "input_size",
    "num_embeddings",
)
