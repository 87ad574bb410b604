"""Networks of the benchmarks, built from plain torch with random weights (ratios do not depend on values)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Residual block of ResNet-18, one shared in-place ReLU (He et al. 2015, arXiv 1512.03385)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


def resnet18() -> nn.Module:
    """ResNet-18 for 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    width_in = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [BasicBlock(width_in, width, stride), BasicBlock(width, width, 1)]
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def vgg11_bn() -> nn.Module:
    """VGG-11 with batch norm (Simonyan, Zisserman 2014, arXiv 1409.1556), its classifier narrowed to 1024."""
    layers: list[nn.Module] = []
    width_in = 3
    for width in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if width:
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            width_in = width
        else:
            layers.append(nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(512 * 7 * 7, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 1000))
    return nn.Sequential(*layers, *head)


def mlp() -> nn.Module:
    """Four hidden layers of 4096 units."""
    layers: list[nn.Module] = []
    for width_in in (1024, 4096, 4096, 4096):
        layers += [nn.Linear(width_in, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 10))


def encoder() -> nn.Module:
    """Four transformer encoder layers, 384 wide, 1536 GELU units each."""
    layer = nn.TransformerEncoderLayer(384, 6, 1536, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def relu_encoder() -> nn.Module:
    """Return the same with ReLU, which torch fuses with its layer where nobody watches."""
    layer = nn.TransformerEncoderLayer(384, 6, 1536, activation="relu", batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def mobilenet() -> nn.Module:
    """Depthwise separable blocks with ReLU6 (Sandler et al. 2018, arXiv 1801.04381), 13 of them."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(inplace=True)]
    width_in = 32
    for width, stride in (
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ):
        layers += [
            nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in, bias=False), nn.BatchNorm2d(width_in),
            nn.ReLU6(inplace=True),
            nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True),
        ]  # fmt: skip
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


def scripted() -> nn.Module:
    """Return the MLP as a TorchScript program."""
    return torch.jit.script(mlp().eval())  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18 8x224": (resnet18, (8, 3, 224, 224)),
    "VGG-11-BN 4x224": (vgg11_bn, (4, 3, 224, 224)),
    "MLP 256": (mlp, (256, 1024)),
    "GELU encoder 8x128": (encoder, (8, 128, 384)),
    "ReLU encoder 8x128": (relu_encoder, (8, 128, 384)),
    "MobileNet 8x160": (mobilenet, (8, 3, 160, 160)),
    "MLP 256, scripted": (scripted, (256, 1024)),
}
"""Name -> (factory, shape of a batch)."""


def prepared(factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a network in eval mode whose batch norms have the statistics of random data."""
    torch.manual_seed(0)
    model = factory()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()
