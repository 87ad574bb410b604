"""Models whose activations are easy to miss or to miscount: each trap, with numbers worked out by hand.

Deaths are planted: a layer is the identity, and the biases of units 1 and 3 are so low that they never fire. The zoo
and ``test_counts`` compare counts with an oracle; here stand the verdicts, the keys and what is said to the user.
"""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import deadcheck
from deadcheck import Diagnosis, Verdict, activations
from deadcheck.errors import DataError, ExitCode, ForwardError, NothingMeasured, UsageError
from tests.test_no_trace import fingerprint

N = 320
"""Samples: more than the 299 after which a unit that never fired is called dead."""

PLANTED = [(1, 1), (3, 3)]
"""The planted units, as ranges."""

OFF = (0.0, -100.0, 0.0, -100.0)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers between -0.5 and 0.5."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def linear(bias: tuple[float, ...] = OFF) -> nn.Linear:
    """Return the identity plus a bias."""
    layer = nn.Linear(len(bias), len(bias))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(bias)))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def conv(kind: type[nn.Module] = nn.Conv2d, bias: tuple[float, ...] = OFF) -> nn.Module:
    """Return the identity of every position plus a bias of every channel."""
    layer = kind(len(bias), len(bias), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(len(bias)).view(layer.weight.shape))
        layer.bias.copy_(torch.tensor(bias))
    return layer


class Then(nn.Module):
    """The planted layer ``fc``, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Any], bias: tuple[float, ...] = OFF) -> None:
        super().__init__()
        self.fc, self.function = linear(bias), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.fc(x))


class Call(nn.Module):
    """A forward given as a function of the model and its inputs, with named submodules."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def keys(diagnosis: Diagnosis) -> list[str]:
    return [site.key for site in diagnosis]


def skipped(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    return [(item.what, item.where) for item in diagnosis.measurement.skipped]


def findings(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.id: finding.message for finding in diagnosis.findings}


# ReLU, however it is spelt.


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: x.clamp_(min=0), "clamp"),
        (lambda x: torch.clip(x, 0), "clamp"),
        (lambda x: x.clamp_min(0.0), "clamp"),
        (lambda x: x.clamp(min=torch.tensor(0.0)), "clamp"),
        (lambda x: x.clamp(0, float("inf")), "clamp"),
        (lambda x: F.threshold(x, 0, 0), "threshold"),
        (lambda x: F.hardtanh(x, 0, 6), "relu6"),
        (F.relu6, "relu6"),
        (lambda x: x.clamp(0, 6), "relu6"),
        (lambda x: F.hardtanh(x, 0, 100), "hardtanh"),
        (lambda x: torch.maximum(x, torch.zeros(())), "maximum"),
        (lambda x: torch.maximum(x, torch.zeros_like(x)), "maximum"),
        (lambda x: torch.max(x, torch.zeros(4)), "maximum"),
        (lambda x: torch.maximum(torch.zeros(()), x), "maximum"),
        (lambda x: F.leaky_relu(x, 0.0), "leaky_relu"),
        (lambda x: F.prelu(x, torch.zeros(1)), "prelu"),
        (lambda x: F.rrelu(x, 0, 0), "rrelu"),
        (lambda x: F.elu(x, alpha=0.0), "elu"),
    ],
)  # fmt: skip
def test_a_relu_of_one_operator_is_a_site(function: Callable[[Tensor], Tensor], name: str) -> None:
    diagnosis = deadcheck.scan(Then(function), uniform(N, 4))

    (site,) = diagnosis.sites
    assert site.key == f":{name}#1"
    assert site.stats.site.activation == name
    assert site.stats.site.fed_by == ("fc",)
    assert site.ranges(Verdict.DEAD) == PLANTED
    assert site.ranges(Verdict.LIVE) == [(0, 0), (2, 2)]
    assert diagnosis.measurement.skipped == ()


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.ReLU6(), nn.PReLU(init=0.0), nn.RReLU(0, 0), nn.Threshold(0, 0), nn.Hardtanh(0, 6)]
)
def test_a_relu_that_is_a_module_gives_its_path(module: nn.Module) -> None:
    diagnosis = deadcheck.scan(nn.Sequential(OrderedDict(fc=linear(), act=module)), uniform(N, 4))

    assert keys(diagnosis) == ["act"]
    assert diagnosis.site("act").ranges(Verdict.DEAD) == PLANTED


@pytest.mark.parametrize("kind", activations.MODULES, ids=lambda kind: kind.__name__)
def test_every_activation_module_is_one_site_under_its_path(kind: type[nn.Module]) -> None:
    arguments = {nn.Threshold: (0.1, 20.0)}.get(kind, ())

    diagnosis = deadcheck.scan(nn.Sequential(OrderedDict(fc=linear(), act=kind(*arguments))), uniform(9, 4))

    assert keys(diagnosis) == ["act"]
    assert diagnosis.sites[0].stats.site.fed_by == ("fc",)
    assert skipped(diagnosis) == []


def put(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


GATE = torch.linspace(-1, 1, 4)

HAND_WRITTEN = [
    (lambda x: torch.where(x > 0, x, 0), "aten.where"),
    (lambda x: torch.where(x > 0, x, torch.zeros_like(x)), "aten.where"),
    (lambda x: torch.where(x < 0, torch.zeros(()), x), "aten.where"),
    (lambda x: x * (x > 0), "aten.mul"),
    (lambda x: (x > 0) * x, "aten.mul"),
    (lambda x: x * (x > 0).float(), "aten.mul"),
    (lambda x: (x + x.abs()) / 2, "aten.add"),
    (lambda x: 0.5 * (x.abs() + x), "aten.add"),
    (lambda x: x.masked_fill(x < 0, 0), "aten.masked_fill"),
    (lambda x: x.masked_fill_(x <= 0, 0.0), "aten.masked_fill_"),
    (put, "aten.index_put_"),
    (lambda x: torch.fmax(x, torch.zeros(())), "aten.fmax"),
    (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "aten.mul"),
    (lambda x: x / (1 + torch.exp(-x)), "aten.div"),
    (lambda x: torch.where(x > 0, 2 * x, torch.expm1(x)), "aten.where"),
    (nn.Softsign(), "aten.div"),
    (lambda x: torch.maximum(x, 0.01 * x), "aten.maximum"),
    (lambda x: torch.max(x * 0.2, x), "aten.maximum"),
    (lambda x: 1 / (1 + torch.exp(-x)), "aten.reciprocal"),
    (lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)), "aten.div"),
    (lambda x: torch.log1p(torch.exp(x)), "aten.log1p"),
    (lambda x: torch.log(1 + torch.exp(x)), "aten.log"),
    (lambda x: torch.logaddexp(x, torch.zeros(())), "aten.logaddexp"),
    (torch.sin, "aten.sin"),
    (torch.cos, "aten.cos"),
    (torch.atan, "aten.atan"),
    (torch.sign, "aten.sign"),
    (lambda x: torch.heaviside(x, torch.ones(())), "aten.heaviside"),
]


@pytest.mark.parametrize(("function", "operator"), HAND_WRITTEN)
def test_a_relu_of_several_operators_is_said_not_to_be_measured(
    function: Callable[[Tensor], Tensor], operator: str
) -> None:
    model = nn.Sequential(OrderedDict(by_hand=Then(function), fc=linear(), act=nn.ReLU()))

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    (item,) = diagnosis.measurement.skipped
    assert item.what == operator
    assert item.where in ("by_hand", "by_hand.function")
    assert item.reason == "looks like an activation written out by hand; not measured" or re.fullmatch(
        "an? [a-z]+ of a layer's output may be its activation; not measured", item.reason
    )
    assert keys(diagnosis) == ["act"]


@pytest.mark.parametrize("bound", [torch.maximum, torch.clamp, torch.clamp_min])
@pytest.mark.parametrize("start", [-1.0, 0.0])
def test_a_threshold_that_is_learnt_is_said_not_to_be_measured(bound: Callable[..., Tensor], start: float) -> None:
    """The thresholded linear unit of Singh and Krishnan (2020, arXiv 1911.09737)."""
    model = Call(lambda m, x: m.act(bound(m.fc(x), m.threshold.weight[0])), fc=linear(), act=nn.ReLU())
    model.threshold = nn.Embedding(1, 4)
    nn.init.constant_(model.threshold.weight, start)

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == ["act"]
    (item,) = (item for item in diagnosis.measurement.skipped if item.what != "Embedding")
    assert item.reason == "bounds a layer's output by a weight, as an activation may; not measured"


