"""Which of several runs of one scan this is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from deadcheck.errors import UsageError


@dataclass(frozen=True)
class Shard:
    """One of ``count`` runs that share the batches of a scan: it takes batches index, index + count, …, from 1 on."""

    index: int = 1
    count: int = 1

    def takes(self, batch: int) -> bool:
        """Tell whether a batch, counted from 0, is one of its own."""
        return batch % self.count == self.index - 1


WHOLE = Shard()
"""The one run of a scan that is not shared."""


def shard_of(text: str | None) -> Shard:
    """Read ``2/4``; without it, the place of this process among those that torchrun started."""
    if text is None:
        rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        is_told = rank.isdecimal() and world.isdecimal() and "TORCHELASTIC_RUN_ID" in os.environ
        return Shard(int(rank) + 1, int(world)) if is_told else WHOLE
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r} is not I/N with I from 1 to N; write --shard 2/4")
    return Shard(int(match[1]), int(match[2]))
