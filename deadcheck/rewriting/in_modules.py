"""Replaces activations in a tree of modules: modules are exchanged, calls in their code are caught."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from deadcheck.activations import BOUNDS
from deadcheck.callsites import found_again
from deadcheck.errors import PatchError
from deadcheck.module_tree import held_in
from deadcheck.patch_plan import Kind, PatchPlan, Replacement, SiteChange
from deadcheck.relu_calls import mentions_relu
from deadcheck.rewriting.base import Made, Subject
from deadcheck.rewriting.in_script import ceiling_of as script_ceiling
from deadcheck.rewriting.in_script import leave_fast_path, reread, rewrite_script
from deadcheck.scripted import Program
from deadcheck.sites import Skipped
from deadcheck.stand_ins import KEEPS_FUNCTION, CannotStandInError, ceiling_of, keeps_relu, module_for, stand_in
from deadcheck.substitute import Group, Key, Rule, Turns, can_substitute, original_class, substitute


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


@dataclass(frozen=True)
class Rewritten:
    """A patched model, and what could not be reached."""

    model: nn.Module
    skipped: tuple[Skipped, ...]


def rewrite(model: nn.Module, plan: PatchPlan) -> Rewritten:
    """Apply a plan to a model in place.

    PatchError, with nothing changed yet, where the model is not one that the plan was made for.
    """
    if (holder := held_in(model)) is not None:
        kind = type(model).__name__
        raise PatchError(f"the model is wrapped in {kind}; patch the model inside it (.{holder}), then wrap it")
    _check(model, plan)
    tree = _Tree(model, plan)
    for change in plan.sites:
        tree.replace(change)
    if plan.others:
        tree.replace_others()
    tree.catch_calls()
    return Rewritten(tree.model, tuple(tree.skipped))


def copied(model: nn.Module, *, share: bool = False) -> nn.Module:
    """Return a copy of a model; with ``share`` its weights are the model's own memory.

    PatchError where its objects cannot be copied.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *vars(module).values()):
            if share and type(tensor) is nn.Parameter:
                # A parameter of its own on the same memory, so that a gradient asked of it is not asked of the model's.
                memo[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad)
            elif isinstance(tensor, Tensor) and not tensor.is_leaf:
                # Weights computed by a hook, which deepcopy refuses; the hook computes them again.
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the model's own objects are copied, and may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise PatchError(
            f"the model cannot be copied ({type(error).__name__}: {reason}); give deadcheck.apply_patch inplace=True"
        ) from error


