"""Models with planted deaths: which units never fire follows from weights and data, not from a measurement.

Inputs lie in [-0.5, 0.5] (one number is 1), and a row of weights sums to 1 in absolute value. So no sum of products
leaves [-1, 1], nor [-sqrt(8), sqrt(8)] behind a layer norm of 8 features: a bias of -3 shuts a unit for good, and one
of 3 opens it. Nearly every sample stands in the data with its opposite too, so a unit without a bias in a first layer
fires on one of the two. Further layers have no negative weights: such a unit fires wherever one that feeds it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 512
SHUT, OPEN = -3.0, 3.0
NORM_SHUT = -200.0
"""For a batch norm that trains: what it normalises is below sqrt(512 * 36) deviations."""

FIRST, SECOND = frozenset({1, 3, 6}), frozenset({0, 5})
"""Dead units of the first and of the second layer of most cases."""


@dataclass(frozen=True)
class Case:
    """A model and the deaths in it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Shape of one sample."""

    dead: tuple[frozenset[int], ...] = (FIRST, SECOND)
    """Dead units of each layer, in the order in which the layers run."""

    axis: int = 1
    """Axis of the units, for tools that ask their user for it."""


def data(shape: tuple[int, ...]) -> Tensor:
    """Return samples and their opposites; the first number of the last sample is larger than any other."""
    half = torch.rand(SAMPLES // 2, *shape, generator=torch.Generator().manual_seed(1)) - 0.5
    both = torch.cat([half, -half])
    both.view(SAMPLES, -1)[-1, 0] = 1.0
    return both


@torch.no_grad()
def rows(weight: Tensor, *, first: bool = False) -> None:
    """Let every row sum to 1 in absolute value, without negative weights unless it is a first layer's."""
    weight.div_(weight.flatten(1).abs().sum(1).view(-1, *[1] * (weight.dim() - 1)))
    if not first:
        weight.abs_()


@torch.no_grad()
def shut(bias: Tensor, dead: frozenset[int], *, live: float = 0.0, by: float = SHUT) -> None:
    """Set the bias of dead and live units."""
    bias.fill_(live)[sorted(dead)] = by


def linear(width_in: int, width: int, dead: frozenset[int] = frozenset(), *, first: bool = False) -> nn.Linear:
    """Return a linear layer with dead units."""
    layer = nn.Linear(width_in, width)
    rows(layer.weight, first=first)
    shut(layer.bias, dead)
    return layer


def conv(width_in: int, width: int, dead: frozenset[int] = frozenset(), *, first: bool = False) -> nn.Conv2d:
    """Return a convolution with dead channels."""
    layer = nn.Conv2d(width_in, width, 3, padding=1)
    rows(layer.weight, first=first)
    shut(layer.bias, dead)
    return layer


def norm(kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d], width: int, dead: frozenset[int]) -> nn.Module:
    """Return a batch norm that shuts units."""
    layer = kind(width)
    shut(layer.bias, dead, by=NORM_SHUT)
    return layer


class Spelled(nn.Module):
    """Two layers whose ReLU is a function, or one module for both."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(6, 8, FIRST, first=True), linear(8, 8, SECOND), linear(8, 3)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.relu(self.b(self.relu(self.a(x)))))
        return y


def modules(kind: Callable[[], nn.Module]) -> nn.Sequential:
    """Two layers, each with a ReLU module of its own."""
    return nn.Sequential(linear(6, 8, FIRST, first=True), kind(), linear(8, 8, SECOND), kind(), linear(8, 3))


def one_firing() -> nn.Module:
    """Two layers; unit 4 of the first one fires on the last sample alone, so it is not dead."""
    model = modules(nn.ReLU)
    with torch.no_grad():
        model[0].weight[4] = torch.eye(6)[0]
        model[0].bias[4] = -0.75
    return model


def normed() -> nn.Module:
    """Batch norms shut the units."""
    return nn.Sequential(
        linear(6, 8, first=True), norm(nn.BatchNorm1d, 8, FIRST), nn.ReLU(),
        linear(8, 8), norm(nn.BatchNorm1d, 8, SECOND), nn.ReLU(), linear(8, 3),
    )  # fmt: skip


def channels() -> nn.Module:
    """Two convolutions."""
    layers = (conv(3, 8, FIRST, first=True), nn.ReLU(), conv(8, 12, SECOND), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(12, 3))


class Residual(nn.Module):
    """Basic block of a ResNet: one in-place ReLU for both layers, the second one after ``+=``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(8, 8, first=True), norm(nn.BatchNorm2d, 8, FIRST)
        self.conv2, self.bn2 = conv(8, 8), norm(nn.BatchNorm2d, 8, SECOND)
        self.relu = nn.ReLU(inplace=True)
        self.head = linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        y: Tensor = self.head(self.relu(out).mean((2, 3)))
        return y


