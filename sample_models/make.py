"""Trains the sample models on scikit-learn's handwritten digits and writes them beside their held-out samples.

    python sample_models/make.py

Deterministic on one machine and torch version: seeds are fixed and one thread is used. 1,797 real images of 8x8
pixels, 0 to 16 scaled to 0 to 1; 450 are held out for the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from architectures import cnn, mlp, residual_cnn, transformer
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """How one model is made."""

    name: str
    build: Callable[[], nn.Module]
    rate: float
    """Learning rate of Adam."""

    steps: int
    kind: str
    """``module``, ``weights`` or ``safetensors``."""


RECIPES = (
    Recipe("digits_mlp", mlp, 0.03, 600, "module"),
    Recipe("digits_mlp_weights", mlp, 0.03, 600, "weights"),
    Recipe("digits_mlp_healthy", lambda: mlp(64), 0.001, 600, "module"),
    Recipe("digits_cnn", cnn, 0.01, 400, "module"),
    Recipe("digits_residual", residual_cnn, 0.005, 300, "safetensors"),
    Recipe("digits_transformer", transformer, 0.003, 400, "weights"),
)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the training images and labels, then the held-out ones."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split((images / 16).astype(np.float32), labels, test_size=450, random_state=0)
    train_x, held_x, train_y, held_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return train_x, train_y, held_x, held_y


def train(recipe: Recipe, x: Tensor, y: Tensor) -> nn.Module:
    """Train one model with Adam on batches of 64, drawn with replacement."""
    torch.manual_seed(0)
    model = recipe.build()
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    for _ in range(recipe.steps):
        index = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(model(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def save(recipe: Recipe, model: nn.Module) -> Path:
    """Write the model in the recipe's format."""
    if recipe.kind == "safetensors":
        path = HERE / f"{recipe.name}.safetensors"
        save_file(model.state_dict(), path)
        return path
    path = HERE / f"{recipe.name}.pt"
    torch.save(model if recipe.kind == "module" else model.state_dict(), path)
    return path


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that the model gets right."""
    return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Make every model and print its accuracy."""
    torch.set_num_threads(1)
    train_x, train_y, held_x, held_y = digits()
    for recipe in RECIPES:
        model = train(recipe, train_x, train_y)
        path = save(recipe, model)
        np.savez_compressed(HERE / f"{recipe.name}.sample.npz", x=held_x.numpy(), y=held_y.numpy())
        rates = f"train {accuracy(model, train_x, train_y):.3f}, held out {accuracy(model, held_x, held_y):.3f}"
        print(f"{path.name}: {path.stat().st_size:,} bytes, accuracy {rates}")


if __name__ == "__main__":
    main()
