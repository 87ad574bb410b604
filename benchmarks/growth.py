"""How the time of a scan grows with samples, layers and width, and that of the bare loop beside it.

    python benchmarks/growth.py [--rounds 5] [--only layers] [--threads 1] [--json out.json]

Runs MLPs in batches of 64, every size in turn in each round: the bare loop and the whole of ``deadcheck.scan``, of all
batches and of one. What a scan of one batch takes above the bare loop of one batch is its set-up, and is taken off. The
slope is p of ``seconds = c * size ** p``, fitted by least squares of the logarithms: 1 is growth in step with the size,
and a constant part makes it less. It is fitted to the medians, and to the least of all rounds, which other work on the
machine moves less. In width, a bare loop grows with the square and the counting in step. From 96 batches on a scan
with two threads or more may run two batches at a time, as it does for a user.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from timing import interleaved, options, seconds, slope, spread, table, write
from torch import Tensor, nn

import deadcheck

BATCH = 64


@dataclass(frozen=True)
class Shape:
    """An MLP and its data."""

    samples: int = 2048
    layers: int = 8
    width: int = 512

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the model and the data, the same each time."""
        torch.manual_seed(0)
        layers = [m for _ in range(self.layers) for m in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*layers).eval(), torch.randn(self.samples, self.width)


AXES: dict[str, tuple[Callable[[int], Shape], list[int]]] = {
    "samples": (lambda size: Shape(samples=size), [512, 1024, 2048, 4096, 8192, 16384]),
    "layers": (lambda size: Shape(layers=size), [2, 4, 8, 16, 32, 64]),
    "width": (lambda size: Shape(width=size, samples=1024, layers=4), [256, 512, 1024, 2048, 4096]),
}
"""What grows -> (the shape of a size, sizes)."""


@torch.no_grad()
def bare(model: nn.Module, data: Tensor) -> None:
    """Run every batch, and nothing else."""
    for batch in data.split(BATCH):
        model(batch)


def scan(model: nn.Module, data: Tensor) -> None:
    """Scan as a user does."""
    deadcheck.scan(model, data, batch_size=BATCH)


def clocks(shape: Shape) -> dict[str, Callable[[], float]]:
    """Return a clock for each part of a row."""
    model, data = shape.build()
    works = {"bare": (bare, data), "scan": (scan, data), "bare 1": (bare, data[:BATCH]), "scan 1": (scan, data[:BATCH])}
    return {name: partial(seconds, partial(work, model, part)) for name, (work, part) in works.items()}


def measured(sizes: dict[int, Shape], rounds: int) -> dict[str, object]:
    """Return seconds by size, and the slopes."""
    every = {(size, part): clock for size, shape in sizes.items() for part, clock in clocks(shape).items()}
    taken = interleaved(every, rounds)
    found = []
    for size in sizes:
        whole, bare_loop, one, bare_one = (taken[size, part] for part in ("scan", "bare", "scan 1", "bare 1"))
        set_up = [a - b for a, b in zip(one, bare_one, strict=True)]
        rest = [a - b for a, b in zip(whole, set_up, strict=True)]
        least = {"bare": min(bare_loop), "scan": min(whole) - (min(one) - min(bare_one))}
        found.append({"size": size, "bare": bare_loop, "scan": rest, "set_up": set_up, "least": least})
    slopes = {
        part: {
            "median": slope(list(sizes), [statistics.median(row[part]) for row in found]),
            "least": slope(list(sizes), [row["least"][part] for row in found]),
        }
        for part in ("bare", "scan")
    }
    return {"rows": found, "slopes": slopes}


def main() -> None:
    """Run the benchmark, print a table for what grows, and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are measured [default: 5]")
    parser.add_argument("--only", choices=AXES, help="only what grows like this")
    parser.add_argument("--sizes", type=int, nargs="+", help="with --only: these sizes instead of its own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads [default: all]")
    args = parser.parse_args()
    if args.sizes and (not args.only or len(set(args.sizes)) < 2 or min(args.sizes) < 1):
        parser.error("--sizes takes two or more different sizes above 0, and needs --only")
    torch.set_num_threads(args.threads)
    found = {}
    for axis, (shaped, own) in AXES.items():
        if args.only not in (None, axis):
            continue
        found[axis] = measured({size: shaped(size) for size in args.sizes or own}, args.rounds)
        rows = [[axis, "bare loop, s", "scan less set-up, s", "set-up, s", "ratio"]]
        for row in found[axis]["rows"]:
            ratio = statistics.median(row["scan"]) / statistics.median(row["bare"])
            rows.append([f"{row['size']:,}", *(spread(row[k], 3) for k in ("bare", "scan", "set_up")), f"{ratio:.2f}"])
        bare_loop, scanned = (found[axis]["slopes"][part] for part in ("bare", "scan"))
        print(
            f"{table(rows)}\n\n"
            f"slope of the medians: bare loop {bare_loop['median']:.2f}, scan {scanned['median']:.2f}; "
            f"of the least: {bare_loop['least']:.2f} and {scanned['least']:.2f}\n",
            flush=True,
        )
    assert "torch._dynamo" not in sys.modules, "a scan must not load the compiler"
    write(args.json, batch=BATCH, axes=found)


if __name__ == "__main__":
    main()
