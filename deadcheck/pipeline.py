"""Joins the stages into the verbs of the library."""

from __future__ import annotations

import copy
import datetime
import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from deadcheck import __version__, parts
from deadcheck import data as data_module
from deadcheck.config import Config, ScanSettings, Thresholds
from deadcheck.data import Batches, DataOptions
from deadcheck.diagnosis import Diagnosis, diagnose
from deadcheck.errors import ForwardError, ReportedElsewhere, UsageError, first_line
from deadcheck.formats import LoadedModel, LoadOptions, open_live, open_model
from deadcheck.offloaded import device_of, spread
from deadcheck.out_of_memory import DoesNotFit
from deadcheck.passes import Course, Passes, Progress, entry_of, threads_of, unwrapped
from deadcheck.preserve import eval_mode, preserved, seed_generators
from deadcheck.probe import Probe, Watch
from deadcheck.processes import gathered
from deadcheck.sample import sample_beside
from deadcheck.settings import STATS
from deadcheck.shard import WHOLE, Shard
from deadcheck.sites import DataIdentity, Environment, Measurement, Spent

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def scan(
    model: nn.Module | ExportedProgram | str | Path,
    data: object = None,
    *,
    batch_size: int = 64,
    max_samples: int | None = None,
    workers: int = 0,
    unpack: str = "auto",
    device: str | None = None,
    dtype: str | torch.dtype = "model",
    autocast: str | torch.dtype | None = None,
    seed: int = 0,
    gates: bool = False,
    units: Mapping[str, int] | Sequence[tuple[str, int]] = (),
    call: str = "forward",
    allow_nonfinite: bool = False,
    stats: str = "full",
    thresholds: Thresholds | None = None,
    load: LoadOptions | None = None,
) -> Diagnosis:
    """Measure every activation of a model on data and judge every unit.

    ``model`` is a module, a TorchScript or exported program, or a path (``load`` says how to read it). ``data`` is a
    tensor, array, dict of keyword arguments, DataLoader, Dataset, iterable of batches, or a path; the first axis counts
    samples, and ``workers`` processes read ahead. The model is left exactly as it was. ``dtype`` casts its weights for
    the scan (float32, float64, bfloat16 or float16), and ``autocast`` runs it under ``torch.autocast`` (bfloat16 or
    float16). ``units`` maps a pattern of site keys or module paths to the axis that holds the units. ``stats`` says how
    much to measure: ``full``, ``counts`` (no means, so no unit is told to be faint) or ``verdict`` (a unit that fired
    is not asked again).

    Raises a DeadcheckError: NothingMeasured when no activation ran or there were no samples, DataError, ForwardError,
    ModelFileError, TrustRequired.
    """
    if stats not in STATS:
        raise UsageError(f"stats is {stats!r}; choose one of {', '.join(STATS)}")
    pairs = tuple(units.items()) if isinstance(units, Mapping) else tuple(units)
    settings = ScanSettings(
        batch_size=batch_size,
        max_samples=max_samples,
        workers=workers,
        unpack=unpack,
        device=device or "cpu",
        dtype=str(dtype).removeprefix("torch."),
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        seed=seed,
        gates=gates,
        units=pairs,
        call=call,
        allow_nonfinite=allow_nonfinite,
        stats=stats,
    )
    if not isinstance(model, (str, Path)):
        loaded = open_live(model)
        settings = replace(settings, device=device or str(device_of(loaded.module)))
    else:
        loaded = open_model(Path(model), load or LoadOptions())
        settings = replace(settings, device=str(_device(settings.device)))
        _put(loaded.module, settings.device)
    batches = open_data(data, settings, loaded)
    return diagnose(measure(loaded, batches, settings), thresholds or Thresholds())


def scan_file(
    path: Path,
    load: LoadOptions,
    config: Config,
    progress: Progress | None = None,
    *,
    shard: Shard = WHOLE,
    checkpoint: Path | None = None,
) -> Diagnosis:
    """Scan a saved model as the command line does."""
    with _opened(path, load, config) as (loaded, batches, settings):
        seen = measure(loaded, batches, settings, progress, shard=shard, checkpoint=checkpoint)
    return diagnose(seen, config.thresholds)


