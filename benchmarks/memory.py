"""Peak memory of a scan over that of the bare forward passes, against the number of samples.

    python benchmarks/memory.py [--samples 64 1024 16384] [--json out.json]

Each figure is the peak resident memory of a process of its own, in MiB. Data comes from a generator, so that it is no
part of the growth.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import torch
from networks import Network, mlp, resnet18
from timing import options, peak, table, write
from torch import Tensor

NETWORKS = {"MLP": Network(mlp, (1024,), 64), "ResNet-18, 64 pixels": Network(resnet18, (3, 64, 64), 64)}


def batches(samples: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield batches of 64 random samples."""
    for start in range(0, samples, 64):
        yield torch.randn(min(64, samples - start), *shape)


@torch.no_grad()
def run(network: Network, samples: int, *, scan: bool) -> None:
    """Run the samples through a network, under the probe or not, and print the peak memory in MiB."""
    model = network.program()
    if scan:
        from deadcheck import scan as deadcheck_scan

        deadcheck_scan(model, batches(samples, network.shape), max_samples=samples)
    else:
        for batch in batches(samples, network.shape):
            model(batch)
    print(peak())


def peak_of(name: str, samples: int, kind: str) -> float:
    """Return the peak memory of one run in a new process, in MiB."""
    command = [sys.executable, __file__, "--run", kind, "--name", name, "--samples", str(samples)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Print a table of peaks, and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 1024, 16384], help="numbers of samples")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--run", choices=["bare", "scan"], help=argparse.SUPPRESS)
    parser.add_argument("--name", choices=list(NETWORKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(NETWORKS[args.name], args.samples[0], scan=args.run == "scan")
        return
    peaks = [
        (name, samples, peak_of(name, samples, "bare"), peak_of(name, samples, "scan"))
        for name in NETWORKS
        if args.only in name
        for samples in args.samples
    ]
    rows = [["network", "samples", "bare MiB", "scan MiB", "difference"]]
    for name, samples, bare, scan in peaks:
        rows.append([name, f"{samples:,}", f"{bare:.0f}", f"{scan:.0f}", f"{scan - bare:.0f}"])
    print(table(rows))
    keys = ("network", "samples", "bare_mib", "scan_mib")
    write(args.json, peaks=[dict(zip(keys, found, strict=True)) for found in peaks])


if __name__ == "__main__":
    main()
