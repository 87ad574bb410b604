"""Models that are odd in one way each; ``reference`` spells out what their activations take and give."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, rnn
from torch.nn.utils.parametrizations import weight_norm

from tests.oracle import Oracle


class Zoo(nn.Module):
    """A model of the zoo: the shape of one sample, and a reference beside its forward."""

    shape: tuple[int, ...] = (6,)
    exact_reference = True
    """Whether the reference's output must equal the model's bit for bit."""

    def reference(self, oracle: Oracle, x: Tensor) -> object:
        raise NotImplementedError


class Functional(Zoo):
    """F.relu, torch.relu, x.relu(), x.relu_() in forward: hooks on modules see none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.d(torch.relu(self.b(F.relu(self.a(x)))).relu() + self.c(x).relu_()).relu()

    def reference(self, oracle, x):
        z1 = self.a(x)
        h1 = oracle.keep(":relu#1", z1, z1.clamp(min=0))
        z2 = self.b(h1)
        h2 = oracle.keep(":relu#2", z2, z2.clamp(min=0))
        h3 = oracle.keep(":relu#3", h2, h2.clamp(min=0))
        z4 = self.c(x)
        h4 = oracle.keep(":relu#4", z4, z4.clamp(min=0))
        z5 = self.d(h3 + h4)
        return oracle.keep(":relu#5", z5, z5.clamp(min=0))


class Spellings(Zoo):
    """ReLU as clamp, clamp_min, threshold, hardtanh, maximum, leaky_relu(0), PReLU(0), RReLU(0, 0)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleList(nn.Linear(6, 5) for _ in range(9))
        self.prelu, self.rrelu = nn.PReLU(init=0.0), nn.RReLU(0, 0)

    def forward(self, x):
        fc = self.fc
        return (
            fc[0](x).clamp(min=0) + torch.clamp_min(fc[1](x), 0) + F.threshold(fc[2](x), 0, 0)
            + F.hardtanh(fc[3](x), 0, 6) + torch.maximum(fc[4](x), torch.zeros(()))
            + torch.max(fc[5](x), torch.zeros(5)) + F.leaky_relu(fc[6](x), 0.0)
            + self.prelu(fc[7](x)) + self.rrelu(fc[8](x))
        )  # fmt: skip

    def reference(self, oracle, x):
        keys = (":clamp#1", ":clamp#2", ":threshold#1", ":relu6#1", ":maximum#1", ":maximum#2", ":leaky_relu#1",
                "prelu", "rrelu")  # fmt: skip
        total = 0
        for key, fc in zip(keys, self.fc, strict=True):
            z = fc(x)
            total = total + oracle.keep(key, z, z.clamp(0, 6) if "relu6" in key else z.clamp(min=0))
        return total


class ResidualBlock(Zoo):
    """One in-place nn.ReLU at two places, the second after an in-place residual add: two sites, as in torchvision."""

    shape = (3, 5, 7)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.down = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)

    def reference(self, oracle, x):
        z = self.bn1(self.conv1(x))
        h = oracle.keep("relu#1", z, z.clamp(min=0))
        z = self.bn2(self.conv2(h)) + self.down(x)
        return oracle.keep("relu#2", z, z.clamp(min=0))


class SharedAct(Zoo):
    """One act object put twice in a Sequential: two sites."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU()
        self.net = nn.Sequential(nn.Linear(6, 4), act, nn.Linear(4, 3), act)

    def forward(self, x):
        return self.net(x)

    def reference(self, oracle, x):
        z = self.net[0](x)
        h = oracle.keep("net.1#1", z, z.clamp(min=0))
        z = self.net[2](h)
        return oracle.keep("net.1#2", z, z.clamp(min=0))


class Siamese(Zoo):
    """The same weights run twice in a forward: one site with twice the observations."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 4), nn.ReLU())

    def forward(self, x):
        return self.tower(x) - self.tower(x.flip(1))

    def reference(self, oracle, x):
        a, b = self.tower[0](x), self.tower[0](x.flip(1))
        return oracle.keep("tower.1", a, a.clamp(min=0)) - oracle.keep("tower.1", b, b.clamp(min=0))


class Crelu(Zoo):
    """relu(x) beside relu(-x) on one line: two sites fed by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.fc(x)
        return torch.cat([F.relu(x), F.relu(-x)], 1)

    def reference(self, oracle, x):
        z = self.fc(x)
        return torch.cat([oracle.keep(":relu#1", z, z.clamp(min=0)), oracle.keep(":relu#2", -z, (-z).clamp(min=0))], 1)


