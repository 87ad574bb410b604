"""Which module and which parameter a tensor of a model belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deadcheck import scripted
from deadcheck.layout import Weight


def module_names(model: nn.Module) -> tuple[dict[nn.Module, str], dict[str, tuple[str, ...]]]:
    """Return each module's canonical path (the first one it is registered under) and its other paths."""
    names: dict[nn.Module, str] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    modules = model.named_modules(remove_duplicate=False)
    if isinstance(model, torch.jit.ScriptModule):
        modules = scripted.distinct(dict(modules))
    for name, module in modules:
        if module in names:
            aliases[names[module]] = (*aliases.get(names[module], ()), name)
        else:
            names[module] = name
    return names, aliases


def weights_of(
    model: nn.Module, names: Mapping[nn.Module, str]
) -> tuple[dict[int, Weight], dict[Any, Weight], dict[str, set[str]]]:
    """Return each parameter and buffer by its identity and by its memory, and the modules that hold it by its name.

    A saved program may hold a weight twice, as two tensors over the same memory.
    """
    weights: dict[int, Weight] = {}
    by_memory: dict[Any, Weight] = {}
    holders: dict[str, set[str]] = {}
    for module, path in names.items():
        owner = path.partition("parametrizations.")[0].rstrip(".") if "parametrizations." in path else path
        for table, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in table.items():
                if tensor is not None:
                    full = f"{path}.{name}" if path else name
                    size = 0 if is_lazy(tensor) else tensor.numel()
                    step = size // len(tensor) if size and tensor.dim() and len(tensor) > 1 else 0
                    weight = weights.setdefault(id(tensor), Weight(owner, full, is_parameter, size, step=step))
                    by_memory.setdefault(memory_of(tensor), weight)
                    holders.setdefault(weight.name, set()).add(owner)
    if isinstance(model, torch.jit.ScriptModule):
        for name, tensor in scripted.constants(model):
            weights.setdefault(id(tensor), Weight("", name, True, tensor.numel()))
            holders.setdefault(name, set())
    by_memory.pop(None, None)
    return weights, by_memory, holders


def memory_of(tensor: Tensor) -> tuple[int, torch.Size] | None:
    """Return where a tensor's numbers are; None for one that has no memory of its own to look at."""
    if tensor.layout is not torch.strided or tensor.is_meta or is_lazy(tensor):
        return None
    try:
        return (tensor.data_ptr(), tensor.shape) if tensor.numel() else None
    except RuntimeError:  # a wrapper, as under vmap
        return None
