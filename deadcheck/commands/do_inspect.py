"""``deadcheck inspect``."""

from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode, UsageError


def inspect(
    file: Annotated[Path, typer.Argument(help="model file, or folder of one", show_default=False)],
    format: options.TextOrJson = "text",
    debug: options.Debug = False,
) -> ExitCode:
    """Say what a model file is and holds, what is wrong with it, and what to type next; runs nothing of it."""
    from deadcheck.commands.printing import print_text
    from deadcheck.inspection import inspect as look
    from deadcheck.reports import as_inspection
    from deadcheck.safe_text import inert, plain

    if format not in ("text", "json"):
        raise UsageError(f"unknown report format {format!r}; there are text, json")
    found = look(file)
    print_text(as_inspection.render_json(found) if format == "json" else inert(plain(as_inspection.render_text(found))))
    return ExitCode.PASSED
