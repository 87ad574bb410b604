"""Cost of a scan as a ratio to the bare forward passes, interleaved with them in one process.

    python benchmarks/overhead.py [--rounds 15] [--batches 32] [--threads 2 1] [--only ResNet] [--json out.json]

Every round runs every column on the same batches, and a ratio is taken inside its round, to a bare loop of forward
passes on the same number of threads. A scan is the whole of ``deadcheck.scan``: set-up, counting, the last merge.
``bare, two at a time`` is a bare loop with the scan's own way to use the threads, and ``bare again`` is the noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest import mock

import torch
from networks import NETWORKS, prepared
from torch import Tensor, nn

import deadcheck
from deadcheck import kernel, passes

Work = Callable[[nn.Module, Tensor, int], object]


@torch.no_grad()
def bare(model: nn.Module, data: Tensor, size: int) -> None:
    """Run every batch, and nothing else."""
    for batch in data.split(size):
        model(batch)


def two_at_a_time(model: nn.Module, data: Tensor, size: int) -> None:
    """Run every batch, two at a time on half the threads each."""
    half = max(torch.get_num_threads() // 2, 1)

    @torch.no_grad()
    def run(batch: Tensor) -> None:
        torch.set_num_threads(half)
        model(batch)

    with passes.threads_of(torch.get_num_threads()), ThreadPoolExecutor(2) as pool:
        list(pool.map(run, data.split(size)))


def scan(model: nn.Module, data: Tensor, size: int) -> None:
    """Scan as a user does."""
    deadcheck.scan(model, data, batch_size=size)


def scan_alone(model: nn.Module, data: Tensor, size: int) -> None:
    """Scan one batch at a time."""
    with mock.patch.object(passes, "LONG", sys.maxsize):
        scan(model, data, size)


def scan_torch(model: nn.Module, data: Tensor, size: int) -> None:
    """Scan without the compiled kernel."""
    with mock.patch.object(kernel, "is_built", return_value=False):
        scan(model, data, size)


@contextmanager
def hooked(model: nn.Module, see: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Watch the outputs of activation modules, as people do today."""
    kinds = (nn.ReLU, nn.ReLU6, nn.GELU)
    modules = [module for module in model.modules() if isinstance(module, kinds)]
    handles = [m.register_forward_hook(lambda module, args, output: see(module, output)) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_hooks(model: nn.Module, data: Tensor, size: int) -> None:
    """Keep the mean of zeros per channel."""
    rates: dict[nn.Module, list[Tensor]] = {}

    def see(module: nn.Module, output: Tensor) -> None:
        dims = [0, 2, 3] if output.dim() == 4 else list(range(output.dim() - 1))
        rates.setdefault(module, []).append((output == 0).float().mean(dims))

    with hooked(model, see):
        bare(model, data, size)


def storing_hooks(model: nn.Module, data: Tensor, size: int) -> None:
    """Keep every activation of a batch, and count its zeros after it."""
    held: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, output: Tensor) -> None:
        held[module] = output.detach().clone()

    with hooked(model, see):
        for batch in data.split(size):
            bare(model, batch, size)
            for output in held.values():
                (output == 0).flatten(1).sum(0)


COLUMNS: dict[str, Work] = {
    "scan": scan,
    "scan, one at a time": scan_alone,
    "scan, torch alone": scan_torch,
    "bare again": bare,
    "bare, two at a time": two_at_a_time,
    "zero-mean hooks": mean_hooks,
    "storing hooks": storing_hooks,
}


def timed(work: Work, model: nn.Module, data: Tensor, size: int) -> float:
    """Return the seconds that a column takes."""
    start = time.perf_counter()
    work(model, data, size)
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print one row per network and thread count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--only", help="part of a network's name")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    rows = []
    print(
        f"torch {torch.__version__}; ratio to a bare loop of {args.batches} batches, median (min-max) of {args.rounds}"
    )
    print(f"{'network':<22}{'threads':>8}" + "".join(f"{column:>22}" for column in args.columns))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, (factory, shape) in NETWORKS.items():
            if args.only and args.only not in name:
                continue
            model, data = prepared(factory), torch.randn(args.batches * shape[0], *shape[1:])
            ratios: dict[str, list[float]] = {column: [] for column in args.columns}
            for number in range(args.rounds + 1):
                base = timed(bare, model, data, shape[0])
                for column in args.columns:
                    ratio = timed(COLUMNS[column], model, data, shape[0]) / base
                    if number:  # the first round warms up
                        ratios[column].append(ratio)
            cells = [f"{statistics.median(r):.3f} ({min(r):.2f}-{max(r):.2f})" for r in ratios.values()]
            print(f"{name:<22}{threads:>8}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
            rows.append({"network": name, "threads": threads, "ratios": ratios})
    assert "torch._dynamo" not in sys.modules, "a scan must not load the compiler"
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
