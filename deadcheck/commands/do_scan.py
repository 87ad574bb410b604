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
    unpack: options.Unpack = None,
    input_shape: options.InputShape = None,
    allow_nonfinite: options.AllowNonfinite = False,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    allow_class: options.AllowClass = None,
    key: options.Key = None,
    trust: options.Trust = False,
    device: options.Device = None,
    seed: options.Seed = None,
    units: options.Units = None,
    gates: options.Gates = False,
    call: options.Call = None,
    config: options.ConfigFile = None,
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="what stdout shows: table, json, …", rich_help_panel=options.REPORT),
    ] = "table",
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
    from deadcheck.commands.inputs import settings, shape_of, unit_axes
    from deadcheck.commands.measuring import Reading, Run, scans
    from deadcheck.commands.output import look_of, outputs_of, publish
    from deadcheck.reports import worst_code

    outputs = outputs_of(format, output or [])
    look = look_of(color, ascii=ascii, per_unit=per_unit, limit=limit)
    flags = {
        "scan.data": data,
        "scan.batch_size": batch_size,
        "scan.max_samples": max_samples,
        "scan.unpack": unpack,
        "scan.input_shape": shape_of(input_shape),
        "scan.allow_nonfinite": allow_nonfinite or None,
        "scan.device": device,
        "scan.seed": seed,
        "scan.units": unit_axes(units or []) or None,
        "scan.gates": gates or None,
        "scan.call": call,
    }
    reading = Reading(arch, arch_arg or (), allow_class or (), key, trust=trust)
    run = Run(settings(config, flags), reading, None, per_unit=per_unit, quiet=quiet, debug=debug)
    outcomes = list(scans([] if model is None else [model], run))
    publish(outcomes, outputs, look)
    return worst_code(outcomes, look)
