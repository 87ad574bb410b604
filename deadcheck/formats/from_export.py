"""Loads an exported program (.pt2): its archive is audited first, and torch gets nothing but what was audited."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree

from deadcheck import torch_file
from deadcheck.archive import member_bytes
from deadcheck.audit import SAMPLE, Audited, audit
from deadcheck.entrypoint import resolve
from deadcheck.errors import DeadcheckError, ModelFileError, TrustRequired, UsageError
from deadcheck.exported import mark, static_batch
from deadcheck.formats.base import LoadedModel, LoadOptions, identity_of
from deadcheck.sites import ModelIdentity


def open_export(path: Path, options: LoadOptions) -> LoadedModel:
    """Load a program that ``torch.export.save`` wrote and mark its places for the probe."""
    program, read = load_program(path, options)
    return _marked(program, identity_of(path, "pt2", read), str(path))


def open_live(program: ExportedProgram) -> LoadedModel:
    """Take a program that lives in memory; the module that is made of it is marked, not the program."""
    return _marked(program, ModelIdentity(None, None, None, "object", "object"), "the program")


def _marked(program: ExportedProgram, identity: ModelIdentity, source: str) -> LoadedModel:
    with _failures(source):
        # The checks of the inputs are Python that torch writes; the forward pass itself checks the shapes.
        module = program.module(check_guards=False)
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
        with path.open("rb") as file:
            found = audit(file, str(path))
            if found.dangers and not options.trust:
                more = f" (and {len(found.dangers) - 1} more)" if len(found.dangers) > 1 else ""
                raise TrustRequired(
                    f"{path}: {found.dangers[0]}{more}; loading it would run that; add --trust if you know where it "
                    "comes from"
                )
            file.seek(0)
            given = BytesIO(file.read()) if found.dangers else _judged_part(file, found, path)
    except (OSError, MemoryError) as error:
        raise ModelFileError(f"{path}: cannot be read ({error}); check the file") from error
    for name in found.needs:
        _require(path, name, options)
    with _failures(str(path)), _quiet("torch.export", "torch._export"), torch.sparse.check_sparse_tensor_invariants():
        return torch.export.load(given), "trusted" if found.dangers else "audited"


def _judged_part(file: BinaryIO, found: Audited, path: Path) -> BytesIO:
    """Return an archive of what was judged, written anew: nothing else in the file, and no reading of it but ours."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:

        def put(name: str, content: bytes) -> None:
            archive.writestr(f"archive/{name}", content)

        for name, content in _FIXED.items():
            put(name, content)
        for name, document in found.documents.items():
            put(name, json.dumps(document).encode())
        for name in dict.fromkeys(found.payloads()):
            put(name, member_bytes(file, str(path), found.members[name], limit=found.members[name].size))
        for name in found.pickles:
            held = BytesIO()
            data = member_bytes(file, str(path), found.members[name])
            torch.save(torch_file.loads(data, f"{path}: {name}").root, held)
            put(name, held.getvalue())
        if SAMPLE not in found.pickles:
            put(SAMPLE, b"")
    out.seek(0)
    return out


_FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"3\n"}


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


@contextmanager
def _failures(source: str) -> Iterator[None]:
    """Say in one sentence what torch could not do."""
    try:
        yield
    except DeadcheckError:
        raise
    except Exception as error:  # torch raises almost anything on a program it does not understand
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelFileError(
            f"{source}: an exported program that this torch cannot load ({text[:200]}); export it again with torch "
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