class RecurrentRelu(Zoo):
    """nn.RNN with ReLU: two layers are two sites, and the time steps are more observations."""

    shape = (5, 3)
    exact_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]

    def reference(self, oracle, x):
        for layer in (0, 1):
            w_i, w_h, b_i, b_h = (
                getattr(self.rnn, f"{n}_l{layer}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            # As torch does it: the inputs of all steps at once, time first.
            steps = F.linear(x.transpose(0, 1), w_i, b_i)
            h, out = torch.zeros(len(x), 4), []
            for t in range(x.shape[1]):
                z = F.linear(h, w_h, b_h) + steps[t]
                h = oracle.keep(f"rnn:relu#{layer + 1}", z, z.clamp(min=0))
                out.append(h)
            x = torch.stack(out, 1)
        return x


class BlankStates(Zoo):
    """Layers on states of zeros and ones that forward makes for each sample, before they meet the data."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.own, self.data = nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x):
        states = torch.zeros(len(x), 3, 4) + 0.5
        h = self.own(torch.relu(self.query(states)))
        memory = x.new_empty(len(x), 3, 5).fill_(0.25)
        return torch.relu(h + self.data(x)[:, None]).sum(1) + torch.relu(self.own(memory)).mean(1)

    def reference(self, oracle, x):
        z = self.query(torch.full((len(x), 3, 4), 0.5))
        h = self.own(oracle.keep(":relu#1", z, z.clamp(min=0), unit=2))
        z = h + self.data(x)[:, None]
        out = oracle.keep(":relu#2", z, z.clamp(min=0), unit=2).sum(1)
        z = self.own(torch.full((len(x), 3, 5), 0.25))
        return out + oracle.keep(":relu#3", z, z.clamp(min=0), unit=2).mean(1)


class Cell(Zoo):
    """nn.RNNCell in a loop, with a number of steps that depends on the batch: one site."""

    shape = (6, 3)

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(3, 4, nonlinearity="relu")

    def forward(self, x):
        h = torch.zeros(len(x), 4)
        for t in range(2 + len(x) % 3):
            h = self.cell(x[:, t], h)
        return h

    def reference(self, oracle, x):
        h = torch.zeros(len(x), 4)
        for t in range(2 + len(x) % 3):
            c = self.cell
            z = F.linear(x[:, t], c.weight_ih, c.bias_ih) + F.linear(h, c.weight_hh, c.bias_hh)
            h = oracle.keep("cell:relu#1", z, z.clamp(min=0))
        return h


def nonzero(z: np.ndarray, h: np.ndarray) -> np.ndarray:
    """What counts as on for the output of an LSTM or GRU."""
    return h != 0


class Gated(Zoo):
    """LSTM, GRU and their cells: the gates are no sites, the outputs are."""

    shape = (4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(3, 4, batch_first=True), nn.GRU(4, 5, batch_first=True)
        self.cell, self.gcell = nn.LSTMCell(5, 3), nn.GRUCell(3, 2)

    def forward(self, x):
        y = self.gru(self.lstm(x)[0])[0]
        return self.gcell(self.cell(y[:, -1])[0])

    def reference(self, oracle, x):
        y = self.lstm(x)[0]
        oracle.keep("lstm", y, y, unit=2, on=nonzero)
        y = self.gru(y)[0]
        oracle.keep("gru", y, y, unit=2, on=nonzero)
        y = self.cell(y[:, -1])[0]
        oracle.keep("cell", y, y, on=nonzero)
        y = self.gcell(y)
        return oracle.keep("gcell", y, y, on=nonzero)


class EncoderLayer(Zoo):
    """A transformer encoder layer in eval, which torch runs as one fused operator unless told not to."""

    shape = (5, 8)

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, activation=activation, batch_first=True)

    def forward(self, x):
        return self.layer(x)

    def reference(self, oracle, x):
        layer = self.layer
        y = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
        z = layer.linear1(y)
        h = oracle.keep("layer:relu#1", z, z.clamp(min=0), unit=2)
        return layer.norm2(y + layer.linear2(h))


class Tokens(Zoo):
    """Linear features on (batch, tokens, features), one unit's bias so low that it never fires."""

    shape = (7, 6)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        with torch.no_grad():
            self.fc.bias[3] = -100

    def forward(self, x):
        return F.relu(self.fc(x))

    def reference(self, oracle, x):
        z = self.fc(x)
        return oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)


class Heads(Zoo):
    """Features seen as (N, heads, T, width) and as rows (N*T*heads, width): the units are the layer's rows."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 12)

    def forward(self, x):
        n, t, _ = x.shape
        y = F.relu(self.a(x).view(n, t, 3, 4).transpose(1, 2)).transpose(1, 2).reshape(n, t, 12)
        return F.relu(self.b(y).view(n * t * 3, 4)).view(n, t, 12)

    def reference(self, oracle, x):
        z = self.a(x)
        h = oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)
        z = self.b(h)
        return oracle.keep(":relu#2", z, z.clamp(min=0), unit=2)


class ConvFlatten(Zoo):
    """Flatten between a convolution and its activation: the units are still the channels."""

    shape = (2, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.ReLU(), nn.Linear(27, 4))

    def forward(self, x):
        return self.net(x)

    def reference(self, oracle, x):
        z = self.net[0](x)
        h = oracle.keep("net.2", z, z.clamp(min=0))
        return self.net[3](h.flatten(1))


class Branches(Zoo):
    """Two convolutions side by side, pooled, then one activation: nine units fed by both."""

    shape = (3, 8, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.one = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(9, 1, 1)

    def forward(self, x):
        y = F.relu(F.max_pool2d(torch.cat([self.a(x), self.b(x)], 1), 2))
        return F.relu(self.one(y).squeeze(1))

    def reference(self, oracle, x):
        z = F.max_pool2d(torch.cat([self.a(x), self.b(x)], 1), 2)
        z = self.one(oracle.keep(":relu#1", z, z.clamp(min=0)))
        return oracle.keep(":relu#2", z, z.clamp(min=0)).squeeze(1)


class ChannelsLast(Zoo):
    """ConvNeXt's permute, LayerNorm, Linear, ReLU: the features are on the last axis."""

    shape = (3, 5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm(4), nn.Linear(4, 6)

    def forward(self, x):
        return F.relu(self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)

    def reference(self, oracle, x):
        z = self.fc(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        return oracle.keep(":relu#1", z, z.clamp(min=0), unit=3).permute(0, 3, 1, 2)


class MemoryFormat(Zoo):
    """Convolutions in channels-last memory."""

    shape = (3, 6, 5)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return F.relu(self.conv(x.contiguous(memory_format=torch.channels_last)))

    def reference(self, oracle, x):
        z = self.conv(x.contiguous(memory_format=torch.channels_last))
        return oracle.keep(":relu#1", z, z.clamp(min=0))


class Sequence(Zoo):
    """One-dimensional and three-dimensional convolutions, and a transposed one."""

    shape = (2, 12)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 4, 2)
        self.c = nn.Conv3d(4, 2, (1, 1, 2))

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x))))
        return F.relu(self.c(y[:, :, None, None]))

    def reference(self, oracle, x):
        z = self.a(x)
        z = self.b(oracle.keep(":relu#1", z, z.clamp(min=0)))
        z = self.c(oracle.keep(":relu#2", z, z.clamp(min=0))[:, :, None, None])
        return oracle.keep(":relu#3", z, z.clamp(min=0))