@pytest.mark.parametrize(
    ("function", "inner", "operator"),
    [
        (lambda x: x * torch.sigmoid(x), "sigmoid", "aten.mul"),
        (lambda x: x.mul_(x.sigmoid()), "sigmoid", "aten.mul_"),
        (lambda x: x * torch.sigmoid(1.702 * x), "sigmoid", "aten.mul"),
        (lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.045 * x.pow(3)))), "tanh", "aten.mul"),
        (lambda x: x * F.relu6(x + 3) / 6, "relu6", "aten.mul"),
        (lambda x: x - torch.tanh(x), "tanh", "aten.sub"),
    ],
)
def test_an_activation_around_another_is_named_beside_its_site(
    function: Callable[[Tensor], Tensor], inner: str, operator: str
) -> None:
    diagnosis = deadcheck.scan(Then(function), uniform(N, 4))

    assert [site.stats.site.activation for site in diagnosis] == [inner]
    assert skipped(diagnosis) == [(operator, "")]


def test_a_model_with_hand_written_activations_alone_has_nothing_to_judge() -> None:
    with pytest.raises(NothingMeasured, match=r"no activation ran in 9 samples.*not measured: aten\.mul"):
        deadcheck.scan(Then(lambda x: x * (x > 0)), uniform(9, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clamp(min=1e-6).log(),
        lambda x: x.clamp(max=20),
        lambda x: x.clamp(-1, 1),
        lambda x: torch.maximum(x, x.flip(1)),
        lambda x: torch.maximum(x, torch.ones(())),
        lambda x: torch.softmax(x, -1),
        lambda x: x.masked_fill(torch.arange(4) > 2, 0),
        lambda x: x * (x.detach().sum(1, keepdim=True) > 0),
        lambda x: torch.where(x.sum(1, keepdim=True) > 0, x, 0),
        lambda x: x.abs() + x.flip(1),
        lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
        lambda x: F.dropout(x),
        lambda x: x,
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
        lambda x: torch.exp(x - x.max()) / torch.exp(x - x.max()).sum(1, keepdim=True),
        lambda x: x * torch.arange(4).sin() + x.flip(1) * torch.arange(4).cos(),
        lambda x: x + torch.randn_like(x) * torch.exp(0.5 * x),
        lambda x: x / torch.exp(x.flip(1)),
        lambda x: 1 / (2 + torch.erf(x)),
        lambda x: x.flip(1) * (1 / torch.exp(x)),
        lambda x: torch.log(torch.exp(x).sum(1, keepdim=True)) - x,
        lambda x: torch.log1p(x.abs()),
        lambda x: x * (1 / (1 + torch.exp(GATE))) * GATE * (GATE > 0),
        lambda x: torch.maximum(x, x.flip(1) * 0.2),
    ],
)
def test_bounds_masks_softmax_and_the_output_are_no_activations(function: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(OrderedDict(fc=linear(), act=nn.ReLU(), last=Then(function)))

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == ["act"]
    assert diagnosis.measurement.skipped == ()


BOOKKEEPING = [
    lambda m, x: (F.one_hot(m.gate(x).argmax(1), 4).float().cumsum(0) - 1).clamp(0, 2),  # places of tokens in an expert
    lambda m, x: (x[:, 2:] - x[:, :2]).clamp(min=0).prod(1, keepdim=True),  # areas of boxes
    lambda m, x: torch.cdist(m.gate(x), m.gate(x)).clamp_min(0).mean(1, keepdim=True),
    lambda m, x: torch.maximum(x.sum(1, keepdim=True), torch.zeros(())),
    lambda m, x: torch.ones(len(x), 4).clamp(0, 1),  # a mask that nobody gave
]


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("function", BOOKKEEPING)
def test_bounds_of_what_no_layer_made_are_listed(function: Callable[..., Tensor], batch_size: int) -> None:
    model = Call(
        lambda m, x: m.act(m.fc(x) + 0 * m.gate(x)) * function(m, x)[:, :1], gate=linear(), fc=linear(), act=nn.ReLU()
    )

    diagnosis = deadcheck.scan(model, uniform(N, 4), batch_size=batch_size)

    assert keys(diagnosis) == ["act"]
    (item,) = diagnosis.measurement.skipped
    assert item.reason == "bounds values that are no units of a layer; not taken for an activation"
    assert not diagnosis.measurement.warnings


@pytest.mark.parametrize("first", [torch.sigmoid, F.softplus, F.relu, F.relu6, F.hardsigmoid])
@pytest.mark.parametrize("bound", [lambda x: x.clamp(0, 1), lambda x: x.clamp(min=0), lambda x: x[:, :2].clamp_min(0)])
def test_a_bound_of_what_is_not_negative_is_no_activation(
    first: Callable[[Tensor], Tensor], bound: Callable[[Tensor], Tensor]
) -> None:
    """As in ``inverse_sigmoid`` of detection decoders, and the limits of time steps in Mamba."""
    diagnosis = deadcheck.scan(Then(lambda x: bound(first(x))), uniform(N, 4))

    assert len(diagnosis.sites) == 1
    (item,) = diagnosis.measurement.skipped
    assert item.reason == "bounds what other activations gave, with no layer between; not taken for an activation"


@pytest.mark.parametrize("first", [torch.tanh, F.silu, F.leaky_relu])
def test_a_bound_of_what_may_be_negative_is_measured(first: Callable[[Tensor], Tensor]) -> None:
    diagnosis = deadcheck.scan(Then(lambda x: first(x).clamp(min=0)), uniform(N, 4))

    assert keys(diagnosis)[1] == ":clamp#1"


@pytest.mark.parametrize(("norm", "axis"), [(nn.InstanceNorm2d(1), 1), (nn.BatchNorm2d(1), 1), (nn.LayerNorm(5), 3)])
def test_the_axis_of_a_norm_with_one_channel(norm: nn.Module, axis: int) -> None:
    (site,) = deadcheck.scan(nn.Sequential(norm, nn.ReLU()), uniform(8, 1, 4, 5)).sites

    assert (site.stats.site.axis, site.units) == (axis, 5 if axis == 3 else 1)


@pytest.mark.parametrize("pattern", ["", "*", ":clamp#1", ":clamp"])
def test_a_bound_whose_axis_the_user_names_is_measured(pattern: str) -> None:
    model = Call(lambda m, x: m.act(m.fc(x.clamp(min=0))), fc=linear(), act=nn.ReLU())

    diagnosis = deadcheck.scan(model, uniform(N, 4), units={pattern: 1})

    assert keys(diagnosis) == [":clamp#1", "act"]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 4, N])
def test_an_instance_norm_keeps_the_samples(channels: int, batch_size: int) -> None:
    """torch normalises samples times channels at once, which is samples alone where the image is grey."""
    layers = OrderedDict(norm=nn.InstanceNorm2d(channels), own=nn.ReLU(), conv=nn.Conv2d(channels, 4, 1), act=nn.ReLU())

    diagnosis = deadcheck.scan(nn.Sequential(layers), uniform(N, channels, 3, 3), batch_size=batch_size)

    assert keys(diagnosis) == ["own", "act"]
    assert [site.units for site in diagnosis] == [channels, 4]
    assert [site.stats.samples for site in diagnosis] == [N, N]
    assert not diagnosis.measurement.warnings


def test_attention_scores_are_no_units() -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    model = Call(lambda m, x: m.act(m.attention(x, x, x)[0]), attention=layer, act=nn.ReLU())

    (site,) = deadcheck.scan(model, uniform(8, 5, 4)).sites

    assert (site.key, site.units, site.stats.observations) == ("act", 4, 8 * 5)


def test_an_activation_of_weights_or_constants_is_no_site_and_is_listed() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        places = F.relu(model.places(torch.arange(4.0)[:, None])).mean(1)
        return F.relu(model.fc(x) + places) * F.softplus(model.fc.weight).sum()

    diagnosis = deadcheck.scan(Call(forward, fc=linear(), places=nn.Linear(1, 4)), uniform(N, 4), batch_size=4)

    assert keys(diagnosis) == [":relu#1"]
    assert diagnosis.sites[0].stats.site.fed_by == ("fc", "places")
    assert [(item.what, item.reason) for item in diagnosis.measurement.skipped] == [
        ("relu", "works on weights or constants alone, the same for every sample"),
        ("softplus", "works on weights or constants alone, the same for every sample"),
    ]


def test_a_bound_of_integers_is_an_index_and_no_activation() -> None:
    model = Call(lambda m, x: F.relu(m.fc(x))[:, (x[:, 0] * 6).long().clamp(min=0)], fc=linear())

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == [":relu#1"]
    assert skipped(diagnosis) == [("clamp", "")]


# One module at several places, and several places of one module.


