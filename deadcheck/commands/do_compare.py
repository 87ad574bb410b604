"""``deadcheck compare``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import choosing, options
from deadcheck.errors import ExitCode


def compare(
    model: Annotated[
        Path | None, typer.Argument(help="saved model; default: the one of deadcheck.yaml", show_default=False)
    ] = None,
    alpha: choosing.Alpha = None,
    tolerance: choosing.Tolerance = None,
    to: choosing.To = "leaky",
    only_dead: choosing.OnlyDead = False,
    layers: choosing.Layers = None,
    clipped: choosing.Clipped = False,
    data: options.Data = None,
    batch_size: options.BatchSize = None,
    max_samples: options.MaxSamples = None,
    unpack: options.Unpack = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    allow_class: options.AllowClass = None,
    key: options.Key = None,
    trust: options.Trust = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
    autocast: options.Autocast = None,
    seed: options.Seed = None,
    call: options.Call = None,
    config: options.ConfigFile = None,
    format: choosing.Format = "table",
    save_report: choosing.SaveReport = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Set ReLU beside Leaky ReLU, as measured on a model: outputs, dead units, gradients, time. Writes no model."""
    from deadcheck.commands.inputs import settings
    from deadcheck.commands.measuring import Reading
    from deadcheck.commands.one_model import Job, one_target, places_of, publish
    from deadcheck.commands.output import look_of
    from deadcheck.reports.as_compare import COMPARISONS

    places = places_of(format, save_report or [], COMPARISONS)
    look = look_of(color, ascii=ascii)
    flags = {
        "scan.data": data, "scan.batch_size": batch_size, "scan.max_samples": max_samples, "scan.unpack": unpack,
        "scan.device": device, "scan.dtype": dtype, "scan.autocast": autocast, "scan.seed": seed, "scan.call": call,
    }  # fmt: skip
    target = one_target(model, settings(config, flags))
    wish = choosing.Wish(
        alpha, tolerance, to, only_dead=only_dead, layers=tuple(layers or ()), clipped=clipped
    )  # fmt: skip
    wanted = choosing.chosen(wish, target.path)
    job = Job(target, Reading(arch, arch_arg or (), allow_class or (), key, trust=trust), quiet)

    from deadcheck.patch_job import compare_file  # after every check that needs no torch

    found = job.run(
        lambda path, load, config, advance: compare_file(path, load, config, wanted.choice, wanted.tolerance, advance)
    )
    publish(places, lambda name, is_seen: COMPARISONS[name](found, look if is_seen else replace(look, color=False)))
    return found.result.exit_code
