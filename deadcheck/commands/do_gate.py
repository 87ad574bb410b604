"""``deadcheck gate``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode

_POLICY = "Policy"


def _limit(text: str) -> Any:
    return typer.Option(help=text, metavar="SHARE", rich_help_panel=_POLICY, show_default=False)


def gate(
    models: Annotated[
        list[Path] | None,
        typer.Argument(help="saved models; default: those of deadcheck.yaml", show_default=False),
    ] = None,
    report: Annotated[
        list[Path] | None,
        typer.Option(help="judge a finished JSON report, without torch; repeats", show_default=False),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", "-b", help="JSON report to compare with", rich_help_panel=_POLICY, show_default=False
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="units (a later checkpoint of one training) or rates (trained anew) \\[default: units]",
            rich_help_panel=_POLICY,
            show_default=False,
        ),
    ] = None,
    max_layer_dead: Annotated[str | None, _limit("dead share of a layer that is allowed \\[default: off]")] = None,
    max_model_dead: Annotated[str | None, _limit("dead share of all units that is allowed \\[default: off]")] = None,
    max_new_dead: Annotated[
        str | None, _limit("share of a layer that may have died since the baseline \\[default: 5%]")
    ] = None,
    max_worse: Annotated[
        str | None, _limit("points by which a layer's dead share may exceed the baseline's \\[default: 5%]")
    ] = None,
    min_samples: Annotated[
        int | None,
        typer.Option(
            help="samples below which nothing is judged \\[default: 299]",
            min=0,
            rich_help_panel=_POLICY,
            show_default=False,
        ),
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="exit with 0 where a rule fails", rich_help_panel=_POLICY)
    ] = False,
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
    device_map: options.DeviceMap = None,
    max_memory: options.MaxMemory = None,
    dtype: options.Dtype = None,
    autocast: options.Autocast = None,
    seed: options.Seed = None,
    units: options.Units = None,
    gates: options.Gates = False,
    stats: options.Stats = None,
    call: options.Call = None,
    config: options.ConfigFile = None,
    format: options.ShownAsText = None,
    output: options.Output = None,
    per_unit: options.PerUnit = False,
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress, and only what fails", rich_help_panel=options.REPORT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="every layer, too", rich_help_panel=options.REPORT)
    ] = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Fail when a model has gone dead: against limits, and against a baseline.

    Exits with 0 passed, 1 a rule failed, 2 could not, 3 nothing that can be judged, 4 refused. 'deadcheck rule' lists
    the rules.
    """
    from deadcheck.commands.gating import gated
    from deadcheck.commands.inputs import refuse_measuring, settings, shape_of, sizes, unit_axes
    from deadcheck.commands.measuring import Reading, Run
    from deadcheck.commands.output import look_of, outputs_of, publish
    from deadcheck.reports import worst_code

    outputs = outputs_of(format, output or [], usual="text")
    look = look_of(color, ascii=ascii, per_unit=per_unit, limit=limit, quiet=quiet, verbose=verbose)
    look = replace(look, exit_zero=exit_zero)
    flags = {
        "scan.data": data, "scan.batch_size": batch_size, "scan.max_samples": max_samples, "scan.unpack": unpack,
        "scan.input_shape": shape_of(input_shape), "scan.allow_nonfinite": allow_nonfinite or None,
        "scan.device": device, "scan.device_map": device_map, "scan.max_memory": sizes(max_memory or []) or None,
        "scan.dtype": dtype, "scan.autocast": autocast, "scan.seed": seed,
        "scan.units": unit_axes(units or []) or None, "scan.gates": gates or None, "scan.stats": stats,
        "scan.call": call, "policy.max_layer_dead": max_layer_dead, "policy.max_model_dead": max_model_dead,
        "policy.max_new_dead": max_new_dead, "policy.max_worse": max_worse,
        "policy.compare": compare, "policy.min_samples": min_samples,
    }  # fmt: skip
    if report and not models:
        reading = {"arch": arch, "arch_arg": arch_arg, "allow_class": allow_class, "key": key, "trust": trust}
        refuse_measuring({**flags, **reading})
    run = Run(
        settings(config, flags), Reading(arch, arch_arg or (), allow_class or (), key, trust=trust), baseline,
        per_unit=per_unit, quiet=quiet, debug=debug,
    )  # fmt: skip
    outcomes = gated(models or [], report or [], run)
    publish(outcomes, outputs, look)
    return worst_code(outcomes, look)
