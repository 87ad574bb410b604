"""Peak memory of a scan over that of the bare forward passes, against the number of samples.

    python benchmarks/memory.py [--samples 64 1024 16384]

Each figure is the peak resident memory of a process of its own, in MiB. Data comes from a generator, so that it is no
part of the growth.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator

import torch
from networks import mlp, prepared, resnet18
from torch import Tensor

NETWORKS = {"MLP": (mlp, (1024,)), "ResNet-18, 64 pixels": (resnet18, (3, 64, 64))}


def batches(samples: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield batches of 64 random samples."""
    for start in range(0, samples, 64):
        yield torch.randn(min(64, samples - start), *shape)


@torch.no_grad()
def run(name: str, samples: int, *, scan: bool) -> None:
    """Run the samples through a network, under the probe or not, and print the peak memory in KiB."""
    factory, shape = NETWORKS[name]
    model = prepared(factory)
    if scan:
        from deadcheck import scan as deadcheck_scan

        deadcheck_scan(model, batches(samples, shape), max_samples=samples)
    else:
        for batch in batches(samples, shape):
            model(batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak(name: str, samples: int, kind: str) -> float:
    """Return the peak memory of one run in a new process, in MiB."""
    command = [sys.executable, __file__, "--run", kind, "--name", name, "--samples", str(samples)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1024


def main() -> None:
    """Print a table of peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 1024, 16384])
    parser.add_argument("--run", choices=["bare", "scan"], help=argparse.SUPPRESS)
    parser.add_argument("--name", choices=list(NETWORKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(args.name, args.samples[0], scan=args.run == "scan")
        return
    print(f"{'network':<24}{'samples':>10}{'bare MiB':>12}{'scan MiB':>12}{'difference':>12}")
    for name in NETWORKS:
        for samples in args.samples:
            bare, scan = peak(name, samples, "bare"), peak(name, samples, "scan")
            print(f"{name:<24}{samples:>10}{bare:>12.0f}{scan:>12.0f}{scan - bare:>12.0f}", flush=True)


if __name__ == "__main__":
    main()