class Experts(Zoo):
    """Rows picked by a mask go to one of two experts, and a third never runs: samples are still told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x):
        out = torch.zeros(len(x), 4)
        mask = x[:, 0] > 0
        for expert, rows in ((0, mask), (1, ~mask)):
            if rows.any():
                out[rows] = self.experts[expert](x[rows])
        return out

    def reference(self, oracle, x):
        out = torch.zeros(len(x), 4)
        mask = x[:, 0] > 0
        for expert, rows in ((0, mask), (1, ~mask)):
            if rows.any():
                z = self.experts[expert][0](x[rows])
                index = np.flatnonzero(rows.numpy())
                out[rows] = oracle.keep(f"experts.{expert}.1", z, z.clamp(min=0), rows=index)
        return out


class Dispatched(Zoo):
    """Rows for an expert picked along the second of two axes, as in Switch Transformers; often one, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        rows = (x[:, 0] > 0.8).nonzero()[:, 0]
        return F.relu(self.fc(x[None, rows].reshape(-1, 6))).sum(0)

    def reference(self, oracle, x):
        rows = np.flatnonzero((x[:, 0] > 0.8).numpy())
        z = self.fc(x[rows])
        return oracle.keep(":relu#1", z, z.clamp(min=0), rows=rows).sum(0)


