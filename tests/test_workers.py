"""Data read ahead by processes, into pinned memory, and by memory map."""

from __future__ import annotations

import mmap
import re
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import deadcheck
from deadcheck import data, passes, pipeline
from deadcheck.batch import mapped
from deadcheck.config import ScanSettings
from deadcheck.data import Batches, DataOptions, open_data
from deadcheck.errors import DataError, UsageError
from deadcheck.formats import open_live

# Workers are forked while pytest-xdist's own threads run, which newer Pythons warn of.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

X = torch.arange(33.0).reshape(11, 3)
Pair = namedtuple("Pair", "left right")


def opened(source: object, **options: Any) -> Batches:
    return open_data(source, DataOptions(batch_size=4, **options))


def read(batches: Batches) -> list[tuple[list[Any], dict[str, Any], int]]:
    return [(mapped(list(b.args), Tensor.tolist), mapped(dict(b.kwargs), Tensor.tolist), b.samples) for b in batches]


class Squares(Dataset[tuple[Tensor, int]]):
    """Sample i is (i, i squared) with its label; the ninth one cannot be read."""

    def __init__(self, length: int = 8) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 8:
            raise ValueError("picture 8 is broken")
        return torch.tensor([index, index * index], dtype=torch.float32), index


class Listed:
    """A data set of dicts that is no Dataset."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": np.full(2, index), "name": f"sample {index}"}


SOURCES = {
    "tensor": X,
    "array": X.numpy(),
    "dict": {"x": X, "y": np.arange(11)},
    "tuple": (X, torch.arange(11)),
    "named": Pair(X, X + 1),
    "list": [X, torch.arange(11)],
    "data set": Squares(),
    "tensors": TensorDataset(X, torch.arange(11)),
    "sequence": Listed(),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("limit", [None, 6])
def test_workers_give_the_same_batches_in_the_same_order(source: object, limit: int | None) -> None:
    ahead, alone = opened(source, workers=2, max_samples=limit), opened(source, max_samples=limit)

    assert (ahead.total, ahead.limit) == (alone.total, alone.limit)
    assert read(ahead) == read(alone)


def test_workers_give_the_same_counts_to_a_model_that_draws() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) * 0 + torch.randn(len(x), 5))

    model = Draws()
    ahead, alone = (deadcheck.scan(model, TensorDataset(X), batch_size=4, workers=count) for count in (1, 0))

    assert all(a.stats.equals(b.stats) for a, b in zip(ahead.sites, alone.sites, strict=True))


def test_only_what_is_wanted_is_read() -> None:
    # The ninth sample raises; the scan ends with the sixth, and nobody asks for more.
    assert sum(samples for *_, samples in read(opened(Squares(length=12), workers=1, max_samples=6))) == 6


def test_a_sample_that_a_worker_cannot_read_is_named_with_its_reason() -> None:
    with pytest.raises(DataError) as caught:
        read(opened(Squares(length=12), workers=1))

    assert str(caught.value) == (
        "Squares raised ValueError at batch 3 (picture 8 is broken), after 8 samples; correct the loader"
    )


def test_what_no_model_takes_is_one_sentence_with_workers_too() -> None:
    with pytest.raises(DataError, match=r"^an array of <U1 cannot go to a model; give numbers$"):
        read(opened({"x": np.zeros(4), "text": np.array(list("abcd"))}, workers=1))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (DataLoader(TensorDataset(X)), "DataLoader is a DataLoader; give it num_workers, and leave --workers out"),
        (Stream(), "Stream is a Stream, which can only be read from its start to its end; give a Dataset or arrays"),
        ([X, X, X], "list is a list, which can only be read"),
        (iter([X]), "is a list_iterator, which can only be read"),
        ("random", "random numbers are drawn and not read; leave --workers out"),
    ],
)
def test_workers_are_refused_where_they_could_not_help(source: object, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        opened(source, workers=3, input_shape=(3,))

    assert str(caught.value).startswith("--workers 3: ")


def test_a_worker_sends_its_batch_and_not_all_that_it_was_cut_from() -> None:
    (batch,) = data._own([X[4:8]])

    assert batch.tolist() == X[4:8].tolist()
    assert batch.untyped_storage().nbytes() == 4 * 3 * 4  # 4 samples of 3 floats


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="files are mapped in another way there")
def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((64, 1 << 16), np.float32))  # 16 MiB
    given_back = []

    class Watched(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            given_back.append(advice)
            super().madvise(*advice)

    with path.open("rb") as file:
        array = np.load(path, mmap_mode="r")
        array._mmap = Watched(file.fileno(), 0, access=mmap.ACCESS_READ)
        total = sum(float(batch.args[0].sum()) for batch in opened(array))

    assert total == 64 * (1 << 16)
    assert given_back == [(mmap.MADV_DONTNEED,)] * 16  # after each batch of 4


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is in memory")
def test_a_mapped_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.ones((64, 1 << 16), np.float32))  # 16 MiB, 1 MiB a batch

    def resident() -> int:
        smaps = Path("/proc/self/smaps").read_text()
        return sum(int(size) for size in re.findall(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", smaps))

    most = max(resident() for _ in opened(path))

    assert most <= 2048


def test_arrays_that_may_be_written_keep_their_pages(tmp_path: Path) -> None:
    # In a private map, what was written is in memory alone.
    np.save(tmp_path / "x.npy", np.zeros((8, 2), np.float32))
    array = np.load(tmp_path / "x.npy", mmap_mode="c")
    array[:] = 7

    assert [batch.args[0].unique().tolist() for batch in opened(array)] == [[7.0], [7.0]]
    assert float(array.sum()) == 112.0  # 16 times 7


# Pinned memory: there is no GPU here, so what would be asked of one.


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_is_read_into_pinned_memory_for_a_gpu(pin: bool, workers: int) -> None:
    batches = opened(TensorDataset(X), workers=workers, pin=pin)

    assert isinstance(batches.raw, DataLoader)
    assert (batches.raw.pin_memory, batches.raw.num_workers, batches.pinned) == (pin, workers, pin)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_arrays_into_pinned_memory_for_a_gpu(workers: int) -> None:
    assert opened(X, workers=workers, pin=True).pinned is (workers > 0)


def test_a_loader_that_pins_is_known() -> None:
    assert opened(DataLoader(TensorDataset(X), 4, pin_memory=True), pin=True).pinned
    assert not opened(DataLoader(TensorDataset(X), 4), pin=True).pinned


@pytest.mark.parametrize(("device", "pins"), [("cuda", True), ("cuda:1", True), ("cpu", False), ("mps", False)])
def test_a_scan_on_a_gpu_asks_for_pinned_memory(device: str, pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DataOptions] = []
    monkeypatch.setattr(pipeline.data_module, "open_data", lambda source, options, forward: seen.append(options))

    pipeline.open_data(X, ScanSettings(device=device), open_live(nn.ReLU()))

    assert [options.pin for options in seen] == [pins]


@pytest.mark.parametrize("pinned", [False, True])
def test_a_copy_is_waited_for_unless_it_comes_from_pinned_memory(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[dict[str, Any]] = []
    move = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **how: moves.append(how) or move(self, *args, **how))
    batches = opened(X)
    batches.pinned = pinned

    loaded = open_live(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
    pipeline.measure(loaded, batches, ScanSettings())

    assert [how["non_blocking"] for how in moves if "non_blocking" in how] == [pinned] * 3  # batches of 4, 4 and 3
    assert passes.Passes(nn.ReLU(), ScanSettings()).placed(X).equal(X)