def test_one_relu_at_two_places_is_two_sites() -> None:
    model = Call(
        lambda m, x: m.relu(m.b(m.relu(m.a(x)))), a=linear(), b=linear((0.0, 0.0, -100.0, 0.0)), relu=nn.ReLU()
    )

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == ["relu#1", "relu#2"]
    assert diagnosis.site("relu#1").ranges(Verdict.DEAD) == PLANTED
    # Units 1 and 3 of b get nothing but zeros, and its own unit 2 is planted.
    assert diagnosis.site("relu#2").ranges(Verdict.DEAD) == [(1, 3)]
    assert [site.stats.site.fed_by for site in diagnosis] == [("a",), ("b",)]
    assert [site.stats.observations for site in diagnosis] == [N, N]


def test_a_site_keeps_its_key_when_the_branch_before_it_does_not_run() -> None:
    model = Call(
        lambda m, x: F.relu(m.b(F.relu(m.a(x)) if m.deep else x)), a=linear(), b=linear((0.0, -100.0, 0.0, 0.0))
    )  # fmt: skip
    model.deep = True
    deep = deadcheck.scan(model, uniform(N, 4))
    model.deep = False
    flat = deadcheck.scan(model, uniform(N, 4))

    assert keys(deep) == [":relu#1", ":relu#2"]
    assert keys(flat) == [":relu#1"]
    assert flat.sites[0].stats.site.fed_by == ("b",)
    assert skipped(flat) == [("Linear", "a")]


@pytest.mark.parametrize("steps", [1, 4])
def test_a_recurrent_relu_is_one_site_over_time(steps: int) -> None:
    rnn = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.weight_ih_l0.copy_(torch.eye(4))
        rnn.bias_ih_l0.copy_(torch.tensor(OFF))

    (site,) = deadcheck.scan(rnn, uniform(N, steps, 4)).sites

    assert (site.stats.samples, site.stats.observations) == (N, N * steps)
    assert site.ranges(Verdict.DEAD) == PLANTED


def test_a_cell_with_a_varying_number_of_steps_is_one_site() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        # Ten samples take one step, ten two, ten three, by batch.
        for _ in range(1 + int(x[0, 0])):
            x = model.act(model.fc(x))
        return x

    model = Call(forward, fc=linear((0.0, -100.0)), act=nn.ReLU())
    data = torch.ones(30, 2) * torch.arange(3.0).repeat_interleave(10)[:, None]

    (site,) = deadcheck.scan(model, data, batch_size=10).sites

    assert site.key == "act"
    assert site.stats.observations == 10 * (1 + 2 + 3)
    assert site.stats.zeros.tolist() == [10, 60]  # the first unit is 0 on the first batch alone
    assert site.stats.fired.tolist() == [20, 0]
    assert site.stats.first_fired.tolist() == [10, -1]


def test_a_siamese_pair_is_one_site() -> None:
    model = Call(lambda m, a, b: m.act(m.fc(a)) - m.act(m.fc(b)), fc=linear(), act=nn.ReLU())

    (site,) = deadcheck.scan(model, (uniform(N, 4), uniform(N, 4, seed=1))).sites

    assert (site.stats.samples, site.stats.observations) == (N, 2 * N)
    assert site.ranges(Verdict.DEAD) == PLANTED


def test_an_in_place_relu_is_counted_before_the_residual_is_added_to_it() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        y = model.relu(model.fc(x))
        y += 1
        return y

    data = uniform(N, 4)
    (site,) = deadcheck.scan(Call(forward, fc=linear(), relu=nn.ReLU(inplace=True)), data).sites

    assert site.stats.zeros.tolist() == [int((data[:, 0] <= 0).sum()), N, int((data[:, 2] <= 0).sum()), N]
    assert float(site.stats.output_max.max()) == float(data[:, [0, 2]].max())


def test_an_encoder_layer_in_eval_is_seen_and_its_fast_path_comes_back() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).eval()
    with torch.no_grad():
        layer.linear1.bias[5] = -100
    assert torch.backends.mha.get_fastpath_enabled()

    diagnosis = deadcheck.scan(nn.TransformerEncoder(layer, 2), uniform(N, 3, 4))

    assert keys(diagnosis) == ["layers.0:relu#1", "layers.1:relu#1"]
    assert [site.ranges(Verdict.DEAD) for site in diagnosis] == [[(5, 5)]] * 2
    assert [site.stats.observations for site in diagnosis] == [3 * N] * 2
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_fast_path_that_was_off_stays_off() -> None:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        deadcheck.scan(Then(F.relu), uniform(8, 4))
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# Saved graphs, as live objects.


def scripted(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, uniform(2, 4))


def warmed_up(model: nn.Module) -> nn.Module:
    graph = traced(model)
    for _ in range(4):
        graph(uniform(2, 4))
    return graph


def exported(model: nn.Module) -> nn.Module:
    samples = torch.export.Dim("samples")
    return torch.export.export(model, (uniform(3, 4),), dynamic_shapes=({0: samples},)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("graph", [scripted, traced, warmed_up, exported])
def test_the_activations_of_a_graph_are_seen(graph: Callable[[nn.Module], nn.Module]) -> None:
    model = graph(nn.Sequential(linear(), nn.ReLU(), nn.Linear(4, 2), nn.Tanh()).eval())

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert [(site.stats.site.activation, site.stats.site.fed_by) for site in diagnosis] == [
        ("relu", ("0",)),
        ("tanh", ("2",)),
    ]
    assert diagnosis.sites[0].ranges(Verdict.DEAD) == PLANTED


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_activation_inside_the_fused_operator_of_a_scripted_encoder_layer_is_seen() -> None:
    eager = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()
    layer = torch.jit.script(eager)
    x = uniform(8, 3, 4)

    diagnosis = deadcheck.scan(nn.Sequential(OrderedDict(layer=layer, act=nn.ReLU())), x)

    assert keys(diagnosis) == ["layer:relu#1", "act"]
    hidden = eager.linear1(eager.norm1(x + eager.self_attn(x, x, x)[0]))
    assert diagnosis.sites[0].stats.zeros.tolist() == (hidden <= 0).sum((0, 1)).tolist()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.ReLU(), nn.GELU()])
def test_an_encoder_layer_is_counted_on_the_very_values_of_the_fused_operator(
    activation: str | nn.Module, norm_first: bool, masked: bool
) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, activation=activation, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    data: dict[str, Tensor] = {"src": uniform(8, 3, 4)}
    if masked:
        data["src_key_padding_mask"] = torch.tensor([[False, False, True]] * 8)
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: outputs.append(output))

    diagnosis = deadcheck.scan(model, data)

    handle.remove()
    assert [site.stats.site.fed_by for site in diagnosis] == [("layers.0.linear1",), ("layers.1.linear1",)]
    assert [site.stats.observations for site in diagnosis] == [24, 24]  # 8 samples of 3 tokens, padding included
    assert diagnosis.measurement.skipped == ()
    with torch.no_grad():
        alone = layer_by_layer(model, **data)
    assert torch.equal(outputs[0], alone)
    assert isinstance(activation, nn.Module) == diagnosis.sites[0].stats.site.key.endswith("activation")


def test_what_an_encoder_layer_of_ones_own_never_runs_is_told() -> None:
    class Own(nn.TransformerEncoderLayer):
        def __init__(self) -> None:
            super().__init__(4, 2, 6, batch_first=True)
            self.adapter = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    diagnosis = deadcheck.scan(Own().eval(), uniform(8, 3, 4))

    assert keys(diagnosis) == [":relu#1"]
    assert [skipped.where for skipped in diagnosis.measurement.skipped] == ["adapter"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_quantised_encoder_layer_runs_although_torch_cannot_fuse_it() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()
    quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})

    (site,) = deadcheck.scan(quantised, uniform(8, 3, 4)).sites

    assert (site.units, site.stats.observations) == (6, 24)
    assert torch.backends.mha.get_fastpath_enabled()