class Resorted(Zoo):
    """Tokens sorted by an expert and put back by an index, beside what stayed where it was; time comes first too."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared, self.out, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = x.reshape(-1, 6)
        order = h[:, 0].argsort()
        h = F.relu(self.out(self.own(h[order])[order.argsort()] + self.shared(h))).view(x.shape)
        steps = h.transpose(0, 1).reshape(-1, 6)
        return F.relu(self.last(steps[torch.arange(len(steps))] + steps)).view(5, -1, 6).sum(0)

    def reference(self, oracle, x):
        h = x.reshape(-1, 6)
        order = h[:, 0].argsort()
        z = self.out(self.own(h[order])[order.argsort()] + self.shared(h)).view(x.shape)
        h = oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)
        z = self.last(2 * h.transpose(0, 1).reshape(-1, 6)).view(5, -1, 6)
        return oracle.keep(":relu#2", z, z.clamp(min=0), sample=1, unit=2).sum(0)


class Queries(Zoo):
    """Learnt queries, copied for each sample, meet the pixels of a map: each query is a unit, as in Mask2Former."""

    shape = (3, 4, 4)
    exact_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Embedding(5, 8)
        self.norm, self.fc, self.conv = nn.LayerNorm(8), nn.Linear(8, 8), nn.Conv2d(3, 8, 1)

    def forward(self, x):
        copies = self.queries.weight.unsqueeze(1).repeat(1, len(x), 1)
        return F.relu(torch.einsum("bqc,bchw->bqhw", self.fc(self.norm(copies).transpose(0, 1)), self.conv(x)))

    def reference(self, oracle, x):
        z = torch.einsum("bqc,bchw->bqhw", self.fc(self.norm(self.queries.weight)).expand(len(x), -1, -1), self.conv(x))
        return oracle.keep(":relu#1", z, z.clamp(min=0))


class PackedTokens(Zoo):
    """Tokens of all samples packed by a mask into rows: a sample's tokens still count as that sample."""

    shape = (5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x):
        return F.relu(self.fc(x[x[..., 0] > -0.5])).sum(0)

    def reference(self, oracle, x):
        mask = x[..., 0] > -0.5
        z = self.fc(x[mask])
        index = mask.nonzero()[:, 0].numpy()
        return oracle.keep(":relu#1", z, z.clamp(min=0), rows=index).sum(0)


class Branching(Zoo):
    """Different sites on different batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        if x.sum() > 0:
            return F.relu(self.a(x)).sum(1)
        return F.gelu(self.b(x)).sum(1)

    def reference(self, oracle, x):
        if x.sum() > 0:
            z = self.a(x)
            return oracle.keep(":relu#1", z, z.clamp(min=0)).sum(1)
        z = self.b(x)
        return oracle.keep(":gelu#1", z, F.gelu(z), on=lambda z, h: z > -3.8103687).sum(1)


class Reparametrised(Zoo):
    """Weight norm, pruning and a tied weight: the sites are named by the modules that hold the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Linear(6, 6))
        self.pruned = prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.pruned.weight_orig

    def forward(self, x):
        return F.relu(self.tied(F.relu(self.pruned(F.relu(self.normed(x))))))

    def reference(self, oracle, x):
        for number, layer in enumerate((self.normed, self.pruned, self.tied), 1):
            z = layer(x)
            x = oracle.keep(f":relu#{number}", z, z.clamp(min=0))
        return x


class Dtype(Zoo):
    """Weights and activations in bfloat16."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.to(self.dtype)

    def forward(self, x):
        return F.relu(self.fc(x.to(self.dtype)))

    def reference(self, oracle, x):
        z = self.fc(x.to(self.dtype))
        return oracle.keep(":relu#1", z, z.clamp(min=0))


class Double(Dtype):
    """Weights and activations in float64."""

    dtype = torch.float64


class Half(Dtype):
    """Weights and activations in float16."""

    dtype = torch.float16


class NotFinite(Zoo):
    """NaN weights in one unit, an overflow to infinity in another: counted apart from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)
        with torch.no_grad():
            self.fc.weight[1, 2] = torch.nan
            self.fc.weight[2] *= 3e38

    def forward(self, x):
        return F.relu(self.fc(x))

    def reference(self, oracle, x):
        z = self.fc(x)
        return oracle.keep(":relu#1", z, z.clamp(min=0))


class RootWeights(Zoo):
    """Weights held by the model itself, used by a matrix product and an einsum."""

    shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 5))
        self.e = nn.Parameter(torch.randn(5, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x):
        return F.relu(torch.einsum("ntd,dh->nth", F.relu(x @ self.w), self.e) + self.bias)

    def reference(self, oracle, x):
        z = x @ self.w
        h = oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)
        z = torch.einsum("ntd,dh->nth", h, self.e) + self.bias
        return oracle.keep(":relu#2", z, z.clamp(min=0), unit=2)


