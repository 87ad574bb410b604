from types import FrameType
from typing import Any

from torch import nn

from deadcheck.leaps import Calls, Leap
from deadcheck.roster import SiteRecord
from deadcheck.steps import Step, Steps

class Runner:
    caller: FrameType | None
    seconds: float
    def __init__(
        self,
        known: dict[int, Leap],
        tracked: dict[int, Any],
        steps: Steps,
        taken: list[Step],
        kinds: dict[type[nn.Module], Any],
        hooks: dict[int, Any],
        pre_hooks: dict[int, Any],
        files: set[str],
        mode: Any,
        settled: set[SiteRecord],
        calls: Calls,
        /,
    ) -> None: ...
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], /) -> Any: ...

def place_of(files: set[str], number: int, caller: FrameType, /) -> int: ...
