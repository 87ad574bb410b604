"""``deadcheck report``."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode


def report(
    path: Annotated[Path, typer.Argument(help="JSON report of a scan or a gate", metavar="REPORT", show_default=False)],
    format: options.ShownAsTable = None,
    output: options.Output = None,
    per_unit: options.PerUnit = False,
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="every layer, too", rich_help_panel=options.REPORT)
    ] = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Render a finished report again, in any format, without scanning.

    Exits with 0 whatever the report says; 'deadcheck gate --report' judges.
    """
    from deadcheck.commands.output import look_of, outputs_of, publish
    from deadcheck.reports.from_json import read_reports

    outputs = outputs_of(format, output or [], usual="table")
    look = look_of(color, ascii=ascii, per_unit=per_unit, limit=limit, verbose=verbose)
    publish(read_reports(path, per_unit=per_unit), outputs, look)
    return ExitCode.PASSED
