"""ReLUs spelled and kept in odd ways leak like those of a model written with Leaky ReLU, gradients bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import deadcheck
from deadcheck.patch_plan import Kind, Replacement
from deadcheck.remedies.base import Choice
from tests.test_patch_zoo import layers_in_parts, planned
from tests.test_patching import result

__all__ = ["layers_in_parts"]  # a fixture that all tests here use

ALPHA = 0.1
Act = Callable[[Tensor], Tensor]


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, ALPHA)


class Odd(nn.Module):
    """A model of ReLUs or, when ``leaks``, of what should stand in for them."""

    shape: tuple[int, ...] = (6,)

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.leaks = leaks
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.build()

    def build(self) -> None:
        """Make the other parts."""

    def act(self, relu: Act) -> Act:
        return leaky if self.leaks else relu

    def module(self, relu: nn.Module | None = None) -> nn.Module:
        return nn.LeakyReLU(ALPHA) if self.leaks else relu or nn.ReLU(inplace=True)


class OwnReLU(nn.ReLU):
    """Named like no ReLU of torch."""


class Halved(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) / 2


class Subclassed(Odd):
    def build(self) -> None:
        self.first = self.module(OwnReLU())
        self.second = (lambda x: leaky(x) / 2) if self.leaks else Halved()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.b(self.first(self.a(x))))  # type: ignore[no-any-return]


class Held(Odd):
    """Kept as attributes: partial functions, a lambda, functions of torch, a method, an operator, in a dict."""

    def build(self) -> None:
        self.acts = {
            name: self.act(relu)
            for name, relu in {
                "partial": functools.partial(F.relu, inplace=True),
                "clamp": functools.partial(torch.clamp, min=0),
                "lambda": lambda x: F.relu(x),
                "torch": torch.relu,
                "method": Tensor.relu,
                "operator": torch.ops.aten.relu,
                "by name": getattr(F, "".join(["re", "lu"])),
            }.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        for act in self.acts.values():
            x = act(self.a(x) - 0.1) + x
        return x


class Kept(Odd):
    """Modules in a dict of modules, in a plain list, and made while running."""

    def build(self) -> None:
        self.kinds = nn.ModuleDict({"relu": self.module(), "gelu": nn.GELU()})
        self.plain = [self.module()]

    def forward(self, x: Tensor) -> Tensor:
        made = nn.LeakyReLU(ALPHA) if self.leaks else nn.ReLU()
        return made(self.plain[0](self.b(self.kinds["relu"](self.a(x)))) - 1)  # type: ignore[no-any-return]


class Reparametrised(Odd):
    def build(self) -> None:
        self.a, self.b = parametrizations.weight_norm(self.a), parametrizations.spectral_norm(self.b)
        self.old = torch.nn.utils.weight_norm(nn.Linear(6, 6))
        self.relu = self.module()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.relu)(self.old(self.relu(self.b(self.relu(self.a(x))))))


class Hooked(Odd):
    """A ReLU called in a hook, and one between hooks."""

    def build(self) -> None:
        self.relu = self.module()
        self.relu.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.relu.register_forward_hook(lambda module, args, out: out + 1)
        self.b.register_forward_hook(lambda module, args, out: self.act(F.relu)(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x)))  # type: ignore[no-any-return]


class Spread(Odd):
    """Called in comprehensions, by ``map``, on both signs, and with named arguments."""

    def forward(self, x: Tensor) -> Tensor:
        act = self.act(lambda z: torch.clamp(input=z, min=0.0, max=None) if z.sum() > 0 else F.relu(input=z))
        parts = [act(layer(x)) for layer in (self.a, self.b)]
        return torch.stack([*map(act, (parts[0] - 1, -parts[1])), sum(act(part - 0.5) for part in parts)])  # type: ignore[list-item]


class Mapped(Odd):
    """Under ``vmap``, and through ``functional_call``."""

    def build(self) -> None:
        self.net = nn.Sequential(self.a, self.module(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.func.functional_call(self.net, dict(self.net.named_parameters()), (x,))
        return torch.vmap(lambda row: self.act(F.relu)(self.b(row)))(y)


class Traced(Odd):
    """A traced part, called twice."""

    def build(self) -> None:
        class Inner(Odd):
            def forward(self, x: Tensor) -> Tensor:
                return self.act(F.relu)(self.b(self.act(torch.relu)(self.a(x))))

        torch.manual_seed(2)
        self.inner = torch.jit.trace(Inner(self.leaks), torch.zeros(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))  # type: ignore[no-any-return]


class Typed(Odd):
    kind = torch.float64

    def build(self) -> None:
        self.relu = self.module()
        self.to(self.kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.relu)(self.b(self.relu(self.a(x.to(self.kind)))))


class Half(Typed):
    kind = torch.float16


class Brain(Typed):
    kind = torch.bfloat16


class Layers(Odd):
    """Encoder and decoder layers, told their ReLU as a function and as a module."""

    shape = (5, 8)

    def build(self) -> None:
        torch.manual_seed(2)
        make: Any = functools.partial(nn.TransformerEncoderLayer, 8, 2, 16, batch_first=True)
        self.named = make(activation=leaky if self.leaks else "relu")
        self.held = make(activation=self.module(nn.ReLU()))
        self.last = nn.TransformerDecoderLayer(8, 2, 16, activation=self.act(F.relu), batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.held(self.named(x))
        return self.last(x, y)  # type: ignore[no-any-return]


class Bounded(Odd):
    """Areas of boxes and distances beside ReLUs, one of which is spelled as a bound: those stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        areas = (x[:, 1:3] - x[:, :2]).clamp(min=0).prod(1, keepdim=True)
        if self.leaks:
            return leaky(self.b(leaky(self.a(x)))) + areas
        return self.b(F.relu(self.a(x))).clamp(min=0) + areas


