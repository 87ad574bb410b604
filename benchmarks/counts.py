"""Whether the counts of the benchmarked networks are right, and whether planted deaths are found.

    python benchmarks/counts.py [--only ResNet] [--json out.json]

Scans every network on a few samples in each way that a benchmark times: one batch at a time, two side by side, and
without the compiled kernel. Samples, observations, zeros, positive inputs and samples fired of every unit must be those
that plain hooks count (``by_hand.py``). Then every case of ``planted.py`` must have the very deaths that were planted.
A scan must not load torch's compiler. Exits with 1 where something differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import by_hand
import numpy as np
import torch
from adapters import TOOLS
from networks import NETWORKS, Form, Network
from planted import CASES, NOT_MEASURED, built, data
from timing import options, table, write
from torch import nn

import deadcheck
from deadcheck import kernel, passes
from deadcheck.errors import NothingMeasured

SAMPLES, BATCH = 6, 2

SMALL: dict[tuple[int, ...], tuple[int, ...]] = {(3, 160, 160): (3, 32, 32), (128, 384): (8, 384)}
"""Shape of a sample -> a smaller one that the network takes too; VGG-11 takes its own only."""

SIDE_BY_SIDE = "side by side"

WAYS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "one at a time": lambda: mock.patch.object(passes, "LONG", sys.maxsize),
    SIDE_BY_SIDE: lambda: mock.patch.object(passes, "LONG", 1),
    "without the kernel": lambda: mock.patch.object(kernel, "is_built", return_value=False),
}

TOLERANCE = 1e-5
"""How far the last bits of an input may be off where what is counted is not what is scanned."""


def shape_of(name: str, network: Network) -> tuple[int, ...]:
    """Return the shape of the samples that a network is checked on."""
    return (3, 32, 32) if name.startswith("ResNet") else SMALL.get(network.shape, network.shape)


def scanned(program: nn.Module, network: Network, samples: torch.Tensor) -> deadcheck.Diagnosis:
    """Scan a network in its form."""
    if network.form is not Form.SAVED:
        return deadcheck.scan(program, samples, batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.pt")
        torch.jit.save(program, str(path))
        return deadcheck.scan(path, samples, batch_size=BATCH, load=deadcheck.LoadOptions(trust=True))


def differences(found: deadcheck.Diagnosis, truth: list[by_hand.Counted]) -> Iterator[str]:
    """Yield a sentence for each count of a scan that is not what it must be."""
    if len(found.sites) != len(truth):
        yield f"{len(found.sites)} sites, and {len(truth)} activations ran"
        return
    for site, counted in zip(found, truth, strict=True):
        for name in ("samples", "observations"):
            own, right = getattr(site.stats, name), getattr(counted, name)
            if own != right:
                yield f"{site.key}: {name} {own}, by hand {right}"
        for name in by_hand.COUNTS:
            own, (least, most) = getattr(site.stats, name), getattr(counted, name)
            if own.shape != least.shape:
                yield f"{site.key}: {len(own)} units, by hand {len(least)}"
                break
            wrong = np.flatnonzero((own < least) | (own > most))
            if len(wrong):
                unit = int(wrong[0])
                right = f"{least[unit]}" if least[unit] == most[unit] else f"{least[unit]} to {most[unit]}"
                yield f"{site.key}: {name} of {len(wrong)} units; of unit {unit} {own[unit]}, by hand {right}"


def checked(name: str) -> dict[str, list[str]]:
    """Return what is wrong with a network's counts, by the way of scanning."""
    network = NETWORKS[name]
    samples = torch.randn(SAMPLES, *shape_of(name, network), generator=torch.Generator().manual_seed(1))
    model = network.eager()
    is_fused = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    tolerance = 0.0 if network.form is Form.MODULE and not is_fused else TOLERANCE
    truth = by_hand.count(model, samples, BATCH, tolerance)
    program, loaded, wrong = network.program(), "torch._dynamo" in sys.modules, {}
    for way, patched in WAYS.items():
        if way == SIDE_BY_SIDE and network.form is not Form.MODULE:
            continue  # programs are run one at a time
        with patched():
            wrong[way] = list(differences(scanned(program, network, samples), truth))
    if not loaded and "torch._dynamo" in sys.modules:
        wrong["compiler"] = ["a scan loaded torch._dynamo, which takes a second"]
    return wrong


def planted(name: str) -> list[str]:
    """Return what is wrong with what a scan finds in a case of planted deaths."""
    case = CASES[name]
    try:
        found = tuple(TOOLS["deadcheck"].ask(built(case), data(case.shape), case.axis).values())
    except NothingMeasured as error:
        return [] if name in NOT_MEASURED else [f"nothing measured: {error}"]
    if name in NOT_MEASURED:
        return ["measured, which it cannot be"]
    listed = [[sorted(units) for units in layers] for layers in (found, case.dead)]
    return [] if found == case.dead else [f"dead units {listed[0]}, planted {listed[1]}"]


def main() -> None:
    """Check everything, print what is wrong and write it."""
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="part of the name of a network or a case")
    args = parser.parse_args()
    torch.set_num_threads(max(torch.get_num_threads(), 2))  # one at a time is all that one thread can do
    found = {name: checked(name) for name in NETWORKS if args.only in name}
    found |= {name: {"planted": planted(name)} for name in CASES if args.only in name}
    if not found:
        parser.error(f"no network or case has {args.only!r} in its name; see networks.py and planted.py")
    rows = [["what", "how", "counts"]]
    rows += [[name, way, "wrong" if w else "right"] for name, ways in found.items() for way, w in ways.items()]
    print(table(rows))
    write(args.json, wrong=found)
    if wrong := [f"{name}, {way}: {w}" for name, ways in found.items() for way, told in ways.items() for w in told]:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
