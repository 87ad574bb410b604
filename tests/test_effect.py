"""How far outputs moved and which units a gradient reaches, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deadcheck.batch import Batch
from deadcheck.effect import Incoming, drift, gradients, incoming, seconds_of
from deadcheck.patch_plan import Kind, Replacement
from tests.test_patch_zoo import scanned


def batch(x: Tensor, labels: Tensor | None = None) -> Batch:
    return Batch((x,), {}, len(x), labels)


def test_drift_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    moved = torch.tensor([[0.0, 1.0], [2.5, 0.0], [0.3, 0.4]])
    found = drift(lambda b: [b.args[0]], lambda b: [b.args[0] + moved], [batch(x, torch.tensor([1, 1, 0]))], 0)

    # |(0, 1)| / |(3, 4)| = 0.2; |(2.5, 0)| / |(0, 2)| = 1.25; where the old output is 0, |(0.3, 0.4)| = 0.5 itself.
    assert found.relative == pytest.approx((0.2 + 1.25 + 0.5) / 3)
    assert found.largest == 2.5
    # Largest entries before: 1, 1, 0; after: (3, 5) 1, (2.5, 2) 0, (0.3, 0.4) 1.
    assert (found.decisions, found.decisions_changed) == (3, 2)
    assert (found.right_before, found.right_after) == (3, 1)
    assert (found.samples, found.nonfinite) == (3, 0)


def test_numbers_that_become_nan_are_counted_and_left_out_of_the_mean() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, math.nan]])
    new = torch.tensor([[math.nan, 1.0], [math.inf, math.nan]])
    found = drift(lambda b: [x], lambda b: [new], [batch(x)], 0)

    assert found.nonfinite == 2
    assert math.isnan(found.relative)


def test_outputs_without_classes_have_no_decisions() -> None:
    for shape in ((4,), (4, 1)):
        found = drift(
            lambda b, s=shape: [torch.ones(s)], lambda b, s=shape: [torch.ones(s) * 2], [batch(torch.ones(4))], 0
        )

        assert (found.decisions, found.right_before) == (0, None)
        assert found.relative == 1


@pytest.mark.parametrize(("shape", "decisions"), [((4, 5), 4), ((4, 7, 5), 28), ((4, 5, 3, 2), 24)])
def test_classes_stand_where_they_usually_do(shape: tuple[int, ...], decisions: int) -> None:
    found = drift(lambda b: [torch.zeros(shape)], lambda b: [torch.ones(shape)], [batch(torch.ones(4))], 0)

    assert found.decisions == decisions


def test_both_models_see_the_same_random_numbers() -> None:
    noisy = nn.Dropout(0.5).train()
    found = drift(lambda b: [noisy(b.args[0])], lambda b: [noisy(b.args[0])], [batch(torch.ones(8, 8))] * 3, 0)

    assert found.largest == 0


class Net(nn.Module):
    """Two layers; unit 1 of the first is dead by its bias, unit 2 by its outgoing weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.a.bias[1] = -100
            self.b.weight[:, 2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]


