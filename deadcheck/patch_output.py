"""Writes a patched model, and checks that what lies on the disk is what was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deadcheck.errors import PatchError, UsageError
from deadcheck.patch_result import Written
from deadcheck.rewriting.base import Made, Subject
from deadcheck.rewriting.in_modules import ModuleTree
from deadcheck.stand_ins import StandIn
from deadcheck.substitute import original_class
from deadcheck.writing import write_safely

Answer = Callable[[nn.Module], list[Tensor]]
"""Runs a model on a sample of the data."""

_WEIGHTS = (".safetensors", ".npz", ".h5")


def check_kind(path: Path, subject: Subject) -> None:
    """Refuse an output that cannot hold this model, with what can."""
    if path.suffix in _WEIGHTS:
        raise UsageError(
            f"{path}: holds weights alone, and a patch leaves those as they are; the patch file says the rest "
            "(--patch-file names it), and a .pt2 holds both"
        )
    if not isinstance(subject, ModuleTree) and (path.suffix == ".pt2") != (subject.suffix == ".pt2"):
        raise UsageError(
            f"{path}: the model is {subject.kind}, and is written as one; name the output {subject.suffix}"
        )
    if isinstance(subject, ModuleTree) and path.suffix != ".pt2":
        foreign = sorted({_name(cls) for cls in map(original_class, subject.module.modules()) if not _is_found(cls)})
        if foreign:
            raise UsageError(
                f"{path}: a whole model names the class {foreign[0]}, which stands in a script where nobody who loads "
                "it finds it; write a .pt2, or the patch file alone (--patch-file) for deadcheck.apply_patch"
            )


def write_model(path: Path, subject: Subject, made: Made, answer: Answer | None) -> Written:
    """Save a patched model in the format that it came in; PatchError where what was saved is not what was made."""

    def write(temporary: Path) -> None:
        try:
            subject.save(made, temporary)
            loaded = subject.read_back(temporary)
        except OSError:
            raise
        except Exception as error:  # the model's own objects are saved, and may raise anything
            reason = (str(error).splitlines() or [""])[0]
            raise PatchError(
                f"{path}: the model cannot be saved ({type(error).__name__}: {reason}); use the patch file alone"
            ) from error
        _compare(path, made.module, loaded, answer)

    write_safely(path, write)
    return Written(str(path), subject.what, needs_of(made.module) if isinstance(subject, ModuleTree) else None)


def needs_of(model: nn.Module) -> str | None:
    """Return what loading the whole model takes besides torch; None for torch alone."""
    classes = {original_class(module) for module in model.modules()}
    own = sorted(_name(cls) for cls in classes if not cls.__module__.startswith(("torch.nn.", "deadcheck.")))
    caught = any(original_class(m) is not type(m) or isinstance(m, StandIn) for m in model.modules())
    parts = [f"the class {own[0]}" + (f" and {len(own) - 1} more" if len(own) > 1 else "")] if own else []
    parts += ["deadcheck, which catches the calls or single units that no module of torch can"] if caught else []
    return ", and ".join(parts) or None


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_found(cls: type) -> bool:
    return cls.__module__ != "__main__" and not cls.__module__.startswith("_deadcheck_") and "<" not in cls.__qualname__


def _compare(path: Path, model: nn.Module, loaded: nn.Module, answer: Answer | None) -> None:
    made, read = model.state_dict(), loaded.state_dict()
    same = made.keys() == read.keys() and all(
        not isinstance(made[name], Tensor) or _equal(made[name].cpu(), read[name]) for name in made
    )
    if same and answer is not None:
        same = all(_equal(old.cpu(), new.cpu()) for old, new in zip(answer(model), answer(loaded), strict=True))
    if not same:
        raise PatchError(f"{path}: what was saved does not load as what was made; use the patch file alone")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0.0, atol=0.0, equal_nan=True).all())
