"""A forward pass that does not fit into memory is run in halves, and counts as if it had fitted."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from deadcheck import parts, passes, pipeline, scan
from deadcheck.config import ScanSettings
from deadcheck.diagnosis import Diagnosis
from deadcheck.errors import ForwardError
from deadcheck.formats import open_live
from deadcheck.out_of_memory import DoesNotFit, is_lack_of_memory
from deadcheck.shard import Shard
from deadcheck.sites import Measurement
from tests.test_gate_cli import deadcheck

X = torch.randn(101, 4, generator=torch.Generator().manual_seed(2))
NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


class Hungry(nn.Module):
    """Has room for some rows, and finds out between its two activations; counts its passes."""

    def __init__(self, room: int, error: Exception = NO_ROOM) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)
        self.room, self.error = room, error
        self.register_buffer("passes", torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.seen.append(len(x))
        x = torch.relu(self.first(x))
        if len(x) > self.room:
            raise self.error
        return torch.relu(self.second(x))


def assert_exact(found: Diagnosis, model: Hungry, x: Tensor = X) -> None:
    """Compare with a count over all of the data at once that knows nothing of batches."""
    with torch.no_grad():
        first = model.first(x).relu()
        second = model.second(first).relu()
    for site, h in zip(found.sites, (first, second), strict=True):
        stats = site.stats
        assert (stats.samples, stats.observations) == (len(x), len(x))
        assert stats.zeros.tolist() == (h == 0).sum(0).tolist()
        assert stats.fired.tolist() == (h > 0).sum(0).tolist()
        witness = [int(column.nonzero()[0]) if column.any() else -1 for column in (h > 0).T]
        assert stats.first_fired.tolist() == witness


def said(found: Diagnosis) -> list[str]:
    return [warning for warning in found.measurement.warnings if "memory" in warning]


@pytest.mark.parametrize(
    ("room", "most"),
    [(64, None), (63, 32), (32, 32), (31, 16), (5, 4), (1, 1)],
)
def test_the_counts_are_those_of_a_scan_that_fits(room: int, most: int | None) -> None:
    model = Hungry(room)

    found = scan(model, X, batch_size=64)

    assert_exact(found, model)
    assert said(found) == (
        [] if most is None else [f"64 samples at a time did not fit into memory, so at most {most} were run"]
    )
    assert int(model.passes) == 0
    assert model.seen == []


def test_the_counts_are_those_of_a_smaller_batch_size_to_the_last_bit() -> None:
    halved, small = scan(Hungry(20), X, batch_size=32), scan(Hungry(20), X, batch_size=16)

    assert all(a.stats.equals(b.stats) for a, b in zip(halved.sites, small.sites, strict=True))
    assert halved.measurement.inputs == small.measurement.inputs
    assert halved.measurement.output_constant == small.measurement.output_constant


@pytest.mark.parametrize(
    "error",
    [
        NO_ROOM,
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                     "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.22 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)  # fmt: skip
def test_lack_of_memory_is_known_in_every_spelling(error: Exception) -> None:
    model = Hungry(3, error)

    assert_exact(scan(model, X, batch_size=8), model)


def test_torchs_own_error_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)

    assert is_lack_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    model = Hungry(3, error)

    with pytest.raises(ForwardError, match=re.escape(str(error))) as caught:
        scan(model, X, batch_size=8)

    assert not isinstance(caught.value, DoesNotFit)


def test_a_failure_late_in_the_scan_is_counted_once() -> None:
    class Late(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            self.room = 10 if bool((x == X[90]).all(1).any()) else 1000  # in the 6th batch of 16, from sample 80 on
            return super().forward(x)

    model = Late(0)
    found = scan(model, X, batch_size=16)

    assert_exact(found, model)
    assert said(found) == ["16 samples at a time did not fit into memory, so at most 8 were run"]


def test_a_failure_side_by_side_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    forward = passes.Passes._forward

    def noted(*args: object, **kwargs: object) -> None:
        names.append(threading.current_thread().name)
        forward(*args, **kwargs)

    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            is_last_straw = len(x) > 4 and bool((x == X[70]).all(1).any())
            x = torch.relu(self.first(x))
            if is_last_straw:
                raise torch.OutOfMemoryError("no room")
            return torch.relu(self.second(x))

    model = Full()
    monkeypatch.setattr(passes, "LONG", 8)
    monkeypatch.setattr(passes, "SLOW", 0.0)
    monkeypatch.setattr(passes, "GAIN", math.inf)
    monkeypatch.setattr(passes.Passes, "_forward", noted)
    loaded = open_live(model)

    def run(batch_size: int) -> Measurement:
        settings = ScanSettings(batch_size=batch_size, threads=2)
        return pipeline.measure(loaded, pipeline.open_data(X, settings, loaded), settings)

    found = run(8)
    monkeypatch.setattr(passes, "LONG", 10**9)
    alone = run(4)

    assert any(name.startswith("deadcheck") for name in names)
    assert all(a.equals(b) for a, b in zip(found.sites, alone.sites, strict=True))
    assert [w for w in found.warnings if "memory" in w] == [
        "8 samples at a time did not fit into memory, so at most 4 were run"
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(TensorDataset(X), 64),
        lambda: TensorDataset(X),
        lambda: list(X.split(64)),
        lambda: X.numpy(),
        lambda: {"x": X},
    ],
    ids=["loader", "data set", "batches", "array", "dict"],
)
def test_data_that_can_be_read_again_is(make) -> None:
    model = Hungry(20)

    found = scan(model, make(), batch_size=64)

    assert_exact(found, model)
    assert said(found) == ["64 samples at a time did not fit into memory, so at most 16 were run"]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


@pytest.mark.parametrize("make", [lambda: iter(X.split(64)), Stream], ids=["iterator", "stream"])
def test_data_that_can_be_read_once_gets_one_sentence(make) -> None:
    with pytest.raises(DoesNotFit) as caught:
        scan(Hungry(20), make(), batch_size=64)

    assert str(caught.value) == (
        "64 samples at a time do not fit into memory, in Hungry: CUDA out of memory. Tried to allocate 20.00 GiB; "
        "choose a smaller --batch-size, or make the batches of your own loader smaller"
    )


def test_a_batch_that_is_more_than_rows_of_samples_is_not_cut() -> None:
    class Graph(Hungry):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return super().forward(x + 0 * edges.sum())

    with pytest.raises(DoesNotFit, match="choose a smaller --batch-size"):
        scan(Graph(4), [(X[:8], torch.zeros(2, 20))], unpack="args")


def test_data_that_the_model_wrote_into_is_not_run_again() -> None:
    class Writes(Hungry):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    with pytest.raises(DoesNotFit, match="choose a smaller --batch-size"):
        scan(Writes(4), X.clone(), batch_size=8)


def test_a_sample_that_does_not_fit_alone_gets_one_sentence() -> None:
    model = Hungry(0)

    with pytest.raises(DoesNotFit) as caught:
        scan(model, X, batch_size=8)

    assert str(caught.value) == (
        "1 sample at a time does not fit into memory, in Hungry: CUDA out of memory. Tried to allocate 20.00 GiB; "
        "use a machine or a --device with more memory"
    )
    assert int(model.passes) == 0


def test_shards_that_were_cut_differently_join_to_one_scan(tmp_path: Path) -> None:
    def shard(index: int, room: int) -> tuple[str, parts.Kept]:
        loaded, path, settings = open_live(Hungry(room)), tmp_path / f"{index}.part", ScanSettings(batch_size=8)
        batches = pipeline.open_data(X, settings, loaded)
        pipeline.counted(loaded, batches, settings, shard=Shard(index, 2), checkpoint=path)
        return path.name, parts.load(path)

    joined = parts.merged([shard(1, 3), shard(2, 100)])
    alone = scan(Hungry(100), X, batch_size=8).measurement

    assert joined.data.samples == 101
    for a, b in zip(joined.sites, alone.sites, strict=True):
        assert (a.zeros.tolist(), a.fired.tolist(), a.first_fired.tolist(), a.observations) == (
            b.zeros.tolist(), b.fired.tolist(), b.first_fired.tolist(), b.observations
        )  # fmt: skip
    assert "8 samples at a time did not fit into memory, so at most 2 were run" in joined.warnings


@pytest.mark.parametrize("after", [1, 2, 3, 5, 9])
def test_an_interrupted_scan_in_halves_goes_on_to_the_same_end(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "KEEP_EVERY", 0.0)
    calls = []

    def stop(done: int, total: int | None) -> None:
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    def run(progress) -> Diagnosis:
        loaded, settings = open_live(model := Hungry(5)), ScanSettings(batch_size=16)
        batches = pipeline.open_data(X, settings, loaded)
        seen = pipeline.measure(loaded, batches, settings, progress, checkpoint=tmp_path / "x.part")
        return pipeline.diagnose(seen), model

    with pytest.raises(KeyboardInterrupt):
        run(stop)

    found, model = run(None)
    assert_exact(found, model)


def test_the_command_says_it_in_the_report_and_fails_with_2(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, room=8):\n"
        "        super().__init__()\n        self.layer, self.room = nn.Linear(4, 6), room\n"
        "    def forward(self, x):\n        x = torch.relu(self.layer(x))\n"
        "        if len(x) > self.room:\n            raise torch.OutOfMemoryError('out of memory')\n        return x\n"
    )
    torch.save(nn.Sequential(nn.Linear(4, 6))[0].state_dict(), tmp_path / "bare.pt")
    state = {f"layer.{name}": value for name, value in torch.load(tmp_path / "bare.pt").items()}
    torch.save(state, tmp_path / "w.pt")
    torch.save(X, tmp_path / "w.sample.pt")

    halved = deadcheck("scan", "w.pt", "--arch", "nets.py:Net", "-f", "json", cwd=tmp_path)
    never = deadcheck("scan", "w.pt", "--arch", "nets.py:Net", "--arch-arg", "room=0", cwd=tmp_path)

    assert halved.returncode == 0, halved.stderr
    assert (
        "64 samples at a time did not fit into memory, so at most 8 were run" in json.loads(halved.stdout)["warnings"]
    )
    assert never.returncode == 2
    assert never.stdout == ""
    assert never.stderr.startswith(
        "deadcheck: error: 1 sample at a time does not fit into memory, in Net: out of memory"
    )
