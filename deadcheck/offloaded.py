"""Models whose weights accelerate keeps elsewhere and brings in for each call, in place of tensors without numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deadcheck.errors import UsageError, first_line

Tell = Callable[[Tensor, Tensor], None]
"""Called with the tensor that stands for a weight between the calls, and the one that was brought in."""


@contextmanager
def told(model: nn.Module, tell: Tell) -> Iterator[None]:
    """Tell each time which weights accelerate has brought in, before the module that they are of runs."""
    hooked = [module for module in model.modules() if "_hf_hook" in vars(module) and "_old_forward" in vars(module)]
    before = [(module, vars(module)["_old_forward"]) for module in hooked]
    for module, forward in before:
        vars(module)["_old_forward"] = _telling(module, forward, tell)
    try:
        yield
    finally:
        for module, forward in before:
            vars(module)["_old_forward"] = forward


def _telling(module: nn.Module, forward: Callable[..., Any], tell: Tell) -> Callable[..., Any]:
    absent = [
        (table, name, tensor)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, tensor in table.items()
        if tensor is not None and tensor.is_meta
    ]

    def told_forward(*args: Any, **kwargs: Any) -> Any:
        for table, name, tensor in absent:
            brought = table.get(name)
            if brought is not None and not brought.is_meta:
                tell(tensor, brought)
        return forward(*args, **kwargs)

    return told_forward


def spread(model: nn.Module, how: str, limits: Sequence[tuple[str, str]], folder: str) -> None:
    """Have accelerate spread a model over the devices; what fits on none of them goes to a folder.

    UsageError where it is not installed, or cannot.
    """
    try:
        import accelerate
    except ImportError as error:
        raise UsageError("--device-map needs accelerate; install torch-deadcheck[big]") from error
    log = logging.getLogger("accelerate")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells at length what was asked of it
        memory = {int(device) if device.isdecimal() else device: size for device, size in limits} or None
        if how == "auto":
            memory = accelerate.utils.get_balanced_memory(model, memory)
        whole = list(getattr(model, "_no_split_modules", None) or [])
        places = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=whole, offload_buffers=True)
        if dict(places) == {"": "disk"}:  # which it cannot dispatch
            accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"), offload_buffers=True)
        else:
            accelerate.dispatch_model(model, places, offload_dir=folder, offload_buffers=True)
    except Exception as error:  # the library raises almost anything, on models and on sizes
        raise UsageError(
            f"accelerate cannot spread the model ({first_line(error)}); change --max-memory or --device-map"
        ) from error
    finally:
        log.setLevel(level)


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a live model runs: that of accelerate's first hook, or of its first tensor."""
    for part in module.modules():
        hook = vars(part).get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensor = next((tensor for tensor in (*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