class Sliced(Zoo):
    """A layer's features cut in two, each half with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x):
        a, b = self.fc(x).chunk(2, -1)
        return F.relu(a) * torch.tanh(b)

    def reference(self, oracle, x):
        z = self.fc(x)
        h = oracle.keep(":relu#1", z[:, :4], z[:, :4].clamp(min=0))
        b = z[:, 4:]
        return h * oracle.keep(":tanh#1", b, torch.tanh(b), on=lambda z, h: np.abs(z) < 4.1465058)


class Shuffled(Zoo):
    """Pixel shuffle moves channels into space; the units stay the convolution's channels."""

    shape = (2, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 1)

    def forward(self, x):
        return F.relu(F.pixel_shuffle(self.conv(x), 2))

    def reference(self, oracle, x):
        z = self.conv(x)
        oracle.keep(":relu#1", z, z.clamp(min=0))
        return F.pixel_shuffle(z.clamp(min=0), 2)


class SqueezeExcite(Zoo):
    """A gate of one value per channel multiplies the map before the activation."""

    shape = (3, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(5, 5)

    def forward(self, x):
        y = self.conv(x)
        gate = torch.sigmoid(self.fc(y.mean((2, 3))))
        return F.relu(y * gate[:, :, None, None])

    def reference(self, oracle, x):
        y = self.conv(x)
        z = self.fc(y.mean((2, 3)))
        gate = oracle.keep(":sigmoid#1", z, torch.sigmoid(z), on=lambda z, h: np.abs(z) < 6.9067548)
        z = y * gate[:, :, None, None]
        return oracle.keep(":relu#1", z, z.clamp(min=0))


class Positions(Zoo):
    """Position embeddings of as many tokens as there are samples in a batch: an axis is no batch by its length."""

    shape = (7, 6)

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pos, self.mlp = nn.Linear(6, 7), nn.Embedding(7, 7), nn.Linear(1, 7)
        self.register_buffer("mask", torch.ones(7, 7).tril())

    def bias(self):
        return self.pos(torch.arange(7)) + self.mlp(torch.arange(7.0)[:, None]).tanh()

    def forward(self, x):
        y = F.relu(self.fc(x) + self.bias())
        scores = (y @ y.transpose(1, 2)).masked_fill(self.mask == 0, -torch.inf)
        return F.relu(self.fc(scores.softmax(-1) @ x))

    def reference(self, oracle, x):
        z = self.fc(x) + self.bias()
        y = oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)
        scores = (y @ y.transpose(1, 2)).masked_fill(self.mask == 0, -torch.inf)
        z = self.fc(scores.softmax(-1) @ x)
        return oracle.keep(":relu#2", z, z.clamp(min=0), unit=2)


