"""Judges a Hugging Face folder and the heads of safetensors files before a library opens them."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from deadcheck.errors import ModelFileError, UsageError

INDEX = "model.safetensors.index.json"
_MAX_JSON = 16 << 20
_MAX_HEADER = 16 << 20
"""Bytes of the head of a safetensors file; 100,000 tensors take half of it."""

_PATTERNS = re.compile(r"(attn|attention|experts)_implementation(_internal)?$")


def shards(path: Path) -> list[Path]:
    """Return the files of weights, which an index may name, inside the folder only."""
    files = {item.name: item for item in path.glob("*.safetensors")}
    names = sorted(files)
    if (path / INDEX).exists():
        table = read_json(path / INDEX).get("weight_map")
        named = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
        strange = [name for name in named if not re.fullmatch(r"[\w.\-]+", name)]
        if strange or not named:
            raise ModelFileError(f"{path / INDEX}: names no files of this folder; download the folder again")
        if missing := [name for name in named if name not in files]:
            raise ModelFileError(f"{path}: {len(missing)} of its files are missing ({missing[0]}); download them too")
        names = named
    if not names:
        raise ModelFileError(
            f"{path}: holds no .safetensors file; convert its weights (model.save_pretrained(..., "
            "safe_serialization=True)), or name one file with --arch"
        )
    for name in sorted(files):  # the library may choose another than the index names
        check_safetensors(files[name])
    return [files[name] for name in names]


def check_safetensors(path: Path) -> None:
    """Refuse what is no regular file, and a head that would take the memory, before the library reads it."""
    if not path.is_file():
        raise ModelFileError(f"{path}: not a regular file; save or download it again")
    try:
        with path.open("rb") as file:
            start, size = file.read(8), file.seek(0, 2)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length + 8 > size or length > _MAX_HEADER:
        raise ModelFileError(
            f"{path}: damaged safetensors (its head claims {length} bytes of {size}); save or download it again"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the table of settings that a file of the folder holds."""
    try:
        if not path.exists():
            raise UsageError(f"{path.parent}: has no {path.name}, so nothing tells how its model is built; add --arch")
        if not path.is_file():
            raise ModelFileError(f"{path}: not a regular file; download the folder again")
        if path.stat().st_size > _MAX_JSON:
            raise ModelFileError(f"{path}: takes more than {_MAX_JSON >> 20} MiB, which no such file needs; not read")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: damaged ({str(error)[:100]}); download the folder again") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: holds no table of settings; download the folder again")
    return value


def what_runs(path: Path, config: dict[str, Any]) -> str | None:
    """Say what code a folder would bring in, from itself or from a hub; None where it brings none."""
    queue: list[Any] = [config]
    while queue:
        value = queue.pop()
        if isinstance(value, list):
            queue += value
        elif isinstance(value, dict):
            queue += value.values()
            for key, item in value.items():
                if key == "auto_map":
                    return "its model is code that comes with the folder"
                if _PATTERNS.search(key) and re.search(r"[^\w-]", str(item)):
                    return f"its {key} is code from a hub"
    weights = config.get("transformers_weights")
    if weights is not None and not re.fullmatch(r"[\w\-]+(\.[\w\-]+)*\.safetensors", str(weights)):
        return "its weights are taken from a file that is no safetensors"
    if (path / "adapter_config.json").exists():
        return "it holds an adapter for another model, which would be loaded too"
    return None
