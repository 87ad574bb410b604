"""Joins what several processes of one scan counted, where torchrun started them."""

from __future__ import annotations

import atexit
from collections.abc import Callable

import torch.distributed as dist

from deadcheck import parts
from deadcheck.errors import DeadcheckError, ReportedElsewhere, UsageError, internal_error


def gathered(count: Callable[[], parts.Kept]) -> list[tuple[str, parts.Kept]]:
    """Count in every process; return what each counted in the first of them, raise ReportedElsewhere in the others.

    An error in any process is raised in the first, and none waits for another that failed.
    """
    if not dist.is_available():
        raise UsageError("this torch was built without torch.distributed; use --shard and 'deadcheck merge'")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    told: tuple[bytes, DeadcheckError | None]
    try:
        told = parts.packed(count()), None
    except DeadcheckError as error:
        error.__cause__ = error.__context__ = None  # what lies below may not travel
        told = b"", error
    except Exception as error:  # a fault of ours: the others must not wait for this process
        told = b"", DeadcheckError(internal_error(error))
    everything = [told] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(told, everything)
    if everything is None:
        raise ReportedElsewhere("the first process reports for all")
    failure = next((error for _, error in everything if error is not None), None)
    if failure is not None:
        raise failure
    return [(f"process {rank}", parts.unpacked(data)) for rank, (data, _) in enumerate(everything)]