def scan_together(
    path: Path, load: LoadOptions, config: Config, shard: Shard, progress: Progress | None = None
) -> Diagnosis:
    """Scan a saved model in every process that torchrun started; all but the first raise ReportedElsewhere."""
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    own: list[Counted] = []

    def count() -> parts.Kept:
        with _opened(path, load, config) as (loaded, batches, settings):
            own.append(counted(loaded, batches, settings, progress, shard=shard))
        return parts.Kept(own[0].scan, shard, True, own[0].part)

    seen = parts.merged(gathered(count))
    seen = replace(seen, seconds=time.perf_counter() - clock, spent=own[0].spent, started=_at(started))
    return diagnose(seen, config.thresholds)


@contextmanager
def _opened(path: Path, load: LoadOptions, config: Config) -> Iterator[tuple[LoadedModel, Batches, ScanSettings]]:
    """Read a model and the data, each where it is to run; weights kept on the disk are gone afterwards."""
    settings = replace(config.scan, device=str(_device(config.scan.device)))
    if settings.max_memory and settings.device_map is None:
        raise UsageError("--max-memory says how a model is spread; add --device-map auto")
    loaded = open_model(path, load)
    if settings.device_map is None:
        _put(loaded.module, settings.device)
        yield loaded, open_data(settings.data, settings, loaded), settings
        return
    if loaded.identity.format in ("torchscript", "pt2"):
        raise UsageError(f"{path}: is a program, and cannot be spread over devices; leave out --device-map")
    with tempfile.TemporaryDirectory(prefix="deadcheck-") as folder:
        spread(loaded.module, settings.device_map, settings.max_memory, folder)
        settings = replace(settings, device=str(device_of(loaded.module)))
        yield loaded, open_data(settings.data, settings, loaded), settings


def _at(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")


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
        workers=settings.workers,
        pin=torch.device(settings.device).type == "cuda",
    )
    return data_module.open_data(source, options, forward=entry_of(loaded.module, settings.call))


