"""How each tool is asked for dead units: the way its documentation says, with what it lets its user choose."""

from __future__ import annotations

import importlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 64

Found = Mapping[str, "frozenset[int] | int"]
"""Layer, as the tool names it -> its dead units, or only how many."""

Ask = Callable[[nn.Module, Tensor, int], Found]
"""(model, data, axis of the units) -> what the tool finds dead."""


@dataclass(frozen=True)
class Tool:
    """A tool, and how it is asked."""

    ask: Ask
    how: str
    """What it is asked, in words."""

    distributions: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()

    def versions(self) -> dict[str, str]:
        """Return the version of each of its distributions; a snippet has none."""
        return {name: metadata.version(name) for name in self.distributions}

    def missing(self) -> str | None:
        """Return why it cannot be asked, or None."""
        for name in self.imports:
            try:
                importlib.import_module(name)
            except Exception as error:  # whatever the import of another's package may raise
                return f"{type(error).__name__}: {error}"
        return None


def loader(data: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of (input, label), which is what most tools take."""
    return DataLoader(TensorDataset(data, torch.zeros(len(data), dtype=torch.long)), BATCH)


def always(zero: Tensor, axis: int) -> Tensor:
    """Reduce a mask to the units for which it holds everywhere."""
    return zero.movedim(axis, -1).flatten(0, -2).all(0)


def units(mask: Tensor) -> frozenset[int]:
    """Return the units of a mask."""
    return frozenset(mask.nonzero().flatten().tolist())


@contextmanager
def outputs(model: nn.Module, kinds: tuple[type[nn.Module], ...], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hook modules of these kinds that hold no others."""

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def seen(module: nn.Module, args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output  # nn.RNN returns its last state too
            if isinstance(first, Tensor):  # the guards of an exported program are a module that returns None
                see(name, first)

        return seen

    chosen = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds) and not list(m.children())]
    handles = [module.register_forward_hook(hook(name)) for name, module in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run(model: nn.Module, data: Tensor) -> None:
    """Run the batches."""
    for batch, _ in loader(data):
        model(batch)


def ask_deadcheck(model: nn.Module, data: Tensor, axis: int, size: int = BATCH) -> Found:
    """Scan, so many samples at a time; it finds the axis by itself."""
    import deadcheck
    from deadcheck import Verdict

    verdicts = (Verdict.DEAD, Verdict.NEGATIVE_ONLY)
    return {
        site.key: frozenset(unit for own in verdicts for low, high in site.ranges(own) for unit in range(low, high + 1))
        for site in deadcheck.scan(model, data, batch_size=size)
    }


TORCHLENS_OPERATIONS = (
    "relu",
    "relu6",
    "clamp",
    "threshold",
    "maximum",
    "leakyrelu",
    "rnnrelu",
    "hardtanh",
    "where",
    "mul",
)


def ask_torchlens(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Trace all samples at once, and take the rows of operations that are a ReLU."""
    import torchlens

    rows, _ = torchlens.debug.dead_neurons_rows(torchlens.trace(model, data), dim=axis)
    return {
        row["op"]: frozenset(row["sample_dead_idx"])  # at most ten, which is more than any case has
        for row in rows
        if row["op"].split("_")[0] in TORCHLENS_OPERATIONS
    }


def ask_torchdiag(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Hand it all samples at once."""
    import torchdiag

    return {name: row["dead"] for name, row in torchdiag.check_dead_neurons(model, data).items()}


def ask_dead_relu_viz(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Draw, and read the counts that it prints."""
    import dead_relu_viz

    printed = StringIO()
    with redirect_stdout(printed):
        dead_relu_viz.visualization(model, loader(data), with_activation=True)
    return {name: int(count) for name, count in re.findall(r"^  (\S+) ->  ?(\d+) dead", printed.getvalue(), re.M)}


def ask_ormas(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Train at a learning rate of 0 under its monitor, a check each step; silent is what is so in all samples."""
    from ormas_monitor import Monitor

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = data.split(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(model, optimizer, out=Path(folder, "run"), check_every=1, patience=len(batches))
        for batch in batches * 2:
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
        monitor.close()
        lines = Path(folder, "run", "diary.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "channels"]
    return {event["layer"]: frozenset(event["certified"] + event["observed"]) for event in events}


def ask_dnikit(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Give the outputs of all modules to its Inactive Unit Analysis, and take units that are always inactive."""
    from dnikit.base import Batch
    from dnikit.introspectors import IUA

    def responses(batch_size: int) -> Iterator[Batch]:
        seen: dict[str, Tensor] = {}
        with outputs(model, (nn.Module,), lambda name, out: seen.update({name: out.clone()})), torch.no_grad():
            for batch in data.split(batch_size):
                model(batch)
                if seen:
                    yield Batch({name: out.numpy() for name, out in seen.items()})

    results = IUA.introspect(responses, batch_size=BATCH).results
    return {
        # The proportions have no axis of samples.
        name: units(always(torch.tensor(result.unit_inactive_proportion)[None] == 1, axis))
        for name, result in results.items()
    }


def ask_neural_observatory(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Watch the forward passes with its defaults, and read its report."""
    from neural_observatory import Observatory

    observatory = Observatory(model)
    observatory.watch()
    for step, (batch, _) in enumerate(loader(data)):
        observatory.step(step=step, epoch=0)
        model(batch)
    observatory.stop()
    results = [result for result in observatory.report().results if result.analyzer_name == "dead_neurons"]
    return {result.layer_name: result.metrics["dead_neurons"] for result in results}


def ask_mean_hooks(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Average ``output == 0`` of ReLU modules per unit, batch by batch."""
    rates: dict[str, list[Tensor]] = {}

    def see(name: str, output: Tensor) -> None:
        rate = (output == 0).float().movedim(axis, -1).flatten(0, -2).mean(0)
        rates.setdefault(name, []).append(rate)

    with outputs(model, (nn.ReLU, nn.ReLU6), see):
        run(model, data)
    return {name: units(torch.stack(parts).mean(0) == 1) for name, parts in rates.items()}


def ask_storing_hooks(model: nn.Module, data: Tensor, axis: int) -> Found:
    """Keep the outputs of all modules, and look for zeros at the end."""
    held: dict[str, list[Tensor]] = {}

    def see(name: str, output: Tensor) -> None:
        held.setdefault(name, []).append(output.detach())

    with outputs(model, (nn.Module,), see):
        run(model, data)
    return {name: units(always(torch.cat(parts) == 0, axis)) for name, parts in held.items()}


TOOLS: dict[str, Tool] = {
    "deadcheck": Tool(
        ask_deadcheck, "`deadcheck.scan(model, data)`; dead and negative-only units", ("torch-deadcheck",),
        ("deadcheck",),
    ),
    "torchlens": Tool(
        ask_torchlens, "`trace`, then `debug.dead_neurons_rows(dim=…)`; rows of ReLU operations", ("torchlens",),
        ("torchlens",),
    ),
    "torchdiag": Tool(ask_torchdiag, "`check_dead_neurons(model, data)`; counts", ("torchdiag",), ("torchdiag",)),
    "dead-relu-viz": Tool(
        ask_dead_relu_viz, "`visualization(model, loader, with_activation=True)`; the counts that it prints",
        ("dead-relu-viz", "torchview"), ("dead_relu_viz",),
    ),
    "ormas-monitor": Tool(
        ask_ormas, "`Monitor` in a training loop at a learning rate of 0; certified and silent channels",
        ("ormas-monitor",), ("ormas_monitor",),
    ),
    "dnikit": Tool(
        ask_dnikit, "outputs of all modules, by hooks, to `IUA`; units that are inactive each time", ("dnikit",),
        ("dnikit.introspectors",),
    ),
    "neural-observatory": Tool(
        ask_neural_observatory, "`Observatory` with its defaults; dead neurons in its report; counts",
        ("neural-observatory",), ("neural_observatory",),
    ),
    "zero-mean hooks": Tool(ask_mean_hooks, "a snippet: mean of `output == 0` in hooks on `nn.ReLU` and `nn.ReLU6`"),
    "storing hooks": Tool(ask_storing_hooks, "a snippet: hooks on all modules keep every output; zeros at the end"),
}  # fmt: skip
"""Name -> tool, in the order of the columns."""
