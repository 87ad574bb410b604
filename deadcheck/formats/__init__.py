"""Model formats: one file each, and one line in ``FORMATS``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deadcheck import archive
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_export import open_export
from deadcheck.formats.from_folder import open_folder
from deadcheck.formats.from_pickle import open_pickle
from deadcheck.formats.from_safetensors import open_safetensors
from deadcheck.formats.from_torchscript import open_torchscript

__all__ = ["FORMATS", "LoadOptions", "LoadedModel", "open_model"]

FORMATS: dict[str, Callable[[Path, LoadOptions], LoadedModel]] = {
    "torch": open_pickle,
    "safetensors": open_safetensors,
    "torchscript": open_torchscript,
    "pt2": open_export,
    "hf-dir": open_folder,
}


def open_model(path: Path, options: LoadOptions) -> LoadedModel:
    """Read a saved model without running anything that the file holds, unless ``options.trust`` says so.

    Raises ModelFileError for what is no model, TrustRequired for what would need trust, UsageError for weights without
    ``arch``, ArchitectureError for weights that do not fit it.
    """
    return FORMATS[archive.kind_of(path)](path, options)
