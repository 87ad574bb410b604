"""Runs a model in another floating type than its own, by casting its weights or under ``torch.autocast``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from deadcheck.config import ScanSettings
from deadcheck.errors import ForwardError, UsageError, first_line
from deadcheck.preserve import preserved
from deadcheck.settings import AUTOCASTS, DTYPES


class FloatType:
    """The floating type that a scan runs a model in."""

    def __init__(self, model: nn.Module, settings: ScanSettings) -> None:
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        asked = _named("dtype", settings.dtype, DTYPES) if settings.dtype != "model" else None
        if asked is not None and _is_program(model) and asked not in (_exported_for(model), own):
            raise UsageError(
                f"the model is a program, made for numbers of its own type, and cannot be cast to {settings.dtype}; "
                "leave out --dtype, or scan the module that it was made of"
            )
        self.weights = asked or own
        """That of the weights while they run; None for a model without any."""

        self.takes = asked or _exported_for(model) or own
        """That in which inputs are given."""

        self._casts = asked
        self._device = torch.device(settings.device).type
        self._autocast = None if settings.autocast is None else _named("autocast", settings.autocast, AUTOCASTS)
        if self._autocast is not None and self.weights is torch.float64:
            raise UsageError("--autocast leaves float64 weights as they are; add --dtype float32, or leave it out")
        if self._autocast is None and _is_autocast_on(self._device):
            self._autocast = torch.get_autocast_dtype(self._device)  # the caller's own

    def __str__(self) -> str:
        weights = name_of(self.weights or torch.get_default_dtype())
        if self._autocast is None:
            return weights
        cast = f"autocast {name_of(self._autocast)}"
        return cast if weights == "float32" else f"{weights}, {cast}"

    @property
    def is_chosen(self) -> bool:
        """Whether the user chose it, and it is not just that of the model."""
        return self._casts is not None

    @contextmanager
    def cast(self, *models: nn.Module) -> Iterator[None]:
        """Run models with their weights cast; shared ones stay shared, and on leaving all have the very tensors again.

        ForwardError where a weight cannot be cast.
        """
        if self._casts is None:
            yield
            return
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(preserved(model))
            table = _table(models, self._casts)
            for module in (module for model in models for module in model.modules()):
                for held in (vars(module), *vars(module).values()):  # an RNN keeps a list of its weights too
                    _replace(held, table)
            yield

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Run under ``torch.autocast``, if that was asked for, in any thread.

        What it keeps of cast weights is neither used nor added to: the caller's may be of another type, and those of a
        scan have no gradient.
        """
        if self._autocast is None:
            yield
            return
        try:
            mode = torch.autocast(self._device, self._autocast, cache_enabled=False)
        except RuntimeError as error:
            raise UsageError(f"--autocast cannot be used on {self._device}: {first_line(error)}") from error
        if not mode._enabled:
            raise UsageError(f"--autocast {name_of(self._autocast)} cannot be used on {self._device}; choose another")
        with mode:
            yield


def _named(option: str, name: str, choices: tuple[str, ...]) -> torch.dtype:
    if name not in choices:
        raise UsageError(f"{option} {name!r} is not one of {', '.join(choices)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_of(dtype: torch.dtype | None) -> str:
    """Return a type as the user spells it."""
    return str(dtype).removeprefix("torch.")


def _is_autocast_on(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # there is none for such a device
        return False


def _table(models: tuple[nn.Module, ...], dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor]]:
    """Return by identity each floating weight and buffer of another type, and what stands in for it."""
    table: dict[int, tuple[Tensor, Tensor]] = {}
    for module in (module for model in models for module in model.modules()):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in table or not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            try:
                table[id(tensor)] = tensor, _cast(tensor, dtype)
            except Exception as error:  # a tensor of a class of its own may raise anything; or there is no room
                raise ForwardError(
                    f"the weight {name!r} of a {type(module).__name__} cannot be cast to {name_of(dtype)} "
                    f"({first_line(error)}); choose another --dtype"
                ) from error
    return table


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if is_lazy(tensor):
        kind: Any = type(tensor)
        return kind(device=tensor.device, dtype=dtype)  # type: ignore[no-any-return]
    cast = tensor.detach().to(dtype)
    return nn.Parameter(cast, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cast


def _replace(held: Any, table: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Put what stands in for tensors into a container that holds them."""
    items = held.items() if isinstance(held, dict) else enumerate(held) if isinstance(held, (list, deque)) else ()
    for place, value in list(items):
        if isinstance(value, Tensor) and id(value) in table:
            held[place] = table[id(value)][1]


def _is_program(model: nn.Module) -> bool:
    """Tell code that torch made of a model: it may have the type of the model's numbers in it."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return True
    return isinstance(model, fx.GraphModule) and any("val" in node.meta for node in model.graph.nodes)


def _exported_for(model: nn.Module) -> torch.dtype | None:
    """Return the floating type that an exported program takes, which need not be that of its weights."""
    nodes = model.graph.nodes if isinstance(model, fx.GraphModule) else ()
    given = (node.meta.get("val") for node in nodes if node.op == "placeholder")
    return next((value.dtype for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)
