"""Finds the user's own code by name: ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from deadcheck.errors import ArchitectureError, DeadcheckError, UsageError, first_line


def resolve(target: str) -> Any:
    """Import the object that ``package.module:name`` or ``file.py:name`` names; UsageError where it cannot be.

    Modules are found from the working directory and ``PYTHONPATH``; a file's own folder serves its siblings. The
    import path is as before afterwards.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{target!r} is not package.module:name or file.py:name; write one of these")
    module = _from_file(Path(place), target) if place.endswith(".py") else _from_module(place, target)
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            near = difflib.get_close_matches(part, [n for n in dir(value) if not n.startswith("_")], 3, 0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{target!r}: {place} has no {part!r}{hint or '; check the name'}") from error
    return value


def build(target: str, arguments: Mapping[str, object]) -> Any:
    """Call the factory or class that ``target`` names; an object that is no callable class is returned as it is."""
    value = resolve(target)
    if not callable(value) or (hasattr(value, "state_dict") and not isinstance(value, type)):
        if arguments:
            raise UsageError(f"{target!r} is an object, not a factory, so it takes no --arch-arg; leave them out")
        return value
    try:
        return value(**arguments)
    except DeadcheckError:
        raise
    except Exception as error:  # the user's factory may raise anything
        given = ", ".join(arguments) or "no arguments"
        where = _line_of(error)
        raise ArchitectureError(
            f"{target!r} called with {given} raised {type(error).__name__}: {first_line(error)}{where}; "
            "give what it needs with --arch-arg name=value"
        ) from error


def _from_file(path: Path, target: str) -> ModuleType:
    if not os.path.isfile(path):  # Path raises where a folder may not be entered
        raise UsageError(f"{target!r}: no such file {str(path)!r}; check the path (it is taken from {os.getcwd()!r})")
    resolved = path.resolve()
    # A name of its own for each file, so that two files called model.py do not stand for one another.
    name = f"_deadcheck_{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up while it runs
    try:
        with _import_path(str(resolved.parent), os.getcwd()):
            spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _import_failure(error, target) from error
    return module


def _from_module(place: str, target: str) -> ModuleType:
    try:
        with _import_path(os.getcwd()):
            return importlib.import_module(place)
    except BaseException as error:
        raise _import_failure(error, target) from error


@contextmanager
def _import_path(*folders: str) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = folders
    try:
        yield
    finally:
        sys.path[:] = before


def _import_failure(error: BaseException, target: str) -> BaseException:
    """Explain an import that failed; an interrupt stays one."""
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, ModuleNotFoundError):
        return UsageError(
            f"{target!r}: no module named {error.name!r} from {os.getcwd()!r} and PYTHONPATH; run from your project's "
            "folder, or set PYTHONPATH"
        )
    return UsageError(f"{target!r}: importing it raised {type(error).__name__}: {first_line(error)}{_line_of(error)}")


def _line_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    return f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
