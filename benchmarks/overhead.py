"""Cost of a scan as a ratio to the bare forward passes, interleaved with them in one process.

    python benchmarks/overhead.py [--rounds 15] [--batches 32] [--threads 2 1] [--only ResNet] [--json out.json]
    python benchmarks/overhead.py --only Convnet --batch-sizes 1 4 16 64 256

Every round runs every column on the same batches, and a ratio is taken inside its round, to a bare loop of forward
passes on the same number of threads. A scan is the whole of ``deadcheck.scan``: set-up, counting, the last merge.
``bare, two at a time`` is a bare loop with the scan's own way to use the threads, and ``bare again`` is the noise: a
note under the table says where that moved by more than 3 % in a round, so that smaller differences are not resolved.

With ``--batch-sizes`` the number of samples stays the same, ``--batches`` of the network's own, and they are cut anew.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from networks import NETWORKS, Form
from timing import interleaved, options, ratios, seconds, spread, table, unresolved, write
from torch import Tensor, nn

import deadcheck
from deadcheck import kernel, passes


@dataclass(frozen=True)
class Subject:
    """What is run, and what a scan is given of it."""

    open: Callable[[], nn.Module]
    """Return the model, loaded anew where it is a file."""

    given: nn.Module | Path


Work = Callable[[Subject, Tensor, int], object]


@torch.no_grad()
def loop(model: nn.Module, data: Tensor, size: int) -> None:
    """Run every batch, and nothing else."""
    for batch in data.split(size):
        model(batch)


def bare(subject: Subject, data: Tensor, size: int) -> None:
    """Run a bare loop."""
    loop(subject.open(), data, size)


def two_at_a_time(subject: Subject, data: Tensor, size: int) -> None:
    """Run every batch, two at a time on half the threads each."""
    model = subject.open()
    half = max(torch.get_num_threads() // 2, 1)

    @torch.no_grad()
    def run(batch: Tensor) -> None:
        torch.set_num_threads(half)
        model(batch)

    with passes.threads_of(torch.get_num_threads()), ThreadPoolExecutor(2) as pool:
        list(pool.map(run, data.split(size)))


def scan(subject: Subject, data: Tensor, size: int, stats: str = "full") -> None:
    """Scan as a user does."""
    deadcheck.scan(subject.given, data, batch_size=size, load=deadcheck.LoadOptions(trust=True), stats=stats)


def scan_alone(subject: Subject, data: Tensor, size: int) -> None:
    """Scan one batch at a time."""
    with mock.patch.object(passes, "LONG", sys.maxsize):
        scan(subject, data, size)


def scan_torch(subject: Subject, data: Tensor, size: int) -> None:
    """Scan without the compiled kernel."""
    with mock.patch.object(kernel, "is_built", return_value=False):
        scan(subject, data, size)


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


def mean_hooks(subject: Subject, data: Tensor, size: int) -> None:
    """Keep the mean of zeros per channel."""
    model = subject.open()
    rates: dict[nn.Module, list[Tensor]] = {}

    def see(module: nn.Module, output: Tensor) -> None:
        dims = [0, 2, 3] if output.dim() == 4 else list(range(output.dim() - 1))
        rates.setdefault(module, []).append((output == 0).float().mean(dims))

    with hooked(model, see):
        loop(model, data, size)


def storing_hooks(subject: Subject, data: Tensor, size: int) -> None:
    """Keep every activation of a batch, and count its zeros after it."""
    model = subject.open()
    held: dict[nn.Module, Tensor] = {}

    def see(module: nn.Module, output: Tensor) -> None:
        held[module] = output.detach().clone()

    with hooked(model, see):
        for batch in data.split(size):
            loop(model, batch, size)
            for output in held.values():
                (output == 0).flatten(1).sum(0)


COLUMNS: dict[str, Work] = {
    "scan": scan,
    "scan, verdict": partial(scan, stats="verdict"),
    "scan, one at a time": scan_alone,
    "scan, torch alone": scan_torch,
    "bare again": bare,
    "bare, two at a time": two_at_a_time,
    "zero-mean hooks": mean_hooks,
    "storing hooks": storing_hooks,
}


BASE = "bare"


@contextmanager
def subject(name: str) -> Iterator[Subject]:
    """Build a network; what a file needs is there inside the context."""
    network = NETWORKS[name]
    model = network.program()
    if network.form is not Form.SAVED:
        yield Subject(lambda: model, model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.pt")
        torch.jit.save(model, str(path))
        yield Subject(lambda: torch.jit.load(str(path)), path)


def measured(name: str, size: int | None, columns: list[str], rounds: int, batches: int) -> dict[str, object]:
    """Return the ratios of every column to the bare loop of its round."""
    network = NETWORKS[name]
    size = size or network.batch
    data = network.data(batches * network.batch)
    with subject(name) as model:
        loaded = "torch._dynamo" in sys.modules
        works = {BASE: bare, **{column: COLUMNS[column] for column in columns}}
        clocks = {column: partial(seconds, partial(work, model, data, size)) for column, work in works.items()}
        taken = interleaved(clocks, rounds)
        assert loaded or "torch._dynamo" not in sys.modules, f"{name}: a scan must not load the compiler"
    return {
        "network": name, "threads": torch.get_num_threads(), "batch": size, "samples": len(data),
        "bare_seconds": taken[BASE], "ratios": {column: ratios(taken[column], taken[BASE]) for column in columns},
    }  # fmt: skip


def noise(found: dict[str, object]) -> str | None:
    """Say what is not resolved in a row, or None."""
    moved = unresolved(found["ratios"].get("bare again", []))
    if moved is None:
        return None
    row = f"{found['network']}, {found['threads']} threads, batch {found['batch']}"
    return f"- {row}: a bare loop against itself moved by up to {moved:.1%}; less is not resolved"


def main() -> None:
    """Run the benchmark, print one row per network, thread count and batch size, and write the figures."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds that are measured [default: 15]")
    parser.add_argument("--batches", type=int, default=32, help="batches of the network's own size [default: 32]")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[None], help="cut the samples like this instead")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="torch's threads [default: 2 1]")
    parser.add_argument("--only", default="", help="a network, or part of the names of some")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN")
    args = parser.parse_args()
    names = [args.only] if args.only in NETWORKS else [name for name in NETWORKS if args.only in name]
    if not names:
        parser.error(f"no network has {args.only!r} in its name; there are: {', '.join(NETWORKS)}")
    found = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in names:
            for size in args.batch_sizes:
                found.append(measured(name, size, args.columns, args.rounds, args.batches))
                print(f"{name}, {threads} threads, batch {found[-1]['batch']}: done", file=sys.stderr)
    rows = [["network", "threads", "batch", *args.columns]]
    for one in found:
        cells = [spread(ratio, 2) for ratio in one["ratios"].values()]
        rows.append([one["network"], str(one["threads"]), str(one["batch"]), *cells])
    print(f"Ratio to a bare loop of {args.batches} batches, median (min-max) of {args.rounds}\n\n{table(rows)}")
    if notes := [note for one in found if (note := noise(one))]:
        print("\n" + "\n".join(notes))
    write(args.json, rows=found)


if __name__ == "__main__":
    main()