def layer_by_layer(model: nn.TransformerEncoder, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
    """Run an encoder on the fused operators of torch, without nested tensors."""
    for layer in model.layers:
        src = layer(src, src_key_padding_mask=src_key_padding_mask)
    return src


# Which axis holds the units.


@pytest.mark.parametrize(
    ("layer", "shape", "axis", "axis_from"),
    [
        (linear(), (4,), 1, "linear"),
        (linear(), (7, 4), 2, "linear"),
        (linear(), (3, 7, 4), 3, "linear"),
        (conv(nn.Conv1d), (4, 5), 1, "conv1d"),
        (conv(nn.Conv2d), (4, 5, 3), 1, "conv2d"),
        (conv(nn.Conv3d), (4, 5, 3, 2), 1, "conv3d"),
        (conv(nn.ConvTranspose2d), (4, 5, 3), 1, "conv_transpose2d"),
        (nn.Sequential(conv(), nn.BatchNorm2d(4), nn.MaxPool2d(1)), (4, 5, 3), 1, "conv2d"),
        (nn.Sequential(conv(), nn.Flatten()), (4, 5, 3), 1, "conv2d"),
        (Call(lambda m, x: m.fc(x.permute(0, 2, 3, 1)), fc=linear()), (4, 5, 3), 3, "linear"),
        (Call(lambda m, x: m.fc(x).permute(0, 2, 1), fc=linear()), (7, 4), 1, "linear"),
        (Call(lambda m, x: m.fc(x).flatten(0, 1), fc=linear()), (7, 4), 1, "linear"),
        (Call(lambda m, x: m.fc(x.to(memory_format=torch.channels_last)), fc=conv()), (4, 5, 3), 1, "conv2d"),
        (Call(lambda m, x: torch.cat([m.a(x[:, :1]), m.b(x[:, 1:])], 1), a=conv(bias=OFF[:1]), b=conv(bias=OFF[1:])),
         (4, 5, 3), 1, "conv2d"),
        (Call(lambda m, x: m.a(x) + m.b(x), a=conv(), b=conv(bias=(0.0,) * 4)), (4, 5, 3), 1, "conv2d"),
    ],
)  # fmt: skip
def test_the_units_are_those_of_what_feeds_the_activation(
    layer: nn.Module, shape: tuple[int, ...], axis: int, axis_from: str
) -> None:
    diagnosis = deadcheck.scan(nn.Sequential(OrderedDict(layer=layer, act=nn.ReLU())), uniform(N, *shape))

    site = diagnosis.site("act")
    assert (site.units, site.stats.samples) == (4, N)
    assert site.stats.observations == N * int(np.prod(shape)) // 4
    assert (site.stats.site.axis, site.stats.site.axis_from) == (axis, axis_from)
    assert site.ranges(Verdict.DEAD) == PLANTED
    assert diagnosis.measurement.warnings == ()


def test_all_that_feeds_an_activation_is_named() -> None:
    model = Call(
        lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1) + m.c(torch.cat([x, x], 1))),
        a=linear(), b=linear(), c=linear((0.0,) * 8), last=nn.ReLU(),
    )  # fmt: skip

    (site,) = deadcheck.scan(model, uniform(N, 4)).sites

    assert site.stats.site.fed_by == ("a", "b", "c")
    assert site.ranges(Verdict.DEAD) == [(1, 1), (3, 3), (5, 5), (7, 7)]


def test_an_activation_on_one_channel_that_was_squeezed_away_has_one_unit() -> None:
    model = Call(lambda m, x: F.relu(m.conv(x).squeeze(1)), conv=conv(bias=(-100.0,)))

    (site,) = deadcheck.scan(model, uniform(N, 1, 5, 3)).sites

    assert (site.units, site.stats.observations) == (1, N * 15)
    assert site.ranges(Verdict.DEAD) == [(0, 0)]


@pytest.mark.parametrize(("shape", "axis", "units"), [((5,), 1, 5), ((3, 5), 2, 5), ((3, 5, 7), 1, 3)])
def test_an_axis_that_nothing_tells_is_guessed_and_said(shape: tuple[int, ...], axis: int, units: int) -> None:
    diagnosis = deadcheck.scan(nn.Sequential(nn.ReLU()), uniform(6, *shape))

    (site,) = diagnosis.sites
    assert (site.stats.site.axis, site.stats.site.axis_from, site.units) == (axis, "guess", units)
    assert diagnosis.measurement.warnings == (
        f"0: nothing told which axis holds the units; axis {axis} was guessed (set it with --units '0=AXIS')",
    )


@pytest.mark.parametrize("units", [{"ac*": 2}, [("act", 2), ("*", 1)], {"act": -2}])
def test_the_user_can_say_which_axis_holds_the_units(units: Any) -> None:
    model = nn.Sequential(OrderedDict(conv=conv(), act=nn.ReLU()))

    diagnosis = deadcheck.scan(model, uniform(6, 4, 5, 3), units=units)

    (site,) = diagnosis.sites
    assert (site.stats.site.axis, site.stats.site.axis_from, site.units) == (2, "user", 5)
    assert site.stats.observations == 6 * 4 * 3
    assert diagnosis.measurement.warnings == ()


@pytest.mark.parametrize("pattern", [":relu#2", "*relu#2"])
def test_the_axis_can_be_said_for_one_of_several_sites(pattern: str) -> None:
    model = Call(lambda m, x: F.relu(F.relu(m.a(x)).flip(2) + m.b(x)), a=conv(), b=conv())

    diagnosis = deadcheck.scan(model, uniform(6, 4, 5, 3), units={pattern: -1}, batch_size=4)

    assert [(site.stats.site.axis, site.stats.site.axis_from, site.units) for site in diagnosis] == [
        (1, "conv2d", 4),
        (3, "user", 3),
    ]
    assert diagnosis.sites[1].stats.observations == 6 * 4 * 5


def test_an_axis_that_is_not_there_is_refused_and_a_pattern_without_a_site_is_said() -> None:
    with pytest.raises(
        UsageError, match=r"--units ':relu=2': the values at .* have 2 axes; give a number from -2 to 1"
    ):
        deadcheck.scan(Then(F.relu), uniform(8, 4), units={":relu": 2})

    (warning,) = deadcheck.scan(Then(F.relu), uniform(8, 4), units={"relu#7": 1}).measurement.warnings
    assert warning == "--units 'relu#7=1' matches no site; see the keys in the report"


def test_guesses_are_said_in_one_sentence_for_all_their_sites() -> None:
    model = Call(lambda m, x: [torch.relu(x + i) for i in range(4)] + [torch.tanh(x * 2)])

    (warning,) = deadcheck.scan(model, uniform(6, 5)).measurement.warnings

    assert warning.startswith(":relu#1, :tanh#1: nothing told which axis holds the units; axis 1 was guessed")


def test_a_layer_that_takes_samples_for_steps_in_time_is_said() -> None:
    model = Call(lambda m, x: F.relu(m.rnn(x)[0]), rnn=nn.RNN(4, 3))

    warning, untold = deadcheck.scan(model, uniform(6, 5, 4)).measurement.warnings

    assert "each batch counts as one sample" in untold  # a step depends on the samples before it
    assert "rnn takes axis 0 for steps in time (batch_first=False), and there the data has its samples" in warning
    right = Call(lambda m, x: F.relu(m.rnn(x.transpose(0, 1))[0]), rnn=nn.RNN(4, 3))
    assert deadcheck.scan(right, uniform(6, 5, 4)).measurement.warnings == ()


def test_samples_are_counted_along_what_most_inputs_agree_on() -> None:
    # A graph of five nodes: its two rows of edges come first and are no samples.
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    model = Call(lambda m, edges, x, kind: F.relu(m.fc(x) + kind[:, None]), fc=linear())
    batch = {"edges": edges, "x": uniform(5, 4), "kind": torch.zeros(5)}

    diagnosis = deadcheck.scan(model, [batch], unpack="kwargs")

    assert diagnosis.sites[0].stats.samples == 5
    assert diagnosis.measurement.warnings == ("samples were counted along x (5); not as long along axis 0: edges 2",)


def test_an_activation_module_made_in_a_forward_is_numbered_in_its_module() -> None:
    model = Call(lambda m, x: m.inner(nn.ReLU()(m.fc(x))), fc=linear(), inner=Then(lambda x: nn.Tanh()(x)))

    assert keys(deadcheck.scan(model, uniform(8, 4))) == [":relu#1", "inner:tanh#1"]


def test_an_activation_fed_by_another_names_it_by_its_key() -> None:
    model = Call(lambda m, x: torch.tanh(F.relu(m.b(F.relu(m.a(x)))).flip(1)), a=linear(), b=linear())

    fed_by = {site.key: site.stats.site.fed_by for site in deadcheck.scan(model, uniform(8, 4))}

    assert fed_by == {":relu#1": ("a",), ":relu#2": ("b",), ":tanh#1": (":relu#2",)}


def test_two_activations_behind_two_of_the_same_kind_are_two_sites() -> None:
    model = Call(lambda m, x: [torch.tanh(F.relu(layer(x)) * 2) for layer in (m.a, m.b)], a=linear(), b=linear())

    assert keys(deadcheck.scan(model, uniform(8, 4))) == [":relu#1", ":tanh#1", ":relu#2", ":tanh#2"]


