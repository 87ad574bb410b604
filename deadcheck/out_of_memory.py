"""Tells when a forward pass needed more memory than there is."""

from __future__ import annotations

import torch

from deadcheck.errors import ForwardError

_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
"""Of CUDA and MPS, of torch's allocator on Linux and on Windows, and of cuBLAS."""


class DoesNotFit(ForwardError):
    """A forward pass needed more memory than there is."""

    def __init__(self, message: str, samples: int, *, can_be_halved: bool) -> None:
        super().__init__(message)
        self.samples = samples
        """Samples of that pass."""

        self.can_be_halved = can_be_halved


def is_lack_of_memory(error: Exception) -> bool:
    """Tell an error that fewer samples might not have met; torch raises a RuntimeError for most of them."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
