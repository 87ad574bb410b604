"""Anonymous memory that scanning a large state dict takes above what the forward pass itself takes.

    python benchmarks/large_weights.py [--width 8192] [--layers 8] [--json out.json]

Writes the weights of a wide MLP (2.1 GB by default), as a torch file and as safetensors, and scans each in a process of
its own. Anonymous memory is ``RssAnon`` of /proc/self/status, sampled every 10 ms; pages of the file are not in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from timing import options, table, write

ARCH = """
from torch import nn
def build(width: int, layers: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())))
"""


def anonymous() -> int:
    """Return the anonymous memory of this process in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) // 1024
    raise OSError("no RssAnon in /proc/self/status")


class Peak:
    """Samples the anonymous memory while a block runs."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(0.01)


def write_weights(folder: Path, width: int, layers: int) -> None:
    """Write the weights in both formats."""
    import torch
    from safetensors.torch import save_file

    (folder / "wide.py").write_text(ARCH)
    state = {}
    for layer in range(0, 2 * layers, 2):
        state[f"{layer}.weight"] = torch.randn(width, width) / width**0.5
        state[f"{layer}.bias"] = torch.zeros(width)
    torch.save(state, folder / "wide.pt")
    save_file(state, folder / "wide.safetensors")


def scan(path: Path, width: int, layers: int) -> None:
    """Scan in this process and print what that took as JSON; the peak is above what was there before."""
    import torch

    import deadcheck

    sample = torch.from_numpy(np.random.default_rng(0).standard_normal((64, width), dtype=np.float32))
    load = deadcheck.LoadOptions(
        arch=f"{path.with_name('wide.py')}:build", arch_args={"width": width, "layers": layers}
    )
    warm = torch.nn.Linear(width, 8)
    warm(sample)
    with Peak() as peak:
        start = time.perf_counter()
        diagnosis = deadcheck.scan(path, sample, load=load)
        seconds = time.perf_counter() - start
    found = {
        "file": path.name, "mib": path.stat().st_size / 2**20, "anonymous_mib": peak.most - peak.start,
        "seconds": seconds, "units": diagnosis.units,
    }  # fmt: skip
    print(json.dumps(found))


def main() -> None:
    """Write the weights, then scan each file in a process of its own."""
    parser = options(__doc__)
    parser.add_argument("--width", type=int, default=8192, help="units of a layer [default: 8192]")
    parser.add_argument("--layers", type=int, default=8, help="layers [default: 8]")
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scan:
        scan(args.scan, args.width, args.layers)
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name), args.width, args.layers)
        for file in ("wide.pt", "wide.safetensors"):
            own = [sys.executable, __file__, "--width", str(args.width), "--layers", str(args.layers)]
            command = [*own, "--scan", str(Path(name) / file)]
            found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))
    rows = [["file", "MiB", "anonymous MiB", "seconds", "units"]]
    for one in found:
        rows.append([one["file"], *(f"{one[key]:,.0f}" for key in ("mib", "anonymous_mib"))])
        rows[-1] += [f"{one['seconds']:.1f}", f"{one['units']:,}"]
    print(table(rows))
    write(args.json, files=found)


if __name__ == "__main__":
    main()
