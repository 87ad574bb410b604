"""Cost of one more batch of a scan as a ratio to the bare forward pass of the same batch, right before and after it.

    python benchmarks/steady.py [--batches 60] [--threads 2 1] [--only ResNet] [--json out.json]

What a machine does beside lasts longer than a batch as a rule and meets both, so that this resolves more than whole
scans do (``overhead.py``). What a scan does once is not in it: its set-up and its first batches. Batches run one at a
time, inside one scan for each column; ``bare`` is the bare pass again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest import mock

import torch
from networks import NETWORKS, Form
from overhead import hooked
from timing import options, seconds, table, write
from torch import Tensor, nn

from deadcheck import kernel
from deadcheck.probe import Probe

Run = Callable[[Tensor], float]
"""Runs a batch and returns the seconds that it took."""

WARM = 5
"""Batches that every column runs before, in which a scan learns what a pass does."""


def scanned(model: nn.Module, level: str) -> Run:
    """Return what runs one more batch of a scan that measures so much; only the first enters the probe in a scan."""
    probe, done = Probe(model, stats=level), 0

    def one_more(batch: Tensor) -> None:
        with probe.batch((batch,), {}, samples=len(batch), first_sample=done):
            model(batch)

    def run(batch: Tensor) -> float:
        nonlocal done
        with probe:
            spent = seconds(partial(one_more, batch))
        done += len(batch)
        return spent

    return run


def mean_hooked(model: nn.Module, batch: Tensor) -> float:
    """Run a batch with hooks that take the mean of zeros per channel."""
    rates: list[Tensor] = []

    def see(module: nn.Module, output: Tensor) -> None:
        dims = [0, 2, 3] if output.dim() == 4 else list(range(output.dim() - 1))
        rates.append((output == 0).float().mean(dims))

    with hooked(model, see):
        return bare(model, batch)


def bare(model: nn.Module, batch: Tensor) -> float:
    """Run a batch, and nothing else."""
    with torch.no_grad():
        return seconds(partial(model, batch))


def measured(name: str, batches: int) -> dict[str, object]:
    """Return the ratios of every column, one for each batch."""
    network = NETWORKS[name]
    model, data = network.program(), network.data(4 * network.batch).split(network.batch)

    columns: dict[str, Run] = {
        "scan": scanned(model, "full"),
        "scan, counts": scanned(model, "counts"),
        "scan, verdict": scanned(model, "verdict"),
        "zero-mean hooks": partial(mean_hooked, model),
        "bare": partial(bare, model),
    }
    ratios: dict[str, list[float]] = {column: [] for column in columns}
    base: list[float] = []
    for number in range(WARM + batches):
        batch = data[number % len(data)]
        before = bare(model, batch)
        for column, run in columns.items():
            spent, after = run(batch), bare(model, batch)
            if number >= WARM:
                ratios[column].append(2 * spent / (before + after))
                base.append(after)
            before = after
    return {
        "network": name, "threads": torch.get_num_threads(), "batch": network.batch,
        "bare_seconds": statistics.median(base), "ratios": ratios,
    }  # fmt: skip


def middle(values: list[float]) -> str:
    """Write the median with the quartiles."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{median:.3f} ({low:.2f}-{high:.2f})"


def main() -> None:
    """Run the benchmark, print one row per network and thread count, and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--batches", type=int, default=60, help="batches that are measured [default: 60]")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="torch's threads [default: 2 1]")
    parser.add_argument("--only", default="", help="a network, or part of the names of some")
    parser.add_argument("--without-kernel", action="store_true", help="count with torch alone")
    args = parser.parse_args()
    modules = [name for name in NETWORKS if NETWORKS[name].form is Form.MODULE]  # a scan copies a program, and marks it
    names = [name for name in modules if args.only in name]
    if not names:
        parser.error(f"no network has {args.only!r} in its name; there are: {', '.join(modules)}")
    found = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        with mock.patch.object(kernel, "is_built", return_value=False) if args.without_kernel else nullcontext():
            found += [measured(name, args.batches) for name in names]
    rows = [["network", "threads", "bare, ms", *found[0]["ratios"]]]
    for one in found:
        cells = [middle(ratios) for ratios in one["ratios"].values()]
        rows.append([one["network"], str(one["threads"]), f"{1000 * one['bare_seconds']:.1f}", *cells])
    print(f"Ratio to the bare passes around it, median (quartiles) of {args.batches} batches\n\n{table(rows)}")
    write(args.json, without_kernel=args.without_kernel, rows=found)


if __name__ == "__main__":
    main()