def test_a_loop_over_layers_with_a_residual_is_a_site_for_each() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        for layer in model.layers:
            x = x + layer(F.relu(x))
        return x

    model = nn.Sequential(linear(), Call(forward, layers=nn.ModuleList(linear() for _ in range(3))))

    diagnosis = deadcheck.scan(model, uniform(8, 4), batch_size=3)

    assert keys(diagnosis) == ["1:relu#1", "1:relu#2", "1:relu#3"]
    assert diagnosis.sites[2].stats.site.fed_by == ("0", "1.layers.0", "1.layers.1")


def test_what_counts_batches_says_so() -> None:
    data = [uniform(4, 5, 3, seed=i) for i in range(6)]

    site = deadcheck.scan(nn.Sequential(conv(bias=(0.0,) * 4), nn.ReLU()), data).sites[0]

    assert site.unit(0).because == "on in 6 of 6 batches"


def test_a_negative_infinity_times_a_slope_of_0_is_not_a_number_and_no_zero() -> None:
    data = torch.tensor([[-torch.inf, 1.0], [-1.0, 2.0]])
    model = Call(lambda m, x: F.leaky_relu(x, 0.0))

    (site,) = deadcheck.scan(model, data, allow_nonfinite=True).sites

    assert site.stats.zeros.tolist() == [1, 0]
    assert site.stats.nonfinite.tolist() == [1, 0]


def test_rows_that_are_atoms_and_not_samples_count_as_one_sample_a_batch() -> None:
    # Four molecules of two or three atoms each; the rows of a batch are atoms.
    def forward(model: Call, atoms: list[Tensor]) -> Tensor:
        return F.relu(model.fc(torch.cat(atoms)))

    molecules = [uniform(size, 4) for size in (2, 3, 3, 2)]
    diagnosis = deadcheck.scan(Call(forward, fc=linear()), [{"atoms": molecules}], unpack="kwargs")

    (site,) = diagnosis.sites
    assert site.stats.observations == 10
    assert site.stats.samples == 1
    assert site.ranges(Verdict.SILENT) != []
    assert site.ranges(Verdict.DEAD) == []


# Batches of odd sizes.


@pytest.mark.parametrize("batch_size", [1, 7, 64, N, 1000])
def test_the_batch_size_changes_no_count(batch_size: int) -> None:
    data = uniform(N, 4)

    (site,) = deadcheck.scan(Then(F.relu), data, batch_size=batch_size).sites

    assert (site.stats.samples, site.stats.observations) == (N, N)
    assert site.stats.zeros.tolist() == [int((data[:, 0] <= 0).sum()), N, int((data[:, 2] <= 0).sum()), N]
    assert site.stats.first_fired.tolist()[1::2] == [-1, -1]
    assert site.stats.first_fired[0] == int((data[:, 0] > 0).nonzero()[0])


def test_empty_batches_between_others_change_nothing() -> None:
    batches = [uniform(0, 4), uniform(5, 4), uniform(0, 4), uniform(2, 4, seed=1), uniform(0, 4)]

    diagnosis = deadcheck.scan(Then(F.relu), batches)

    assert diagnosis.measurement.data.samples == 7
    assert diagnosis.sites[0].stats.samples == 7


def test_samples_without_a_batch_axis_count_once_a_call_and_that_is_said() -> None:
    diagnosis = deadcheck.scan(nn.Sequential(conv(), nn.ReLU()), [uniform(4, 5, 3, seed=i) for i in range(6)])

    (site,) = diagnosis.sites
    assert (site.units, site.stats.samples, site.stats.observations) == (4, 6, 6 * 15)
    assert (site.stats.site.axis, site.stats.site.samples_from) == (0, "call")
    assert "could not be told apart by sample" in diagnosis.measurement.warnings[0]
    assert site.ranges(Verdict.SILENT) == PLANTED


# What never runs, and what runs now and then.


def test_a_branch_an_expert_and_a_copy_that_never_run_are_listed() -> None:
    model = Call(
        lambda m, x: m.net[:2](m.experts[1](x)),
        experts=nn.ModuleList([nn.Sequential(linear(), nn.ReLU()) for _ in range(3)]),
        net=nn.Sequential(linear(), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid()),
        target=nn.Sequential(linear(), nn.ReLU()),
        drop=nn.Dropout(),
    )

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == ["experts.1.1", "net.1"]
    assert skipped(diagnosis) == [
        ("Sequential", "experts.0"),
        ("Sequential", "experts.2"),
        ("Linear", "net.2"),
        ("Sigmoid", "net.3"),
        ("Sequential", "target"),
    ]
    assert {item.reason for item in diagnosis.measurement.skipped} == {"never ran on this sample"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_layer_that_ran_on_weights_alone_ran(batch_first: bool) -> None:
    """The first layer of a detection decoder, on queries that are learnt."""

    def forward(model: Call, x: Tensor) -> Tensor:
        queries = model.queries.weight[None].expand(len(x), -1, -1)
        return model.decoder(
            queries if batch_first else queries.transpose(0, 1), x if batch_first else x.transpose(0, 1)
        )

    layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=batch_first)
    model = Call(forward, queries=nn.Embedding(5, 4), decoder=nn.TransformerDecoder(layer, 1))

    diagnosis = deadcheck.scan(model, uniform(N, 7, 4))

    assert keys(diagnosis) == ["decoder.layers.0:relu#1"]
    assert not diagnosis.measurement.skipped


def test_different_sites_on_different_batches_are_joined_by_key() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        return model.act_a(model.a(x)) if x[0, 0] > 0 else model.act_b(model.b(x))

    model = Call(forward, a=linear(), act_a=nn.ReLU(), b=linear((0.0, 0.0, -100.0, 0.0)), act_b=nn.ReLU())
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0] * 160)[:, None]
    data = signs.repeat_interleave(2, 0) * torch.tensor([0.5, 0.25, 0.25, 0.25])
    # Batches of two: +, -, -, +, and so on.
    diagnosis = deadcheck.scan(model, data, batch_size=2)

    a, b = diagnosis.site("act_a"), diagnosis.site("act_b")
    assert (a.stats.samples, b.stats.samples) == (640, 640)
    assert a.ranges(Verdict.DEAD) == PLANTED
    assert a.stats.first_fired.tolist() == [0, -1, 0, -1]
    assert b.ranges(Verdict.DEAD) == [(0, 3)]  # its inputs are all negative


def test_a_branch_that_saw_few_samples_has_silent_units_and_no_dead_ones() -> None:
    model = Call(lambda m, x: m.act(m.fc(x)) if x[0, 0] > 0 else x, fc=linear(), act=nn.ReLU())
    data = torch.cat([torch.full((10, 4), 0.5), torch.full((990, 4), -0.5)])

    diagnosis = deadcheck.scan(model, data, batch_size=10)

    assert diagnosis.site("act").stats.samples == 10
    assert diagnosis.site("act").ranges(Verdict.SILENT) == PLANTED
    assert diagnosis.dead == 0
    assert "10 samples are too few" in findings(diagnosis)["too-few-samples"]


# Gated recurrent layers.


@pytest.mark.parametrize(
    ("layer", "gates"),
    [
        (nn.GRU(4, 3, batch_first=True), ["sigmoid", "sigmoid", "tanh"]),
        (nn.LSTMCell(4, 3), ["sigmoid", "sigmoid", "tanh", "sigmoid", "tanh"]),
        (nn.GRUCell(4, 3), ["sigmoid", "sigmoid", "tanh"]),
        (nn.LSTM(4, 3, batch_first=True), []),
    ],
)
def test_gates_are_hidden_until_asked_for_and_the_output_is_a_site(layer: nn.Module, gates: list[str]) -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        out = model.cell(x if isinstance(model.cell, nn.RNNBase) else x[:, 0])
        return out[0] if isinstance(out, tuple) else out

    model, data = Call(forward, cell=layer), uniform(8, 5, 4)
    steps = 5 if isinstance(layer, nn.RNNBase) else 1

    plain, full = deadcheck.scan(model, data), deadcheck.scan(model, data, gates=True)

    (output,) = plain.sites
    name = "lstm" if "LSTM" in type(layer).__name__ else "gru"
    assert (output.key, output.stats.site.activation, output.units) == ("cell", name, 3)
    assert (output.stats.samples, output.stats.observations) == (8, 8 * steps)
    assert [site.stats.site.activation for site in full] == [*gates, name]
    hidden = [(item.where, "its gates cannot be seen" in item.reason) for item in full.measurement.skipped]
    assert hidden == ([] if gates else [("cell", True)])
    assert plain.measurement.skipped == ()
    assert all(site.units == 3 for site in full)


