"""Joins the stages into the verbs of the library."""

from __future__ import annotations

import copy
import datetime
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from deadcheck import data as data_module
from deadcheck.boundary import InputWatch, OutputWatch, tensors_in
from deadcheck.config import Config, ScanSettings, Thresholds
from deadcheck.data import Batch, Batches, DataOptions
from deadcheck.diagnosis import Diagnosis, diagnose
from deadcheck.errors import DeadcheckError, ForwardError, NothingMeasured, UsageError, first_line
from deadcheck.formats import LoadedModel, LoadOptions, open_live, open_model
from deadcheck.preserve import eval_mode, preserved
from deadcheck.probe import Probe, Watch
from deadcheck.sample import sample_beside
from deadcheck.sites import DataIdentity, Environment, Measurement, SiteStats, Skipped

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Progress = Callable[[int, "int | None"], None]
"""Called after each batch with the samples done and the samples to come (None when unknown)."""


def scan(
    model: nn.Module | ExportedProgram | str | Path,
    data: object = None,
    *,
    batch_size: int = 64,
    max_samples: int | None = None,
    unpack: str = "auto",
    device: str | None = None,
    seed: int = 0,
    gates: bool = False,
    units: Mapping[str, int] | Sequence[tuple[str, int]] = (),
    call: str = "forward",
    allow_nonfinite: bool = False,
    thresholds: Thresholds | None = None,
    load: LoadOptions | None = None,
) -> Diagnosis:
    """Measure every activation of a model on data and judge every unit.

    ``model`` is a module, a TorchScript or exported program, or a path (``load`` says how to read it). ``data`` is a
    tensor, array, dict of keyword arguments, DataLoader, Dataset, iterable of batches, or a path; the first axis counts
    samples. The model is left exactly as it was. ``units`` maps a pattern of site keys or module paths to the axis that
    holds the units.

    Raises a DeadcheckError: NothingMeasured when no activation ran or there were no samples, DataError, ForwardError,
    ModelFileError, TrustRequired.
    """
    pairs = tuple(units.items()) if isinstance(units, Mapping) else tuple(units)
    settings = ScanSettings(
        batch_size=batch_size,
        max_samples=max_samples,
        unpack=unpack,
        device=device or "cpu",
        seed=seed,
        gates=gates,
        units=pairs,
        call=call,
        allow_nonfinite=allow_nonfinite,
    )
    if not isinstance(model, (str, Path)):
        loaded = open_live(model)
        settings = replace(settings, device=device or str(_device_of(loaded.module)))
    else:
        loaded = open_model(Path(model), load or LoadOptions())
        _put(loaded.module, settings.device)
    batches = open_data(data, settings, loaded)
    return diagnose(measure(loaded, batches, settings), thresholds or Thresholds())


def scan_file(path: Path, load: LoadOptions, config: Config, progress: Progress | None = None) -> Diagnosis:
    """Scan a saved model as the command line does."""
    loaded = open_model(path, load)
    _put(loaded.module, config.scan.device)
    batches = open_data(config.scan.data, config.scan, loaded)
    return diagnose(measure(loaded, batches, config.scan, progress), config.thresholds)


def open_data(source: object, settings: ScanSettings, loaded: LoadedModel) -> Batches:
    """Open the data that was named, or the sample beside the model."""
    if source is None:
        path = loaded.identity.path
        source = sample_beside(Path(path)) if path else None
        if source is None and loaded.example is not None and path is not None:
            return data_module.example_in(path, loaded.example)
        if source is None:
            beside = f" and none lies beside it ({Path(path).stem}.sample.npz)" if path else ""
            raise UsageError(
                f"no data was given{beside}; add --data FILE (.npz, .npy, .pt, .safetensors) or "
                "--data package.module:loader, a sample of what the model was trained on"
            )
    options = DataOptions(
        batch_size=settings.batch_size,
        max_samples=settings.max_samples,
        unpack=settings.unpack,
        seed=settings.seed,
        input_shape=settings.input_shape,
    )
    return data_module.open_data(source, options, forward=_entry(loaded.module, settings.call))


