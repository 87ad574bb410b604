"""``deadcheck baseline write`` and ``deadcheck baseline prune``, the only writers of baselines."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode

app = typer.Typer(help="Write down what a gate accepts, and tighten it.", no_args_is_help=True)

_Report = Annotated[Path | None, typer.Option(help="take a finished JSON report, without torch", show_default=False)]


@app.command()
def write(
    model: Annotated[Path | None, typer.Argument(help="saved model to scan", show_default=False)] = None,
    report: _Report = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="where to write; default: the baseline that deadcheck.yaml names", show_default=False
        ),
    ] = None,
    accept_worse: Annotated[
        bool, typer.Option("--accept-worse", help="replace a baseline even by a worse or another one")
    ] = False,
    data: options.Data = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    allow_class: options.AllowClass = None,
    key: options.Key = None,
    trust: options.Trust = False,
    config: options.ConfigFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Write the baseline of a model, from a scan or from a report.

    Exits with 1, and writes nothing, where the baseline that is there is better.
    """
    from deadcheck.commands.baselines import Source, write_baseline
    from deadcheck.commands.measuring import Reading

    reading = Reading(arch, tuple(arch_arg or ()), tuple(allow_class or ()), key, trust=trust)
    source = Source(model, report, data, reading, config)
    return write_baseline(source, output, accept_worse=accept_worse, quiet=quiet, debug=debug)


@app.command()
def prune(
    baseline: Annotated[Path, typer.Argument(help="baseline to tighten, in place", show_default=False)],
    model: Annotated[Path | None, typer.Option(help="saved model to scan", show_default=False)] = None,
    report: _Report = None,
    data: options.Data = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    allow_class: options.AllowClass = None,
    key: options.Key = None,
    trust: options.Trust = False,
    config: options.ConfigFile = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Take units that came back out of a baseline, so that they may not die again.

    Nothing that is newly stuck is added. Exits with 3 where the two cannot be compared.
    """
    from deadcheck.commands.baselines import Source, prune_baseline
    from deadcheck.commands.measuring import Reading

    reading = Reading(arch, tuple(arch_arg or ()), tuple(allow_class or ()), key, trust=trust)
    source = Source(model, report, data, reading, config)
    return prune_baseline(source, baseline, quiet=quiet, debug=debug)
