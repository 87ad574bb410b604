"""``deadcheck plot``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import choosing, options
from deadcheck.errors import ExitCode, UsageError

app = typer.Typer(help="Draw what an activation does to a model's own inputs.", no_args_is_help=True)


@app.callback()
def _plots() -> None:
    pass


@app.command()
def alpha(
    model: Annotated[
        Path | None, typer.Argument(help="saved model; default: the one of deadcheck.yaml", show_default=False)
    ] = None,
    alpha: choosing.Alpha = None,
    to: choosing.To = "leaky",
    layers: choosing.Layers = None,
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
    call: options.Call = None,
    config: options.ConfigFile = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            rich_help_panel=options.REPORT,
            show_default=False,
            help="write the picture as FORMAT=PATH: text or svg; repeats",
        ),
    ] = None,
    ascii: options.Ascii = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Draw the curve from -5 to 2 above the distribution of the inputs that the model gives its ReLUs."""  # fmt: skip
    from deadcheck.commands.inputs import settings
    from deadcheck.commands.measuring import Reading
    from deadcheck.commands.one_model import Job, one_target, places_of, publish
    from deadcheck.commands.output import look_of
    from deadcheck.reports import as_curve, as_curve_svg

    if alpha == "auto":
        raise UsageError("a picture needs a slope; give a number, as --alpha 0.1")
    replacement = choosing.replacement_of(to, alpha)
    pictures = {"text": as_curve.render, "svg": as_curve_svg.render}
    places = places_of("text", output or [], pictures)
    look = look_of("never", ascii=ascii)
    flags = {
        "scan.data": data, "scan.batch_size": batch_size, "scan.max_samples": max_samples, "scan.unpack": unpack,
        "scan.device": device, "scan.dtype": dtype, "scan.autocast": autocast, "scan.call": call,
    }  # fmt: skip
    target = one_target(model, settings(config, flags))
    job = Job(target, Reading(arch, arch_arg or (), allow_class or (), key, trust=trust), quiet)

    from deadcheck.pre_activations import curve_of  # after every check that needs no torch

    curve = job.run(
        lambda path, load, config, advance: curve_of(path, load, config, replacement, tuple(layers or ()))
    )  # fmt: skip
    publish(places, lambda name, is_seen: pictures[name](curve, look if is_seen else replace(look, width=120)))
    return ExitCode.PASSED