def measure(
    loaded: LoadedModel,
    batches: Batches,
    settings: ScanSettings,
    progress: Progress | None = None,
    *,
    watch: Watch | None = None,
) -> Measurement:
    """Run the data through the model and count at every site; the model is left as it was."""
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    model, notes = _runnable(loaded.module)
    run = _Run(model, settings, None if batches.as_one else loaded.batch_size)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(eval_mode(model))
        torch.manual_seed(settings.seed)
        probe = stack.enter_context(Probe(model, gates=settings.gates, unit_axes=settings.units, watch=watch))
        run.through(batches, probe, progress)
        stats, skipped, told = probe.stats(), probe.skipped(), (*probe.warnings.values(), *probe.notes())
    if not run.samples:
        raise NothingMeasured(f"the data ({batches.source}) holds no samples, so nothing was measured; give it some")
    if not stats:
        raise NothingMeasured(_no_activation(run.samples, skipped))
    return Measurement(
        model=loaded.identity,
        data=DataIdentity(batches.source, batches.sha256, run.samples, batches.synthetic),
        env=Environment(torch.__version__, settings.device, run.dtype, seed=settings.seed),
        sites=stats,
        skipped=skipped,
        inputs=run.inputs.summaries(),
        warnings=(*loaded.warnings, *notes, *batches.warnings, *run.warnings, *told, *_guesses(stats)),
        output_constant=run.outputs.constant,
        seconds=time.perf_counter() - clock,
        started=started.isoformat(timespec="seconds"),
    )


