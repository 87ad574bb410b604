"""A scan leaves the model and torch as they were, also after an exception."""

from __future__ import annotations

import gc
import hashlib
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import deadcheck
from deadcheck import passes, pipeline, preserve
from deadcheck.config import ScanSettings
from deadcheck.errors import DataError, ForwardError, ProbeError
from deadcheck.formats.base import LoadedModel
from deadcheck.pre_activations import PreActivations
from deadcheck.probe import Probe
from deadcheck.sites import ModelIdentity
from deadcheck.stats import SiteCounter


class Stateful(nn.Module):
    """Keeps a hidden state in a buffer, an attribute and a list; draws random numbers; has a frozen BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.frozen = nn.BatchNorm1d(4).eval()
        self.register_buffer("hidden", torch.zeros(4))
        self.last: Tensor | None = None
        self.log: list[Tensor] = []
        self.calls = 0
        self.fail_at = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise ValueError("the model broke")
        y = torch.relu(self.drop(self.frozen(self.bn(self.fc(x)))) + self.hidden)
        self.hidden += y.mean(0)
        self.hidden = self.hidden * 0.5
        self.last = y
        self.log.append(y)
        self.fresh = torch.rand(2) + random.random() + np.random.rand()
        return y


def fingerprint(model: nn.Module) -> str:
    """Return a digest of all that a scan must not change."""
    parts: list[object] = []
    for name, module in model.named_modules():
        parts += [name, module.training, sorted(vars(module))]
        parts += [len(v) for k, v in sorted(vars(module).items()) if "hooks" in k and v is not None]
        parts += [(k, repr(v)) for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, list, Tensor))]
    for name, tensor in model.state_dict().items():
        parts += [name, tensor.numpy().tobytes()]
    parts += [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    parts += [torch.get_rng_state().numpy().tobytes(), pickle.dumps(random.getstate()), str(np.random.get_state())]
    parts += [torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()]
    parts += [torch.get_num_threads(), torch.is_inference_mode_enabled()]
    parts += [len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)]
    parts += [id(nn.Module.__call__)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def stateful() -> Stateful:
    torch.manual_seed(0)
    model = Stateful().train()
    model.frozen.eval()
    return model


DATA = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))


def test_a_scan_changes_nothing() -> None:
    model = stateful()
    before = fingerprint(model)

    deadcheck.scan(model, DATA, batch_size=10)

    assert fingerprint(model) == before
    assert model.bn.training
    assert not model.frozen.training


def test_devices_that_nobody_uses_are_left_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` leaves one that a device takes when it is first used, in place of the user's own."""
    model, seeded = stateful(), list[object]()
    for kind in (torch.cuda, torch.xpu):
        monkeypatch.setattr(kind, "is_initialized", lambda: False)
        monkeypatch.setattr(kind, "manual_seed_all", seeded.append)

    deadcheck.scan(model, DATA, batch_size=10)
    preserve.seed_generators(3)

    assert not seeded
    assert torch.initial_seed() == 3


def test_devices_in_use_are_seeded_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ["as it was"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(state))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: state.__setitem__(slice(None), states))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: state.__setitem__(0, f"seed {seed}"))
    before = preserve.Randomness()

    preserve.seed_generators(3)
    seeded = list(state)
    before.restore()

    assert (seeded, state) == (["seed 3"], ["as it was"])


def test_the_fingerprint_can_tell() -> None:
    model = stateful()
    before = fingerprint(model)

    model(DATA)

    assert fingerprint(model) != before


def test_a_forward_that_raises_changes_nothing() -> None:
    model = stateful()
    model.fail_at = 3
    before = fingerprint(model)

    with pytest.raises(ForwardError, match="the model broke"):
        deadcheck.scan(model, DATA, batch_size=10)

    assert fingerprint(model) == before


def test_a_loader_that_raises_changes_nothing_and_names_its_batch() -> None:
    model = stateful()
    before = fingerprint(model)

    def loader() -> Iterator[Tensor]:
        for number in range(10):
            if number == 6:
                raise OSError("disk gone")
            yield DATA[:3]

    with pytest.raises(DataError, match=r"raised OSError at batch 7 \(disk gone\), after 18 samples"):
        deadcheck.scan(model, loader())

    assert fingerprint(model) == before


def test_an_interrupt_changes_nothing() -> None:
    model = stateful()
    before = fingerprint(model)

    def loader() -> Iterator[Tensor]:
        yield DATA
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deadcheck.scan(model, loader())

    assert fingerprint(model) == before