class GraphMixing(Zoo):
    """Nodes mixed by a fixed adjacency, from the left, by einsum and sparse: the units stay those of the layer."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 5)
        self.register_buffer("adj", (torch.rand(5, 5) > 0.5).float())
        self.norm, self.learnt = nn.BatchNorm1d(5), nn.Parameter(torch.rand(5, 5))

    def mixed(self, x):
        """Mix by a sparse matrix, nodes first."""
        n = len(x)
        return torch.sparse.mm(self.adj.to_sparse(), x.transpose(0, 1).reshape(5, -1)).view(5, n, -1).transpose(0, 1)

    def forward(self, x):
        y = F.relu(self.adj @ self.a(x))
        y = F.relu(torch.einsum("vw,nwf->nvf", self.adj, self.b(y)))
        y = F.relu(self.mixed(self.c(y)))
        return F.relu(self.norm(torch.einsum("nvf,vw->nfw", y, self.learnt)))

    def reference(self, oracle, x):
        z = self.adj @ self.a(x)
        z = torch.einsum("vw,nwf->nvf", self.adj, self.b(oracle.keep(":relu#1", z, z.clamp(min=0), unit=2)))
        z = self.mixed(self.c(oracle.keep(":relu#2", z, z.clamp(min=0), unit=2)))
        y = oracle.keep(":relu#3", z, z.clamp(min=0), unit=2)
        z = self.norm(torch.einsum("nvf,vw->nfw", y, self.learnt))
        return oracle.keep(":relu#4", z, z.clamp(min=0))


class Packed(Zoo):
    """Sequences of several lengths, packed and padded again: rows of steps, and last states, know their sample."""

    shape = (6, 3)

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn = nn.GRU(3, 4, batch_first=True), nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        self.fc, self.out = nn.Linear(4, 5), nn.Linear(4, 3)

    def packed(self, x):
        lengths = 1 + (x[:, 1:, 0] > 0).sum(1)
        return rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)

    def forward(self, x):
        y, last = self.gru(self.packed(x))
        y, _ = rnn.pad_packed_sequence(self.rnn(y)[0], batch_first=True)
        return torch.cat([F.relu(self.fc(y)).sum(1), F.relu(self.out(last[-1]))], 1)

    def reference(self, oracle, x):
        packed = self.packed(x)
        y, last = self.gru(packed)
        rows = torch.cat([packed.sorted_indices[:n] for n in packed.batch_sizes.tolist()])
        oracle.keep("gru", y.data, y.data, on=nonzero, rows=rows.numpy())
        net, state, start = self.rnn, torch.zeros(len(x), 4), 0
        steps = F.linear(y.data, net.weight_ih_l0, net.bias_ih_l0)
        for n in packed.batch_sizes.tolist():
            z = F.linear(state[:n], net.weight_hh_l0, net.bias_hh_l0) + steps[start : start + n]
            state = oracle.keep("rnn:relu#1", z, z.clamp(min=0), rows=rows[start : start + n].numpy())
            start += n
        padded, _ = rnn.pad_packed_sequence(net(y)[0], batch_first=True)
        z = self.fc(padded)
        a = oracle.keep(":relu#1", z, z.clamp(min=0), unit=2).sum(1)
        z = self.out(last[-1])
        return torch.cat([a, oracle.keep(":relu#2", z, z.clamp(min=0))], 1)


class Routed(Zoo):
    """Tokens sent to two of three experts, added up by index, as in Mixtral."""

    shape = (4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def run(self, x, act):
        flat = x.reshape(-1, 6)
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            if len(row):
                out.index_add_(0, row, act(number, expert(flat[row]), row) * weights[row, slot, None])
        return out.view(len(x), 4, 6)

    def forward(self, x):
        return F.relu(self.run(x, lambda number, z, row: torch.relu(z)))

    def reference(self, oracle, x):
        def act(number, z, row):
            return oracle.keep(f":relu#{number + 1}", z, z.clamp(min=0), rows=(row // 4).numpy())

        z = self.run(x, act)
        return oracle.keep(":relu#4", z, z.clamp(min=0), unit=2)


class Written(Zoo):
    """Outputs written into slices of zeros: steps of a (time, samples, units) tensor, halves of the channels, rows."""

    shape = (5, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 5)

    def run(self, x, out, each):
        for step in range(5):
            out[step, :, :3] = self.a(x[:, step])
            out[step, :, 3:] = self.b(x[:, step])
        for row in range(len(x)):
            each[row] = self.c(out[:, row].mean(0))
        return out, each

    def forward(self, x):
        out, each = self.run(x, torch.zeros(5, len(x), 6), torch.zeros(len(x), 5))
        return torch.cat([F.relu(out).sum(0), F.relu(each)], 1)

    def reference(self, oracle, x):
        z, each = self.run(x, torch.zeros(5, len(x), 6), torch.zeros(len(x), 5))
        first = oracle.keep(":relu#1", z, z.clamp(min=0), sample=1, unit=2).sum(0)
        return torch.cat([first, oracle.keep(":relu#2", each, each.clamp(min=0))], 1)


class Looped(Zoo):
    """A block with a residual in a loop, its first turn fed by the entry too, and an exit that some batches take."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.block, self.late = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.enter(x)
        for _ in range(3):
            x = F.relu(x + self.block(x))
        go = x[:, 0] > 0.5
        if go.any():
            x[go] = torch.sigmoid(self.late(x[go]))
        return torch.tanh(x)

    def reference(self, oracle, x):
        x = self.enter(x)
        for _ in range(3):
            z = x + self.block(x)
            x = oracle.keep(":relu#1", z, z.clamp(min=0))
        go = x[:, 0] > 0.5
        if go.any():
            z = self.late(x[go])
            rows = np.flatnonzero(go.numpy())
            x[go] = oracle.keep(":sigmoid#1", z, z.sigmoid(), on=lambda z, h: np.abs(z) < 6.9067548, rows=rows)
        return oracle.keep(":tanh#1", x, x.tanh(), on=lambda z, h: np.abs(z) < 4.1465058)


class Ensemble(Zoo):
    """Three nets as one by vmap over stacked weights: each has units of its own."""

    exact_reference = False

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def run(self, x):
        weights, biases = (torch.stack([getattr(net, name) for net in self.nets]) for name in ("weight", "bias"))
        return torch.func.vmap(F.linear, in_dims=(None, 0, 0))(x, weights, biases)

    def forward(self, x):
        return F.relu(self.run(x)).sum(0)

    def reference(self, oracle, x):
        z = self.run(x).transpose(0, 1).flatten(1)
        return oracle.keep(":relu#1", z, z.clamp(min=0)).view(len(x), 3, 4).sum(1)


