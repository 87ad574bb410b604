"""What is to stand in for ReLU, and where: options and what they mean, for the commands that change a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deadcheck.commands.options import REPORT
from deadcheck.errors import UsageError

if TYPE_CHECKING:
    from deadcheck.patch_plan import Kind, Replacement
    from deadcheck.remedies.base import Choice

CHANGE = "What changes"
_KINDS = {"leaky": "leaky_relu", "prelu": "prelu", "elu": "elu", "gelu": "gelu", "silu": "silu"}
_DEFAULTS = {"leaky": 0.01, "prelu": 0.25, "elu": 1.0}

Alpha = Annotated[
    str | None,
    typer.Option(
        help="slope below 0, or auto: the largest that moves outputs within --tolerance \\[default: 0.01]",
        rich_help_panel=CHANGE, show_default=False,
    ),
]  # fmt: skip
Tolerance = Annotated[
    str | None,
    typer.Option(help="with --alpha auto: how far outputs may move \\[default: 1%]", metavar="SHARE",
                 rich_help_panel=CHANGE, show_default=False),
]  # fmt: skip
To = Annotated[
    str,
    typer.Option(help="what stands in: leaky, prelu (learns its slope), elu, gelu or silu", rich_help_panel=CHANGE),
]
All = Annotated[
    bool, typer.Option("--all", help="every ReLU: what is done when nothing else is said", rich_help_panel=CHANGE)
]
OnlyDead = Annotated[
    bool, typer.Option("--only-dead", help="dead units alone; the others keep ReLU exactly", rich_help_panel=CHANGE)
]
DeadFrom = Annotated[
    Path | None,
    typer.Option(help="with --only-dead: take them from this JSON report", rich_help_panel=CHANGE, show_default=False),
]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        help="pattern of site keys or module paths, !pattern to leave some out; repeats", metavar="GLOB",
        rich_help_panel=CHANGE, show_default=False,
    ),
]  # fmt: skip
MinDeadShare = Annotated[
    str | None,
    typer.Option(help="layers with at least this share of dead units", metavar="SHARE", rich_help_panel=CHANGE,
                 show_default=False),
]  # fmt: skip
Clipped = Annotated[
    bool,
    typer.Option("--clipped", help="ReLU6 and hardtanh(0, c) too; their ceiling stays", rich_help_panel=CHANGE),
]
Format = Annotated[
    str,
    typer.Option("--format", "-f", help="what stdout shows: table, json or markdown", rich_help_panel=REPORT),
]
SaveReport = Annotated[
    list[str] | None,
    typer.Option(help="write a report as FORMAT=PATH; repeats", rich_help_panel=REPORT, show_default=False),
]


@dataclass(frozen=True)
class Wish:
    """The options as they were given."""

    alpha: str | None = None
    tolerance: str | None = None
    to: str = "leaky"
    everything: bool = False
    only_dead: bool = False
    dead_from: Path | None = None
    layers: Sequence[str] = ()
    min_dead_share: str | None = None
    clipped: bool = False

    @property
    def is_default(self) -> bool:
        """Whether none was given."""
        return self == Wish()


@dataclass(frozen=True)
class Chosen:
    """What the options mean."""

    choice: Choice
    tolerance: float | None
    """For a slope that is to be found."""

    report_sha256: str | None = None
    """Digest of the model that the report of dead units is about."""


def chosen(wish: Wish, model: str | None) -> Chosen:
    """Return what the options mean together; UsageError where they do not fit, before any work."""
    from deadcheck.remedies.base import Choice

    if wish.everything and (wish.only_dead or wish.layers or wish.min_dead_share or wish.dead_from):
        raise UsageError("--all changes every ReLU, so it goes with none of --only-dead, --layers, --min-dead-share")
    if wish.dead_from is not None and not wish.only_dead:
        raise UsageError("--dead-from says which units are dead, for --only-dead; add that")
    dead, digest = (None, None) if wish.dead_from is None else _dead_units(wish.dead_from, model)
    choice = Choice(
        replacement=replacement_of(wish.to, wish.alpha),
        only_dead=wish.only_dead,
        dead=dead,
        layers=tuple(wish.layers),
        min_dead_share=0.0 if wish.min_dead_share is None else _share("--min-dead-share", wish.min_dead_share),
        clipped=wish.clipped,
    )
    return Chosen(choice, _tolerance(wish), digest)


def _dead_units(path: Path, model: str | None) -> tuple[dict[str, tuple[tuple[int, int], ...]], str | None]:
    from deadcheck.reports.from_json import read_report

    record = read_report(path, model)
    return {site.key: site.dead_units for site in record.sites}, record.model.sha256


def _share(option: str, text: str) -> float:
    from deadcheck.shares import share

    try:
        return float(share(text))
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from error


def replacement_of(to: str, alpha: str | None) -> Replacement:
    """Return what stands in; for ``auto`` its slope is still to be found."""
    from deadcheck.patch_plan import Kind, Replacement

    if to not in _KINDS:
        raise UsageError(f"--to {to!r} is not one of {', '.join(_KINDS)}")
    kind = Kind(_KINDS[to])
    if to not in _DEFAULTS:
        if alpha is not None:
            raise UsageError(f"{to} has no slope to choose; leave out --alpha")
        return Replacement(kind, None)
    if alpha == "auto":
        if to not in ("leaky", "prelu"):
            raise UsageError(f"--alpha auto chooses a slope, and {to} has none; give a number, or --to leaky")
        return Replacement(kind, _DEFAULTS[to])
    return Replacement(kind, _DEFAULTS[to] if alpha is None else _slope(alpha, kind))


def _slope(text: str, kind: Kind) -> float:
    from deadcheck.patch_plan import slope_fault

    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if math.isnan(alpha):
        raise UsageError(f"--alpha {text!r} is not a number; write 0.01, or auto")
    if fault := slope_fault(kind, alpha):
        raise UsageError(f"--alpha {text} {fault}")
    return alpha


def _tolerance(wish: Wish) -> float | None:
    if wish.alpha != "auto":
        if wish.tolerance is not None:
            raise UsageError("--tolerance is how far --alpha auto may move the outputs; add --alpha auto")
        return None
    tolerance = _share("--tolerance", wish.tolerance or "1%")
    if tolerance == 0:
        raise UsageError("--tolerance 0 allows no slope at all; give a share above 0, as 1%")
    return tolerance
