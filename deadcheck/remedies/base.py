"""What a remedy takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deadcheck.patch_plan import PatchPlan, Replacement
from deadcheck.ranges import Ranges
from deadcheck.sites import Skipped


@dataclass(frozen=True)
class Choice:
    """What the user wants changed."""

    replacement: Replacement = field(default_factory=Replacement)
    only_dead: bool = False
    """Only the units that are dead."""

    dead: Mapping[str, Ranges] | None = None
    """Dead units by site key, from an earlier report; None for those of the scan at hand."""

    layers: tuple[str, ...] = ()
    """Patterns of site keys or module paths; one that begins with ``!`` takes sites out again."""

    min_dead_share: float = 0.0
    """Only sites with at least this share of dead units."""

    call: str = "forward"
    """Method of the model that is run."""

    clipped: bool = False
    """ReLU6 and hardtanh(0, c) too."""

    @property
    def is_everything(self) -> bool:
        """Whether every ReLU is meant, those that did not run included."""
        return not (self.only_dead or self.layers or self.min_dead_share)


@dataclass(frozen=True)
class Planned:
    """A plan, and what was wanted and cannot be reached."""

    plan: PatchPlan
    skipped: tuple[Skipped, ...]
