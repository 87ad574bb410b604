"""Runs an operator under the ``torch.autocast`` that the model called it under, which torch turns off in a mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch

_KEYS = {name: key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith("Autocast")}


@cache
def is_autocast(func: Any) -> bool:
    """Tell an operator whose inputs ``torch.autocast`` casts, and has cast before a mode sees it."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(func.name(), name) for name in _KEYS)


def as_called() -> AbstractContextManager[Any]:
    """Return the context in which an operator runs that calls others, as the model would run it."""
    try:
        with torch._C._RestorePythonTLSSnapshot():  # type: ignore[attr-defined]
            off = torch._C._dispatch_tls_local_exclude_set()
    except RuntimeError:  # some operators that call functions reach a mode without its handler, and nothing is off
        return nullcontext()
    here = torch._C._dispatch_tls_local_exclude_set()
    for key in _KEYS.values():
        if not off.has(key):
            here = here.remove(key)
    guard: AbstractContextManager[Any] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), here
    )
    return guard
