"""Which module, or which part of a program, runs now, and which never did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from deadcheck import activations
from deadcheck.places import Place
from deadcheck.sites import NEVER_RAN, Skipped

_LAYER_PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2")
"""Modules with weights that the fused operator of an encoder layer runs."""


class Whereabouts:
    """Follows a forward pass from module to module, or from mark to mark of a program that is not made of them."""

    def __init__(self, names: Mapping[nn.Module, str], *, gates: bool) -> None:
        self._names = names
        self._gates = gates
        self._stack: list[nn.Module] = []
        self._path: str | None = None
        """Path of what runs; None where it has to be looked for."""
        self.place: Place | None = None
        """Where a program stands; None for a model of modules."""
        self.ran: set[str] = set()
        """Paths of the modules that ran in any pass."""

    def fork(self) -> Whereabouts:
        """Return one for another thread that runs the same model."""
        return Whereabouts(self._names, gates=self._gates)

    def start(self) -> None:
        """Begin a pass."""
        self._stack.clear()
        self._path = self.place = None

    def enter(self, module: nn.Module) -> None:
        """Note that a module begins."""
        self._stack.append(module)
        self._path = self._names.get(module) if self.place is None else None
        self.ran.add(self._names.get(module, ""))

    def leave(self) -> None:
        """Note that the module that began last ended."""
        self._stack.pop()
        self._path = None

    def go_to(self, place: Place) -> None:
        """Note where a program stands now."""
        self.place, self._path = place, None
        self.ran.add(place.path)

    @property
    def module(self) -> nn.Module | None:
        """The innermost module that runs."""
        return self._stack[-1] if self._stack else None

    @property
    def path(self) -> str:
        """Path of what runs; empty for the model itself."""
        if self._path is None:
            named = (self._names[module] for module in reversed(self._stack) if module in self._names)
            self._path = next(named, "") if self.place is None else self.place.path
        return self._path

    @property
    def is_activation(self) -> bool:
        """Whether the module that runs is an activation itself, so that its path names the site."""
        if self.place is not None:
            return self.place.is_module
        running = self.module
        if running not in self._names:  # made in a forward, as nn.ReLU()(x) is
            return False
        return isinstance(running, activations.MODULES) or (type(running) in activations.GATED and not self._gates)

    @property
    def is_gate(self) -> bool:
        """Whether an activation that runs now is a gate inside an LSTM or GRU."""
        if self.place is not None:
            return self.place.is_gate
        return any(type(module) in activations.GATED for module in self._stack)

    @contextmanager
    def inside(self, operator: str) -> Iterator[None]:
        """Stand where an operator would that is part of a fused one: an encoder layer's may be a module of its own."""
        layer = self.module
        if operator != "_transformer_encoder_layer_fwd" or not isinstance(layer, nn.TransformerEncoderLayer):
            yield
            return
        inner = [module for module in layer.children() if module is layer.activation]
        run = (*inner, *(part for name in _LAYER_PARTS for part in getattr(layer, name).modules()))
        self.ran.update(self._names[part] for part in run if part in self._names)
        self._stack += inner
        self._path = None
        try:
            yield
        finally:
            del self._stack[len(self._stack) - len(inner) :]
            self._path = None


def never_ran(model: nn.Module, names: Mapping[nn.Module, str], ran: Iterable[str]) -> Iterator[Skipped]:
    """Yield the topmost modules that hold weights or activations and are not, nor hold any of, those that ran."""
    if isinstance(model, torch.jit.ScriptModule) and not hasattr(model, "training"):
        return  # a frozen program no longer says which module its code came from
    alive = {""}
    for name in filter(None, ran):
        parts = name.split(".")
        alive.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    for module, name in names.items():
        if name in alive or name.rpartition(".")[0] not in alive:
            continue
        matters = any(isinstance(child, activations.MODULES) for child in module.modules())
        if matters or any(True for _ in module.parameters()):
            yield Skipped(type(module).__name__, name, NEVER_RAN)
