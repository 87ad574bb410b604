"""Says what a model file holds and names, what is wrong with it and how to scan it; runs nothing, needs no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from deadcheck import archive
from deadcheck.errors import DeadcheckError, TrustRequired
from deadcheck.inspectors import INSPECTORS
from deadcheck.inspectors.base import Found, Inspection, TensorInfo
from deadcheck.sample import sample_beside

__all__ = ["Inspection", "TensorInfo", "inspect"]

_WRAPPERS = ("module.", "_orig_mod.")


def inspect(path: Path) -> Inspection:
    """Look at a model file; ModelFileError for what is no model, with what it is and what to do with it."""
    kind = archive.kind_of(path)
    found = Found()
    words, look = INSPECTORS[kind]
    try:
        look(path, found)
    except DeadcheckError as error:
        found.kind, found.what = found.kind or kind, found.what or words
        found.problems.append(str(error).removeprefix(f"{path}: "))
        found.refused = found.refused or isinstance(error, TrustRequired)
        found.is_hopeless = True
    except OSError as error:
        raise archive.unreadable(path, error) from error
    sample = sample_beside(path)
    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file()) if path.is_dir() else path.stat().st_size
    return Inspection(
        path=str(path),
        bytes=size,
        kind=found.kind,
        what=found.what,
        tensors=tuple(found.tensors),
        classes=tuple(sorted(found.classes.items())),
        names=tuple(sorted(found.names - set(found.classes))),
        activations=tuple(found.activations),
        entries=tuple(found.entries),
        prefix=_prefix([tensor.name for tensor in found.tensors]),
        sample=None if sample is None else str(sample),
        problems=tuple(found.problems),
        refused=found.refused,
        next=_next(path, found, has_sample=found.has_sample or sample is not None),
    )


def _next(path: Path, found: Found, *, has_sample: bool) -> str:
    if found.is_hopeless or (found.problems and not found.flags):
        return ""
    data = [] if has_sample else ["--data DATA"]
    name = f"./{path}" if str(path).startswith("-") else str(path)  # or it would be taken for an option
    return " ".join(["deadcheck scan", shlex.quote(name), *found.flags, *data])


def _prefix(names: list[str]) -> str | None:
    for prefix in _WRAPPERS:
        if names and all(name.startswith(prefix) for name in names):
            return prefix
    return "_orig_mod." if any("_orig_mod." in name for name in names) else None
