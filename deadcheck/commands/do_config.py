"""``deadcheck config validate``, ``deadcheck config show`` and ``deadcheck schema``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ConfigError, ExitCode, UsageError

app = typer.Typer(help="Check a configuration, and show what it comes to.", no_args_is_help=True)


@app.command()
def validate(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="configuration files; default: the one that is found", show_default=False),
    ] = None,
    format: options.TextOrJson = "text",
    debug: options.Debug = False,
) -> ExitCode:
    """Check configuration files; every fault is told with its line."""
    from deadcheck.commands.printing import print_text
    from deadcheck.config import find_config, load_config
    from deadcheck.safe_text import shown

    _check_format(format)
    found = find_config(Path.cwd())
    paths = files or ([] if found is None else [found])
    if not paths:
        raise ConfigError("no deadcheck.yaml here or above; 'deadcheck init' writes one")
    faults = []
    for path in paths:
        try:
            load_config(path)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    names = [str(path) for path in paths]
    text = "".join(f"{shown(name)}: valid\n" for name in names)
    print_text(text if format == "text" else json.dumps({"status": "pass", "exit_code": 0, "valid": names}) + "\n")
    return ExitCode.PASSED


@app.command()
def show(
    config: options.ConfigFile = None,
    format: options.TextOrJson = "text",
    debug: options.Debug = False,
) -> ExitCode:
    """Show every setting, and where its value came from."""
    from deadcheck.commands.printing import print_text
    from deadcheck.config import load_config, settings_of
    from deadcheck.safe_text import shown

    _check_format(format)
    found = settings_of(load_config(config))
    if format == "json":
        print_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
        return ExitCode.PASSED
    rows = [(row.name, row.spelled, row.origin) for row in found]
    widths = [max(len(shown(row[i])) for row in rows) for i in range(2)]
    for name, value, origin in rows:
        print_text(f"{shown(name):<{widths[0]}}  {shown(value):<{min(widths[1], 40)}}  {shown(origin)}\n")
    return ExitCode.PASSED


def schema() -> ExitCode:
    """Print the JSON Schema of deadcheck.yaml, for editors."""
    from deadcheck.commands.printing import print_text
    from deadcheck.settings import json_schema

    print_text(json.dumps(json_schema(), indent=1) + "\n")
    return ExitCode.PASSED


def _check_format(format: str) -> None:
    if format not in ("text", "json"):
        raise UsageError(f"unknown format {format!r}; there are text, json")
