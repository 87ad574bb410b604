"""One model on one set of data, before and after a change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deadcheck import effect, passes, pipeline
from deadcheck.batch import Batch, rebatched
from deadcheck.casting import FloatType
from deadcheck.config import Config
from deadcheck.data import Batches
from deadcheck.diagnosis import Diagnosis, SiteDiagnosis, Verdict, diagnose
from deadcheck.patch_result import Drift, GradientReach
from deadcheck.preserve import eval_mode, preserved, seed_generators
from deadcheck.probe import Probe
from deadcheck.ranges import mask_of
from deadcheck.reach import Sightings
from deadcheck.rewriting.base import Subject
from deadcheck.rewriting.in_modules import copied

_GRADIENT_SAMPLES = 512


class Study:
    """One model on one set of data, before and after a change; each part is measured when it is asked for."""

    def __init__(
        self, subject: Subject, config: Config, *, progress: passes.Progress | None = None, has_data: bool = True
    ) -> None:
        self.subject = subject
        self.loaded = subject.loaded
        self.config = config
        self.progress = progress
        self.has_data = has_data
        self.model = subject.module
        self.sightings = Sightings(passes.CALLS_MODEL)

    @cached_property
    def before(self) -> Diagnosis:
        """What the model is."""
        return self._diagnose(self.model, self.sightings)

    def after(self, patched: nn.Module) -> tuple[Diagnosis, Sightings]:
        """Return what the patched model is."""
        sightings = Sightings(passes.CALLS_MODEL)
        return self._diagnose(patched, sightings), sightings

    def look(self, model: nn.Module) -> Sightings:
        """Watch another model on the data."""
        return self.after(model)[1]

    def _diagnose(self, model: nn.Module, sightings: Sightings) -> Diagnosis:
        loaded = replace(self.loaded, module=model)
        measurement = pipeline.measure(loaded, self._open(), self.config.scan, self.progress, watch=sightings)
        sightings.finish()
        return diagnose(measurement, self.config.thresholds)

    def _open(self) -> Batches:
        return pipeline.open_data(self.config.scan.data, self.config.scan, self.loaded)

    def batches(self, samples: int | None = None) -> Iterator[Batch]:
        """Yield the data's batches, up to some number of samples."""
        done, found = 0, self._open()
        for batch in found if self._fixed is None else rebatched(found, self._fixed):
            if not batch.samples:
                continue
            yield batch
            done += batch.samples
            if samples is not None and done >= samples:
                return

    @cached_property
    def _fixed(self) -> int | None:
        """The number of samples that the model takes, where there is one and the data is not an example of it."""
        return None if self._open().as_one else self.loaded.batch_size

    @contextmanager
    def running(self, *models: nn.Module) -> Iterator[list[effect.Forward]]:
        """Have models run as in a scan, and left as they were; gives the function that runs each."""
        with ExitStack() as stack:
            stack.enter_context(FloatType(self.model, self.config.scan).cast(*models))
            for model in models:
                stack.enter_context(preserved(model))
                stack.enter_context(eval_mode(model))
            yield [passes.forward_of(model, self.config.scan, self._fixed) for model in models]

    def answer(self, model: nn.Module) -> list[torch.Tensor]:
        """Return what a model gives for the first batch."""
        with self.running(model) as (forward,), torch.no_grad():
            seed_generators(self.config.scan.seed)
            return forward(next(self.batches()))

    def drift(self, patched: nn.Module, batches: Sequence[Batch] | None = None) -> Drift:
        """Return how far the outputs moved."""
        with self.running(self.model, patched) as (old, new):
            return effect.drift(old, new, self.batches() if batches is None else batches, self.config.scan.seed)

    def gradients(self, patched: nn.Module) -> dict[str, GradientReach | str]:
        """Return by site the gradients that reach its units before and after, or why they are not told."""
        where = {record.key: effect.incoming(self.model, record) for record in self.sightings.records}
        known = {key: item for key, item in where.items() if isinstance(item, effect.Incoming)}
        found = []
        for model in (self.model, patched):
            twin = _twin(model)
            with self.running(twin) as (forward,):
                batches = self.batches(_GRADIENT_SAMPLES)
                found.append(effect.gradients(twin, forward, batches, known, self.config.scan.seed))
        return {key: _gradient(self.before.site(key), item, found) for key, item in where.items()}

    def stale_units(self) -> int | None:
        """Count dead units that fire once batch norms use the batch's own statistics; None without batch norms."""
        twin = _twin(self.model)
        norms = [module for module in twin.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms or not self.before.dead:
            return None
        with self.running(twin) as (forward,), Probe(twin, unit_axes=self.config.scan.units) as probe:
            for module in norms:
                module.training = True
            done = 0
            for batch in self.batches():
                if batch.samples > 1:  # a batch of one has no statistics
                    with probe.batch(batch.args, batch.kwargs, samples=batch.samples, first_sample=done):
                        forward(batch)
                    done += batch.samples
            fired = {stats.site.key: stats.fired for stats in probe.stats()}
        return sum(_revived(site, fired.get(site.key)) for site in self.before)


def _twin(model: nn.Module) -> nn.Module:
    """Return a copy to try things on; a program is run as it is, since it cannot be copied with its marks."""
    return model if isinstance(model, (torch.jit.ScriptModule, fx.GraphModule)) else copied(model, share=True)


def _gradient(
    site: SiteDiagnosis, where: effect.Incoming | str, found: Sequence[Mapping[str, npt.NDArray[np.float64]] | str]
) -> GradientReach | str:
    reasons = [reason for reason in (where, *found) if isinstance(reason, str)]
    if reasons:
        return reasons[0]
    old, new = (gradients[site.key] for gradients in found if not isinstance(gradients, str))
    dead = mask_of(tuple(site.ranges(Verdict.DEAD)), site.units)
    return GradientReach(
        units=site.units,
        without_before=int((old == 0).sum()),
        without_after=int((new == 0).sum()),
        dead_mean_before=float(old[dead].mean()) if dead.any() else None,
        dead_mean_after=float(new[dead].mean()) if dead.any() else None,
    )


def _revived(site: SiteDiagnosis, fired: npt.NDArray[np.int64] | None) -> int:
    return 0 if fired is None else int((fired[mask_of(tuple(site.ranges(Verdict.DEAD)), site.units)] > 0).sum())