def test_a_gru_unit_whose_update_gate_is_shut_from_the_start_is_dead() -> None:
    gru = nn.GRU(4, 3, batch_first=True)
    with torch.no_grad():
        gru.bias_ih_l0[3:6] = torch.tensor([0.0, 1000.0, 0.0])  # the update gate of unit 1 keeps its state, 0

    (site,) = deadcheck.scan(gru, uniform(N, 5, 4)).sites

    assert site.ranges(Verdict.DEAD) == [(1, 1)]


# Not ReLU.


@pytest.mark.parametrize(
    ("module", "far", "near"),
    [
        (nn.LeakyReLU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.PReLU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.PReLU(4), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.RReLU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.ELU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.SELU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.CELU(), Verdict.NEGATIVE_ONLY, Verdict.NEGATIVE_ONLY),
        (nn.GELU(), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
        (nn.GELU(approximate="tanh"), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
        (nn.SiLU(), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
        (nn.Mish(), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
        (nn.Softplus(), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
        (nn.Hardswish(), Verdict.DEAD, Verdict.NEGATIVE_ONLY),
    ],
    ids=str,
)  # fmt: skip
def test_a_unit_that_never_leaves_the_negative_side_is_not_live(module: nn.Module, far: Verdict, near: Verdict) -> None:
    model = nn.Sequential(linear((0.0, -10.0, 0.0, -1.0)), module)

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    (site,) = diagnosis.sites
    assert [site.verdict(unit) for unit in range(4)] == [Verdict.LIVE, far, Verdict.LIVE, near]
    assert "negative-only" in findings(diagnosis)


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Hardtanh()], ids=str)
def test_a_unit_that_never_leaves_a_rail_is_saturated(module: nn.Module) -> None:
    diagnosis = deadcheck.scan(nn.Sequential(linear((0.0, -100.0, 0.0, 100.0)), module), uniform(N, 4))

    (site,) = diagnosis.sites
    assert [site.verdict(unit) for unit in range(4)] == [
        Verdict.LIVE, Verdict.SATURATED, Verdict.LIVE, Verdict.SATURATED,
    ]  # fmt: skip
    assert "2 of 4 units never left a rail" in findings(diagnosis)["saturated"]


def test_a_clipped_relu_at_its_ceiling_is_saturated_and_at_its_floor_dead() -> None:
    (site,) = deadcheck.scan(nn.Sequential(linear((0.0, -100.0, 3.0, 100.0)), nn.ReLU6()), uniform(N, 4)).sites

    assert [site.verdict(unit) for unit in range(4)] == [
        Verdict.LIVE, Verdict.DEAD, Verdict.ALWAYS_ON, Verdict.SATURATED,
    ]  # fmt: skip


# Data that looks like death.


@pytest.mark.parametrize(("scale", "dead"), [(1.0, []), (255.0, [(0, 3)])])
def test_inputs_of_0_to_255_in_a_net_trained_on_0_to_1(scale: float, dead: list[tuple[int, int]]) -> None:
    model = nn.Sequential(linear((0.0,) * 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(-torch.eye(4))
        model[0].bias[:] = 0.75
    data = (uniform(N, 4) + 0.5).clamp(min=0.01) * scale
    data[0], data[1] = 0.01 * scale, scale

    diagnosis = deadcheck.scan(model, data)

    (seen,) = diagnosis.measurement.inputs
    assert (seen.min, seen.max) == pytest.approx((0.01 * scale, scale))
    assert seen.mean == pytest.approx(float(data.double().mean()))
    assert seen.sd == pytest.approx(float(data.double().std(correction=0)))
    assert diagnosis.sites[0].ranges(Verdict.DEAD) == dead
    assert ("inputs-suspect" in findings(diagnosis)) == bool(dead)
    if dead:
        assert "runs from 2.55 to 255" in findings(diagnosis)["inputs-suspect"]


def test_a_constant_feature_of_the_input_is_said() -> None:
    data = uniform(N, 4)
    data[:, 1] = -1.0

    diagnosis = deadcheck.scan(nn.Sequential(linear((0.0,) * 4), nn.ReLU()), data)

    assert diagnosis.sites[0].ranges(Verdict.DEAD) == [(1, 1)]
    assert "1 of 4 elements are the same in every sample" in findings(diagnosis)["constant-input"]


def test_a_padding_channel_is_said_and_an_all_zero_sample_is_none() -> None:
    data = uniform(N, 3, 2, 2)
    data[:, 2], data[5] = 0.0, 0.0

    diagnosis = deadcheck.scan(nn.Sequential(conv(bias=(0.0,) * 3), nn.ReLU()), data)

    assert diagnosis.measurement.inputs[0].constant_features == 4
    assert diagnosis.sites[0].ranges(Verdict.DEAD) == [(2, 2)]


def test_data_that_is_one_sample_over_and_over_is_said() -> None:
    found = findings(deadcheck.scan(Then(F.relu), torch.full((N, 4), 0.5)))

    assert "every sample is the same" in found["constant-input"]
    assert "the same output for all 320 samples" in found["output-constant"]


# NaN, infinities and types of numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["weight", "activation", "input"])
def test_what_is_not_finite_is_invalid_and_never_dead(value: float, place: str) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear((0.5,) * 4), nn.ReLU())
    data = uniform(N, 4)
    if place == "weight":
        with torch.no_grad():
            model[0].bias[1] = value
    elif place == "activation":
        model.insert(1, Then(lambda x: torch.where(torch.arange(4) == 1, value, x), (0.0,) * 4))
    else:
        data[7, 1] = value

    diagnosis = deadcheck.scan(model, data, allow_nonfinite=True)

    first = diagnosis.sites[0]
    assert first.verdict(1) is Verdict.INVALID
    assert first.stats.nonfinite.tolist()[1] == (1 if place == "input" else N)
    (finding,) = (f for f in diagnosis.findings if (f.id, f.where) == ("invalid", first.key))
    # Infinity times 0 is NaN, so a bad input reaches every unit of the layer behind it.
    assert f"{4 if place == 'input' else 1} of 4 units gave NaN or infinity" in finding.message
    assert first.counts[Verdict.DEAD] == (0 if place == "input" else 1)
    if np.isnan(value) and place == "weight":
        # NaN times 0 is NaN, so it reaches every unit of the next layer.
        assert diagnosis.sites[1].ranges(Verdict.INVALID) == [(0, 3)]


def test_a_model_of_nan_has_no_dead_units() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert (diagnosis.dead, diagnosis.silent, diagnosis.count(Verdict.INVALID)) == (0, 0, 4)


def test_data_with_nan_is_refused_with_its_place() -> None:
    data = uniform(100, 4)
    data[83, 2] = torch.nan

    with pytest.raises(DataError, match=r"the first is sample 83; .* --allow-nonfinite") as raised:
        deadcheck.scan(Then(F.relu), data)
    assert raised.value.exit_code == ExitCode.ERROR


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    diagnosis = deadcheck.scan(Then(F.relu).to(dtype), uniform(N, 4))

    assert diagnosis.sites[0].ranges(Verdict.DEAD) == PLANTED
    assert diagnosis.measurement.env.dtype == str(dtype).removeprefix("torch.")
    assert diagnosis.measurement.warnings == (
        f"inputs of float32 were cast to {diagnosis.measurement.env.dtype}, the model's own type",
    )


def test_complex_values_are_skipped_and_the_rest_is_measured() -> None:
    model = nn.Sequential(OrderedDict(fc=linear(), act=nn.ReLU(), last=Then(lambda x: torch.tanh(x + 1j))))

    diagnosis = deadcheck.scan(model, uniform(N, 4))

    assert keys(diagnosis) == ["act"]
    (item,) = diagnosis.measurement.skipped
    assert (item.what, item.where) == ("aten.tanh.default", "last")
    assert item.reason == "complex values have no sign; not measured"


def test_integer_inputs_reach_an_embedding_as_they_are() -> None:
    table = nn.Embedding(2, 4)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0, -1, -1, -1], [-1, -1, 1, -1]]))
    data = torch.zeros(N, 3, dtype=torch.int64)
    data[9, 2] = 1  # the second word comes up once

    (site,) = deadcheck.scan(nn.Sequential(table, nn.ReLU()), data).sites

    assert site.stats.site.axis_from == "embedding"
    assert (site.units, site.stats.observations) == (4, 3 * N)
    assert site.stats.fired.tolist() == [N, 0, 1, 0]
    assert site.stats.first_fired.tolist() == [0, -1, 9, -1]
    assert site.ranges(Verdict.DEAD) == PLANTED


