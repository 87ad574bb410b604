"""Calls of modules are seen in the threads that watch, and ``nn.Module`` is as it was when nobody does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import module_calls

MADE = nn.Module.__call__
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU())


class Meets(nn.Module):
    """Waits in its forward for somebody else, and notes how modules are called then."""

    def __init__(self, meet: Callable[[], object]) -> None:
        super().__init__()
        self.layer, self.meet = nn.Linear(4, 6), meet

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        return torch.relu(self.layer(x))


def test_the_way_modules_are_called_comes_back() -> None:
    def failing() -> None:
        assert nn.Module.__call__ is not MADE
        raise ValueError("no")

    deadcheck.scan(network(), X)
    assert nn.Module.__call__ is MADE

    with pytest.raises(deadcheck.DeadcheckError, match="no"):
        deadcheck.scan(Meets(failing), X)
    assert nn.Module.__call__ is MADE


def test_scans_in_two_threads_share_it_whichever_ends_first() -> None:
    both, ended = threading.Barrier(2), threading.Event()

    def first() -> None:
        both.wait(30)

    def second() -> None:
        both.wait(30)
        assert ended.wait(30)

    found: dict[str, int] = {}

    def run(name: str, meet: Callable[[], object]) -> None:
        found[name] = len(list(deadcheck.scan(Meets(meet), X)))

    threads = [
        threading.Thread(target=run, args=("first", first)),
        threading.Thread(target=run, args=("second", second)),
    ]
    for thread in threads:
        thread.start()
    threads[0].join(60)
    assert nn.Module.__call__ is not MADE
    ended.set()
    threads[1].join(60)

    assert found == {"first": 1, "second": 1}
    assert nn.Module.__call__ is MADE


def test_calls_in_other_threads_are_none_of_its_business() -> None:
    seen: list[nn.Module] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(module)
        return module_calls.made(module, *args, **kwargs)

    model = network()
    with module_calls.seen_by(see):
        thread = threading.Thread(target=model, args=(X,))
        thread.start()
        thread.join()
        assert seen == []
        model(X)

    assert seen == [model, *model]


def test_somebody_elses_way_of_calling_modules_is_gone_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tracer's: every layer is called by it in every batch."""
    names: list[str] = []

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        names.append(type(module).__name__)
        return MADE(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)

    deadcheck.scan(network(), X, batch_size=3)

    assert names == ["Sequential", "Linear", "ReLU", "Linear", "ReLU"] * 4
    assert nn.Module.__call__ is call


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_output_of_a_recurrent_layer_is_counted_before_its_own_hooks(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = kind(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.unsqueeze(1))[0]

    model = Recurrent()
    model.layer.register_forward_hook(lambda module, args, output: (output[0] * 0, output[1]))
    hooks = dict(model.layer._forward_hooks)

    (site,) = deadcheck.scan(model, X)

    assert site.stats.zeros.sum() == 0
    assert dict(model.layer._forward_hooks) == hooks
