"""``deadcheck patch``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import choosing, options
from deadcheck.errors import ExitCode, UsageError

_WRITE = "What is written"


def patch(
    model: Annotated[
        Path | None, typer.Argument(help="saved model; default: the one of deadcheck.yaml", show_default=False)
    ] = None,
    alpha: choosing.Alpha = None,
    tolerance: choosing.Tolerance = None,
    to: choosing.To = "leaky",
    all: choosing.All = False,
    only_dead: choosing.OnlyDead = False,
    dead_from: choosing.DeadFrom = None,
    layers: choosing.Layers = None,
    min_dead_share: choosing.MinDeadShare = None,
    clipped: choosing.Clipped = False,
    from_file: Annotated[
        Path | None,
        typer.Option(help="do what this patch file says", rich_help_panel=choosing.CHANGE, show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            rich_help_panel=_WRITE,
            show_default=False,
            help="patched model, in the format of the model; a .pt2 takes any model that torch can export",
        ),
    ] = None,
    patch_file: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_WRITE,
            show_default=False,
            help="patch file \\[default: beside the output, as NAME.patch.yaml; else deadcheck.patch.yaml here]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="write over files that exist", rich_help_panel=_WRITE)] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="measure and report, write nothing", rich_help_panel=_WRITE)
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
    dtype: options.Dtype = None,
    autocast: options.Autocast = None,
    seed: options.Seed = None,
    units: options.Units = None,
    call: options.Call = None,
    config: options.ConfigFile = None,
    format: choosing.Format = "table",
    save_report: choosing.SaveReport = None,
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Let ReLU pass alpha * x where x is negative, and show what that does to the model.

    This changes what the model computes. Exits with 3 where a ReLU that was meant to change could not be reached.
    """  # fmt: skip
    from deadcheck.commands.inputs import settings, shape_of, unit_axes
    from deadcheck.commands.measuring import Reading
    from deadcheck.commands.one_model import Job, one_target, places_of, publish
    from deadcheck.commands.output import check_apart, check_place, look_of
    from deadcheck.reports.patches import PATCHES

    wish = choosing.Wish(
        alpha, tolerance, to, all, only_dead, dead_from, tuple(layers or ()), min_dead_share, clipped
    )  # fmt: skip
    if from_file is not None and not wish.is_default:
        raise UsageError("--from-file says what changes and how; leave out --alpha, --to, --layers and the like")
    places = places_of(format, save_report or [], PATCHES)
    look = look_of(color, ascii=ascii, limit=limit)
    flags = {
        "scan.data": data, "scan.batch_size": batch_size, "scan.max_samples": max_samples, "scan.unpack": unpack,
        "scan.input_shape": shape_of(input_shape), "scan.allow_nonfinite": allow_nonfinite or None,
        "scan.device": device, "scan.dtype": dtype, "scan.autocast": autocast, "scan.seed": seed,
        "scan.units": unit_axes(units or []) or None, "scan.call": call,
    }  # fmt: skip
    target = one_target(model, settings(config, flags))
    wanted = choosing.chosen(wish, target.path)
    job = Job(target, Reading(arch, arch_arg or (), allow_class or (), key, trust=trust), quiet)

    from deadcheck.patch_job import PatchOptions, patch_file_for, run  # after every check that needs no torch

    asked = PatchOptions(
        choice=wanted.choice, tolerance=wanted.tolerance, report_sha256=wanted.report_sha256, from_file=from_file,
        output=output, patch_file=patch_file, force=force, dry_run=dry_run,
    )  # fmt: skip
    written = [("the patched model", output), ("the patch file", patch_file_for(asked))]
    files = [] if dry_run else [(what, path) for what, path in written if path is not None]
    check_apart([*files, *((f"the {name} report", path) for name, path in places)])
    for what, path in files:
        if path.resolve() != Path(target.path).resolve():  # of the model itself more is said
            check_place(what, str(path), str(path))
    result = job.run(lambda path, load, config, advance: run(path, load, config, asked, advance))
    publish(places, lambda name, is_seen: PATCHES[name](result, look if is_seen else replace(look, color=False)))
    return result.exit_code