def measure(
    loaded: LoadedModel,
    batches: Batches,
    settings: ScanSettings,
    progress: Progress | None = None,
    *,
    shard: Shard = WHOLE,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> Measurement:
    """Run the data through the model and count at every site; the model is left as it was.

    With a ``checkpoint`` the scan goes on from what that file holds, if it is there, and keeps in it what it counted.
    Of several shards each counts batches of its own; ``parts.merged`` joins them.
    """
    started, clock = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    own = counted(loaded, batches, settings, progress, shard=shard, checkpoint=checkpoint, watch=watch)
    if shard.index > 1 and not own.part.samples:
        raise ReportedElsewhere(
            f"no batch falls to shard {shard.index}/{shard.count}, for there are fewer; {checkpoint} is written, and "
            "merge takes it with the others"
        )
    seen = parts.measurement(own.scan, own.part)
    return replace(seen, seconds=time.perf_counter() - clock, spent=own.spent, started=_at(started))


_NOT_OF_THE_SCAN = ("data", "device", "device_map", "max_memory", "threads", "workers")
"""Settings that may differ between parts of one scan."""


class Counted(NamedTuple):
    """What one process counted of a scan, and how long that took."""

    scan: parts.Scan
    part: parts.Part
    spent: Spent


def counted(
    loaded: LoadedModel,
    batches: Batches,
    settings: ScanSettings,
    progress: Progress | None = None,
    *,
    shard: Shard = WHOLE,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> Counted:
    """Count the batches of one shard, as ``measure`` does; they may hold nothing to measure."""
    if watch is not None:
        settings = replace(settings, stats="full")  # what is watched is to be changed, by all that is known
    model, notes = _runnable(loaded.module)
    run = Passes(model, settings, fixed=None if batches.as_one else loaded.batch_size)
    scan = _identity(loaded, batches, settings, run)
    before = _before(checkpoint, scan, shard)
    if before is not None and before.is_complete:
        return Counted(scan, before.part, run.spent)

    def so_far(probe: Probe) -> parts.Part:
        told = (*loaded.warnings, *notes, *batches.warnings, *run.warnings, *probe.notes())
        sites = probe.stats()
        part = parts.Part(
            {stats.site: stats for stats in sites}, dict(zip((s.site for s in sites), probe.places(), strict=True)),
            run.inputs.states, run.outputs, run.samples, run.batches, probe.skipped(), told, probe.unmatched(),
        )  # fmt: skip
        return part if before is None else before.part.plus(part)

    def keep(probe: Probe, *, is_complete: bool = False) -> None:
        if checkpoint is not None:
            parts.save(checkpoint, parts.Kept(scan, shard, is_complete, so_far(probe)))

    def run_all(stack: ExitStack) -> Counted:
        stack.enter_context(run.float_type.cast(model))
        held = stack.enter_context(preserved(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(threads_of(settings.threads or torch.get_num_threads()))
        seed_generators(settings.seed)
        probe = stack.enter_context(
            Probe(model, gates=settings.gates, unit_axes=settings.units, watch=watch, stats=settings.stats)
        )
        run.through(batches, probe, held, Course(shard, 0 if before is None else before.part.batches, keep, progress))
        keep(probe, is_complete=True)
        return Counted(scan, so_far(probe), run.spent)

    while True:
        try:
            with ExitStack() as stack:
                return run_all(stack)
        except DoesNotFit as error:
            # Half of that pass is counted, so all begins anew; who watches would see it twice.
            if watch is not None or not batches.repeats or not error.can_be_halved:
                raise
            run.start_over(error.samples // 2)
        gc.collect()  # what the failed pass held
        torch.cuda.empty_cache()


def _identity(loaded: LoadedModel, batches: Batches, settings: ScanSettings, run: Passes) -> parts.Scan:
    """Return what parts of one scan agree in."""
    told = {f.name: repr(getattr(settings, f.name)) for f in fields(settings) if f.name not in _NOT_OF_THE_SCAN}
    env = Environment(
        str(torch.__version__), settings.device, str(run.float_type), seed=settings.seed, stats=settings.stats
    )
    data = DataIdentity(batches.source, batches.sha256, 0, batches.synthetic)
    return parts.Scan(loaded.identity, data, env, {**told, "deadcheck": __version__})


def _before(checkpoint: Path | None, scan: parts.Scan, shard: Shard) -> parts.Kept | None:
    """Return what the file of an interrupted scan holds; UsageError if that was another scan."""
    if checkpoint is None or not checkpoint.exists():
        return None
    kept = parts.load(checkpoint)
    differing = parts.differences(kept.scan, scan)
    if kept.shard != shard:
        differing = [f"it holds shard {kept.shard.index}/{kept.shard.count}"]
    if differing:
        raise UsageError(f"{checkpoint} is of another scan: {differing[0]}; delete it, or name another --checkpoint")
    return kept


def _runnable(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the module to run, and what has to be said about that."""
    model = unwrapped(module)
    notes = [] if model is module else [f"the model inside {type(module).__name__} was measured"]
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        notes.append("the model has lazy layers without weights: a copy with random ones was measured")
        # torch copies parameters without values, and fails on such buffers.
        kind: Any = UninitializedBuffer  # torch's stub has other arguments
        blank = {id(b): kind(b.requires_grad, b.device, b.dtype) for b in model.buffers() if is_lazy(b)}
        model = copy.deepcopy(model, blank)
    return model, notes


def runnable(module: nn.Module) -> nn.Module:
    """Return the module that a scan runs: the one inside wrappers, with weights where it was lazy."""
    return _runnable(module)[0]


def _put(module: nn.Module, device: str) -> None:
    try:
        module.to(device)
    except Exception as error:  # runs code of the model's classes, on a state that a file may have made; or no room
        raise ForwardError(
            f"the model cannot be put on {device!r} ({type(error).__name__}: {first_line(error)}); "
            "save the model again, or choose another --device"
        ) from error


def _device(name: str) -> torch.device:
    """Return the device of a name; ``auto`` is the best there is, and a process of torchrun takes a GPU of its own."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    rank = os.environ.get("LOCAL_RANK", "")
    if name == "cuda" and rank.isdecimal():
        name = f"cuda:{rank}"
    try:
        torch.zeros(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here: {first_line(error)}") from error
