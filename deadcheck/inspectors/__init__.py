"""Looking at a model file, by its kind; nothing of it is built or run."""

from collections.abc import Callable
from pathlib import Path

from deadcheck.inspectors.base import Found, Inspection, TensorInfo
from deadcheck.inspectors.of_programs import look_at_export, look_at_torchscript
from deadcheck.inspectors.of_saved import look_at_saved
from deadcheck.inspectors.of_weights import look_at_folder, look_at_safetensors

__all__ = ["INSPECTORS", "Found", "Inspection", "TensorInfo"]

INSPECTORS: dict[str, tuple[str, Callable[[Path, Found], None]]] = {
    "torch": ("a file of torch.save", look_at_saved),
    "torchscript": ("a TorchScript program", look_at_torchscript),
    "pt2": ("an exported program", look_at_export),
    "safetensors": ("safetensors", look_at_safetensors),
    "hf-dir": ("a Hugging Face folder", look_at_folder),
}
"""Kind, as ``archive.kind_of`` tells it -> what to call a file of it that cannot be read, and who looks at it."""
