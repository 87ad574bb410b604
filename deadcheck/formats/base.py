"""What every model format takes and gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from deadcheck.sites import ModelIdentity


@dataclass(frozen=True)
class LoadOptions:
    """What the user said about reading a model; trust comes from here and from nowhere else."""

    arch: str | None = None
    """Code that builds the model: ``package.module:factory`` or ``file.py:factory``."""

    arch_args: Mapping[str, object] = field(default_factory=dict)
    """Keyword arguments for the factory."""

    allow_classes: tuple[str, ...] = ()
    """Classes of the user's environment that a pickled model may use, as ``package.Net``."""

    key: str | None = None
    """Entry of a checkpoint that holds the model or its weights; dots go deeper."""

    trust: bool = False
    """Whether this file may run as a program."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run."""

    module: nn.Module
    identity: ModelIdentity
    warnings: tuple[str, ...] = ()
    """What had to be done to read it, one sentence each."""

    batch_size: int | None = None
    """Samples that one forward pass must have, where the program is fixed to that."""

    example: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    """Arguments that the file holds as an example."""


def identity_of(
    path: Path, format_name: str, read: str, *, arch: str | None = None, prefix: str | None = None
) -> ModelIdentity:
    """Return who a model file is: path, digest, size, and how it was read."""
    digest, size = hashlib.sha256(), 0
    for file in _files(path):
        if path.is_dir():
            digest.update(file.name.encode())
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
                size += len(block)
    return ModelIdentity(str(path), digest.hexdigest(), size, format_name, read, arch, prefix)


def _files(path: Path) -> list[Path]:
    """Return what a model is made of: the file, or the config and the weights in a folder."""
    if not path.is_dir():
        return [path]
    return sorted(f for f in path.iterdir() if f.suffix == ".safetensors" or f.name in FOLDER_FILES)


INDEX = "model.safetensors.index.json"
FOLDER_FILES = ("config.json", INDEX)
"""Files of a folder, beside its weights, that say what the model is."""
