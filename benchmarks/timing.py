"""What the benchmarks share: works timed in turn, a fitted slope, tables and the file of figures."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

K = TypeVar("K")

ROOT = Path(__file__).parent.parent


def options(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every figure to this file")
    return parser


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that a work takes by the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(clocks: Mapping[K, Callable[[], float]], rounds: int, *, warm: int = 1) -> dict[K, list[float]]:
    """Ask every clock in turn, round by round, so that what else the machine does meets all.

    A clock does some work and returns its seconds. The first ``warm`` rounds come on top, and are forgotten.
    """
    taken: dict[K, list[float]] = {name: [] for name in clocks}
    for number in range(warm + rounds):
        for name, clock in clocks.items():
            spent = clock()
            if number >= warm:
                taken[name].append(spent)
    return taken


def ratios(taken: Sequence[float], base: Sequence[float]) -> list[float]:
    """Divide what was measured by what was measured in the same round."""
    return [one / other for one, other in zip(taken, base, strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    """Write the median with the least and the largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def slope(sizes: Sequence[float], taken: Sequence[float]) -> float:
    """Return p of ``seconds = c * size ** p`` that fits best: least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(spent) for spent in taken]
    return statistics.linear_regression(x, y).slope


RESOLVED = 0.03
"""Share by which something may differ from itself before it is said that less is not resolved."""


def unresolved(again: Sequence[float]) -> float | None:
    """Return by how much something moved against itself, given those ratios; None where that is little."""
    moved = max((abs(ratio - 1) for ratio in again), default=0.0)
    return moved if moved > RESOLVED else None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows as Markdown; the first one is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [list(rows[0]), ["-" * width for width in widths], *map(list, rows[1:])]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def machine() -> dict[str, object]:
    """Return what the figures depend on."""
    torch = sys.modules.get("torch")
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def write(path: Path | None, **figures: object) -> None:
    """Write the figures to the file, where one was named."""
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n", encoding="utf-8")


def peak() -> float:
    """Return the most memory that this process ever held, in MiB.

    ``VmHWM`` begins anew with a program, where ``ru_maxrss`` keeps what the process that started it had.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status: peak memory can be measured on Linux only")
