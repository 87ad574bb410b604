"""Sees every call of a module in a thread: as long as any watches, ``nn.Module.__call__`` is a function that tells it.

torch's hooks on all modules see the same calls and cost more: each call then goes through the longer way of
``Module._call_impl``, is told of twice, and cannot be run in another way. ``torch.fx`` traces in this manner too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

See = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""Runs a call of a module, by ``made`` or in another way, and returns its output."""

_here = threading.local()
_lock = threading.Lock()
_users = 0
made: Callable[..., Any] = nn.Module.__call__
"""Calls a module as it is called where nobody watches."""

_TORCHS = made
_is_compiling = torch.compiler.is_compiling


@contextmanager
def seen_by(see: See) -> Iterator[None]:
    """Have ``see`` run the calls of modules in this thread."""
    before = getattr(_here, "see", None)
    _patch()
    _here.see = see
    try:
        yield
    finally:
        _here.see = before
        _unpatch()


def is_only_watcher() -> bool:
    """Tell whether a call of a module without hooks is nothing but a call of its ``forward``."""
    return made is _TORCHS


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if _is_compiling():  # torch.cond compiles what it calls, this too
        return made(module, *args, **kwargs)
    see: See | None = getattr(_here, "see", None)
    return made(module, *args, **kwargs) if see is None else see(module, args, kwargs)


def _patch() -> None:
    global _users, made
    with _lock:
        if _users == 0:
            made = nn.Module.__call__
            nn.Module.__call__ = _call  # type: ignore[method-assign]
        _users += 1


def _unpatch() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and nn.Module.__call__ is _call:  # or somebody else has put theirs around it
            nn.Module.__call__ = made  # type: ignore[method-assign]
