"""Exports a model made of modules, so that it can be patched as a program and saved without its classes."""

from __future__ import annotations

import logging
from dataclasses import replace
from io import BytesIO
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from deadcheck import exported
from deadcheck.boundary import tensors_in
from deadcheck.data import Batch
from deadcheck.errors import PatchError
from deadcheck.formats.base import LoadedModel
from deadcheck.subject import Exported


def exported_subject(loaded: LoadedModel, model: nn.Module, batch: Batch) -> Exported:
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
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    try:
        logger.disabled = True
        dynamic: Any = shapes  # which torch takes, and its annotation leaves out
        torch.export.save(torch.export.export(model, batch.args, dict(batch.kwargs), dynamic_shapes=dynamic), held)
    except Exception as error:  # the model's own code is traced, and torch raises almost anything
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise PatchError(
            f"torch cannot export this model ({text[:200]}), so no .pt2 can be written; use the patch file with "
            "deadcheck.apply_patch"
        ) from error
    finally:
        logger.disabled = before
    return held