class Modulated(Zoo):
    """Filters made for each sample, run as one grouped convolution, as in StyleGAN 2."""

    shape = (4, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(3, 4, 3, 3)), nn.Linear(4, 4)
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def run(self, x):
        n = len(x)
        weights = self.weight * self.style(x.mean((2, 3)))[:, None, :, None, None]
        return F.conv2d(x.reshape(1, n * 4, 5, 5), weights.reshape(n * 3, 4, 3, 3), groups=n).view(n, 3, 3, 3)

    def forward(self, x):
        return F.relu(self.run(F.relu(self.norm(x))))

    def reference(self, oracle, x):
        z = self.norm(x)
        z = self.run(oracle.keep(":relu#1", z, z.clamp(min=0)))
        return oracle.keep(":relu#2", z, z.clamp(min=0))


class Messages(Zoo):
    """Messages along edges, added up at the nodes of all samples at once; a node may get none."""

    shape = (5, 6)

    def __init__(self) -> None:
        super().__init__()
        self.message, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.update, self.other, self.third = (nn.Linear(4, 5) for _ in range(3))

    def run(self, x, act):
        n, nodes, width = x.shape
        start, end = (torch.tensor(ends) for ends in ([0, 1, 2, 2, 4], [1, 2, 1, 4, 2]))  # nothing comes to 0 and 3
        offsets = torch.arange(n)[:, None] * nodes
        flat, start, end = x.reshape(-1, width), (start + offsets).view(-1), (end + offsets).view(-1)
        sent = self.message(flat[start])
        summed = torch.zeros(n * nodes, 4).scatter_add(0, end[:, None].expand_as(sent), sent)
        added = torch.zeros(n * nodes, 4).index_add_(0, end, sent)
        by_node = flat.view(n, nodes, width).transpose(0, 1).reshape(-1, width)  # nodes before samples
        largest = torch.zeros(n * nodes, 4).scatter_reduce(
            0, torch.arange(nodes * n)[:, None].repeat(1, 4), self.message(by_node), "amax", include_self=False
        )
        written = torch.zeros(n * nodes, 4)
        written.index_put_((end,), sent, accumulate=True)
        h = act(1, self.update(summed), (n, nodes, 5), 0) + act(2, self.other(added), (n, nodes, 5), 0)
        h = h + act(3, self.third(written), (n, nodes, 5), 0)
        y = act(4, self.last(largest), (nodes, n, 3), 1)
        return h.view(n, nodes, 5).sum(1).sum(1) + y.view(nodes, n, 3).sum(0).sum(1)

    def forward(self, x):
        return self.run(x, lambda number, z, shape, sample: F.relu(z))

    def reference(self, oracle, x):
        def act(number, z, shape, sample):
            z = z.view(shape)
            return oracle.keep(f":relu#{number}", z, z.clamp(min=0), sample=sample, unit=2).view(-1, shape[-1])

        return self.run(x, act)


