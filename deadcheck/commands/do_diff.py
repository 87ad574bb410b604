"""``deadcheck diff``."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode, UsageError


def diff(
    old: Annotated[Path, typer.Argument(help="JSON report of the earlier scan", show_default=False)],
    new: Annotated[Path, typer.Argument(help="JSON report of the later one", show_default=False)],
    format: Annotated[str, typer.Option("--format", "-f", help="text, json or markdown")] = "text",
    limit: options.Limit = None,
    color: options.Color = "auto",
    ascii: options.Ascii = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Show what changed between two scans, layer by layer: which units died, which came back.

    Exits with 3 where the two cannot be compared.
    """
    from deadcheck.commands.output import look_of
    from deadcheck.commands.printing import print_text
    from deadcheck.comparison import compare
    from deadcheck.reports.as_diff import DIFFS, Diff
    from deadcheck.reports.from_json import read_report

    if format not in DIFFS:
        raise UsageError(f"unknown format {format!r} of a diff; there are {', '.join(DIFFS)}")
    look = look_of(color, ascii=ascii, limit=limit)
    found = Diff(str(old), str(new), compare(read_report(old), read_report(new)))
    print_text(DIFFS[format](found, look))
    return found.code
