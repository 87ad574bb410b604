"""What is patched: a tree of modules, a TorchScript program or an exported program, each changed in its own way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck import rewrite_script
from deadcheck.errors import PatchError
from deadcheck.formats.base import LoadedModel
from deadcheck.plan import PatchPlan, SiteChange
from deadcheck.rewrite import copied, rewrite
from deadcheck.scripted import Program
from deadcheck.sites import Skipped
from deadcheck.stand_ins import ceiling_of
from deadcheck.substitute import Rule
from deadcheck.unit_slope import stand_in


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


class ModuleTree(Subject):
    """A tree of Python modules."""

    kind, what, suffix = "a model made of modules", "the patched model, whole", ".pt"

    def save(self, made: Made, path: Path) -> None:
        """Write the whole module."""
        torch.save(made.product, path)

    def read_back(self, path: Path) -> nn.Module:
        """Load the whole module."""
        return torch.load(path, map_location="cpu", weights_only=False)  # type: ignore[no-any-return]

    def made(self, plan: PatchPlan) -> Made:
        """Return a patched copy that shares the model's weights."""
        result = rewrite(copied(self.module, share=True), plan)
        return Made(result.model, result.model, result.skipped)

    def function(self, plan: PatchPlan, change: SiteChange, made: Made, ceiling: float) -> Callable[[Tensor], Tensor]:
        """Return the module at a site, or the function that stands in for its calls."""
        if change.modules and not isinstance(self.module.get_submodule(change.modules[0]), torch.jit.ScriptModule):
            module = made.module.get_submodule(change.modules[0])
            is_layer = ceiling_of(self.module.get_submodule(change.modules[0])) is None
            return (module.get_submodule("activation") if is_layer else module).forward  # type: ignore[no-any-return]
        run = stand_in(plan.for_site(change), ceiling=None if ceiling == torch.inf else ceiling, units=change.units)
        return lambda x: run(x, False)


class ProgramSubject(Subject):
    """A program, which is read again for each change."""

    _function_of: Callable[..., Callable[[Tensor], Tensor]]

    def function(self, plan: PatchPlan, change: SiteChange, made: Made, ceiling: float) -> Callable[[Tensor], Tensor]:
        """Return the operators that stand at a site, as a program of their own."""
        rule = Rule(plan.for_site(change), change.units)
        return self._function_of(rule, ceiling=ceiling)


class Scripted(ProgramSubject):
    """A TorchScript program; ``read`` gives it anew."""

    kind, what, suffix = "a TorchScript program", "the patched program", ".pt"
    _function_of = staticmethod(rewrite_script.function_of)

    def save(self, made: Made, path: Path) -> None:
        """Write the program."""
        torch.jit.save(made.product, str(path))

    def read_back(self, path: Path) -> nn.Module:
        """Load the program."""
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]

    def __init__(self, loaded: LoadedModel, read: Callable[[], torch.jit.ScriptModule], method: str) -> None:
        # Measured without the fused layers of torch, as the patched program runs: their operators can be replaced.
        self._read, self._method = read, method
        program = self._program()
        program.mark()
        super().__init__(replace(loaded, module=program.module), program.module)

    def _program(self) -> Program:
        return Program(rewrite_script.leave_fast_path(self._read()))

    def made(self, plan: PatchPlan) -> Made:
        """Return the program with its operators replaced, once with marks to be measured, once without."""
        rules = rules_of(plan)
        program, marked = self._program(), self._program()
        skipped = rewrite_script.rewrite_script(program, rules, method=self._method)
        rewrite_script.rewrite_script(marked, rules, method=self._method)
        marked.mark()
        return Made(marked.module, program.module, skipped_sites(plan, skipped))


def rules_of(plan: PatchPlan) -> dict[int, Rule]:
    """Return what stands in for each operator of a program, by its number; PatchError for a patch of modules."""
    rules = {}
    for change in plan.sites:
        if not change.operators:
            raise PatchError(f"{change.site}: the patch is for a model made of modules, and this is a program")
        rules.update(dict.fromkeys(change.operators, Rule(plan.for_site(change), change.units)))
    return rules


def patched_script(module: torch.jit.ScriptModule, plan: PatchPlan) -> torch.jit.ScriptModule:
    """Return a TorchScript program with a patch applied; the one given stays as it is."""
    program = Program(rewrite_script.leave_fast_path(rewrite_script.reread(module)))
    all_or_none(skipped_sites(plan, rewrite_script.rewrite_script(program, rules_of(plan))))
    return program.module


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
