"""Patched models of the zoo compute what a leaky model written by hand computes, bit for bit, gradients too."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import deadcheck
from deadcheck import passes, pipeline
from deadcheck.config import ScanSettings, Thresholds
from deadcheck.diagnosis import Diagnosis, diagnose
from deadcheck.formats import LoadedModel
from deadcheck.patch_file import dump_plan, parse_plan
from deadcheck.patch_plan import Kind, PatchPlan, Replacement
from deadcheck.reach import Sightings
from deadcheck.remedies.base import Choice
from deadcheck.remedies.slope import plan_slopes
from deadcheck.sites import Family, ModelIdentity
from tests.oracle import LeakyOracle
from tests.zoo import ZOO, Zoo, build, inputs

ALPHA = 0.1
SAMPLES = 9
_OTHER = ("Gated", "NotFinite", "Shuffled", "RecurrentRelu", "Packed", "Stacked")
ACTIVE = [kind for kind in ZOO if kind.__name__ not in _OTHER]
"""Zoo without models that have no ReLU, whose reference gives no output of its own, or whose ReLU is out of reach."""


@pytest.fixture(autouse=True)
def layers_in_parts() -> Iterator[None]:
    """Run encoder layers as the reference does; the fused operator of torch rounds differently."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def scanned(model: nn.Module, x: Tensor) -> tuple[Diagnosis, Sightings]:
    """Measure a model and watch how its sites are reached."""
    loaded = LoadedModel(model, ModelIdentity(None, None, None, "object", "object"), ())
    settings = ScanSettings(batch_size=4)
    sightings = Sightings(passes.CALLS_MODEL)
    batches = pipeline.open_data(x, settings, loaded)
    measurement = pipeline.measure(loaded, batches, settings, watch=sightings)
    return diagnose(measurement, Thresholds()), sightings


def planned(model: nn.Module, x: Tensor, choice: Choice) -> PatchPlan:
    """Plan a change and take it through the text of a patch file."""
    diagnosis, sightings = scanned(model, x)
    plan = plan_slopes(model, diagnosis, sightings, choice, lambda other: scanned(other, x)[1]).plan
    text = dump_plan(plan)

    assert parse_plan(text) == plan
    return parse_plan(text)


def relus(model: nn.Module, x: Tensor) -> list[tuple[str, int]]:
    """Return key and number of units of every site that a patch can change."""
    diagnosis, _ = scanned(model, x)
    sites = [site.stats.site for site in diagnosis if site.stats.site.family is Family.RECTIFIER]
    return [(site.key, site.units) for site in sites if site.activation != "prelu"]


def reference(model: Zoo, x: Tensor, sites: dict[str, list[int] | None]) -> Tensor:
    """Compute the leaky model by hand."""
    oracle = LeakyOracle(sites, ALPHA)
    out = run(lambda batch: model.reference(oracle, batch), x)

    assert oracle.changed == set(sites)
    return out


def run(model: Callable[[Tensor], object], x: Tensor) -> Tensor:
    """Run a model in batches, since a branch may depend on the batch."""
    return torch.cat([torch.atleast_1d(out) for out in map(model, x.split(4)) if isinstance(out, Tensor)])


def same(got: Tensor, wanted: Tensor, model: Zoo) -> bool:
    return torch.equal(got, wanted) if model.exact_reference else torch.allclose(got, wanted, atol=1e-6)


