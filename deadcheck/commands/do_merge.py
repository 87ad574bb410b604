"""``deadcheck merge``."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode


def merge(
    part: Annotated[
        list[Path],
        typer.Argument(help="files that 'scan --shard I/N --checkpoint FILE' wrote, one a shard", show_default=False),
    ],
    config: options.ConfigFile = None,
    format: options.ShownAsTable = None,
    output: options.Output = None,
    per_unit: options.PerUnit = False,
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Join the shards of one scan into one report, the same as that of one run.

    Exits as scan does. A shard that is missing, given twice, unfinished or of another scan is refused.
    """
    from functools import partial

    from deadcheck.commands.inputs import settings
    from deadcheck.commands.measuring import attempted, joined
    from deadcheck.commands.output import look_of, outputs_of, publish
    from deadcheck.reports import worst_code

    outputs = outputs_of(format, output or [], usual="table")
    look = look_of(color, ascii=ascii, per_unit=per_unit, limit=limit)
    work = partial(joined, part, settings(config, {}), per_unit=per_unit)
    outcomes = [attempted(None, work, debug=debug)]
    publish(outcomes, outputs, look)
    return worst_code(outcomes, look)