class Experts(nn.Module):
    """Two experts in one parameter, and a layer whose rows are cut in two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(2, 4, 3)), nn.Parameter(torch.randn(2, 3, 2))
        self.wide = nn.Parameter(torch.randn(9, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = sum(torch.relu(x @ self.up[i]) @ self.down[i] * (2 * i + 1) for i in range(2))
        return torch.relu(y @ self.wide[:5].T).sum(1) + torch.relu(y @ self.wide[5:].T).sum(1)  # type: ignore[operator]


def test_the_gradient_of_an_expert_is_that_of_its_own_entry() -> None:
    net, x = Experts(), torch.randn(16, 4)
    _, sightings = scanned(net, x)
    where = [incoming(net, record) for record in sightings.records]

    assert where[:2] == [Incoming((("up", (i,), 1),), 0, 3) for i in range(2)]
    assert where[2:] == [f"which rows of 'wide{cut}' make its units is not known" for cut in ("", "[10:]")]

    sites = {str(i): where[i] for i in range(2)}
    found = gradients(net, lambda b: [net(*b.args)], [batch(x)], sites, 0)  # type: ignore[arg-type]
    signs = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(0)) * 2 - 1
    (gradient,) = torch.autograd.grad((net(x).double() * signs).sum(), [net.up])

    assert not isinstance(found, str)
    for i in range(2):
        assert np.allclose(found[str(i)], gradient[i].abs().mean(0).numpy() / 16, atol=1e-7)


def test_units_without_gradient_are_those_without() -> None:
    net, x = Net(), torch.randn(32, 4)
    where = {"a": Incoming((("a.weight", (), 0),), 0, 3)}
    found = gradients(net, lambda b: [net(*b.args)], [batch(x[:16]), batch(x[16:])], where, 0)

    assert not isinstance(found, str)
    assert (found["a"] == 0).tolist() == [False, True, True]

    # The same by hand: signs of the outputs, then the gradient of their sum, its mean size per unit over 32 samples.
    total = torch.zeros(3, 4)
    for number, part in enumerate((x[:16], x[16:])):
        signs = torch.randint(0, 2, (16, 2), generator=torch.Generator().manual_seed(number)) * 2 - 1
        (gradient,) = torch.autograd.grad((net(part).double() * signs).sum(), [net.a.weight])
        total += gradient.abs()
    assert np.allclose(found["a"], total.mean(1).detach().numpy() / 32, atol=1e-7)


def test_a_model_that_turns_gradients_off_says_so() -> None:
    net = Net()
    where = {"a": Incoming((("a.weight", (), 0),), 0, 3)}

    def off(b: Batch) -> list[Tensor]:
        with torch.no_grad():
            return [net(*b.args)]

    assert gradients(net, off, [batch(torch.randn(4, 4))], where, 0) == "the forward pass gives no gradient"


class Feeders(nn.Module):
    """Layers whose units stand along different axes of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(2, 3, 1), nn.ConvTranspose1d(3, 5, 2)
        self.norm, self.own = nn.BatchNorm1d(5), nn.Parameter(torch.randn(5, 7))
        self.square = nn.Parameter(torch.randn(7, 7))
        self.halves = nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        x = torch.relu(self.norm(x)).mean(2)
        x = torch.relu(torch.relu(x @ self.own) @ self.square)
        a, b = self.halves(x).chunk(2, 1)
        return torch.relu(a) * torch.relu(b)


def test_where_incoming_weights_stand() -> None:
    torch.manual_seed(0)
    model = Feeders().eval()
    _, sightings = scanned(model, torch.randn(8, 2, 4))
    found = {record.key: incoming(model, record) for record in sightings.records}

    assert found[":relu#1"] == Incoming((("conv.weight", (), 0),), 0, 3)
    assert found[":relu#2"] == Incoming((("up.weight", (), 1),), 0, 5)
    assert found[":relu#3"] == Incoming((("norm.weight", (), 0),), 0, 5)
    assert found[":relu#4"] == Incoming((("own", (), 1),), 0, 7)
    assert found[":relu#5"] == "which rows of 'square' make its units is not known"
    assert found[":relu#6"] == Incoming((("halves.weight", (), 0),), 0, 3)
    assert found[":relu#7"] == Incoming((("halves.weight", (), 0),), 3, 3)


def test_times_are_positive() -> None:
    x = torch.ones(4, 4)

    assert all(seconds > 0 for seconds in seconds_of([lambda b: [x + 1], lambda b: [x @ x]], batch(x)))


def test_a_replacement_spells_itself() -> None:
    assert [str(Replacement(*given)) for given in ((Kind.LEAKY, 0.01), (Kind.GELU, None))] == [
        "leaky_relu(0.01)",
        "gelu",
    ]
