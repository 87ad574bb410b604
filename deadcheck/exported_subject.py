"""Exported programs as what is patched; a model made of modules can be exported to become one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from deadcheck import exported, rewrite_export
from deadcheck.boundary import tensors_in
from deadcheck.data import Batch
from deadcheck.errors import PatchError
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_export import load_program
from deadcheck.plan import PatchPlan
from deadcheck.subject import Made, ProgramSubject, all_or_none, rules_of, skipped_sites


class Exported(ProgramSubject):
    """An exported program; ``read`` gives it anew."""

    kind, what, suffix = "an exported program", "the patched program", ".pt2"
    _function_of = staticmethod(rewrite_export.function_of)

    def save(self, made: Made, path: Path) -> None:
        """Write the program."""
        torch.export.save(made.product, str(path))

    def read_back(self, path: Path) -> nn.Module:
        """Load the program."""
        return torch.export.load(str(path)).module()

    def __init__(self, loaded: LoadedModel, read: Callable[[], ExportedProgram]) -> None:
        super().__init__(loaded, loaded.module)
        self._read = read

    def made(self, plan: PatchPlan) -> Made:
        """Return the program with its operators replaced, and the module that runs it, with marks."""
        program = self._read()
        skipped = rewrite_export.rewrite_export(program, rules_of(plan))
        module = program.module()
        exported.mark(module)
        return Made(module, program, skipped_sites(plan, skipped))


def from_file(loaded: LoadedModel, path: Path, options: LoadOptions) -> Exported:
    """Return a saved program as what is patched."""
    return Exported(loaded, lambda: load_program(path, options)[0])


def patched_export(program: ExportedProgram, plan: PatchPlan) -> ExportedProgram:
    """Return an exported program with a patch applied; the one given stays as it is."""
    held = BytesIO()
    torch.export.save(program, held)
    held.seek(0)
    copy = torch.export.load(held)
    all_or_none(skipped_sites(plan, rewrite_export.rewrite_export(copy, rules_of(plan))))
    return copy


def exported_from(loaded: LoadedModel, model: nn.Module, batch: Batch) -> Exported:
    """Export a model in eval mode on one batch, for any number of samples where that is possible.

    PatchError where torch cannot export it, as for branches that depend on the data.
    """
    held = _exported(model, batch)

    def read() -> ExportedProgram:
        held.seek(0)
        return torch.export.load(held)

    program = read()
    module = program.module()
    exported.mark(module)
    fixed = exported.static_batch(program)
    return Exported(replace(loaded, module=module, batch_size=fixed, example=None), read)


def _exported(model: nn.Module, batch: Batch) -> BytesIO:
    held = BytesIO()
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for _, tensor in tensors_in([batch.args, dict(batch.kwargs)]):
        if tensor.dim() and tensor.shape[0] == batch.samples:
            shapes[tensor] = {0: Dim.AUTO}  # type: ignore[no-untyped-call]
    # By position as far as that goes: a program takes its arguments as they were given when it was exported.
    given = inspect.signature(model.forward).bind(*batch.args, **batch.kwargs)
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True
        dynamic: Any = shapes  # which torch takes, and its annotation leaves out
        torch.export.save(torch.export.export(model, given.args, given.kwargs, dynamic_shapes=dynamic), held)
    except Exception as error:  # the model's own code is traced, and torch raises almost anything
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PatchError(
            f"torch cannot export this model ({text[:200]}), so no .pt2 can be written; use the patch file with "
            "deadcheck.apply_patch"
        ) from error
    finally:
        logger.disabled = before
    return held