class _Run:
    """One pass over the data."""

    def __init__(self, model: nn.Module, settings: ScanSettings, fixed: int | None) -> None:
        self.entry = model if settings.call == "forward" else _entry(model, settings.call)
        self.settings = settings
        self.fixed = fixed
        self.samples = 0
        self.inputs = InputWatch(allow_nonfinite=settings.allow_nonfinite)
        self.outputs = OutputWatch()
        self._floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        self._takes = _exported_for(model) or self._floats
        self._cast: set[str] = set()

    @property
    def dtype(self) -> str:
        """Floating type of the model's weights."""
        return str(self._floats or torch.get_default_dtype()).removeprefix("torch.")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was done to the data on its way in."""
        fixed = (
            f"the program takes {self.fixed} samples at a time, so the data was cut to that and filled up at the end"
        )
        cut = (fixed,) if self.fixed is not None else ()
        return cut + tuple(
            f"inputs of {name} were cast to {str(self._takes).removeprefix('torch.')}, the model's own type"
            for name in sorted(self._cast)
        )

    def through(self, batches: Batches, probe: Probe, progress: Progress | None) -> None:
        """Run every batch through the model."""
        for batch in batches if self.fixed is None else data_module.rebatched(batches, self.fixed):
            if not batch.samples:
                continue
            placed = Batch(self._placed(batch.args), self._placed(dict(batch.kwargs)), batch.samples)
            self.inputs.see(placed.args, placed.kwargs, samples=batch.samples, first_sample=self.samples)
            rows = self.fixed or batch.samples
            self._forward(data_module.padded(placed, rows), rows, probe)
            self.samples += batch.samples
            if progress is not None:
                progress(self.samples, batches.total)

    def _forward(self, batch: Batch, rows: int, probe: Probe) -> None:
        """Run one forward pass over ``rows`` samples, those that only fill up the batch included."""
        args, kwargs, padding = batch.args, batch.kwargs, rows - batch.samples
        try:
            with probe.batch(args, kwargs, samples=rows, first_sample=self.samples, padding=padding):
                output = self.entry(*args, **kwargs)
                with probe.aside():
                    self.outputs.see(output, samples=rows)
        except DeadcheckError:
            raise
        except Exception as error:  # the model's own code runs here, and may raise anything
            raise ForwardError(_explained(error, probe, args, kwargs, self.samples)) from error

    def _placed(self, value: Any) -> Any:
        """Move tensors to the device, and floating ones to the model's own floating type."""
        if isinstance(value, Tensor):
            if value.is_floating_point() and self._takes is not None and value.dtype != self._takes:
                self._cast.add(str(value.dtype).removeprefix("torch."))
                return value.to(self.settings.device, self._takes)
            return value.to(self.settings.device)
        if isinstance(value, dict):
            return {key: self._placed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._placed(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value


def _exported_for(model: nn.Module) -> torch.dtype | None:
    """Return the floating type that an exported program takes, which need not be that of its weights."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    given = (node.meta.get("val") for node in nodes if node.op == "placeholder")
    return next((value.dtype for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside data-parallel and compiled wrappers."""
    while type(module).__name__ in _WRAPPERS:
        inner = module._modules.get(_WRAPPERS[type(module).__name__])
        if inner is None:
            break
        module = inner
    return module


def _runnable(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module to run, and what has to be said about that."""
    model = _unwrapped(module)
    notes = [] if model is module else [f"the model inside {type(module).__name__} was measured"]
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        notes.append("the model has lazy layers without weights: a copy with random ones was measured")
        model = copy.deepcopy(model)
    return model, notes


def forward_of(model: nn.Module, settings: ScanSettings, fixed: int | None = None) -> Callable[[Batch], list[Tensor]]:
    """Return the function that runs a batch through a model as a scan does, and gives the tensors that come out.

    The batch stays as it was. ``fixed`` is the number of samples that the model takes, where there is one.
    """
    entry = _Run(model, settings, fixed).entry

    def forward(batch: Batch) -> list[Tensor]:
        filled = placed(model, settings, data_module.padded(batch, fixed or batch.samples))
        outputs = [tensor for _, tensor in tensors_in(entry(*filled.args, **filled.kwargs))]
        return [t[: batch.samples] if fixed and t.dim() and t.shape[0] == fixed else t for t in outputs]

    return forward


def placed(model: nn.Module, settings: ScanSettings, batch: Batch) -> Batch:
    """Return a batch of its own, on the device and in the floating type of the model."""
    run = _Run(model, settings, None)
    args, kwargs = copy.deepcopy((run._placed(batch.args), run._placed(dict(batch.kwargs))))
    return Batch(args, kwargs, batch.samples, batch.labels)


def runnable(module: nn.Module) -> nn.Module:
    """Return the module that a scan runs: the one inside wrappers, with weights where it was lazy."""
    return _runnable(module)[0]


CALLS_MODEL = _Run._forward.__code__
"""The code that calls the model during a scan."""

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def _entry(module: nn.Module, call: str) -> Callable[..., Any]:
    inner = _unwrapped(module)
    entry = getattr(inner, call, None)
    if not callable(entry):
        raise UsageError(f"the model ({type(inner).__name__}) has no method {call!r} to call; name one with --call")
    return entry  # type: ignore[no-any-return]


def _put(module: nn.Module, device: str) -> None:
    place = _device(device)
    try:
        module.to(place)
    except Exception as error:  # runs code of the model's classes, on a state that a file may have made; or no room
        raise ForwardError(
            f"the model cannot be put on {device!r} ({type(error).__name__}: {first_line(error)}); "
            "save the model again, or choose another --device"
        ) from error


def _device(name: str) -> torch.device:
    try:
        torch.zeros(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}") from error


def _device_of(module: nn.Module) -> torch.device:
    tensor = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _guesses(stats: Sequence[SiteStats]) -> Iterator[str]:
    guessed = [s.site for s in stats if s.site.axis_from == "guess"]
    for axis in sorted({site.axis for site in guessed}):
        keys = [site.key for site in guessed if site.axis == axis]
        yield (
            f"{_listed(keys)}: nothing told which axis holds the units; axis {axis} was guessed "
            f"(set it with --units '{keys[0]}=AXIS')"
        )
    untold = [s.site.key for s in stats if s.site.samples_from == "call"]
    if untold:
        yield (
            f"{_listed(untold)}: values could not be told apart by sample, so each batch counts as one sample "
            "(--batch-size 1 makes that exact where the first axis of the data counts samples)"
        )


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _no_activation(samples: int, skipped: Sequence[Skipped]) -> str:
    seen = ", ".join(sorted({item.what for item in skipped})[:5])
    hint = f"; not measured: {seen}" if seen else ""
    return f"no activation ran in {samples} samples, so there is nothing to judge{hint}; is this the model you meant?"


def _explained(error: Exception, probe: Probe, args: Any, kwargs: Any, sample: int) -> str:
    """Say where a forward pass failed, on what input, and what that place expected."""
    path, module = probe.failure
    given = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for _, t in tensors_in([args, kwargs]))
    reason = first_line(error)
    expected = next(
        (
            f"; {name}={getattr(module, name)} is what that layer expects"
            for name in _EXPECTS
            if isinstance(getattr(module, name, None), (int, tuple))
        ),
        "",
    )
    where = f"{path} ({type(module).__name__})" if path else type(module).__name__
    tensors = [tensor for _, tensor in tensors_in([args, kwargs])]
    todo = "check the shape and type of the data (one sample along the first axis)"
    if "type" in reason and tensors and not any(tensor.is_floating_point() for tensor in tensors):
        todo = "the model takes floats, so give floats, scaled as in training (images of 0..255 often become 0..1)"
    at = f"at sample {sample}, given {given or 'no tensors'}{expected}"
    return f"the forward pass failed in {where} {at}: {reason}; {todo}"


_EXPECTS = (
    "in_features",
    "in_channels",
    "num_features",
    "num_channels",
    "normalized_shape",
    "input_size",
    "num_embeddings",
)
