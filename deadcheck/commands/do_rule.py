"""``deadcheck rule``."""

import json
import shutil
import textwrap
from dataclasses import asdict
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode, UsageError


def rule(
    name: Annotated[
        str | None, typer.Argument(help="code or name, as DC003 or layer-dead; default: all", show_default=False)
    ] = None,
    format: options.TextOrJson = "text",
) -> ExitCode:
    """Say what a rule judges, why, and what to do."""
    from deadcheck.commands.printing import print_text
    from deadcheck.rules import RULES, find_rule, page

    if format not in ("text", "json"):
        raise UsageError(f"unknown format {format!r}; there are text, json")
    chosen = RULES if name is None else (find_rule(name),)
    if format == "json":
        print_text(json.dumps([asdict(item) for item in chosen], indent=1) + "\n")
    elif name is None:
        width = max(len(item.name) for item in RULES)
        print_text("".join(f"{item.code}  {item.name:<{width}}  {item.summary}\n" for item in RULES))
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        print_text("\n\n".join(textwrap.fill(part, width) for part in page(chosen[0]).split("\n\n")) + "\n")
    return ExitCode.PASSED
