"""What a patch did to a model, in numbers before and after; records for reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from deadcheck.diagnosis import Diagnosis, SiteDiagnosis
from deadcheck.errors import ExitCode
from deadcheck.patch_plan import PatchPlan, SiteChange
from deadcheck.sites import ModelIdentity, Skipped


@dataclass(frozen=True)
class GradientReach:
    """Gradient that reaches the incoming weights of a site's units, from outputs under random signs."""

    units: int
    """Units whose incoming weights are told apart."""

    without_before: int
    """Of these, with a gradient of exactly 0 from every sample."""

    without_after: int
    dead_mean_before: float | None
    """Mean |gradient| over the weights of dead units; None where there are none."""

    dead_mean_after: float | None


@dataclass(frozen=True)
class SiteEffect:
    """What became of one site."""

    change: SiteChange
    stand_in: str
    """What stands in now, as ``leaky_relu(0.01)``."""

    fault: str | None
    """What the function at the site does wrong; None when it is as said, at, above and below 0, slope included."""

    before: SiteDiagnosis | None = None
    """None for a site that did not run, or was not measured."""

    after: SiteDiagnosis | None = None
    gradient: GradientReach | None = None
    gradient_reason: str | None = None
    """Why the gradient is not told."""

    @property
    def units_changed(self) -> int | None:
        """Units that were changed; None where their number is not known."""
        if self.change.units is not None:
            return self.change.units.replaced
        return self.before.units if self.before is not None else None


@dataclass(frozen=True)
class Drift:
    """How far the outputs moved."""

    samples: int
    relative: float
    """Mean over the samples of ``|new - old| / |old|`` (2-norms); where the old output is 0, of ``|new|``."""

    largest: float
    """Largest difference of one number of the output."""

    nonfinite: int
    """Numbers of the new output that are NaN or infinite and were not before."""

    decisions: int = 0
    """Largest entries along the classes that were compared; 0 where the output has no classes."""

    decisions_changed: int = 0
    right_before: int | None = None
    """Decisions that equal the label; None without labels."""

    right_after: int | None = None


@dataclass(frozen=True)
class AlphaSearch:
    """How the slope was chosen."""

    tolerance: float
    steps: tuple[tuple[float, float], ...]
    """Slope and relative drift on the search samples, in the order of the trials."""

    alpha: float
    samples: int
    verified_samples: int
    """Samples that the search did not see; 0 where there were none."""

    verified_drift: float | None


@dataclass(frozen=True)
class Advice:
    """When something else would serve better, or what the numbers mean."""

    id: str
    message: str


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    path: str
    what: str
    needs: str | None = None
    """What loading it takes besides torch."""


@dataclass(frozen=True)
class Response:
    """What an activation gives at one input."""

    x: float
    output: float
    slope: float


@dataclass(frozen=True)
class SideBySide:
    """ReLU beside what stands in for it, as measured on one model."""

    result: PatchResult
    relu: tuple[Response, ...]
    """At inputs below and above 0."""

    stand_in: tuple[Response, ...]
    seconds_before: float = field(default=0.0, compare=False)
    """Median time of one pass over the first batch."""

    seconds_after: float = field(default=0.0, compare=False)
    batch: int = 0
    """Samples of that batch."""

    @property
    def units_with_gradient_told(self) -> int:
        """Units of the sites whose gradient is known."""
        return sum(site.gradient.units for site in self.result.sites if site.gradient is not None)


@dataclass(frozen=True)
class PatchResult:
    """What a patch did."""

    model: ModelIdentity
    plan: PatchPlan
    sites: tuple[SiteEffect, ...]
    skipped: tuple[Skipped, ...]
    """What was meant and could not be reached."""

    left: tuple[Skipped, ...] = ()
    """What was left as it is, as chosen."""

    before: Diagnosis | None = None
    """None when nothing was measured, without data."""

    after: Diagnosis | None = None
    drift: Drift | None = None
    search: AlphaSearch | None = None
    advice: tuple[Advice, ...] = ()
    written: tuple[Written, ...] = ()
    is_dry: bool = False
    """Whether nothing was to be written."""

    warnings: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def exit_code(self) -> ExitCode:
        """0 when all that was meant was changed, 3 when something was left."""
        return ExitCode.PASSED if self.is_complete else ExitCode.NOTHING_JUDGED

    @property
    def is_complete(self) -> bool:
        """Whether everything that was meant was changed, and does what it should."""
        return not self.skipped and all(site.fault is None for site in self.sites)