def test_a_relu_of_integers_is_counted() -> None:
    model = Call(lambda m, x: torch.relu(m.fc(x).int()), fc=linear())

    (site,) = deadcheck.scan(model, uniform(N, 4) * 10).sites

    assert site.ranges(Verdict.DEAD) == PLANTED


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation.*:UserWarning")
def test_a_dynamically_quantised_linear_feeds_its_relu() -> None:
    model = nn.Sequential(linear((0.0, -2.0, 0.0, -2.0)), nn.ReLU())
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    (site,) = deadcheck.scan(model, uniform(N, 4)).sites

    assert site.stats.site.fed_by == ("0",)
    assert site.ranges(Verdict.DEAD) == PLANTED


class Recurrent(nn.Module):
    """A recurrent layer, or a cell, that gives its states too, and a ReLU above it."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.fc = kind(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        return torch.relu(self.fc(self.rnn(x)[0]))


class OneState(Recurrent):
    """The same for a cell whose output is its state."""

    def forward(self, x):
        return torch.relu(self.fc(self.rnn(x)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation.*:UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["module", "scripted", "traced"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell])
def test_a_dynamically_quantised_recurrent_layer_is_counted_by_its_output(kind: type[nn.Module], how: str) -> None:
    torch.manual_seed(0)
    model = (OneState if kind is nn.GRUCell else Recurrent)(kind).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {kind, nn.Linear})
    data = torch.randn(5, 12, 4) if kind in (nn.LSTM, nn.GRU) else torch.randn(12, 4)
    hidden = model.rnn(data) if kind is nn.GRUCell else model.rnn(data)[0]
    program = model
    if how != "module":
        program = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, data)

    diagnosis = deadcheck.scan(program, data)

    rnn, relu = diagnosis
    assert (rnn.key, rnn.stats.site.activation) == ("rnn", "lstm" if "LSTM" in kind.__name__ else "gru")
    assert rnn.stats.zeros.tolist() == (hidden == 0).flatten(0, -2).sum(0).tolist()
    assert rnn.stats.output_max.tolist() == hidden.flatten(0, -2).amax(0).tolist()
    assert relu.stats.zeros.tolist() == (model(data) == 0).flatten(0, -2).sum(0).tolist()
    assert not diagnosis.measurement.skipped


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation.*:UserWarning")
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_dynamically_quantised_cell_that_cannot_be_seen_is_listed(nonlinearity: str) -> None:
    model = OneState(functools.partial(nn.RNNCell, nonlinearity=nonlinearity)).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {nn.RNNCell})

    diagnosis = deadcheck.scan(model, torch.randn(12, 4))

    (cell,) = diagnosis.measurement.skipped
    assert (cell.what, cell.where) == (f"quantized.quantized_rnn_{nonlinearity}_cell_dynamic.default", "rnn")


@pytest.mark.parametrize("kind", [nn.SiLU, nn.Mish, nn.PReLU, nn.GELU, nn.ReLU, nn.Sigmoid])
def test_a_backward_pass_inside_forward_has_no_activations(kind: type[nn.Module]) -> None:
    """As in a force field, whose forces are the gradient of its energy."""

    def forward(model: Call, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(model.act(model.fc(x)).sum(), x)[0]

    diagnosis = deadcheck.scan(Call(forward, fc=linear(), act=kind()), uniform(N, 4))

    assert keys(diagnosis) == ["act"]
    assert diagnosis.sites[0].stats.observations == N
    assert not diagnosis.measurement.skipped


def test_what_is_run_again_by_a_backward_pass_is_counted_once() -> None:
    def forward(model: Call, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = checkpoint(lambda x: torch.relu(model.fc(x)), x, use_reentrant=False).sum()
            return torch.autograd.grad(energy, x)[0]

    (site,) = deadcheck.scan(Call(forward, fc=linear()), uniform(N, 4))

    assert site.stats.observations == N


# Needles in haystacks.


def test_a_unit_that_fires_once_in_5000_is_rare_and_has_its_witness() -> None:
    data = uniform(5000, 4)
    data[3217, 1] = 150.0

    (site,) = deadcheck.scan(Then(F.relu), data).sites

    unit = site.unit(1)
    assert (unit.verdict, unit.fired, unit.witness) == (Verdict.RARE, 1, 3217)
    assert unit.because == "on in 1 of 5000 samples, first in sample 3217"
    assert site.ranges(Verdict.DEAD) == [(3, 3)]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (15, 15), (7, 3)])
def test_a_channel_that_fires_on_one_position_of_every_sample_is_not_dead(row: int, column: int) -> None:
    data = uniform(N, 4, 16, 16)
    data[:, 1, row, column] = 150.0

    (site,) = deadcheck.scan(nn.Sequential(conv(), nn.ReLU()), data).sites

    assert site.stats.fired.tolist()[1] == N
    assert site.stats.zeros.tolist()[1] == N * 255
    assert site.ranges(Verdict.DEAD) == [(3, 3)]


# Inputs and outputs of any shape.


@dataclass
class Record:
    x: Tensor
    note: str = ""


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


def halves(data: Tensor) -> list[Tensor]:
    return list(data.split(len(data) // 2))


DATA = uniform(N, 4)


@pytest.mark.parametrize(
    ("forward", "data", "unpack"),
    [
        (lambda m, x: F.relu(m.fc(x)), DATA, "auto"),
        (lambda m, x: F.relu(m.fc(x)), DATA.numpy(), "auto"),
        (lambda m, x: F.relu(m.fc(x)), halves(DATA), "auto"),
        (lambda m, x: F.relu(m.fc(x)), (DATA, torch.zeros(N)), "first"),
        (lambda m, x, scale: F.relu(m.fc(x) * scale), (DATA, torch.ones(N, 1)), "args"),
        (lambda m, x, scale: F.relu(m.fc(x) * scale), [Pair(half, torch.ones(1)) for half in halves(DATA)], "args"),
        (lambda m, x, *, scale=0.0: F.relu(m.fc(x) * scale), {"x": DATA, "scale": 1.0}, "kwargs"),
        (lambda m, x, flags: F.relu(m.fc(x)), {"x": DATA, "flags": None}, "kwargs"),
        (lambda m, x, mode: F.relu(m.fc(x)) if mode == "on" else x, {"x": DATA, "mode": "on"}, "kwargs"),
        (lambda m, items: F.relu(m.fc(items[0]["x"][1])), [{"items": [{"x": (None, DATA)}]}], "kwargs"),
        (lambda m, items: F.relu(m.fc(items[0]["x"])), [[[{"x": half}]] for half in halves(DATA)], "auto"),
        (lambda m, words: F.relu(m.fc(torch.tensor([[float(len(w)) - 2] * 4 for w in words]))),
         [{"words": ["a", "bbb"] * 80}] * 2, "kwargs"),
        (lambda m, words: F.relu(m.fc(torch.tensor([[float(len(w)) - 2] * 4 for w in words]))),
         [(["a", "bbb"] * 80,)] * 2, "auto"),
    ],
)  # fmt: skip
def test_inputs_of_any_kind_run(forward: Callable[..., Tensor], data: Any, unpack: str) -> None:
    diagnosis = deadcheck.scan(Call(forward, fc=linear()), data, unpack=unpack)

    (site,) = diagnosis.sites
    assert (site.units, site.stats.samples, site.stats.observations) == (4, N, N)
    assert site.ranges(Verdict.DEAD) == PLANTED


def test_a_dataclass_as_input_runs_and_says_that_samples_cannot_be_told() -> None:
    model = Call(lambda m, record: F.relu(m.fc(record.x)), fc=linear())

    diagnosis = deadcheck.scan(model, [Record(half) for half in halves(DATA)])

    assert diagnosis.sites[0].stats.observations == N
    assert "each batch counts as one sample" in diagnosis.measurement.warnings[0]
    assert diagnosis.dead == 0  # two samples at most are known


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: None,
        lambda y: {"logits": y, "loss": None},
        lambda y: Record(y),
        lambda y: Pair(y, y.sum()),
        lambda y: (y, [y, {"deep": (y, "text")}]),
        lambda y: "text",
        lambda y: y.sum(),
        lambda y: iter([y]),
    ],
)
def test_outputs_of_any_kind_run(wrap: Callable[[Tensor], Any]) -> None:
    diagnosis = deadcheck.scan(Then(lambda x: wrap(F.relu(x))), DATA)

    assert diagnosis.sites[0].ranges(Verdict.DEAD) == PLANTED
    assert "output-constant" not in findings(diagnosis)


@pytest.mark.parametrize("wrap", [lambda y: {"a": [y]}, Record, lambda y: (None, Pair(y, y))])
def test_a_constant_output_is_found_inside_containers(wrap: Callable[[Tensor], Any]) -> None:
    found = findings(deadcheck.scan(Then(lambda x: wrap(F.relu(x)), (-100.0,) * 4), DATA))

    assert "output-constant" in found
    assert "layer-dead" in found


# One thing under several names.


def test_a_module_under_two_names_is_one_site_with_its_other_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Sequential(linear(), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.second(x)

    (site,) = deadcheck.scan(Shared(), DATA).sites

    assert site.key == "first.1"
    assert site.stats.site.aliases == ("second.1",)
    assert site.ranges(Verdict.DEAD) == PLANTED


def test_tied_weights_are_the_layers_that_hold_them() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), linear((-100.0, 0.0, 0.0, 0.0)), nn.ReLU())
    model[2].weight = model[0].weight

    diagnosis = deadcheck.scan(model, DATA)

    assert [(site.key, site.stats.site.fed_by, site.ranges(Verdict.DEAD)) for site in diagnosis] == [
        ("1", ("0",), PLANTED),
        ("3", ("2",), [(0, 1), (3, 3)]),
    ]


class DataParallel(nn.Module):
    """Somebody's own class with the name of one of torch, that does more than to call the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(-self.module(x))


