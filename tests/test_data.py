"""Data in every shape it comes in, cut into batches; and hostile or wrong data, refused with a reason."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import struct
import sys
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from deadcheck.batch import Batch
from deadcheck.data import UNSIZED_LIMIT, Batches, DataOptions, open_data
from deadcheck.errors import DataError, TrustRequired, UsageError
from deadcheck.sample import sample_beside

X = torch.arange(10.0).reshape(5, 2)
Y = torch.arange(5)

Pair = namedtuple("Pair", "left right")


def one(x: Tensor) -> None: ...


def two(x: Tensor, mask: Tensor) -> None: ...


def optional(x: Tensor, mask: Tensor | None = None) -> None: ...


def named(pixels: Tensor, *, mask: Tensor | None = None) -> None: ...


def anything(*xs: Tensor) -> None: ...


def opened(source: object, forward: Callable[..., Any] | None = None, **options: Any) -> Batches:
    return open_data(source, DataOptions(**options), forward=forward)


def only(batches: Batches) -> Batch:
    (batch,) = batches
    return batch


def joined(batches: Batches) -> Tensor:
    return torch.cat([batch.args[0] for batch in batches])


def sizes(batches: Batches) -> list[int]:
    return [batch.samples for batch in batches]


def fault(source: object, forward: Callable[..., Any] | None = None, **options: Any) -> str:
    """Return what is said where the data cannot be opened, or breaks while it is read."""
    with pytest.raises(DataError) as caught:
        list(opened(source, forward, **options))
    return str(caught.value)


# Arrays.


@pytest.mark.parametrize("data", [X, X.numpy(), X.numpy().astype(">f4"), X.numpy()[::-1][::-1]])
def test_an_array_is_cut_into_batches(data: object) -> None:
    batches = opened(data, batch_size=2)

    assert batches.total == 5
    taken = list(batches)
    assert [batch.samples for batch in taken] == [2, 2, 1]
    assert all(len(batch.args) == 1 and batch.kwargs == {} for batch in taken)
    assert torch.equal(torch.cat([batch.args[0] for batch in taken]), X)
    assert batches.warnings == []


def test_a_tensor_comes_detached() -> None:
    assert not only(opened(X.clone().requires_grad_())).args[0].requires_grad


def test_an_array_is_copied() -> None:
    array = np.zeros((2, 2), np.float32)
    only(opened(array)).args[0].add_(1)

    assert not array.any()


@pytest.mark.parametrize(
    ("data", "dtype"),
    [(np.ones(2, bool), torch.bool), (np.ones(2, np.int8), torch.int8), (np.ones(2, np.float16), torch.float16),
     (np.ones(2, np.complex64), torch.complex64)],
)  # fmt: skip
def test_an_array_keeps_its_type(data: np.ndarray, dtype: torch.dtype) -> None:
    assert only(opened(data)).args[0].dtype == dtype


@settings(deadline=None)
@given(n=st.integers(0, 30), size=st.integers(1, 35), most=st.none() | st.integers(1, 35), as_batches=st.booleans())
def test_any_length_is_cut_exactly(n: int, size: int, most: int | None, as_batches: bool) -> None:
    data = torch.arange(n * 2.0).reshape(n, 2)
    source = list(data.split(size)) if as_batches and n else data
    batches = opened(source, batch_size=size, max_samples=most)
    taken = list(batches)
    kept = n if most is None else min(n, most)

    assert [batch.samples for batch in taken] == [len(batch.args[0]) for batch in taken]
    assert [batch.samples for batch in taken] == [min(size, kept - start) for start in range(0, kept, size)]
    assert torch.equal(torch.cat([batch.args[0] for batch in taken] or [data[:0]]), data[:kept])
    assert batches.total == (None if source is not data else kept)
    assert batches.warnings == []


# Dicts and tuples.


def test_a_dict_goes_to_the_parameters_of_forward() -> None:
    batches = opened({"pixels": X, "mask": X > 3, "labels": Y}, named, batch_size=3)
    first, last = batches

    assert first.args == last.args == ()
    assert set(first.kwargs) == {"pixels", "mask"}
    assert torch.equal(last.kwargs["pixels"], X[3:])
    assert torch.equal(last.kwargs["mask"], X[3:] > 3)
    assert batches.warnings == ["labels of the data did not go to the model (--unpack changes that)"]


@pytest.mark.parametrize("name", ["x", "input", "inputs", "image", "images", "data", "features", "arr_0"])
def test_a_dict_of_other_names_gives_its_usual_input(name: str) -> None:
    batches = opened({"label": Y, name: X}, named)

    assert torch.equal(only(batches).args[0], X)
    assert batches.warnings == ["label of the data did not go to the model (--unpack changes that)"]


def test_a_dict_of_unknown_names_gives_its_first() -> None:
    assert torch.equal(only(opened({"a": X, "b": Y})).args[0], X)


def test_what_is_not_one_value_per_sample_stays_whole() -> None:
    first, last = opened(
        {"x": X, "scale": torch.tensor(2.0), "names": list("abcde"), "classes": ["p", "q"], "nested": {"y": Y}},
        batch_size=3, unpack="kwargs",
    )  # fmt: skip

    assert (first.kwargs["scale"], last.kwargs["scale"]) == (2.0, 2.0)
    assert (first.kwargs["names"], last.kwargs["names"]) == (list("abc"), list("de"))
    assert last.kwargs["classes"] == ["p", "q"]
    assert torch.equal(last.kwargs["nested"]["y"], Y[3:])


@pytest.mark.parametrize(
    ("forward", "given", "note"),
    [
        (None, 1, ["entry 1 of the data did not go to the model (--unpack changes that)"]),
        (one, 1, ["entry 1 of the data did not go to the model (--unpack changes that)"]),
        (optional, 1, ["entry 1 of the data did not go to the model (--unpack changes that)"]),
        (two, 2, []),
        (anything, 2, []),
        (nn.Linear(2, 2).forward, 1, ["entry 1 of the data did not go to the model (--unpack changes that)"]),
        (nn.Bilinear(2, 2, 1).forward, 2, []),
    ],
)
def test_a_pair_is_unpacked_as_forward_takes_it(
    forward: Callable[..., Any] | None, given: int, note: list[str]
) -> None:
    batches = opened((X, Y), forward)
    batch = only(batches)

    assert len(batch.args) == given
    assert torch.equal(batch.args[0], X)
    assert batches.warnings == note


def test_a_note_is_made_once() -> None:
    batches = opened((X, Y), one, batch_size=1)

    assert len(list(batches)) == 5
    assert len(batches.warnings) == 1


@pytest.mark.parametrize(
    ("unpack", "source", "args", "names"),
    [
        ("first", (X, Y), 1, set()),
        ("first", {"pixels": X, "mask": X}, 1, set()),
        ("args", (X, Y), 2, set()),
        ("args", {"pixels": X, "mask": Y}, 2, set()),
        ("kwargs", {"a": X, "b": Y}, 0, {"a", "b"}),
    ],
)
def test_unpack_overrules_forward(unpack: str, source: object, args: int, names: set[str]) -> None:
    batch = only(opened(source, named, unpack=unpack))

    assert len(batch.args) == args
    assert set(batch.kwargs) == names
    assert batch.samples == 5


def test_kwargs_need_names() -> None:
    assert fault((X, Y), unpack="kwargs") == (
        "--unpack kwargs needs batches that are dicts, and these are tuples; use args or first"
    )


def test_an_unknown_unpack() -> None:
    with pytest.raises(UsageError, match=r"^--unpack 'all' is not one of auto, first, args, kwargs$"):
        opened(X, unpack="all")


def test_a_named_tuple_within_a_batch_stays_one() -> None:
    batch = only(opened([(Pair(X, Y.numpy()),)], max_samples=2))

    assert isinstance(batch.args[0], Pair)
    assert torch.equal(batch.args[0].left, X[:2])
    assert torch.equal(batch.args[0].right, Y[:2])


def test_batches_that_are_named_tuples() -> None:
    batch = only(opened([Pair(X, X + 1)], two))

    assert torch.equal(batch.args[1], X + 1)


def test_strings_pass_and_count() -> None:
    batches = opened([["red", "blue"], ["green"]], unpack="first")
    assert [batch.args for batch in batches] == [("red",), ("green",)]
    assert batches.warnings == [
        "entry 1 of the data did not go to the model (--unpack changes that)",
        "the data has no tensor whose first axis counts samples; each batch counts as one sample",
    ]

    assert [(b.args[0], b.samples) for b in opened([{"x": ["red", "blue"]}, {"x": ["green"]}])] == [
        (["red", "blue"], 2), (["green"], 1),
    ]  # fmt: skip


def test_strings_beside_tensors_are_cut_with_them() -> None:
    batch = only(opened([{"text": list("abcde"), "x": X}], unpack="kwargs", max_samples=3))

    assert (batch.kwargs["text"], len(batch.kwargs["x"]), batch.samples) == (list("abc"), 3, 3)


def test_arrays_of_unequal_length() -> None:
    assert fault({"x": X, "y": torch.zeros(4, 1)}) == (
        "the arrays in dict differ in length along their first axis (x (5, 2), y (4, 1)); make them agree"
    )
    assert fault((X, Y[:3])) == (
        "the arrays in tuple differ in length along their first axis ([0] (5, 2), [1] (3,)); make them agree"
    )


@pytest.mark.parametrize("data", [torch.tensor(3.0), np.float32(3), {"x": torch.tensor(3.0)}])
def test_single_numbers_are_no_samples(data: object) -> None:
    source = type(data).__name__
    told = fault(data if not isinstance(data, np.generic) else np.asarray(data))

    assert told == (
        f"{'ndarray' if source == 'float32' else source} holds single numbers only; "
        "the first axis of the data must count samples"
    )


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (np.array([{}, None]), "object"),
        (np.array(["a", "b"]), "<U1"),
        (np.array(["2020-01-01"], "M8[D]"), r"datetime64[D]"),
        (np.zeros(2, [("a", int)]), "[('a', '<i8')]"),
    ],
)
def test_arrays_of_no_numbers(data: np.ndarray, dtype: str) -> None:
    assert fault(data) == f"an array of {dtype} cannot go to a model; give numbers"


@pytest.mark.parametrize(("data", "kind"), [(None, "NoneType"), (3, "int"), (object(), "object")])
def test_things_that_are_no_data(data: object, kind: str) -> None:
    assert fault(data) == (f"{kind} is a {kind}, not data; give a tensor, array, dict, loader, data set or iterable")


# Loaders, data sets, iterables.


def test_a_loader_keeps_its_batches() -> None:
    batches = opened(DataLoader(TensorDataset(X, Y), 3), batch_size=3)

    assert batches.total == 5
    assert sizes(batches) == [3, 2]
    assert batches.warnings == ["entry 1 of the data did not go to the model (--unpack changes that)"]


def test_a_loader_of_another_batch_size_says_so() -> None:
    batches = opened(DataLoader(TensorDataset(X), 3), batch_size=2)

    assert sizes(batches) == [3, 2]
    assert batches.warnings == ["the DataLoader's own batch size of 3 was used"]


def test_a_shuffled_loader_says_so() -> None:
    batches = opened(DataLoader(TensorDataset(X), 2, shuffle=True), batch_size=2)

    assert sorted(joined(batches)[:, 0].tolist()) == X[:, 0].tolist()
    assert batches.warnings == ["the DataLoader shuffles, so sample numbers and the sample itself change between runs"]


def test_a_loader_is_cut_within_a_batch() -> None:
    batches = opened(DataLoader(TensorDataset(X), 3), batch_size=3, max_samples=4)

    assert batches.total == 4
    assert torch.equal(joined(batches), X[:4])


def test_an_empty_loader_gives_nothing() -> None:
    batches = opened(DataLoader(TensorDataset(X[:0]), 3), batch_size=3)

    assert (batches.total, list(batches), batches.warnings) == (0, [], [])


class Failing(Dataset[Tensor]):
    """Breaks in its 13th sample, which a loader of 2 reaches in its 7th batch."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        if index == 12:
            raise self.error
        return torch.zeros(1)

    def __init__(self, error: Exception) -> None:
        self.error = error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError("disc\ngone"), "OSError at batch 7 (disc)"),
        (ValueError("odd"), "ValueError at batch 7 (odd)"),
        (KeyError("name"), "KeyError at batch 7 ('name')"),
        (RuntimeError(), "RuntimeError at batch 7 (RuntimeError)"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError at batch 7 (by 0)"),
    ],
)
def test_a_loader_that_raises(error: Exception, text: str) -> None:
    told = f"raised {text}, after 12 samples; correct the loader"

    assert fault(DataLoader(Failing(error), 2), batch_size=2) == f"DataLoader {told}"
    assert fault(Failing(error), batch_size=2) == f"Failing {told}"


