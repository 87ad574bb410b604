"""``deadcheck scan``."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode


def scan(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="saved model: .pt, .pth, .ckpt, .bin or .safetensors; default: those of deadcheck.yaml",
            show_default=False,
        ),
    ] = None,
    data: options.Data = None,
    batch_size: options.BatchSize = None,
    max_samples: options.MaxSamples = None,
    workers: options.Workers = None,
    unpack: options.Unpack = None,
    input_shape: options.InputShape = None,
    allow_nonfinite: options.AllowNonfinite = False,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    allow_class: options.AllowClass = None,
    key: options.Key = None,
    trust: options.Trust = False,
    device: options.Device = None,
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    dtype: options.Dtype = None,
    autocast: options.Autocast = None,
    threads: options.Threads = None,
    shard: options.ShardOption = None,
    checkpoint: options.Checkpoint = None,
    seed: options.Seed = None,
    units: options.Units = None,
    gates: options.Gates = False,
    stats: options.Stats = None,
    call: options.Call = None,
    config: options.ConfigFile = None,
    format: options.ShownAsTable = None,
    output: options.Output = None,
    per_unit: options.PerUnit = False,
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Measure how often every unit is zero, and say which are dead.

    A model of torch.nn classes is read safely with no flag; weights need --arch; a file runs only with --trust.
    """
    from deadcheck.commands.inputs import settings, shape_of, sizes, unit_axes
    from deadcheck.commands.measuring import Reading, Run, scans
    from deadcheck.commands.output import check_apart, check_place, look_of, outputs_of, publish
    from deadcheck.errors import UsageError
    from deadcheck.reports import worst_code
    from deadcheck.shard import WHOLE, shard_of

    outputs = outputs_of(format, output or [], usual="table")
    look = look_of(color, ascii=ascii, per_unit=per_unit, limit=limit)
    flags = {
        "scan.data": data,
        "scan.batch_size": batch_size,
        "scan.max_samples": max_samples,
        "scan.workers": workers,
        "scan.unpack": unpack,
        "scan.input_shape": shape_of(input_shape),
        "scan.allow_nonfinite": allow_nonfinite or None,
        "scan.device": device,
        "scan.device_map": device_map,
        "scan.max_memory": sizes(max_memory or []) or None,
        "scan.dtype": dtype,
        "scan.autocast": autocast,
        "scan.threads": threads,
        "scan.seed": seed,
        "scan.units": unit_axes(units or []) or None,
        "scan.gates": gates or None,
        "scan.stats": stats,
        "scan.call": call,
    }
    reading = Reading(arch, arch_arg or (), allow_class or (), key, trust=trust)
    own = shard_of(shard)
    if shard is not None and checkpoint is None:
        raise UsageError(f"--shard {shard} counts a part of the data; add --checkpoint FILE, and merge the files")
    if shard is None and own != WHOLE and checkpoint is not None:
        raise UsageError("--checkpoint keeps one process; in several give each a --shard I/N, without torchrun")
    if checkpoint is not None:
        check_place("--checkpoint", str(checkpoint))
        check_apart([("--checkpoint", checkpoint), *((f"the {name} report", path) for name, path in outputs)])
    run = Run(settings(config, flags), reading, None, own, checkpoint, per_unit=per_unit, quiet=quiet, debug=debug)
    outcomes = list(scans([] if model is None else [model], run))
    if not outcomes and own.index > 1:
        return ExitCode.PASSED  # the first process reports for all that torchrun started
    publish(outcomes, outputs, look)
    return worst_code(outcomes, look)
