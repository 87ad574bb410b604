"""All hostile files; run as ``python -m tests.hostile.corpus FOLDER`` it writes each into a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hostile import (
    bombs,
    evil_data,
    evil_folders,
    evil_modules,
    evil_pickles,
    evil_programs,
    evil_scripts,
    evil_settings,
    evil_weights,
    evil_zips,
    odd_files,
)
from tests.hostile.cases import ARCH, Case

ALL = (
    *evil_pickles.CASES,
    *evil_modules.CASES,
    *evil_zips.CASES,
    *evil_programs.CASES,
    *evil_scripts.CASES,
    *evil_weights.CASES,
    *evil_data.CASES,
    *evil_settings.CASES,
    *evil_folders.CASES,
    *odd_files.CASES,
    *bombs.CASES,
)


def named(name: str) -> Case:
    """Return the file of that name."""
    return next(case for case in ALL if case.name == name)


def write(folder: Path) -> None:
    """Write every file; the payload of each would create ``marker`` beside it."""
    for case in ALL:
        place = folder / case.name
        place.mkdir(parents=True)
        (place / "arch.py").write_text(ARCH)
        case.make(place, place / "marker")


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve())