def test_outputs_are_bit_equal_with_and_without_the_probe() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(inplace=True), layer).eval()
    data = torch.randn(4, 3, 8)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        plain = model(data)
        with Probe(model) as probe, probe.batch((data,), {}, samples=4, first_sample=0):
            probed = model(data)
    torch.backends.mha.set_fastpath_enabled(True)

    assert torch.equal(plain, probed)


def test_state_is_carried_between_batches_and_put_back_at_the_end() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 0

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            return torch.relu(x - self.steps)

    model = Counter()
    # Inputs of 2: the first batch passes 1, the second and third nothing.
    stats = deadcheck.scan(model, torch.full((3, 1), 2.0), batch_size=1).sites[0].stats

    assert stats.fired.tolist() == [1]
    assert model.steps == 0


def test_a_probe_inside_a_probe_is_refused() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            deadcheck.scan(nn.Sequential(nn.ReLU()), x)
            return x

    with pytest.raises(ProbeError, match="already running in this thread"):
        deadcheck.scan(Nested(), DATA)
    assert deadcheck.scan(nn.Sequential(nn.Linear(6, 3), nn.ReLU()), DATA).units == 3


def test_two_threads_do_not_disturb_one_another() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for width in (5, 9)]
    alone = [deadcheck.scan(model, DATA, batch_size=2) for model in models]
    together: dict[int, list[deadcheck.Diagnosis]] = {0: [], 1: []}

    def work(index: int) -> None:
        for _ in range(5):
            together[index].append(deadcheck.scan(models[index], DATA, batch_size=2))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for index, expected in enumerate(alone):
        assert len(together[index]) == 5
        for diagnosis in together[index]:
            assert [s.stats.zeros.tolist() for s in diagnosis] == [s.stats.zeros.tolist() for s in expected]
    assert torch.backends.mha.get_fastpath_enabled()


def left_in_cycles(run: Callable[[], object]) -> list[str]:
    """Return the kinds of what stays in memory until Python looks for garbage, once it is warm."""
    run()
    gc.collect()
    gc.disable()
    try:
        before = {id(item) for item in gc.get_objects()}
        run()
        kinds = (Tensor, Probe, SiteCounter, nn.Module)
        return [type(x).__name__ for x in gc.get_objects() if id(x) not in before and isinstance(x, kinds)]
    finally:
        gc.enable()


@pytest.fixture
def long_scans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have two threads, and eight batches run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(passes, "LONG", 8)
    monkeypatch.setattr(passes, "SLOW", 0.0)
    monkeypatch.setattr(passes, "GAIN", 1e9)
    yield
    torch.set_num_threads(before)


def failing_scan() -> None:
    with pytest.raises(ForwardError):
        deadcheck.scan(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 6))


def watched_scan() -> None:
    loaded = LoadedModel(WHOLE, ModelIdentity(None, None, None, "object", "object"), ())
    settings = ScanSettings(batch_size=4)
    watch = PreActivations()
    pipeline.measure(loaded, pipeline.open_data(torch.randn(8, 6), settings, loaded), settings, watch=watch)
    assert sum(counts.total for counts in watch.counts.values()) == 8 * 5


def scan_with_lstm() -> None:
    deadcheck.scan(nn.Sequential(nn.ReLU(), nn.LSTM(6, 5, batch_first=True)), torch.randn(8, 3, 6))


WHOLE = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.GELU())


@pytest.mark.usefixtures("long_scans")
@pytest.mark.parametrize(
    "run",
    [
        *(partial(deadcheck.scan, WHOLE, torch.randn(64, 6), batch_size=4, stats=x) for x in ("full", "verdict")),
        partial(deadcheck.scan, WHOLE, torch.randn(8, 6)),
        partial(deadcheck.scan, torch.jit.trace(WHOLE, torch.randn(2, 6)), torch.randn(8, 6)),
        watched_scan,
        failing_scan,
        scan_with_lstm,
    ],
)
def test_nothing_that_a_scan_counted_stays_in_memory(run: Callable[[], object]) -> None:
    assert left_in_cycles(run) == []


def test_a_scan_does_not_import_dynamo() -> None:
    code = (
        "import sys, torch, deadcheck\n"
        "deadcheck.scan(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), torch.randn(4, 3))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    root = Path(__file__).parent.parent

    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