class Neighbours(Zoo):
    """Points gathered by flat indices (DGCNN), by two indices (PointNet++), and the last valid step of each sample."""

    shape = (6, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(8, 5, 1), nn.Linear(5, 4), nn.Linear(4, 3)

    def run(self, x, act):
        n, p, d = x.shape
        near = torch.cdist(x, x).topk(2, largest=False)[1]
        flat = (near + torch.arange(n).view(-1, 1, 1) * p).view(-1)
        edges = torch.cat([x.reshape(n * p, d)[flat].view(n, p, 2, d), x[:, :, None].repeat(1, 1, 2, 1)], 3)
        y = act(1, self.conv(edges.permute(0, 3, 1, 2)), 1).amax(3).transpose(1, 2)
        y = act(2, self.fc(y)[torch.arange(n).view(n, 1, 1), near], 3)
        return act(3, self.last(y.amax(2))[torch.arange(n), near[:, 0, 1]], 1)

    def forward(self, x):
        return self.run(x, lambda number, z, unit: F.relu(z))

    def reference(self, oracle, x):
        return self.run(x, lambda number, z, unit: oracle.keep(f":relu#{number}", z, z.clamp(min=0), unit=unit))


class FeaturesFirst(Zoo):
    """Weights on the left of (features, samples), experts in one weight of three axes, maxout, samples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 1))
        self.experts, self.fc = nn.Parameter(torch.randn(3, 4, 5)), nn.Linear(15, 8)

    def run(self, x, act):
        y = act(1, self.w @ x.T + self.bias, {"sample": 1, "unit": 0})
        y = act(2, (y.T[:, None, None] @ self.experts).flatten(1), {})
        y = act(3, self.fc(y).view(-1, 4, 2).amax(2), {})
        return torch.stack([row * 2 for row in y])

    def forward(self, x):
        return F.relu(self.run(x, lambda number, z, axes: F.relu(z)))

    def reference(self, oracle, x):
        z = self.run(x, lambda number, z, axes: oracle.keep(f":relu#{number}", z, z.clamp(min=0), **axes))
        return oracle.keep(":relu#4", z, z.clamp(min=0))


class Stacked(Zoo):
    """Heads, and chunks of one layer, stacked along a new axis are other units; repeats are more observations."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.cut = nn.ModuleList(nn.Linear(6, 4) for _ in range(3)), nn.Linear(6, 6)
        self.bits, self.twice = nn.Embedding(2, 3), nn.Linear(6, 6)

    def run(self, x, act):
        y = act(1, torch.stack([head(x) for head in self.heads], 1), lambda z: z.flatten(1)[:, None])
        z = act(2, torch.stack(self.cut(x).chunk(2, -1)), lambda z: z.transpose(0, 1).flatten(1)[:, None])
        w = act(3, self.bits((self.cut(x) > 0).long()), lambda z: z)
        n = len(x)
        v = act(4, self.twice(x).roll(1, 0).repeat_interleave(2, 0), lambda z: z.view(n, 2, 6).roll(-1, 0))
        return y.sum(1), z.sum(0), w.sum(1), v.view(n, 2, 6).sum(1)

    def forward(self, x):
        return torch.cat(self.run(x, lambda number, z, order: F.relu(z)), 1)

    def reference(self, oracle, x):
        def act(number, z, order):
            oracle.keep(f":relu#{number}", order(z), order(z).clamp(min=0), unit=2)
            return z.clamp(min=0)

        return torch.cat(self.run(x, act), 1)


class OneParameter(Zoo):
    """Layers and experts that are parts of one parameter: indexed, twice too, unbound, chunked, transposed, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.bias = nn.Parameter(torch.randn(3, 6, 6)), nn.Parameter(torch.randn(3, 6))
        self.gain, self.wide = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 6))
        self.experts, self.kernels = nn.Parameter(torch.randn(2, 6, 5)), nn.Parameter(torch.randn(2, 2, 2, 3))
        self.grid, self.halves = nn.Parameter(torch.randn(2, 2, 6, 4)), nn.Parameter(torch.randn(2, 6, 10))

    def run(self, x, act):
        for i in range(3):
            x = x + act(i, x @ self.deep[i] + self.bias[i])
        for i, gain in enumerate(self.gain.unbind()):
            x = act(3 + i, F.layer_norm(x, (6,)) * gain)
        y = sum(act(5 + i, F.linear(x, part)) for i, part in enumerate(self.wide.chunk(2)))
        experts = self.experts.transpose(1, 2)
        z = sum(act(7 + i, F.linear(x, experts[i])) for i in range(2))
        v = x.view(-1, 2, 3)
        for i in range(2):
            v = act(9 + i, F.conv1d(v, self.kernels[i], padding=1))
        for i in range(2):
            for j in range(2):
                y = y + act(11 + 2 * i + j, x @ self.grid[i][j]).sum(1, keepdim=True)
        for i in range(2):
            for j, half in enumerate(self.halves[i].chunk(2, -1)):
                y = y + act(15 + 2 * i + j, x @ half).sum(1, keepdim=True)
        return y.sum(1) + z.sum(1) + v.sum((1, 2))

    def forward(self, x):
        return self.run(x, lambda number, z: F.relu(z))

    def reference(self, oracle, x):
        return self.run(x, lambda number, z: oracle.keep(f":relu#{number + 1}", z, z.clamp(min=0)))


ZOO: tuple[type[Zoo], ...] = (
    Functional, Spellings, ResidualBlock, SharedAct, Siamese, Crelu, RecurrentRelu, Cell, Gated, EncoderLayer, Tokens,
    Heads, ConvFlatten, Branches, ChannelsLast, MemoryFormat, Sequence, Experts, PackedTokens, Branching,
    Reparametrised, Dtype, Double, Half, NotFinite, RootWeights, Sliced, Shuffled, SqueezeExcite, Positions,
    GraphMixing, Packed, Routed, Written, Looped, Ensemble, Modulated, Neighbours, FeaturesFirst, Stacked,
    OneParameter, Dispatched, Resorted, Queries, BlankStates, Messages,
)  # fmt: skip


def build(kind: type[Zoo]) -> Zoo:
    """Build a model of the zoo with fixed weights, in eval mode."""
    torch.manual_seed(3)
    return kind().eval()


def inputs(kind: type[Zoo], samples: int, seed: int = 0) -> Tensor:
    """Return normal inputs for a model of the zoo."""
    return torch.randn(samples, *kind.shape, generator=torch.Generator().manual_seed(seed))
