"""Trains two small models whose learning rate is raised half-way, and keeps their checkpoints.

    python sample_models/make_history.py

``crash`` loses a whole layer at once, ``decline`` a few units an epoch. Deterministic on one machine and torch version.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make import HERE, accuracy, digits
from torch import nn

STEPS = 21
"""Batches of 64 in an epoch: the training images once over."""


@dataclass(frozen=True)
class History:
    """One training run."""

    name: str
    widths: tuple[int, int]
    rates: tuple[float, ...]
    """Learning rate of Adam in each epoch."""

    kept: range
    """Epochs whose checkpoint is kept, from 1."""


HISTORIES = (
    History("crash", (40, 20), (0.003,) * 4 + (0.3,) * 2, range(1, 7)),
    History("decline", (96, 48), (0.003,) * 4 + (0.03,) * 6, range(4, 11)),
)


def main() -> None:
    """Train both and print what became of each epoch."""
    torch.set_num_threads(1)
    folder = HERE / "history"
    folder.mkdir(exist_ok=True)
    train_x, train_y, held_x, held_y = digits()
    np.savez_compressed(folder / "held_out.npz", x=held_x.numpy())
    for history in HISTORIES:
        torch.manual_seed(0)
        a, b = history.widths
        model = nn.Sequential(nn.Linear(64, a), nn.ReLU(), nn.Linear(a, b), nn.ReLU(), nn.Linear(b, 10))
        optimiser = torch.optim.Adam(model.parameters())
        for epoch, rate in enumerate(history.rates, 1):
            optimiser.param_groups[0]["lr"] = rate
            for _ in range(STEPS):
                index = torch.randint(0, len(train_x), (64,))
                optimiser.zero_grad()
                F.cross_entropy(model(train_x[index]), train_y[index]).backward()
                optimiser.step()
            if epoch in history.kept:
                path: Path = folder / f"{history.name}_{epoch:02d}.pt"
                torch.save(model, path)
                print(f"{path.name}: rate {rate}, held out {accuracy(model, held_x, held_y):.3f}")


if __name__ == "__main__":
    main()
