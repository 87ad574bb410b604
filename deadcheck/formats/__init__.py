"""Model formats, told apart by a file's first bytes."""

from __future__ import annotations

from pathlib import Path

from deadcheck.errors import ModelFileError
from deadcheck.formats import archive
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_pickle import open_pickle
from deadcheck.formats.from_safetensors import open_safetensors

__all__ = ["LoadOptions", "LoadedModel", "open_model"]


def open_model(path: Path, options: LoadOptions) -> LoadedModel:
    """Read a saved model without running anything that the file holds.

    Raises ModelFileError for what is no model, TrustRequired for what would need trust, UsageError for weights without
    ``arch``, ArchitectureError for weights that do not fit it.
    """
    start = archive.first_bytes(path)
    if start.startswith(b"PK"):
        return open_pickle(path, options, is_zip=True)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return open_safetensors(path, options)
    if not archive.is_pickle(path):
        archive.refuse_other_kinds(path, start)
        raise ModelFileError(f"{path}: damaged, or no kind of model that is known; save or download the model again")
    return open_pickle(path, options, is_zip=False)
