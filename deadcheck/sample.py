"""Finds the sample that lies beside a model."""

from __future__ import annotations

from pathlib import Path

_SUFFIXES = (".sample.npz", ".sample.pt", ".sample.safetensors", ".sample.npy")


def sample_beside(model: Path) -> Path | None:
    """Return the sample that lies beside a model (``NAME.sample.npz|pt|safetensors|npy``), or None."""
    place = model if model.name else model.resolve()  # a folder may be given as "."
    stem = place.name if place.is_dir() else place.stem
    return next((p for suffix in _SUFFIXES if stem and (p := place.with_name(stem + suffix)).is_file()), None)
