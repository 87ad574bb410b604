"""The code of the sample models, as ``--arch sample_models/architectures.py:NAME`` builds them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int = 256) -> nn.Module:
    """Two hidden layers of ReLU units on the 64 pixels."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )  # fmt: skip


def cnn() -> nn.Module:
    """Two convolutions and a hidden layer, of torch.nn modules alone."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class ResidualCnn(nn.Module):
    """A residual block whose ReLUs are function calls, which hooks on modules do not see."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pixels of shape (N, 64)."""
        x = F.relu(self.bn1(self.stem(x.view(-1, 1, 8, 8))))
        y = self.bn2(self.conv(x))
        y += x
        return self.fc(F.relu_(y).mean((2, 3)))


class RowTransformer(nn.Module):
    """An encoder that reads an image as eight rows of eight pixels."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "relu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify pixels of shape (N, 64)."""
        rows = self.embed(x.view(-1, 8, 8)) + self.position
        return self.head(self.encoder(rows).mean(1))


def residual_cnn() -> nn.Module:
    """Build a ResidualCnn."""
    return ResidualCnn()


def transformer() -> nn.Module:
    """Build a RowTransformer."""
    return RowTransformer()
