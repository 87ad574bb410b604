"""Which calls are a ReLU, seen above autograd, whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deadcheck.relu_calls import ReluCall, relu_call


def call_of(code: str, x: Tensor, *, clipped: bool = False) -> ReluCall | None:
    """Run an expression and return the last ReLU that was recognised in it."""
    found: list[ReluCall] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            call = relu_call(func, args, kwargs or {}, clipped=clipped)
            if call is not None:
                found.append(call)
            return func(*args, **(kwargs or {}))

    with Watch():
        eval(code, {"x": x, "F": F, "torch": torch, "zero": torch.zeros(()), "zeros": torch.zeros(3)})
    return found[0] if found else None


X = torch.tensor([-1.0, 0.0, 2.0])


@pytest.mark.parametrize(
    "code",
    ["F.relu(x)", "torch.relu(x)", "x.relu()", "x.clamp(min=0)", "x.clamp(0)", "torch.clamp(x, 0.0)", "x.clip(min=0)",
     "torch.clip(x, 0)", "x.clamp_min(0)", "torch.clamp_min(x, 0)", "F.threshold(x, 0, 0)", "torch.threshold(x, 0, 0)",
     "torch.maximum(x, zero)", "torch.max(x, zeros)", "x.maximum(zeros)", "x.max(zero)", "F.leaky_relu(x, 0.0)",
     "F.hardtanh(x, 0, float('inf'))", "x.clamp(0, float('inf'))", "torch.ops.aten.relu(x)",
     "torch.ops.aten.relu.default(x)", "torch.nn.ReLU()(x)", "F.relu(input=x)", "torch.clamp(input=x, min=0)"],
)  # fmt: skip
def test_every_spelling_of_relu(code: str) -> None:
    call = call_of(code, X.clone())

    assert call is not None
    assert torch.equal(call.input, X)
    assert (call.inplace, call.ceiling) == (False, None)


@pytest.mark.parametrize(
    "code",
    ["x.relu_()", "torch.relu_(x)", "F.relu(x, inplace=True)", "F.relu(x, True)", "x.clamp_(min=0)", "x.clip_(0)",
     "torch.clamp_min_(x, 0)", "F.threshold(x, 0, 0, True)", "F.threshold_(x, 0.0, 0.0)", "F.leaky_relu(x, 0.0, True)",
     "F.leaky_relu_(x, 0.0)", "torch.nn.ReLU(inplace=True)(x)"],
)  # fmt: skip
def test_those_that_write_over_their_input(code: str) -> None:
    call = call_of(code, X.clone())

    assert call is not None
    assert call.inplace


@pytest.mark.parametrize("code", ["F.relu6(x)", "F.hardtanh(x, 0, 6)", "x.clamp(0, 6)", "torch.nn.ReLU6()(x)"])
def test_those_with_a_ceiling_count_when_asked(code: str) -> None:
    assert call_of(code, X.clone()) is None
    call = call_of(code, X.clone(), clipped=True)
    assert call is not None
    assert call.ceiling == 6


@pytest.mark.parametrize(
    "code",
    ["x.clamp(min=0.1)", "x.clamp(max=0)", "x.clamp(-1, 1)", "x.max(0)", "x.max(dim=0)", "torch.max(x)", "x.max()",
     "F.threshold(x, 0.1, 0)", "F.threshold(x, 0, 1)", "torch.maximum(x, x - 1)", "torch.maximum(x, torch.ones(3))",
     "F.leaky_relu(x, 0.1)", "F.gelu(x)", "x.long().clamp(min=0)", "torch.clamp(x, 0, out=torch.empty(3))",
     "torch.maximum(x, torch.zeros(2, 3))", "torch.maximum(x, torch.zeros(3, dtype=torch.float64))", "x.sum()"],
)  # fmt: skip
def test_what_is_none(code: str) -> None:
    assert call_of(code, X.clone(), clipped=True) is None


def test_a_recurrent_cell_gives_the_input_of_its_relu() -> None:
    torch.manual_seed(0)
    cell = torch.nn.RNNCell(3, 4, nonlinearity="relu")
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    call = relu_call(torch.rnn_relu_cell, (x, h, *cell.parameters()), {}, clipped=False)

    assert call is not None
    assert torch.equal(call.input.relu(), cell(x, h))
