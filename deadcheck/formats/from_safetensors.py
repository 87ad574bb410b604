"""Reads weights from a safetensors file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deadcheck.errors import ModelFileError, first_line
from deadcheck.folder import check_safetensors
from deadcheck.formats.base import LoadedModel, LoadOptions
from deadcheck.formats.from_state_dict import load_weights


def open_safetensors(path: Path, options: LoadOptions) -> LoadedModel:
    """Read the weights and load them into the model that ``--arch`` builds."""
    return load_weights(path, read_safetensors(path), options, "safetensors")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; ModelFileError where it is damaged."""
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise ModelFileError(
            f"{path}: damaged safetensors ({first_line(error)}); save or download the model again"
        ) from error
