"""Cost of a scan as a ratio to the bare forward pass, interleaved with it in one process.

    python benchmarks/overhead.py [--rounds 15] [--threads 2 1] [--json out.json]

Every round runs the bare forward, the probe, the bare forward again (the A/A control) and today's usual way, a
forward hook with ``(output == 0).float().mean`` per channel, on the same batch; a ratio is taken inside its round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from networks import NETWORKS, prepared
from torch import Tensor, nn

from deadcheck.probe import Probe

COLUMNS = ("probe", "bare again", "zero-mean hooks")


def hooked(model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Attach the hooks that people write today: the mean of zeros per channel, on activation modules."""
    rates: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        dims = [0, 2, 3] if output.dim() == 4 else list(range(output.dim() - 1))
        rates[module] = (output == 0).float().mean(dims)

    kinds = (nn.ReLU, nn.GELU)
    return [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: nn.Module, batch: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the ratio of each column to the bare forward of its round."""
    ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
    samples = 0
    with Probe(model) as probe:

        def probed() -> None:
            nonlocal samples
            with probe.batch((batch,), {}, samples=len(batch), first_sample=samples):
                model(batch)
            samples += len(batch)

        def bare() -> None:
            model(batch)

        probed(), bare()
        for _ in range(rounds):
            base = timed(bare)
            ratios["probe"].append(timed(probed) / base)
            ratios["bare again"].append(timed(bare) / base)
            handles = hooked(model)
            ratios["zero-mean hooks"].append(timed(bare) / base)
            for handle in handles:
                handle.remove()
    return ratios


def main() -> None:
    """Run the benchmark and print one row per network and thread count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--only", help="part of a network's name")
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}; ratio to the bare forward, median (min-max) of {args.rounds} rounds")
    print(f"{'network':<22}{'threads':>8}" + "".join(f"{column:>24}" for column in COLUMNS))
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name, (factory, shape) in NETWORKS.items():
            if args.only and args.only not in name:
                continue
            ratios = measure(prepared(factory), torch.randn(shape), args.rounds)
            cells = [f"{statistics.median(r):.3f} ({min(r):.2f}-{max(r):.2f})" for r in ratios.values()]
            print(f"{name:<22}{threads:>8}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
            rows.append({"network": name, "threads": threads, "ratios": ratios})
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    sys.exit(main())
