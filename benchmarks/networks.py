"""Networks of the benchmarks, built from plain torch with random weights (ratios do not depend on values)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

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


def convnet() -> nn.Module:
    """Three small convolutions and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


class Form(Enum):
    """In which form a network is run."""

    MODULE = "module"
    SCRIPTED = "live TorchScript program"
    SAVED = "file of a TorchScript program, which the bare loop loads too"
    EXPORTED = "module of an exported program"


@dataclass(frozen=True)
class Network:
    """A network that is measured."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Shape of one sample."""

    batch: int
    form: Form = Form.MODULE

    def eager(self) -> nn.Module:
        """Build it, the same weights each time, in eval mode, its batch norms as if it had been trained.

        They are shifted, and hold the mean and the variance of what comes: with those of a new layer, whatever comes
        would be tiny beside the shift, and half of the units never fire.
        """
        torch.manual_seed(0)
        model = self.build()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.normal_(norm.bias, std=0.5)
            norm.momentum = 1.0  # the figures of the one batch that follows
        if norms:
            with torch.no_grad():
                model(self.data(2 * self.batch))
        for norm in norms:
            norm.momentum = 0.1
        return model.eval()

    def program(self) -> nn.Module:
        """Build it in its form; of a file, what would be in it."""
        model = self.eager()
        if self.form in (Form.SCRIPTED, Form.SAVED):
            program: nn.Module = torch.jit.script(model)
            return program
        if self.form is Form.EXPORTED:
            example = (torch.randn(2, *self.shape),)
            return torch.export.export(model, example, dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
        return model

    def data(self, samples: int) -> Tensor:
        """Return random samples, the same each time."""
        return torch.randn(samples, *self.shape, generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, Network] = {
    "ResNet-18 8x224": Network(resnet18, (3, 224, 224), 8),
    "VGG-11-BN 4x224": Network(vgg11_bn, (3, 224, 224), 4),
    "MLP 256": Network(mlp, (1024,), 256),
    "GELU encoder 8x128": Network(encoder, (128, 384), 8),
    "ReLU encoder 8x128": Network(relu_encoder, (128, 384), 8),
    "MobileNet 8x160": Network(mobilenet, (3, 160, 160), 8),
    "Convnet 64x32": Network(convnet, (3, 32, 32), 64),
    "MLP 256, scripted": Network(mlp, (1024,), 256, Form.SCRIPTED),
    "MLP 256, scripted file": Network(mlp, (1024,), 256, Form.SAVED),
    "MLP 256, exported": Network(mlp, (1024,), 256, Form.EXPORTED),
    "Convnet 64x32, exported": Network(convnet, (3, 32, 32), 64, Form.EXPORTED),
}
"""Name -> network. Exported ones stand last: to export loads torch's compiler."""