class Recurrent(nn.Module):
    """nn.RNN of two layers; a head reads the last step.

    Rows of recurrent weights sum to 1/4, so states stay below 1 / (1 - 1/4) in the first layer and 16/9 in the second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(6, 8, 2, nonlinearity="relu", batch_first=True), linear(8, 3)
        for number, dead in enumerate((FIRST, SECOND)):
            rows(getattr(self.rnn, f"weight_ih_l{number}"), first=number == 0)
            rows(getattr(self.rnn, f"weight_hh_l{number}"))
            getattr(self.rnn, f"weight_hh_l{number}").data.div_(4)
            shut(getattr(self.rnn, f"bias_ih_l{number}"), dead)
            shut(getattr(self.rnn, f"bias_hh_l{number}"), frozenset())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0][:, -1])
        return y


def encoder() -> nn.Module:
    """Encoder layer, which torch runs as one fused operator when it does not train."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="relu", batch_first=True)
    head = linear(8, 3)
    for module, dead in ((layer.linear1, frozenset({2, 7, 11})), (head, frozenset())):
        rows(module.weight, first=True)
        shut(module.bias, dead, live=OPEN)
    rows(layer.linear2.weight)
    return nn.Sequential(layer, head)


def leaky() -> nn.Module:
    """A leak instead of 0: the input of the planted units never is above 0."""
    head = linear(8, 3)
    shut(head.bias, frozenset(), live=OPEN)
    return nn.Sequential(linear(6, 8, FIRST, first=True), nn.LeakyReLU(), head)


def scripted() -> nn.Module:
    """Return a TorchScript program."""
    program: nn.Module = torch.jit.script(modules(nn.ReLU).eval())
    return program


def exported() -> nn.Module:
    """Return an exported program, as a module."""
    batch = {0: torch.export.Dim.AUTO}
    return torch.export.export(modules(nn.ReLU).eval(), (data((6,)),), dynamic_shapes=(batch,)).module()


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "x.relu_()": lambda x: x.relu_(),
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "F.threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "maximum(x, 0)": lambda x: torch.maximum(x, x.new_zeros(())),
    "torch.where(x > 0, x, 0)": lambda x: torch.where(x > 0, x, 0.0),
    "x * (x > 0)": lambda x: x * (x > 0),
}

CASES: dict[str, Case] = {
    "nn.ReLU": Case(lambda: modules(nn.ReLU), (6,)),
    "nn.ReLU, in place": Case(lambda: modules(lambda: nn.ReLU(inplace=True)), (6,)),
    "nn.ReLU6": Case(lambda: modules(nn.ReLU6), (6,)),
    **{name: Case(lambda relu=relu: Spelled(relu), (6,)) for name, relu in SPELLINGS.items()},  # type: ignore[misc]
    "one nn.ReLU for two layers": Case(lambda: Spelled(nn.ReLU()), (6,)),
    "batch norm before ReLU": Case(normed, (6,)),
    "convolutions": Case(channels, (3, 6, 6)),
    "residual block": Case(Residual, (8, 6, 6)),
    "tokens (N, T, C)": Case(lambda: modules(nn.ReLU), (5, 6), axis=-1),
    "nn.RNN with ReLU": Case(Recurrent, (5, 6), axis=-1),
    "TransformerEncoderLayer": Case(encoder, (5, 8), (frozenset({2, 7, 11}),), axis=-1),
    "LeakyReLU never above 0": Case(leaky, (6,), (FIRST,)),
    "a unit that fires once": Case(one_firing, (6,)),
    "TorchScript": Case(scripted, (6,)),
    "torch.export": Case(exported, (6,)),
}
"""Name -> case."""

NOT_MEASURED = ("torch.where(x > 0, x, 0)", "x * (x > 0)")
"""Cases of which a scan says that it does not measure them."""


def built(case: Case) -> nn.Module:
    """Build the model of a case, the same weights each time, in eval mode."""
    torch.manual_seed(0)
    model = case.build()
    return model if isinstance(model, torch.fx.GraphModule) else model.eval()


SCORES: dict[str, str] = {
    "exact": "every planted death, and no other",
    "part": "some layers are right, the others were not reported",
    "wrong": "a layer was reported with other units, or another number of them",
    "not seen": "nothing dead was reported",
    "raised": "it raised",
}
"""Score -> what it means."""


def judged(found: Mapping[str, frozenset[int] | int], dead: tuple[frozenset[int], ...]) -> str:
    """Return the score of what was found, given the dead units of each layer.

    Names of layers are not compared, and deaths that come up again at the layer before or after are the same deaths.
    Where a tool gives no units but numbers of them, these are compared.
    """
    seen = {units for units in found.values() if units}
    counted = any(isinstance(units, int) for units in seen)
    truth = {len(units) if counted else units for units in dead}
    if not seen:
        return "not seen"
    return "exact" if seen == truth else "part" if seen < truth else "wrong"
