"""Looks at safetensors files and at Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deadcheck import folder
from deadcheck.errors import ModelFileError
from deadcheck.inspectors.base import Found, TensorInfo

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
          "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


def look_at_safetensors(path: Path, found: Found) -> None:
    """Say which tensors a safetensors file holds."""
    found.kind, found.what = "safetensors", "safetensors: weights without the code that runs them"
    found.flags.append("--arch FILE.py:FACTORY")
    found.tensors = list(_header(path))


def _header(path: Path) -> Iterator[TensorInfo]:
    from safetensors import SafetensorError, safe_open

    folder.check_safetensors(path)
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                yield TensorInfo(name, _TYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{path}: damaged safetensors ({str(error)[:200]}); download the model again") from error


def look_at_folder(path: Path, found: Found) -> None:
    """Say what a Hugging Face folder holds, from its config and the heads of its weights."""
    found.kind, found.what = "hf-dir", "a Hugging Face folder"
    for shard in folder.shards(path):
        found.tensors += _header(shard)
    if not (path / "config.json").exists():
        found.flags.append("--arch FILE.py:FACTORY")
        return
    config: dict[str, Any] = folder.read_json(path / "config.json")
    found.what += f" ({config.get('model_type', 'of an unnamed type')})"
    names = config.get("architectures")
    found.names = {str(name) for name in names} if isinstance(names, list) else set()
    if act := config.get("hidden_act") or config.get("activation_function"):
        found.activations.append(("", str(act)))
    if problem := folder.what_runs(path, config):
        found.refused = True
        found.problems.append(problem)
        found.flags.append("--arch FILE.py:FACTORY")