class BoundedOutside(Odd):
    """The same where the ReLU is a module, and no call is named."""

    def build(self) -> None:
        self.relu = self.module(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.relu(self.a(x))) + (x[:, 1:3] - x[:, :2]).clamp(min=0).prod(1, keepdim=True)


KINDS: tuple[type[Odd], ...] = (
    Bounded, BoundedOutside,
    Subclassed, Held, Kept, Reparametrised, Hooked, Spread, Mapped, Traced, Typed, Half, Brain, Layers,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_they_leak_with_the_gradients_of_leaky_relu(kind: type[Odd]) -> None:
    torch.manual_seed(0)
    model, wanted = kind(leaks=False).eval(), kind(leaks=True).eval()
    wanted.load_state_dict(model.state_dict())
    x = torch.randn(9, *kind.shape)
    patched = deadcheck.apply_patch(model, planned(model, x, Choice(Replacement(Kind.LEAKY, ALPHA))))
    outputs = [net(x) for net in (patched, wanted)]
    gradients = [
        torch.autograd.grad(out.double().square().sum(), list(net.parameters()), allow_unused=True)
        for net, out in zip((patched, wanted), outputs, strict=True)
    ]

    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model(x))
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x) - 1


class OutOfReach(Odd):
    """A function of TorchScript, a result written elsewhere, and one ReLU that can be changed."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(scripted(F.relu(self.a(x)))).detach()
        return torch.clamp(z, min=0, out=torch.empty_like(z))


def test_what_still_runs_is_listed_and_not_among_what_was_changed(tmp_path: Path) -> None:
    found = result(OutOfReach(leaks=False), tmp_path)

    assert [site.change.site for site in found.sites] == [":relu#1"]
    assert {item.where: item.reason for item in found.skipped} == dict.fromkeys(
        (":relu#2", ":clamp#1"), "still runs: it is called where nothing can replace it, as in a TorchScript function"
    )
    assert np.isfinite(found.drift.relative if found.drift is not None else np.nan)
    assert found.exit_code == 3