def test_a_loader_that_would_raise_after_the_limit() -> None:
    assert sizes(opened(DataLoader(Failing(ValueError()), 2), batch_size=2, max_samples=12)) == [2] * 6


def test_a_data_set_is_collated() -> None:
    batches = opened(TensorDataset(X, Y), two, batch_size=2)

    assert batches.total == 5
    taken = list(batches)
    assert [batch.samples for batch in taken] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.args[1] for batch in taken]), Y)


class Rows:
    """A data set by its methods alone."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 5:
            raise AssertionError("beyond the end")
        return {"x": X[index].numpy(), "name": "abcde"[index]}


def test_a_sequence_is_a_data_set() -> None:
    batches = opened(Rows(), batch_size=2, unpack="kwargs", max_samples=3)

    assert batches.total == 3
    taken = list(batches)
    assert [batch.kwargs["name"] for batch in taken] == [["a", "b"], ["c"]]
    assert torch.equal(torch.cat([batch.kwargs["x"] for batch in taken]), X[:3])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


def test_an_iterable_data_set_is_batched() -> None:
    batches = opened(Stream(), batch_size=2)

    assert batches.total is None
    taken = list(batches)
    assert [batch.samples for batch in taken] == [2, 2, 1]
    assert torch.equal(torch.cat([batch.args[0] for batch in taken]), X)
    assert batches.warnings == []


def test_a_loader_of_an_iterable_data_set() -> None:
    batches = opened(DataLoader(Stream(), 2), batch_size=2)

    assert batches.total is None
    assert sizes(batches) == [2, 2, 1]


def test_a_generator_gives_batches() -> None:
    batches = opened((X[i:i + 2] for i in (0, 2, 4)), batch_size=99)  # fmt: skip

    assert (batches.source, batches.total) == ("generator", None)
    assert sizes(batches) == [2, 2, 1]
    assert batches.warnings == []


def test_a_generator_function_is_called() -> None:
    def loader() -> Iterator[Tensor]:
        yield X

    assert torch.equal(joined(opened(loader)), X)


def test_an_endless_generator_ends_at_the_limit() -> None:
    batches = opened(torch.zeros(3000, 1) for _ in itertools.count())

    assert sizes(batches) == [3000, 3000, 3000, 1000]
    assert batches.limit == UNSIZED_LIMIT == 10_000
    assert batches.warnings == ["the data does not say how long it is; stopped after 10000 samples (see --max-samples)"]


def test_an_endless_generator_ends_at_a_limit_of_ones_own() -> None:
    batches = opened((X for _ in itertools.count()), max_samples=12)

    assert sizes(batches) == [5, 5, 2]
    assert batches.warnings == []


def test_a_list_is_a_list_of_batches_without_a_limit() -> None:
    batches = opened([torch.zeros(6000, 1)] * 2)

    assert sizes(batches) == [6000, 6000]
    assert batches.warnings == []


def test_batches_without_an_axis_of_samples() -> None:
    batches = opened([torch.tensor(1.0), torch.tensor(2.0)])

    assert sizes(batches) == [1, 1]
    assert batches.warnings == [
        "the data has no tensor whose first axis counts samples; each batch counts as one sample"
    ]


def test_an_iterable_that_cannot_be_iterated() -> None:
    class Broken:
        def __iter__(self) -> Iterator[Tensor]:
            raise KeyError("no index")

    assert fault(Broken()) == "Broken cannot be iterated ('no index'); give batches"


# Random data.


def test_random_data_is_the_same_each_time() -> None:
    batches = opened("random", input_shape=(3, 2), batch_size=100, seed=4)
    data = joined(batches)

    assert data.shape == (256, 3, 2)
    assert batches.synthetic
    assert batches.total == 256
    assert batches.warnings == [
        "the inputs are random numbers: they show nothing about which units are dead on real data"
    ]
    assert torch.equal(joined(opened("random", input_shape=(3, 2), batch_size=100, seed=4)), data)
    assert not torch.equal(joined(opened("random", input_shape=(3, 2), batch_size=100, seed=5)), data)


def test_random_data_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    list(opened("random", input_shape=(2,)))

    assert torch.equal(torch.get_rng_state(), before)


def test_random_data_of_a_given_length() -> None:
    assert sizes(opened("random", input_shape=(2,), batch_size=4, max_samples=9)) == [4, 4, 1]


def test_random_data_needs_a_shape() -> None:
    with pytest.raises(UsageError) as caught:
        opened("random")

    assert str(caught.value) == "random data needs the shape of one sample; add --input-shape 3,32,32"


# Entry points.


def test_a_factory_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "loaders.py"
    path.write_text("import torch\ndef make(): return torch.ones(3, 2)\nready = torch.zeros(2, 2)\n")

    batches = opened(f"{path}:make")
    assert (batches.source, batches.total, batches.sha256) == (f"{path}:make", 3, None)
    assert torch.equal(joined(batches), torch.ones(3, 2))
    assert torch.equal(joined(opened(f"{path}:ready")), torch.zeros(2, 2))


def test_a_factory_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data_test_loaders.py").write_text("import torch\nclass Sets:\n    train = torch.ones(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    try:
        assert torch.equal(joined(opened("data_test_loaders:Sets.train")), torch.ones(3, 2))
    finally:
        sys.modules.pop("data_test_loaders", None)


def test_a_class_of_data_sets_is_built(tmp_path: Path) -> None:
    path = tmp_path / "sets.py"
    path.write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "class Set(TensorDataset):\n    def __init__(self): super().__init__(torch.ones(3, 2))\n"
    )

    assert sizes(opened(f"{path}:Set", batch_size=2)) == [2, 1]


def test_a_missing_factory(tmp_path: Path) -> None:
    path = tmp_path / "loaders.py"
    path.write_text("def make(): ...\n")

    with pytest.raises(UsageError, match=r"has no 'mak'; did you mean make\?$"):
        opened(f"{path}:mak")
    assert fault(f"{path}:make") == (
        f"{path}:make is a NoneType, not data; give a tensor, array, dict, loader, data set or iterable"
    )


def test_a_path_with_a_colon_that_exists_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "run:one"
    with path.open("wb") as file:
        np.save(file, X.numpy())

    assert torch.equal(joined(opened(str(path))), X)


# Files.


def test_a_npy_file(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X.numpy())

    batches = opened(path, batch_size=2)
    assert (batches.source, batches.total) == (str(path), 5)
    assert batches.sha256 == sha256(path.read_bytes()).hexdigest()
    assert torch.equal(joined(batches), X)


def test_a_npy_file_without_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((0, 3)))

    assert list(opened(tmp_path / "x.npy")) == []


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_file(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "x.npz", pixels=X.numpy(), mask=X.numpy() > 3, label=Y.numpy())

    batches = opened(str(tmp_path / "x.npz"), named)
    batch = only(batches)
    assert torch.equal(batch.kwargs["pixels"], X)
    assert torch.equal(batch.kwargs["mask"], X > 3)
    assert batches.warnings == ["label of the data did not go to the model (--unpack changes that)"]


@pytest.mark.parametrize("data", [X, {"x": X, "y": Y}, (X, Y), [X, X]])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file(tmp_path: Path, data: object, zipped: bool) -> None:
    torch.save(data, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)

    assert torch.equal(joined(opened(tmp_path / "x.pt", batch_size=2)), X)


def test_a_list_of_arrays_of_the_same_samples_is_no_list_of_batches(tmp_path: Path) -> None:
    torch.save([X, Y], tmp_path / "x.pt")

    for source in (tmp_path / "x.pt", [X, Y], [X.numpy(), Y.numpy()]):
        batches = opened(source, batch_size=2)
        assert torch.equal(joined(batches), X)
        assert batches.warnings == ["entry 1 of the data did not go to the model (--unpack changes that)"]


def test_a_model_of_two_inputs_takes_a_list_of_two_arrays() -> None:
    batch = only(opened([X, X + 1], lambda a, b: None))

    assert [arg.tolist() for arg in batch.args] == [X.tolist(), (X + 1).tolist()]


@pytest.mark.parametrize("name", ["needs", "breaks"])
def test_a_function_that_raises_is_no_crash(name: str, tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("def needs(x): ...\ndef breaks(): raise OSError('no disk')\n")

    with pytest.raises(DataError, match=rf"made.py:{name} raised (TypeError|OSError) when called without arguments"):
        opened(f"{tmp_path / 'made.py'}:{name}")


def test_an_archive_without_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")

    with pytest.raises(DataError, match=r"x\.npz: holds no arrays; save the inputs under their names"):
        opened(tmp_path / "x.npz")


def test_a_pt_file_of_unlike_batches(tmp_path: Path) -> None:
    torch.save([X[:3], X[3:]], tmp_path / "x.pt")

    assert sizes(opened(tmp_path / "x.pt")) == [3, 2]


def test_a_safetensors_file(tmp_path: Path) -> None:
    save_file({"pixels": X, "mask": X > 3}, tmp_path / "x.safetensors")

    batch = only(opened(tmp_path / "x.safetensors", named))
    assert torch.equal(batch.kwargs["pixels"], X)
    assert torch.equal(batch.kwargs["mask"], X > 3)


def test_the_kind_of_a_file_is_told_by_its_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X.numpy())
    np.savez(tmp_path / "b.npz", x=X.numpy())
    torch.save(X, tmp_path / "c.pt")
    save_file({"x": X}, tmp_path / "d.safetensors")

    for path in sorted(tmp_path.iterdir()):
        unnamed = path.rename(path.with_suffix(".data"))
        assert torch.equal(joined(opened(unnamed)), X), path


@pytest.mark.parametrize("suffix", ["npz", "pt", "safetensors", "npy"])
def test_the_sample_beside_a_model(tmp_path: Path, suffix: str) -> None:
    for model in (tmp_path / "net.pt", tmp_path / "folder.v1"):
        assert sample_beside(model) is None
    (tmp_path / "folder.v1").mkdir()
    (tmp_path / f"net.sample.{suffix}").touch()
    (tmp_path / f"folder.v1.sample.{suffix}").touch()

    assert sample_beside(tmp_path / "net.pt") == tmp_path / f"net.sample.{suffix}"
    assert sample_beside(tmp_path / "folder.v1") == tmp_path / f"folder.v1.sample.{suffix}"
    assert sample_beside(tmp_path / "other.pt") is None


def test_of_several_samples_npz_comes_first(tmp_path: Path) -> None:
    for suffix in ("npy", "safetensors", "pt", "npz"):
        (tmp_path / f"net.sample.{suffix}").touch()

    assert sample_beside(tmp_path / "net.pt") == tmp_path / "net.sample.npz"


def test_the_sample_beside_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model.sample.npz").touch()
    monkeypatch.chdir(tmp_path / "model")

    assert sample_beside(Path()) == tmp_path / "model.sample.npz"
    assert sample_beside(Path("/")) is None


def test_a_folder_is_no_sample(tmp_path: Path) -> None:
    (tmp_path / "net.sample.npz").mkdir()

    assert sample_beside(tmp_path / "net.pt") is None


# Hostile and wrong files.


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))

    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "x.npz", "x.data"])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_run(
    tmp_path: Path, name: str, wrapped: bool, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, marker = tmp_path / name, tmp_path / "ran"
    payload: object = {"x": X, "y": Payload(marker)} if wrapped else Payload(marker)
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)

    with pytest.raises(TrustRequired, match=re.escape(f"{path}: names posix.mkdir, which no model needs")):
        opened(path)
    assert not marker.exists()


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    path, marker = tmp_path / "x.npz", tmp_path / "ran"
    np.savez(path, x=np.array([Payload(marker)], dtype=object))

    assert fault(path) == (
        f"{path}: holds Python objects, which need pickle and could run code; save it with a numeric dtype"
    )
    assert not marker.exists()


def test_a_module_is_no_data(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(nn.Linear(2, 2), path)

    assert fault(path) == (
        f"{path}: needs torch.nn.modules.linear.Linear, which could run code, so it was not read; "
        "save tensors, dicts and lists alone"
    )


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (5, "holds a int, not data; save a tensor, or a dict or tuple of them"),
        ("text", "holds a str, not data; save a tensor, or a dict or tuple of them"),
        (None, "holds a NoneType, not data; save a tensor, or a dict or tuple of them"),
        ({"a": 1}, "the dict holds no tensors; save the inputs under their names"),
        ({}, "the dict holds no tensors; save the inputs under their names"),
        (X.to_sparse(), "holds a sparse tensor; save it dense (tensor.to_dense())"),
    ],
)
def test_a_pt_file_of_no_data(tmp_path: Path, data: object, told: str) -> None:
    torch.save(data, tmp_path / "x.pt")

    assert fault(tmp_path / "x.pt") == f"{tmp_path / 'x.pt'}: {told}"


def header(shape: str, dtype: str = "<f4") -> bytes:
    """Return the start of a .npy file that claims a shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_a_handmade_header_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(header("(2, 1)") + struct.pack("<2f", 1, 2))

    assert joined(opened(tmp_path / "x.npy")).tolist() == [[1], [2]]


