"""What can be patched, and what is common to programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deadcheck.errors import PatchError
from deadcheck.formats.base import LoadedModel
from deadcheck.patch_plan import PatchPlan, SiteChange
from deadcheck.sites import Skipped
from deadcheck.substitute import Rule


@dataclass(frozen=True)
class Made:
    """A patched model: to be run, and to be saved."""

    module: nn.Module
    product: Any
    """What is saved; the module itself where it needs no marks to be measured."""

    skipped: tuple[Skipped, ...]


class Subject(ABC):
    """A model that can be patched. It is never changed itself: each ``made`` starts anew."""

    kind: str
    """What it is, for people."""

    what: str
    """What is written."""

    suffix: str

    def __init__(self, loaded: LoadedModel, module: nn.Module) -> None:
        self.loaded = loaded
        self.module = module
        """What runs in a scan."""

    @abstractmethod
    def made(self, plan: PatchPlan) -> Made:
        """Return a patched model."""

    @abstractmethod
    def function(self, plan: PatchPlan, change: SiteChange, made: Made, ceiling: float) -> Callable[[Tensor], Tensor]:
        """Return what stands at a site, as a function of its own."""

    @abstractmethod
    def save(self, made: Made, path: Path) -> None:
        """Write what was made to a file."""

    @abstractmethod
    def read_back(self, path: Path) -> nn.Module:
        """Load a file of our own, of a moment ago: what it holds may run."""


class ProgramSubject(Subject):
    """A program, which is read again for each change."""

    _function_of: Callable[..., Callable[[Tensor], Tensor]]

    def function(self, plan: PatchPlan, change: SiteChange, made: Made, ceiling: float) -> Callable[[Tensor], Tensor]:
        """Return the operators that stand at a site, as a program of their own."""
        rule = Rule(plan.for_site(change), change.units)
        return self._function_of(rule, ceiling=ceiling)


def rules_of(plan: PatchPlan) -> dict[int, Rule]:
    """Return what stands in for each operator of a program, by its number; PatchError for a patch of modules."""
    rules = {}
    for change in plan.sites:
        if not change.operators:
            raise PatchError(f"{change.site}: the patch is for a model made of modules, and this is a program")
        rules.update(dict.fromkeys(change.operators, Rule(plan.for_site(change), change.units)))
    return rules


def skipped_sites(plan: PatchPlan, reasons: Mapping[int, str]) -> tuple[Skipped, ...]:
    """Return the sites whose operators could not be replaced."""
    return tuple(
        Skipped(
            change.activation, change.site, next(reasons[number] for number in change.operators if number in reasons)
        )
        for change in plan.sites
        if any(number in reasons for number in change.operators)
    )


def all_or_none(skipped: Sequence[Skipped]) -> None:
    """Raise PatchError where something could not be changed."""
    if skipped:
        raise PatchError(f"{skipped[0].where}: the {skipped[0].what} cannot be changed: {skipped[0].reason}")
