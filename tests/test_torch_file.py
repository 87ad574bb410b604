"""What torch.save wrote is read as torch itself reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deadcheck import torch_file
from deadcheck.pickles import Inert


def quantised(per_channel: bool) -> Tensor:
    values = torch.arange(6.0).reshape(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if per_channel:
            return torch.quantize_per_channel(values, torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3), 0, torch.qint8)
        return torch.quantize_per_tensor(values, 0.1, 3, torch.quint8)


def compressed(make: Callable[[Tensor], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(torch.eye(4) * 3)


COMPLEX = torch.tensor([1 + 2j, 3 - 4j])
TENSORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(1.5),
    "empty": lambda: torch.ones(0, 3),
    "view": lambda: torch.arange(12.0).reshape(3, 4).T[1:, ::2],
    "expanded": lambda: torch.arange(3.0).expand(2, 3),
    "channels-last": lambda: torch.arange(24.0).reshape(1, 4, 2, 3).to(memory_format=torch.channels_last),
    "parameter": lambda: nn.Parameter(torch.ones(2), requires_grad=False),
    "complex": lambda: COMPLEX,
    "conjugate": lambda: COMPLEX.conj(),
    "imaginary-part-of-a-conjugate": lambda: COMPLEX.conj().imag,
    "bfloat16": lambda: torch.arange(3.0).to(torch.bfloat16),
    "float8": lambda: torch.arange(3.0).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.arange(3).to(torch.uint16),
    "bool": lambda: torch.tensor([True, False]),
    "quantised": lambda: quantised(False),
    "quantised-by-channel": lambda: quantised(True),
    "sparse": lambda: compressed(lambda dense: dense.to_sparse()),
    "sparse-csr": lambda: compressed(lambda dense: dense.to_sparse_csr()),
    "sparse-csc": lambda: compressed(lambda dense: dense.to_sparse_csc()),
    "sparse-bsr": lambda: compressed(lambda dense: dense.to_sparse_bsr((2, 2))),
}


def same(expected: Tensor, given: Tensor) -> bool:
    assert (given.dtype, given.shape, given.layout) == (expected.dtype, expected.shape, expected.layout)
    if expected.is_quantized:
        expected, given = expected.dequantize(), given.dequantize()
    if expected.layout is not torch.strided:
        expected, given = expected.to_dense(), given.to_dense()
    if expected.dtype.itemsize == 1:
        expected, given = expected.view(torch.uint8), given.view(torch.uint8)
    return torch.equal(expected.resolve_conj().resolve_neg(), given)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", TENSORS)
def test_a_tensor_is_what_was_saved(kind: str, as_zip: bool, tmp_path: Path) -> None:
    tensor = TENSORS[kind]()
    torch.save({"x": tensor}, tmp_path / "x.pt", _use_new_zipfile_serialization=as_zip)

    given = torch_file.load(tmp_path / "x.pt").root["x"]

    assert same(tensor, given)
    assert type(given) is type(tensor)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_named_and_not_made(layout: torch.layout, tmp_path: Path) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    torch.save({"x": nested, "y": torch.ones(2)}, tmp_path / "x.pt")

    root = torch_file.load(tmp_path / "x.pt").root

    assert isinstance(root["x"], Inert)
    assert torch.equal(root["y"], torch.ones(2))