@pytest.mark.parametrize("shape", ["(100_000_000_000,)", "(100000000000,)", "(-1,)", "(10**9,)", "'x'", "(99,)"])
def test_a_npy_file_that_claims_what_it_does_not_hold(tmp_path: Path, shape: str) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(header(shape) + bytes(64))

    told = fault(path)
    assert told.startswith(f"{path}: damaged")
    assert told.endswith("; save the data again")


def test_a_npz_file_whose_member_claims_400_gb(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header("(100000000000,)") + bytes(64))

    assert fault(path).startswith(f"{path}: damaged or cut short (")


def test_a_npz_bomb(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    size = 300 << 20
    block = bytes(1 << 20)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        for _ in range(size // len(block)):
            member.write(block)

    assert fault(path) == (
        f"{path}: {path.stat().st_size} bytes that would inflate to {size}, as a zip bomb does; save it as .npy instead"
    )


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.pt", "x.csv", "x"])
def test_a_text_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("1,2,3\n4,5,6\n")

    assert fault(path) == (
        f"{path}: not data that can be read (it looks like text); give .npz, .npy, .pt or .safetensors"
    )


def test_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(60))

    assert fault(path) == (
        f"{path}: not data that can be read (its kind is not known); give .npz, .npy, .pt or .safetensors"
    )


@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.pt", "x.safetensors"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()

    assert fault(tmp_path / name) == f"{tmp_path / name}: the file is empty; save the data again"


def test_a_folder(tmp_path: Path) -> None:
    assert fault(tmp_path) == f"{tmp_path}: is a folder; give a file, or file.py:name for a loader"


def test_a_missing_path(tmp_path: Path) -> None:
    path = tmp_path / "gone.npz"

    assert fault(path) == f"{path}: no such file; check the path, or give module:name for a loader"
    assert fault(str(path)) == fault(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    os.mkfifo(path)
    end = os.open(path, os.O_RDWR)
    os.write(end, b"x" * 64)  # so that this test fails, and does not hang, where the pipe is read

    try:
        assert fault(path) == f"{path}: not a regular file; give a file"
    finally:
        os.close(end)


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")

    assert fault(path) == f"{path}: a Git LFS pointer, not the data; run 'git lfs pull'"


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.pt", "x.safetensors", "old.pt"])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.6, 0.97])
def test_a_file_cut_short(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    data = torch.arange(1000.0).reshape(-1, 2)
    if name.endswith("npy"):
        np.save(path, data.numpy())
    elif name.endswith("npz"):
        np.savez(path, x=data.numpy())
    elif name.endswith("pt"):
        torch.save(data, path, _use_new_zipfile_serialization=name != "old.pt")
    else:
        save_file({"x": data}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])

    told = fault(path)
    assert told.startswith(f"{path}: damaged")
    assert told.endswith(" again")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_with_a_byte_turned_never_ends_in_another_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(X, path) if name == "x.pt" else save_file({"x": X}, path)
    content = path.read_bytes()

    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            list(opened(path))
        except DataError as error:
            assert "; " in str(error)  # noqa: PT017 (some bytes do no harm)


@pytest.mark.parametrize("name", ["x.npz", "x.pt"])
def test_a_zip_file_of_something_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")

    assert fault(path) == f"{path}: a zip, but not one that torch.save writes; give what torch.save wrote"


def test_a_damaged_safetensors_header(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")

    told = fault(path)
    assert told.startswith(f"{path}: damaged safetensors (")
    assert told.endswith("; save or download it again")