def test_a_class_of_the_same_name_is_no_wrapper() -> None:
    diagnosis = deadcheck.scan(DataParallel(nn.Sequential(nn.Linear(6, 5), nn.ReLU())), torch.randn(8, 6))

    # What is negated after a ReLU is never above 0.
    assert [(site.key, site.stats.fired.tolist() == [0] * 5) for site in diagnosis.sites] == [
        ("module.1", False), (":relu#1", True)
    ]  # fmt: skip


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel, functools.partial(torch.compile, backend="eager")])
def test_the_model_inside_a_wrapper_is_measured_under_its_own_names(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(OrderedDict(fc=linear(), act=nn.ReLU()))

    diagnosis = deadcheck.scan(wrapper(model), DATA)

    assert keys(diagnosis) == ["act"]
    assert diagnosis.site("act").stats.site.fed_by == ("fc",)
    assert diagnosis.site("act").ranges(Verdict.DEAD) == PLANTED
    (note,) = diagnosis.measurement.warnings
    assert note.endswith("was measured")


def test_a_lazy_model_is_measured_as_a_copy_and_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.ReLU())

    diagnosis = deadcheck.scan(model, DATA)

    assert [(site.key, site.units) for site in diagnosis] == [("1", 5), ("4", 3)]
    assert isinstance(model[0], nn.LazyLinear)
    assert model[0].has_uninitialized_params()
    assert isinstance(model[3], nn.LazyBatchNorm1d)
    assert model[3].has_uninitialized_params()
    assert "lazy layers without weights" in diagnosis.measurement.warnings[0]


class Codec(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = linear((0.0,) * 4), linear()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.encoder(x))

    def decode(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.decoder(x), 0.5)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_an_entry_point_that_is_not_forward(wrap: Callable[[nn.Module], nn.Module]) -> None:
    diagnosis = deadcheck.scan(wrap(Codec()), DATA, call="decode")

    assert keys(diagnosis) == [":leaky_relu#1"]
    assert diagnosis.sites[0].ranges(Verdict.NEGATIVE_ONLY) == PLANTED
    assert skipped(diagnosis) == [("Linear", "encoder")]


def test_an_entry_point_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"\(Codec\) has no method 'encode'"):
        deadcheck.scan(Codec(), DATA, call="encode")


# Loaders.


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(DATA)


@pytest.mark.parametrize(
    "data",
    [
        lambda: iter(halves(DATA)),
        lambda: (half for half in halves(DATA)),
        Stream,
        lambda: DataLoader(Stream(), batch_size=7),
        lambda: DataLoader(TensorDataset(DATA, torch.zeros(N)), batch_size=7),
        lambda: TensorDataset(DATA, torch.zeros(N)),
        lambda: lambda: iter(halves(DATA)),
    ],
)
def test_loaders_of_any_kind(data: Callable[[], Any]) -> None:
    diagnosis = deadcheck.scan(Then(F.relu), data())

    assert diagnosis.measurement.data.samples == N
    assert diagnosis.sites[0].ranges(Verdict.DEAD) == PLANTED


def endless() -> Iterator[Tensor]:
    while True:
        yield torch.cat([DATA, DATA])


@pytest.mark.parametrize(("limit", "samples"), [(None, 10_000), (700, 700), (3, 3)])
def test_an_endless_loader_ends(limit: int | None, samples: int) -> None:
    diagnosis = deadcheck.scan(Then(F.relu), endless(), max_samples=limit)

    assert diagnosis.measurement.data.samples == samples
    assert diagnosis.sites[0].stats.samples == samples
    said = "the data does not say how long it is; stopped after 10000 samples (see --max-samples)"
    assert diagnosis.measurement.warnings == (() if limit else (said,))


@pytest.mark.parametrize(
    "data", [[], iter([]), torch.zeros(0, 4), [torch.zeros(0, 4)] * 3, DataLoader([]), TensorDataset(torch.zeros(0, 4))]
)
def test_a_loader_that_yields_nothing_has_nothing_to_judge(data: Any) -> None:
    with pytest.raises(NothingMeasured, match="holds no samples") as raised:
        deadcheck.scan(Then(F.relu), data)
    assert raised.value.exit_code == ExitCode.NOTHING_JUDGED


@pytest.mark.parametrize("error", [OSError("disk gone"), ValueError("bad row"), KeyError("label")])
def test_a_loader_that_raises_is_named_with_its_batch(error: Exception) -> None:
    def loader() -> Iterator[Tensor]:
        yield from DATA[:30].split(5)
        raise error

    with pytest.raises(DataError, match=rf"raised {type(error).__name__} at batch 7 .* after 30 samples") as raised:
        deadcheck.scan(Then(F.relu), loader())
    assert raised.value.exit_code == ExitCode.ERROR
    assert raised.value.__cause__ is error


# Nothing left behind.


class Breaks(nn.Module):
    """Raises in its second pass, after the first activation."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.fc, self.act = linear(), nn.ReLU()
        self.broken = Then(self._breaks)
        self.error, self.calls = error, 0

    def _breaks(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.broken(self.act(self.fc(x))))


def test_a_forward_that_raises_half_way_names_the_module_and_the_sample() -> None:
    model = Breaks(ValueError("half-way"))
    before = fingerprint(model)

    with pytest.raises(ForwardError, match=r"failed in broken \(Then\) at sample 64, given \(64, 4\).*half-way"):
        deadcheck.scan(model, DATA)

    assert fingerprint(model) == before
    assert torch.backends.mha.get_fastpath_enabled()
    assert len(deadcheck.scan(Then(F.relu), DATA).sites) == 1  # the probe is free again


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_half_way_through_a_forward_leaves_nothing(error: type[BaseException]) -> None:
    model = Breaks(error())
    before = fingerprint(model)

    with pytest.raises(error):
        deadcheck.scan(model, DATA)

    assert fingerprint(model) == before
    assert torch.is_grad_enabled()
    assert deadcheck.scan(Then(F.relu), DATA).dead == 2


class Carries(nn.Module):
    """Keeps its state between batches; the first batch fixes the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = linear()
        self.state: Tensor | None = None
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = torch.zeros(len(x), 4)
        self.steps += 1
        self.state = F.relu(self.fc(x) + 0.5 * self.state)
        return self.state


def test_a_stateful_model_gives_the_same_counts_twice_and_gets_its_state_back() -> None:
    model = Carries()

    first, second = (deadcheck.scan(model, DATA, batch_size=80).sites[0].stats for _ in range(2))

    assert first.zeros.tolist() == second.zeros.tolist()
    assert first.output_sum.tolist() == second.output_sum.tolist()
    assert first.fired.tolist() != deadcheck.scan(Then(F.relu), DATA).sites[0].stats.fired.tolist()
    assert model.state is None
    assert float(model.steps) == 0


@pytest.mark.parametrize(("norm", "is_told"), [(nn.InstanceNorm2d(4), False), (nn.BatchNorm2d(4), True)])
def test_only_a_norm_over_the_batch_is_said_to_use_its_statistics(norm: nn.Module, is_told: bool) -> None:
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    found = deadcheck.scan(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()), torch.randn(10, 3, 6, 6)).measurement

    assert any("statistics of each batch" in note for note in found.warnings) is is_told


def test_a_batch_norm_that_the_user_froze_stays_frozen_and_no_statistics_move() -> None:
    model = nn.Sequential(linear(), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.ReLU())
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    diagnosis = deadcheck.scan(model, DATA)

    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert int(model[3].num_batches_tracked) == 0
    # In eval mode: with batch statistics unit 1 would be centred on 0 and fire, and dropout would lower the counts.
    assert diagnosis.site("2").ranges(Verdict.DEAD) == PLANTED
    assert diagnosis.site("5").stats.fired.tolist() == diagnosis.site("2").stats.fired.tolist()
