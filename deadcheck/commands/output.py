"""Where reports go, and how they look there."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from deadcheck.commands.printing import print_error, print_text
from deadcheck.config import files_named_in, find_config
from deadcheck.errors import UsageError
from deadcheck.reports import REPORTS, Outcome, RenderOptions
from deadcheck.safe_text import plain
from deadcheck.sample import sample_beside
from deadcheck.writing import write_text

FOR_PEOPLE = ("table", "text", "concise")


def outputs_of(chosen: str | None, pairs: Sequence[str], *, usual: str) -> list[tuple[str, str]]:
    """Return (format, path) of every report, checked before any work is done; stdout comes last.

    Stdout shows what was ``chosen`` for it (``-f``), or what a pair sends there, or the ``usual``.

    What is on stdout must be one report or one failure, so nothing may go wrong after it is written.
    """
    outputs = []
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise UsageError(f"-o {pair!r} is not FORMAT=PATH; write -o json=report.json")
        if path != "-":
            check_place(f"-o {pair!r}", path, pair)
        outputs.append((name, path))
    if chosen is not None or not any(path == "-" for _, path in outputs):
        outputs.append((chosen or usual, "-"))
    unknown = sorted({name for name, _ in outputs} - set(REPORTS))
    if unknown:
        raise UsageError(f"unknown report format {unknown[0]!r}; there are {', '.join(REPORTS)}")
    if sum(path == "-" for _, path in outputs) > 1:
        raise UsageError("two reports on stdout would run into one; write one of them to a file, with -o FORMAT=PATH")
    check_apart([(f"the {name} report", path) for name, path in outputs])
    return sorted(outputs, key=lambda output: output[1] == "-")


def check_apart(places: Sequence[tuple[str, str | Path]]) -> None:
    """Refuse two things, each with what it is, that are to go to one file, where one of them would be lost."""
    met: dict[Path, str] = {}
    for what, path in places:
        if str(path) == "-" or Path(path).is_char_device():
            continue
        place = Path(path).resolve()
        if place in met:
            raise UsageError(f"{met[place]} and {what} are to go to one file; name a file for each")
        met[place] = what


def check_place(what: str, path: str, argument: str | None = None, *, is_baseline: bool = False) -> None:
    """Refuse a path that no file can be written to, or must not be, before any work is done.

    ``argument`` is how the command line names it, for what is written anew: no other file that it or the settings name
    may be lost. A baseline takes the place of the one that the settings name.
    """
    try:
        if not Path(path).resolve().parent.is_dir():
            raise UsageError(f"{what}: the folder {str(Path(path).parent)!r} does not exist; create it first")
        if Path(path).is_dir():
            raise UsageError(f"{what}: {path!r} is a folder; name a file in it")
    except OSError as error:
        raise UsageError(f"{what}: cannot write to {path!r} ({error.strerror}); choose another place") from error
    if argument is not None and any(_is_same(path, other) for other in _read_by_command(argument, is_baseline)):
        raise UsageError(f"{what}: {path!r} is a file that this command reads, and would be lost; name another file")


def _read_by_command(written: str, is_baseline: bool) -> Iterator[str]:
    """Yield what may be a file among all that the command line and the settings name, but for the one ``written``."""
    named = sys.argv[1:]
    own = [
        i for i, text in enumerate(named)
        if text == written or Path(text) == Path(written) or (text.startswith("-") and text.endswith(written))
    ]  # fmt: skip
    read = [text for i, text in enumerate(named) if i not in own[-1:]]
    for file in _settings_of(named):
        read += [str(file), *(text for name, text in files_named_in(file) if not (is_baseline and name == "baseline"))]
    for text in read:
        yield from (text, text.partition("=")[2], text.rpartition(":")[0], text.rpartition("=")[2])
        with suppress(OSError, ValueError):  # it is no path at all
            if sample := sample_beside(Path(text)):
                yield str(sample)


def _settings_of(named: Sequence[str]) -> Iterator[Path]:
    """Yield the configuration files that a command line names, or else the one that is found."""
    given = re.findall(r"(?:^|\0)--config[=\0]([^\0]+)", "\0".join(named))
    yield from map(Path, given or filter(None, [find_config(Path.cwd())]))


def look_of(
    color: str,
    *,
    ascii: bool = False,
    per_unit: bool = False,
    limit: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
) -> RenderOptions:
    """Return how reports should look, from the flags and the terminal."""
    if color not in ("auto", "always", "never"):
        raise UsageError(f"--color {color!r} is not auto, always or never")
    terminal = sys.stdout.isatty()
    automatic = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    width = shutil.get_terminal_size((120, 24)).columns
    unicode = "utf" in (sys.stdout.encoding or "").lower() and os.environ.get("TERM") != "dumb"
    return RenderOptions(
        width=min(max(width, 60), 400),
        color=color == "always" or (color == "auto" and automatic),
        unicode=unicode and not ascii,
        per_unit=per_unit,
        limit=limit,
        quiet=quiet,
        verbose=verbose,
    )


def publish(outcomes: Sequence[Outcome], outputs: Sequence[tuple[str, str]], look: RenderOptions) -> None:
    """Write every report, files first; what a model failed of goes to stderr too.

    For people at stdout a lone failure is said once, on stderr.
    """
    alone = len(outcomes) == 1
    for name, path in outputs:
        if path != "-" and any(outcome.model is not None and _is_same(path, outcome.model) for outcome in outcomes):
            raise UsageError(f"-o {name}={path}: is the model itself, which is never written over; name another file")
    for name, path in outputs:
        for_people = name in FOR_PEOPLE and path == "-"
        if not (for_people and alone and outcomes[0].record is None):
            write(path, REPORTS[name](outcomes, look if for_people else replace(look, color=False)), name)
        if path == "-" and (alone or not for_people):
            for outcome in outcomes:
                if outcome.failure is not None:
                    print_error(outcome.failure.message)


def _is_same(path: str, other: str) -> bool:
    try:
        return Path(path).is_file() and Path(path).samefile(other)
    except (OSError, ValueError):  # one of them does not exist, or is no path at all
        return False


def write(path: str, text: str, name: str) -> None:
    """Print a report, or write it to a temporary file that then takes the place of the old one."""
    text = text if text.endswith("\n") or not text else text + "\n"
    if path == "-":
        print_text(text)
        return
    write_text(Path(path), text, f"the {name} report")


@contextmanager
def progress(name: str, *, quiet: bool) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show samples done and time left on stderr, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(plain(name), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
