"""``deadcheck init``."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from deadcheck.commands import options
from deadcheck.errors import ExitCode, UsageError

_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
_SAMPLES = (".npz", ".pt", ".safetensors")
_MOST_MODELS, _MOST_FOLDERS = 20, 2_000
_PASSED_OVER = ("node_modules", "site-packages", "__pycache__", "venv", "build", "dist")


def init(
    force: Annotated[bool, typer.Option("--force", help="replace a deadcheck.yaml that is there")] = False,
    debug: options.Debug = False,
) -> ExitCode:
    """Write a commented deadcheck.yaml for the models in this folder."""
    from deadcheck.commands.output import write
    from deadcheck.commands.printing import print_text
    from deadcheck.config import FILE_NAME
    from deadcheck.safe_text import shown

    place = Path(FILE_NAME)
    if place.exists() and not force:
        raise UsageError(f"{FILE_NAME} is there already; --force replaces it")
    models = sorted(_models())[:_MOST_MODELS]
    write(str(place), _text(models), "configuration")
    named = ", ".join(path.as_posix() for path in models) or "no models found; name yours in it"
    print_text(f"{FILE_NAME}: {shown(named)}\nnext: deadcheck gate\n")
    return ExitCode.PASSED


def _models() -> Iterator[Path]:
    for number, (folder, folders, files) in enumerate(os.walk(".")):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _PASSED_OVER)
        if number == _MOST_FOLDERS:
            return
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix in _SUFFIXES and ".sample." not in name and not name.startswith("."):
                yield path


def _text(models: list[Path]) -> str:
    lines = [
        "# What 'deadcheck gate' judges, and what it allows.",
        "# 'deadcheck config show' lists every setting, 'deadcheck rule' every rule;",
        "# 'deadcheck schema' prints a schema for your editor.",
        "# Trust (--allow-class) is never given here, only on the command line.",
        "",
        "extends: default          # or ci-strict, ci-ratchet, transformer",
        "",
        "# A model may also say:",
        "#   data: samples.npz     # a few hundred real samples, prepared as in training",
        "#   arch: mynet.py:build  # the code that builds it, where the file holds weights",
        "#   baseline: base/{name}.json   # written by 'deadcheck baseline write'",
        "models:",
    ]
    for path in models:
        lines += _entry(path)
    if not models:
        lines.append("  # - path: models/net.pt")
    lines += [
        "",
        "policy:",
        "  # max_layer_dead: 60%   # share of a layer that may be dead; healthy nets reach 58%",
        "  max_new_dead: 5%        # with a baseline: share of a layer that may have died since",
        "  # layers:               # for some layers only, the first match holds",
        "  #   - {match: 'head.*', max_layer_dead: 30%}",
        "  # ignores:              # findings that were looked at and accepted",
        "  #   - {rule: layer-dead, layer: 'aux.*', reason: later, until: 2030-12-31}",
    ]
    return "\n".join(lines) + "\n"


def _entry(path: Path) -> list[str]:
    sample = next((s for s in (path.with_suffix(f".sample{end}") for end in _SAMPLES) if s.is_file()), None)
    data = [] if sample is None else [f"    data: {_scalar(sample.as_posix())}"]
    return [f"  - path: {_scalar(path.as_posix())}", *data]


def _scalar(text: str) -> str:
    import yaml

    return yaml.safe_dump(text, width=10_000, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
