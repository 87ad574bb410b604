"""Model formats: one file each, and one line in ``FORMATS``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deadcheck import archive
from deadcheck.formats import from_torchscript
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_folder import open_folder
from deadcheck.formats.from_pickle import open_pickle
from deadcheck.formats.from_safetensors import open_safetensors
from deadcheck.sites import ModelIdentity

__all__ = ["FORMATS", "LoadOptions", "LoadedModel", "open_live", "open_model"]


def _open_export(path: Path, options: LoadOptions) -> LoadedModel:
    from deadcheck.formats import from_export  # on demand: torch.export takes a while to import

    return from_export.open_export(path, options)


FORMATS: dict[str, Callable[[Path, LoadOptions], LoadedModel]] = {
    "torch": open_pickle,
    "safetensors": open_safetensors,
    "torchscript": from_torchscript.open_torchscript,
    "pt2": _open_export,
    "hf-dir": open_folder,
}


def open_model(path: Path, options: LoadOptions) -> LoadedModel:
    """Read a saved model without running anything that the file holds, unless ``options.trust`` says so.

    Raises ModelFileError for what is no model, TrustRequired for what would need trust, UsageError for weights without
    ``arch``, ArchitectureError for weights that do not fit it.
    """
    return FORMATS[archive.kind_of(path)](path, options)


def open_live(model: Any) -> LoadedModel:
    """Take a model that lives in memory: a module, a TorchScript program or an exported program."""
    if isinstance(model, torch.jit.ScriptModule):
        return from_torchscript.open_live(model)
    # Nobody has an exported program who has not imported this.
    exported = sys.modules.get("torch.export.exported_program")
    if exported is not None and isinstance(model, exported.ExportedProgram):
        from deadcheck.formats import from_export

        return from_export.open_live(model)
    return LoadedModel(model, ModelIdentity(None, None, None, "object", "object"))