def unshared(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy in which each path of a shared ReLU holds a module of its own, and where each path stood first.

    Weights stay shared, so the copy computes the same and its sites are those of the model.
    """
    first: dict[nn.Module, str] = {}
    origin = {p: first.setdefault(m, p) for p, m in model.named_modules(remove_duplicate=False)}
    tree = _Tree(copied(model, share=True), PatchPlan(Replacement()))
    for module, paths in list(tree.paths.items()):
        for path in paths[1:] if ceiling_of(module) is not None else ():
            parent_path, _, name = path.rpartition(".")
            tree.own_parent(parent_path)._modules[name] = copy.copy(module)
    return tree.model, origin


def _check(model: nn.Module, plan: PatchPlan) -> None:
    if not callable(getattr(model, plan.call, None)):
        raise PatchError(f"the model has no method {plan.call!r}, which the patch was made for; make it again")
    if any(change.operators for change in plan.sites):
        raise PatchError("the patch is for a TorchScript or exported program, and this is a model made of modules")
    paths = {name for name, _ in model.named_modules(remove_duplicate=False)}
    wanted = {path for change in plan.sites for path in (*change.modules, *([change.module] if change.calls else []))}
    missing = sorted(wanted - paths)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise PatchError(
            f"the model has no module {', '.join(map(repr, missing[:3]))}{more}; the patch was made for another "
            "architecture, so make it again for this one"
        )
    for change in plan.sites:
        for path in change.modules:
            module = model.get_submodule(path)
            is_script = isinstance(module, torch.jit.ScriptModule)
            if ceiling_of(module) is None and not keeps_relu(module) and not is_script:
                raise PatchError(
                    f"{path!r} is a {type(module).__name__}, not the {change.activation} that the patch replaces; was "
                    "it applied before?"
                )


class _Tree:
    """One model being changed."""

    def __init__(self, model: nn.Module, plan: PatchPlan) -> None:
        self.model = model
        self.plan = plan
        self.skipped: list[Skipped] = []
        self._like = next((t for t in model.parameters() if t.is_floating_point()), None)
        catches_all = plan.others and plan.replacement.kind is not Kind.PRELU
        self._group = Group(everywhere=Rule(plan.replacement) if catches_all else None, clipped=plan.clipped)
        self.paths: dict[nn.Module, list[str]] = {}
        """All paths of each module."""

        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, []).append(path)
        self._done: dict[str, Rule] = {}
        self._refused: set[str] = set()
        """Modules whose calls cannot be caught, as their sites already say."""

    # Modules.

    def replace(self, change: SiteChange) -> None:
        """Replace the modules of one site, or note the rule for its calls."""
        made: dict[nn.Module, nn.Module] = {}
        rule = Rule(self.plan.for_site(change), change.units)
        for path in change.modules:
            if path in self._done:  # a shared module serves several sites
                if self._done[path] != rule:
                    raise PatchError(f"{change.site}: {path!r} serves another site too, which asks for something else")
                continue
            self._done[path] = rule
            old = self.model.get_submodule(path)
            if old in made.values():  # it stands in a container that is shared too
                continue
            new = made.get(old) or self._module(old, change)
            if new is None:
                continue
            made[old] = new
            self._put(path, old, new, change.modules)
        if change.calls:
            self._add_rules(change)

    def replace_others(self) -> None:
        """Replace every ReLU that no site told of."""
        plan = self.plan
        told = {path for change in plan.sites for path in (*change.modules, change.module)}
        inside: set[nn.Module] = set()
        for module, paths in list(self.paths.items()):
            is_script = isinstance(module, torch.jit.ScriptModule) and module not in inside
            inside |= set(module.modules()) if is_script else set()
            ceiling = ceiling_of(module)
            wanted = is_script or keeps_relu(module) or (ceiling is not None and (ceiling == math.inf or plan.clipped))
            if wanted and not told.intersection(paths):
                new = self._module(module, SiteChange(paths[0], "relu", modules=tuple(paths)))
                for path in paths:
                    if new is not None:
                        self._put(path, module, new, paths)

    def _module(self, old: nn.Module, change: SiteChange) -> nn.Module | None:
        """Make what stands in for a module; None, and why is noted, where nothing can."""
        if isinstance(old, torch.jit.ScriptModule):
            return self._script(old, change)
        if isinstance(old, KEEPS_FUNCTION):
            training, old = old.training, nn.ReLU()
            old.training = training
        keeps = bool(getattr(old, "inplace", False)) and not all(self._makes_input(path) for path in change.modules)
        try:
            return module_for(old, self.plan.for_site(change), change.units, like=self._like, keeps_inplace=keeps)
        except CannotStandInError as error:
            self.skipped.append(Skipped(change.activation, change.site, str(error)))
            return None

    def _script(self, old: torch.jit.ScriptModule, change: SiteChange) -> nn.Module:
        """Return a TorchScript module with every ReLU rewritten."""
        program = Program(leave_fast_path(reread(old)))
        rule = Rule(self.plan.for_site(change), change.units)
        ceilings = {place.number: script_ceiling(node) for node, place in program.operators["forward"] if place.number}
        chosen = {
            number: rule
            for number, ceiling in ceilings.items()
            if ceiling is not None and (ceiling == math.inf or self.plan.clipped)
        }
        for reason in rewrite_script(program, chosen).values():
            self.skipped.append(Skipped(change.activation, change.site, reason))
        return program.module

    def _makes_input(self, path: str) -> bool:
        """Tell whether the input of a module is made for it alone, so that writing into it is of no effect."""
        parent_path, _, name = path.rpartition(".")
        parent = self._at(parent_path)
        names = list(parent._modules)
        before = names[names.index(name) - 1] if type(parent) is nn.Sequential and names[0] != name else None
        maker = parent._modules[before] if before is not None else None
        return maker is not None and bool(maker._parameters) and type(maker).__module__.startswith("torch.nn.modules")

    def _put(self, path: str, old: nn.Module, new: nn.Module, all_paths: Iterable[str]) -> None:
        if isinstance(old, KEEPS_FUNCTION):
            old.activation = new
            self._leave_fast_path(old)
            return
        if not path:
            self.model = new
            return
        parent_path, _, name = path.rpartition(".")
        parent = self.own_parent(parent_path) if set(self.paths[old]) - set(all_paths) else self._at(parent_path)
        parent._modules[name] = new
        if isinstance(parent, KEEPS_FUNCTION) and name == "activation":
            self._leave_fast_path(parent)

    def _at(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def own_parent(self, path: str) -> nn.Module:
        """Return the module at a path, made a copy of its own where it is shared with other paths.

        The copy has the same parameters and children: only its table of children is new.
        """
        module, done = self.model, ""
        for name in path.split(".") if path else []:
            done = f"{done}.{name}".lstrip(".")
            child = module._modules[name]
            assert child is not None
            if len(self.paths.get(child, ())) > 1:
                twin = copy.copy(child)
                twin.__dict__["_modules"] = dict(child._modules)
                self.paths[child] = [p for p in self.paths[child] if p != done]
                self.paths[twin] = [done]
                module._modules[name] = child = twin
            module = child
        return module

    def _leave_fast_path(self, layer: nn.Module) -> None:
        """Keep torch from running the layer as one fused operator, which computes a ReLU whatever stands in it."""
        vars(layer)["activation_relu_or_gelu"] = 0
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoder) and any(m is layer for m in module.modules()):
                module.use_nested_tensor = False

    # Calls.

    def _add_rules(self, change: SiteChange) -> None:
        replacement = self.plan.for_site(change)
        module = self._at(change.module)
        reason = can_substitute(module)
        if replacement.kind is Kind.PRELU:
            reason = "a learnt slope needs a module of its own, and this is a call of a function; use leaky"
        if reason is not None:
            self._refused.add(change.module)
            self.skipped.append(Skipped(change.activation, change.site, reason))
            return
        rules = self._group.modules.setdefault(change.module, {})
        assert isinstance(rules, dict)
        rule = Rule(replacement, change.units)
        for calls in change.calls:
            own = found_again(original_class(module), calls.at, change.site)
            key: Key = tuple(place.key for place in (*own, *calls.via))
            if not calls.turns:
                rules[key] = rule
                continue
            before = rules.get(key)
            turns: list[Rule | None] = list(before.rules) if isinstance(before, Turns) else [None] * calls.period
            for turn in calls.turns:
                turns[turn % len(turns)] = rule
            rules[key] = Turns(tuple(turns))

    def catch_calls(self) -> None:
        """Give the modules in whose code ReLUs are called the class that catches them."""
        group, told = self._group, set(self._group.modules)
        if any(isinstance(rule, Turns) for rules in group.modules.values() for rule in rules.values()):
            told.add("")  # turns are counted from where the model is called
        is_alike = all(rule == group.everywhere for rules in group.modules.values() for rule in rules.values())
        if is_alike and not any(change.activation in BOUNDS for change in self.plan.sites):
            group.modules.clear()  # every call is treated alike, so none need be told apart
        for path, module in list(self.model.named_modules()):
            if path in told or (group.everywhere is not None and mentions_relu(module)):
                reason = can_substitute(module)
                if reason is None:
                    entries = ("forward",) if path or self.plan.call == "forward" else ("forward", self.plan.call)
                    substitute(module, group, path, entries)
                elif path not in self._refused:
                    self.skipped.append(Skipped("relu", path, f"calls in its code were not caught: {reason}"))
