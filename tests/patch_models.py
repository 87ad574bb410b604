"""Models whose ReLUs are hard to tell apart, each beside what it computes when the chosen ones leak.

``leaky(x, key)`` of a reference stands for the ReLU of one site.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

At = Callable[[Tensor, str], Tensor]


class Hard(nn.Module):
    """A model with a reference."""

    def reference(self, at: At, x: Tensor) -> Tensor:
        raise NotImplementedError


class Everything(Hard):
    """Module, functional, in-place, shared, looped and clamped ReLUs, TorchScript, and a branch on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(6, 6) for _ in range(7))
        self.relu, self.shared = nn.ReLU(), nn.ReLU(inplace=True)
        self.script = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()))

    def forward(self, x):
        is_positive = bool(x.detach().sum() > 0)
        x = self.relu(self.fc[0](x))
        x = F.relu(self.fc[1](x))
        x = self.shared(self.fc[2](x))
        x = self.shared(self.fc[3](x))
        for _ in range(3):
            x = self.fc[4](x).relu_()
        x = self.script(self.fc[5](x).clamp(min=0))
        return torch.relu(self.fc[6](x)) if is_positive else F.threshold(-x, 0, 0)

    def reference(self, at, x):
        is_positive = bool(x.detach().sum() > 0)
        x = at(self.fc[0](x), "relu")
        x = at(self.fc[1](x), ":relu#1")
        x = at(self.fc[2](x), "shared#1")
        x = at(self.fc[3](x), "shared#2")
        for _ in range(3):
            x = at(self.fc[4](x), ":relu#2")
        x = at(self.fc[5](x), ":clamp#1")
        inner = [m for m in self.script.children() if list(m.parameters())]
        x = at(inner[0](x), "script:relu#1")
        x = at(inner[1](x), "script:relu#2")
        return at(self.fc[6](x), ":relu#3") if is_positive else at(-x, ":threshold#1")


class OneLine(Hard):
    """Three layers through one line of code: told apart by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for fc in self.fc:
            x = F.relu(fc(x))
        return x

    def reference(self, at, x):
        for number, fc in enumerate(self.fc, 1):
            x = at(fc(x), f":relu#{number}")
        return x


class OneLineRepeated(OneLine):
    """The same, twice over: the turns come round again."""

    def forward(self, x):
        for fc in (*self.fc, *self.fc):
            x = F.relu(fc(x))
        return x

    def reference(self, at, x):
        return super().reference(at, super().reference(at, x))


class SharedInLoop(Hard):
    """One nn.ReLU after each of three layers, on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.ReLU()

    def forward(self, x):
        for fc in self.fc:
            x = self.act(fc(x))
        return x

    def reference(self, at, x):
        for number, fc in enumerate(self.fc, 1):
            x = at(fc(x), f"act#{number}")
        return x


class Act(nn.Module):
    """Calls a ReLU and holds no weights."""

    def forward(self, x):
        return F.relu(x)


class SharedBlock(Hard):
    """A block without weights, called at two places on what different layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 6), Act()

    def forward(self, x):
        x = self.act(self.a(x))
        return self.act(self.b(x))

    def reference(self, at, x):
        return at(self.b(at(self.a(x), "act:relu#1")), "act:relu#2")


class Twins(Hard):
    """Two blocks of one class: the same code at two paths."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return F.relu(self.fc(x))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Twins.Block(), Twins.Block())

    def forward(self, x):
        return self.net(x)

    def reference(self, at, x):
        return at(self.net[1].fc(at(self.net[0].fc(x), "net.0:relu#1")), "net.1:relu#1")


def helper(x: Tensor) -> Tensor:
    return F.relu(x)


class Helper(Hard):
    """A function of its own calls the ReLU, for two layers; and one line holds two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = helper(self.a(x))
        return helper(self.b(x)) + F.relu(self.c(x))

    def reference(self, at, x):
        x = at(self.a(x), ":relu#1")
        return at(self.b(x), ":relu#2") + at(self.c(x), ":relu#3")


class Comprehension(Hard):
    """Two layers in a list comprehension, beside a nested function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.ModuleList(nn.Linear(6, 6) for _ in range(2)), nn.Linear(6, 6)

    def forward(self, x):
        def finish(y):
            return F.relu(self.last(y))

        return finish(sum([F.relu(fc(x)) for fc in self.fc]))

    def reference(self, at, x):
        y = at(self.fc[0](x), ":relu#1") + at(self.fc[1](x), ":relu#2")
        return at(self.last(y), ":relu#3")


class Nested(Hard):
    """A container shared by two places of a Sequential, with a ReLU and a norm in it."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.ReLU(), nn.LayerNorm(6))
        self.net = nn.Sequential(nn.Linear(6, 6), block, nn.Linear(6, 6), block)

    def forward(self, x):
        return self.net(x)

    def reference(self, at, x):
        x = self.net[1][1](at(self.net[0](x), "net.1.0#1"))
        return self.net[1][1](at(self.net[2](x), "net.1.0#2"))


class Tied(Hard):
    """One layer object at three places, as ALBERT has it: one site."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.layers = nn.ModuleList([layer] * 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, at, x):
        for layer in self.layers:
            x = at(layer[0](x), "layers.0.1")
        return x


class PreActivation(Hard):
    """An in-place ReLU whose input is used again: what it wrote over it matters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        return self.b(self.relu(x)) + x

    def reference(self, at, x):
        x = at(self.a(x), "relu")
        return self.b(x) + x


class Checkpointed(Hard):
    """A block that is run again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Twins.Block(), nn.Linear(6, 6)

    def forward(self, x):
        return self.head(checkpoint(self.block, x, use_reentrant=False))

    def reference(self, at, x):
        return self.head(at(self.block.fc(x), "block:relu#1"))


HARD: tuple[type[Hard], ...] = (
    Everything, OneLine, OneLineRepeated, SharedInLoop, SharedBlock, Twins, Helper, Comprehension, Nested, Tied,
    PreActivation, Checkpointed,
)  # fmt: skip


def build(kind: type[Hard]) -> Hard:
    """Build a model with fixed weights."""
    torch.manual_seed(5)
    return kind()


def inputs(samples: int = 8) -> Tensor:
    """Return normal inputs."""
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(2))
