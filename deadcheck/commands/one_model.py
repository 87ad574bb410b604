"""Reads the one model that a command works on, as the command line and the configuration say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deadcheck.commands.inputs import Target, targets_of
from deadcheck.commands.measuring import Reading
from deadcheck.commands.output import check_apart, check_place, progress, write
from deadcheck.config import Config
from deadcheck.errors import UsageError
from deadcheck.safe_text import inert

if TYPE_CHECKING:
    from deadcheck.formats import LoadOptions

_T = TypeVar("_T")
Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class Job:
    """One model and how to read it."""

    target: Target
    reading: Reading
    quiet: bool = False

    def run(self, work: Callable[[Path, LoadOptions, Config, Progress | None], _T]) -> _T:
        """Do some work on the model; what the user's code prints goes to stderr."""
        load, path = self.reading.options(self.target), Path(self.target.path)
        with redirect_stdout(sys.stderr), progress(path.name, quiet=self.quiet) as advance:
            return work(path, load, self.target.config, advance)


def one_target(model: Path | None, config: Config) -> Target:
    """Return the model that was named, or the only one of the configuration."""
    targets = targets_of([] if model is None else [model], config)
    if len(targets) != 1:
        raise UsageError(f"the configuration names {len(targets)} models; name the one to work on")
    return targets[0]


def places_of(stdout_format: str, pairs: Sequence[str], known: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return (format, path) of every report, stdout last; checked before any work is done."""
    places = []
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise UsageError(f"{pair!r} is not FORMAT=PATH, where FORMAT is one of {', '.join(known)}")
        check_place(repr(pair), path, pair)
        places.append((name, path))
    places.append((stdout_format, "-"))
    unknown = sorted({name for name, _ in places} - set(known))
    if unknown:
        raise UsageError(f"unknown format {unknown[0]!r}; there are {', '.join(known)}")
    check_apart([(f"the {name} report", path) for name, path in places])
    return places


def publish(places: Sequence[tuple[str, str]], render: Callable[[str, bool], str]) -> None:
    """Write every report; ``render`` takes a format and whether it goes to stdout."""
    for name, path in places:
        text = render(name, path == "-")
        write(path, inert(text) if name in ("table", "text") else text, name)