LEAKY = Replacement(Kind.LEAKY, ALPHA)


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_every_relu_leaks(kind: type[Zoo]) -> None:
    model, x = build(kind), inputs(kind, SAMPLES)
    patched = deadcheck.apply_patch(model, planned(model, x, Choice(LEAKY)))
    with torch.no_grad():
        got, wanted = run(patched, x), reference(model, x, {key: None for key, _ in relus(model, x)})

    assert same(got, wanted, model)
    assert not torch.equal(wanted, reference(model, x, {}))


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_each_relu_alone_leaks(kind: type[Zoo]) -> None:
    model, x = build(kind), inputs(kind, SAMPLES)
    for key, _ in relus(model, x):
        patched = deadcheck.apply_patch(model, planned(model, x, Choice(LEAKY, layers=(key,))))
        with torch.no_grad():
            assert same(run(patched, x), reference(model, x, {key: None}), model), key


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_single_units_leak_and_the_others_stay_exact(kind: type[Zoo]) -> None:
    model, x = build(kind), inputs(kind, SAMPLES)
    sites = relus(model, x)
    # Two units that are not neighbours, where a layer has three: their ranges are (0, 0) and (2, 2).
    dead = {key: ((0, 0), (2, 2)) if units > 2 else ((0, 0),) for key, units in sites}
    plan = planned(model, x, Choice(LEAKY, only_dead=True, dead=dead))
    patched = deadcheck.apply_patch(model, plan)
    lists = {key: [0, 2] if units > 2 else None if units == 1 else [0] for key, units in sites}
    with torch.no_grad():
        assert {change.site for change in plan.sites} == set(lists)
        assert same(run(patched, x), reference(model, x, lists), model)


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_gradients_are_those_of_the_leaky_model(kind: type[Zoo]) -> None:
    model, x = build(kind), inputs(kind, SAMPLES)
    patched = deadcheck.apply_patch(model, planned(model, x, Choice(LEAKY)))
    run(patched, x).double().sum().backward()
    reference(model, x, {key: None for key, _ in relus(model, x)}).double().sum().backward()

    compared = 0
    for (name, new), (_, old) in zip(patched.named_parameters(), model.named_parameters(), strict=True):
        if old.grad is not None:  # the reference takes a learnt slope of 0 for a ReLU
            assert new.grad is not None, name
            assert same(new.grad, old.grad, model), name
            compared += 1
    assert compared


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_names_and_values_stay_and_the_original_is_untouched(kind: type[Zoo]) -> None:
    model, x = build(kind), inputs(kind, SAMPLES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    with torch.no_grad():
        wanted = run(model, x)
    patched = deadcheck.apply_patch(model, planned(model, x, Choice(LEAKY)))

    assert list(patched.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in patched.state_dict().items())
    assert [type(module) for module in model.modules()] == types
    with torch.no_grad():
        assert torch.equal(run(model, x), wanted)


@pytest.mark.parametrize("kind", ACTIVE, ids=lambda kind: kind.__name__)
def test_copied_saved_and_loaded_it_is_the_same_function(kind: type[Zoo]) -> None:
    import copy

    model, x = build(kind), inputs(kind, SAMPLES)
    patched = deadcheck.apply_patch(model, planned(model, x, Choice(LEAKY, layers=("*",))))
    with torch.no_grad():
        wanted = run(patched, x)
        if kind.__name__ != "Reparametrised":  # torch itself refuses to copy or pickle a parametrised module's hooks
            held = io.BytesIO()
            torch.save(patched, held)
            held.seek(0)
            assert torch.equal(run(torch.load(held, weights_only=False), x), wanted)
            assert torch.equal(run(copy.deepcopy(patched), x), wanted)
        fresh = deadcheck.apply_patch(build(kind), planned(model, x, Choice(LEAKY, layers=("*",))))
        fresh.load_state_dict(patched.state_dict())
        assert torch.equal(run(fresh, x), wanted)


def test_what_is_out_of_reach_is_listed() -> None:
    from tests.zoo import RecurrentRelu

    model, x = build(RecurrentRelu), inputs(RecurrentRelu, SAMPLES)
    diagnosis, sightings = scanned(model, x)
    plan = plan_slopes(model, diagnosis, sightings, Choice(LEAKY))

    assert plan.plan.sites == ()
    assert [item.where for item in plan.skipped] == ["rnn:relu#1", "rnn:relu#2"]
    assert "nn.RNN computes it inside one operator" in plan.skipped[0].reason
