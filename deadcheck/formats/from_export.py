"""Loads an exported program (.pt2): its archive is audited first, and the bytes audited are the bytes loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree

from deadcheck.audit import audit
from deadcheck.entrypoint import resolve
from deadcheck.errors import ModelFileError, TrustRequired, UsageError
from deadcheck.exported import mark, static_batch
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.sites import ModelIdentity


def open_export(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a program that ``torch.export.save`` wrote and mark its places for the probe."""
    program, read = load_program(path, options)
    return _marked(program, identity_of(path, "pt2", read))


def open_live(program: ExportedProgram) -> LoadedModel:
    """Take a program that lives in memory; the module that is made of it is marked, not the program."""
    return _marked(program, ModelIdentity(None, None, None, "object", "object"))


def _marked(program: ExportedProgram, identity: ModelIdentity) -> LoadedModel:
    module = program.module()
    mark(module)
    return LoadedModel(module, identity, batch_size=static_batch(program), example=program.example_inputs)


def load_program(path: Path, options: LoadOptions) -> tuple[ExportedProgram, str]:
    """Return the program of an archive, and how it was read: ``audited`` or ``trusted``.

    TrustRequired where the audit found what would run code of the file and ``options.trust`` does not allow that.
    """
    if options.arch is not None or options.key is not None:
        raise UsageError(
            f"{path}: is an exported program, which brings its own code; leave out --arch, --arch-arg and --key"
        )
    try:
        file = BytesIO(path.read_bytes())
    except (OSError, MemoryError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error}); check the file") from error
    found = audit(file, str(path))
    if found.dangers and not options.trust:
        more = f" (and {len(found.dangers) - 1} more)" if len(found.dangers) > 1 else ""
        raise TrustRequired(
            f"{path}: {found.dangers[0]}{more}; loading it would run that; add --trust if you know where it comes from"
        )
    for name in found.needs:
        _require(path, name, options)
    file.seek(0)
    return _loaded(path, file), "trusted" if found.dangers else "audited"


def _require(path: Path, name: str, options: LoadOptions) -> None:
    """Import a class that the inputs or outputs are made of, if the user allows it."""
    if name in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        return
    if name not in options.allow_classes and not options.trust:
        raise TrustRequired(
            f"{path}: its inputs or outputs are made of {name}, a class of {name.partition('.')[0]}; "
            f"to import it, add --allow-class {name}"
        )
    module, _, attribute = name.rpartition(".")
    resolve(f"{module}:{attribute}")


def _loaded(path: Path, file: BytesIO) -> ExportedProgram:
    try:
        with _quiet("torch.export", "torch._export"), torch.sparse.check_sparse_tensor_invariants():
            return torch.export.load(file)
    except Exception as error:  # torch raises almost anything on a program it does not understand
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(
            f"{path}: an exported program that this torch cannot load ({text[:200]}); export it again with torch "
            f"{torch.__version__.partition('+')[0]}"
        ) from error


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Keep torch from logging a traceback of what is reported as one sentence."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
