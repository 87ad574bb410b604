"""Loads a TorchScript program, which runs code of its own and so needs trust."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch

from deadcheck import archive
from deadcheck.errors import ModelFileError, TrustRequired, UsageError
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.scripted import Program
from deadcheck.sites import ModelIdentity


def open_torchscript(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a program that ``torch.jit.save`` wrote, scripted, traced or frozen, and mark its places for the probe."""
    program = Program(load_program(path, options))
    program.mark()
    return LoadedModel(program.module, identity_of(path, "torchscript", "trusted"))


def open_live(module: torch.jit.ScriptModule) -> LoadedModel:
    """Take a program that lives in memory: a copy of it is marked and measured."""
    buffer = BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    program = Program(torch.jit.load(buffer))
    program.mark()
    return LoadedModel(program.module, ModelIdentity(None, None, None, "object", "object"))


def load_program(path: Path, options: LoadOptions) -> torch.jit.ScriptModule:
    """Return the program as it is in the file; TrustRequired where ``options.trust`` does not allow it to run."""
    if options.arch is not None or options.key is not None:
        raise UsageError(
            f"{path}: is a TorchScript program, which brings its own code; leave out --arch, --arch-arg and --key"
        )
    archive.check_zip(path, packed="code/")
    if not options.trust:
        raise TrustRequired(
            f"{path}: is a TorchScript program, and a program can write files and run whatever it holds; "
            "add --trust if you know where it comes from"
        )
    try:
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, OSError, MemoryError, UnicodeError) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(
            f"{path}: TorchScript that cannot be loaded ({text[:200]}); save it again with this torch"
        ) from error
