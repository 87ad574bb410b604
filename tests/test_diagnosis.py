"""Verdicts on both sides of their borders, from records written by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deadcheck.config import Thresholds
from deadcheck.diagnosis import VERDICTS, Diagnosis, SiteDiagnosis, Verdict, diagnose
from deadcheck.sites import DataIdentity, Family, SiteStats
from tests.records import input_summary, measurement, site_stats
from tests.test_confidence import log_martingale

OFF_FAMILIES = (Family.RECTIFIER, Family.CLIPPED, Family.SMOOTH, Family.NONZERO)


def diagnosed(stats: SiteStats, **thresholds: float) -> SiteDiagnosis:
    return diagnose(measurement(stats), Thresholds(**thresholds)).sites[0]


def verdict_of_first(stats: SiteStats, **thresholds: float) -> Verdict:
    return diagnosed(stats, **thresholds).verdict(0)


def found(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.id: finding.message for finding in diagnosis.findings}


# Verdicts


@pytest.mark.parametrize("family", list(Family))
def test_a_unit_that_fires_now_and_then_is_live(family: Family) -> None:
    site = diagnosed(site_stats(family=family))

    assert site.counts == {verdict: 4 if verdict is Verdict.LIVE else 0 for verdict in VERDICTS}


@pytest.mark.parametrize(("nonfinite", "expected"), [(0, Verdict.DEAD), (1, Verdict.INVALID)])
def test_invalid_comes_before_dead(nonfinite: int, expected: Verdict) -> None:
    assert verdict_of_first(site_stats(off=[0], nonfinite=[nonfinite, 0, 0, 0])) is expected


@pytest.mark.parametrize("family", OFF_FAMILIES)
@pytest.mark.parametrize(("samples", "expected"), [(298, Verdict.SILENT), (299, Verdict.DEAD)])
def test_dead_needs_299_samples(family: Family, samples: int, expected: Verdict) -> None:
    assert verdict_of_first(site_stats(family=family, samples=samples, off=[0])) is expected


@pytest.mark.parametrize(("fired", "expected"), [(0, Verdict.DEAD), (1, Verdict.LIVE)])
def test_one_firing_is_enough_not_to_be_dead(fired: int, expected: Verdict) -> None:
    # 300 samples settle no rate, and one output of 1 is a mean of 1/300; the layer's mean is (3 x 0.3 + 1/300) / 4.
    stats = site_stats(samples=300, off=[0], fired=[fired, 180, 180, 180], output_abs_sum=[fired, 90, 90, 90])

    # 1/300 of .226 is .0148, so tau has to be below that.
    assert verdict_of_first(stats, tau=0.014) is expected


@pytest.mark.parametrize(("zeros", "expected"), [(1000, Verdict.DEAD), (999, Verdict.NEGATIVE_ONLY)])
def test_a_leaking_unit_is_dead_only_if_nothing_leaks(zeros: int, expected: Verdict) -> None:
    stats = site_stats(family=Family.LEAKY, off=[0], zeros=[zeros, 400, 400, 400], input_max=[0.0, 1, 1, 1])

    assert verdict_of_first(stats) is expected


@pytest.mark.parametrize("family", [Family.LEAKY, Family.SMOOTH])
@pytest.mark.parametrize(("input_max", "expected"), [(0.0, Verdict.NEGATIVE_ONLY), (1e-9, Verdict.LIVE)])
def test_negative_only_where_the_input_never_rose_above_0(family: Family, input_max: float, expected: Verdict) -> None:
    assert verdict_of_first(site_stats(family=family, input_max=[input_max, 1, 1, 1])) is expected


@pytest.mark.parametrize("family", [Family.RECTIFIER, Family.SQUASHING, Family.NONZERO])
def test_negative_only_is_for_what_leaks(family: Family) -> None:
    assert verdict_of_first(site_stats(family=family, input_max=[0.0, 1, 1, 1])) is Verdict.LIVE


def test_a_leaking_unit_stuck_on_the_negative_side_is_not_called_faint() -> None:
    stats = site_stats(
        family=Family.LEAKY, input_max=[-1, 1, 1, 1], fired=[0, 600, 600, 600], output_abs_sum=[1, 300, 300, 300]
    )

    assert verdict_of_first(stats) is Verdict.NEGATIVE_ONLY


@pytest.mark.parametrize("family", OFF_FAMILIES)
def test_rare_is_settled_by_the_martingale(family: Family) -> None:
    # The first n at which one firing is settled to lie below 1 %, by the definition itself.
    border = next(n for n in range(300, 5000) if log_martingale(1, n, 0.01) >= np.log(20))

    for samples, expected in ((border - 1, Verdict.LIVE), (border, Verdict.RARE)):
        assert verdict_of_first(site_stats(family=family, samples=samples, fired=[1, 500, 500, 500])) is expected


@pytest.mark.parametrize("family", [Family.LEAKY, Family.SQUASHING])
def test_what_does_not_go_off_is_not_rare(family: Family) -> None:
    assert verdict_of_first(site_stats(family=family, samples=5000, fired=[1, 500, 500, 500])) is Verdict.LIVE


@pytest.mark.parametrize(("total", "expected"), [(100.0, Verdict.FAINT), (101.0, Verdict.LIVE)])
def test_faint_is_relative_to_the_mean_of_the_layer(total: float, expected: Verdict) -> None:
    # (100 + 3 x 500) / 4 = 400, and 100 / 400 = .25; (101 + 1500) / 4 = 400.25, and 101 / 400.25 = .2523.
    stats = site_stats(output_abs_sum=[total, 500, 500, 500])

    assert verdict_of_first(stats, tau=0.25) is expected


def test_a_squashing_unit_is_not_faint() -> None:
    stats = site_stats(family=Family.SQUASHING, output_abs_sum=[0.0, 500, 500, 500])

    assert verdict_of_first(stats) is Verdict.LIVE


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_invalid_neighbour_changes_nobody_elses_verdict(value: float) -> None:
    stats = site_stats(nonfinite=[1, 0, 0, 0], output_abs_sum=[value, 1, 300, 300])

    # Without the first unit the layer's mean is 601 / 3 / 1000 = .2003, and .001 is .5 % of that.
    site = diagnosed(stats)
    assert [site.verdict(unit).value for unit in range(4)] == ["invalid", "faint", "live", "live"]


@pytest.mark.parametrize("family", [Family.CLIPPED, Family.SQUASHING])
@pytest.mark.parametrize(("flat", "expected"), [(1000, Verdict.SATURATED), (999, Verdict.LIVE)])
def test_saturated_is_on_a_rail_in_every_observation(family: Family, flat: int, expected: Verdict) -> None:
    assert verdict_of_first(site_stats(family=family, flat=[flat, 0, 0, 0])) is expected


def test_a_squashing_unit_that_was_never_between_its_rails_is_saturated_not_dead() -> None:
    assert verdict_of_first(site_stats(family=Family.SQUASHING, off=[0])) is Verdict.SATURATED


@pytest.mark.parametrize("family", [Family.RECTIFIER, Family.CLIPPED, Family.LEAKY])
@pytest.mark.parametrize(("input_min", "expected"), [(0.0, Verdict.LIVE), (1e-9, Verdict.ALWAYS_ON)])
def test_always_on_where_the_input_was_always_above_0(family: Family, input_min: float, expected: Verdict) -> None:
    stats = site_stats(family=family, fired=1000, flat=0, input_min=[input_min, -1, -1, -1])

    assert verdict_of_first(stats) is expected


def test_a_clipped_unit_that_touched_its_ceiling_is_not_the_identity() -> None:
    stats = site_stats(family=Family.CLIPPED, fired=1000, flat=[1, 0, 0, 0], input_min=1.0)

    assert verdict_of_first(stats) is Verdict.LIVE
    assert diagnosed(stats).verdict(1) is Verdict.ALWAYS_ON


def test_shards_that_are_too_small_alone_are_enough_together() -> None:
    shard = site_stats(samples=150, off=[0, 2])

    assert diagnosed(shard).counts[Verdict.SILENT] == 2
    assert diagnosed(shard + shard).counts[Verdict.DEAD] == 2
    assert diagnosed(shard + site_stats(samples=150, off=[2])).ranges(Verdict.DEAD) == [(2, 2)]


# Evidence


@pytest.mark.parametrize(
    ("input_max", "depth"), [(-0.499, "shallow"), (-0.5, "mid"), (-1.999, "mid"), (-2.0, "deep"), (-9.0, "deep")]
)
def test_depth_is_the_largest_input_in_standard_deviations(input_max: float, depth: str) -> None:
    # The record's standard deviation is 1, so the margin is the largest input.
    site = diagnosed(site_stats(off=[0], input_max=[input_max, 1, 1, 1]))

    assert site.unit(0).depth == depth
    assert site.depths == {name: int(name == depth) for name in ("shallow", "mid", "deep")}
    assert site.unit(1).depth is None


def test_depths_of_inputs_without_spread() -> None:
    # Unit 0 sees -3 for ever, unit 1 sees 0 for ever: infinitely many deviations below 0, and none to measure by.
    stats = site_stats(
        off=[0, 1], input_max=[-3.0, 0, 1, 1], silent_input_sum=[-3000.0, 0, np.nan, np.nan],
        silent_input_square_sum=[9000.0, 0, np.nan, np.nan],
    )  # fmt: skip
    site = diagnosed(stats)

    assert (site.unit(0).depth, site.unit(1).depth) == ("deep", None)
    assert site.depths == {"shallow": 0, "mid": 0, "deep": 1}


def test_the_evidence_for_a_dead_unit() -> None:
    unit = diagnosed(site_stats(off=[1])).unit(1)

    assert (unit.unit, unit.verdict, unit.samples, unit.fired) == (1, Verdict.DEAD, 1000, 0)
    assert (unit.zero_rate, unit.witness, unit.samples_needed, unit.depth) == (1.0, None, 0, "mid")
    assert unit.upper_bound == pytest.approx(0.002991, abs=5e-7)
    assert unit.because == "never on in 1000 samples: its firing rate is below 0.003 (95% sure)"


def test_the_evidence_for_a_silent_unit_says_how_many_more() -> None:
    unit = diagnosed(site_stats(samples=250, off=[1])).unit(1)

    assert unit.samples_needed == 49  # 299 - 250
    assert unit.because == "never on in 250 samples; 49 more without firing would make it dead"


def test_the_evidence_for_a_rare_unit_names_its_witness() -> None:
    stats = site_stats(samples=5000, fired=[3, 3000, 3000, 3000], first_fired=[17, 0, 0, 0])
    unit = diagnosed(stats).unit(0)

    assert (unit.verdict, unit.witness, unit.fired) == (Verdict.RARE, 17, 3)
    assert unit.because == "on in 3 of 5000 samples, first in sample 17"
    assert 3 / 5000 < unit.upper_bound < 0.01


@pytest.mark.parametrize(
    ("stats", "because"),
    [
        (site_stats(nonfinite=2), "2 of 1000 values were NaN or infinite"),
        (
            site_stats(family=Family.LEAKY, input_max=-0.25),
            "its input never rose above 0 (largest -0.25), so only the leak came through",
        ),
        (
            site_stats(output_abs_sum=[1.0, 300, 300, 300]),
            "its mean |h| of 0.001 is at most 2.5% of the layer's mean",
        ),
        (
            site_stats(family=Family.SQUASHING, flat=1000),
            "on a rail in all 1000 observations (output 1 at most)",
        ),
        (site_stats(input_min=0.5, flat=0), "its input was never at or below 0 (smallest 0.5)"),
        (site_stats(), "on in 600 of 1000 samples"),
    ],
    ids=["invalid", "negative-only", "faint", "saturated", "always-on", "live"],
)  # fmt: skip
def test_every_verdict_says_why(stats: SiteStats, because: str) -> None:
    assert diagnosed(stats).unit(0).because == because


def test_units_are_numbered_as_in_a_list() -> None:
    site = diagnosed(site_stats(off=[3]))

    assert (site.unit(-1).unit, site.unit(-1).verdict) == (3, Verdict.DEAD)
    with pytest.raises(IndexError):
        site.unit(4)


# Totals


@pytest.mark.parametrize(
    ("off", "ranges"),
    [([], []), ([0], [(0, 0)]), ([0, 1, 2], [(0, 2)]), ([0, 2, 3, 7], [(0, 0), (2, 3), (7, 7)])],
)
def test_ranges_are_inclusive(off: list[int], ranges: list[tuple[int, int]]) -> None:
    assert diagnosed(site_stats(units=8, off=off)).ranges(Verdict.DEAD) == ranges


def test_totals_are_the_sums_of_the_sites() -> None:
    diagnosis = diagnose(measurement(site_stats("a", off=[0]), site_stats("b", units=6, samples=200, off=[1, 2])))

    assert (diagnosis.units, diagnosis.dead, diagnosis.silent) == (10, 1, 2)
    assert diagnosis.dead_share == 0.1
    assert [site.key for site in diagnosis] == ["a", "b"]
    assert [site.key for site in diagnosis.worst()] == ["b", "a"]  # 2 of 6 are more than 1 of 4
    for site in diagnosis:
        assert sum(site.counts.values()) == site.units == len(site.codes)
        assert sum(stop - start + 1 for verdict in VERDICTS for start, stop in site.ranges(verdict)) == site.units


def test_rates_of_a_site() -> None:
    site = diagnosed(site_stats(off=[0], output_max=[0.0, 1, 2, 1], output_min=[0.0, -7, 0, 0]))

    assert site.dead_share == 0.25
    assert site.zero_rate == 0.55  # (1000 + 3 x 400) / 4000
    assert site.positive_share == 0.45  # 3 x 600 / 4000
    assert site.mean_output == pytest.approx(0.225)  # 3 x 300 / 4000
    assert site.max_abs_output == 7
    assert site.upper_bound == pytest.approx(0.002991, abs=5e-7)


def test_dormant_shares_count_scores_up_to_tau() -> None:
    # The layer's mean is (0 + 10 + 40 + 950) / 4 = 250; the scores are 0, .04, .16 and 3.8.
    stats = site_stats(output_abs_sum=[0.0, 10, 40, 950])

    assert diagnosed(stats).dormant_shares == {0.0: 0.25, 0.025: 0.25, 0.1: 0.5}


def test_a_site_that_is_not_there_names_those_that_are() -> None:
    diagnosis = diagnose(measurement(site_stats("a"), site_stats("b")))

    assert diagnosis.site("b").key == "b"
    with pytest.raises(KeyError, match="no site 'c'; there are a, b"):
        diagnosis.site("c")


def test_a_notebook_shows_totals_and_the_worst_sites() -> None:
    sites = [site_stats(f"layer{i}", off=range(i % 4)) for i in range(8)]
    lines = repr(diagnose(measurement(*sites))).splitlines()

    assert lines[0] == "Diagnosis of net.pt on 1,000 samples of net.sample.npz"
    assert lines[1] == "  12 dead and 0 silent of 32 units in 8 sites"  # twice 0 + 1 + 2 + 3
    assert lines[2].split() == ["layer3", "relu", "4", "units:", "3", "dead,", "1", "live"]
    assert "  … 3 more in .sites" in lines
    assert len(lines) <= 11


# Findings


def test_a_healthy_model_has_no_findings() -> None:
    assert diagnose(measurement(site_stats(), inputs=(input_summary(),), output_constant=False)).findings == ()


@pytest.mark.parametrize("samples", [100, 1000])
def test_a_layer_in_which_nothing_fires_is_named(samples: int) -> None:
    whole = diagnose(measurement(site_stats("fc.1", samples=samples, off=range(4))))
    most = diagnose(measurement(site_stats("fc.1", samples=samples, off=range(3))))

    assert found(whole)["layer-dead"].startswith("fc.1: no unit ever fired")
    assert whole.findings[0].where == "fc.1"
    assert whole.findings[0].level == "error"
    assert "layer-dead" not in found(most)


@pytest.mark.parametrize(("n_off", "expected"), [(24, False), (25, True), (100, False)])
def test_a_quarter_of_a_layer_is_worth_a_finding(n_off: int, expected: bool) -> None:
    diagnosis = diagnose(measurement(site_stats(units=100, off=range(n_off))))

    assert ("layer-mostly-dead" in found(diagnosis)) is expected


@pytest.mark.parametrize(("dead", "expected"), [(6, False), (7, True), (8, True)])
def test_rounding_does_not_move_the_border(dead: int, expected: bool) -> None:
    # 0.07 * 100 is 7.000000000000001 in floats.
    diagnosis = diagnose(measurement(site_stats(units=100, off=range(dead))), Thresholds(warn_layer_dead=0.07))

    assert ("layer-mostly-dead" in found(diagnosis)) is expected


def test_dead_units_are_told_without_alarm() -> None:
    message = found(diagnose(measurement(site_stats(off=[0]))))["layer-mostly-dead"]

    assert message == (
        "features.1: 1 of 4 units are dead; a network can work well with fewer units than it has, so compare with an "
        "earlier checkpoint before you act"
    )


def test_a_site_without_units_is_not_a_dead_layer() -> None:
    diagnosis = diagnose(measurement(site_stats(units=0)))

    assert diagnosis.findings == ()
    assert (diagnosis.units, diagnosis.dead_share, diagnosis.sites[0].dead_share) == (0, 0.0, 0.0)


def test_invalid_units_are_an_error() -> None:
    diagnosis = diagnose(measurement(site_stats(nonfinite=[3, 0, 0, 0])))

    assert diagnosis.findings[0].level == "error"
    assert found(diagnosis)["invalid"].startswith("features.1: 1 of 4 units gave NaN or infinity; look at")


@pytest.mark.parametrize(("constant", "expected"), [(True, True), (False, False), (None, False)])
def test_a_constant_output_is_an_error(constant: bool | None, expected: bool) -> None:
    diagnosis = diagnose(measurement(site_stats(), output_constant=constant))

    assert ("output-constant" in found(diagnosis)) is expected


def test_too_few_samples_says_how_many_more_by_the_site_that_saw_fewest() -> None:
    branch = site_stats("expert", samples=10, off=[0])
    trunk = site_stats("trunk", samples=250, off=[1])
    diagnosis = diagnose(measurement(site_stats("stem", off=[1]), trunk, branch))

    assert found(diagnosis)["too-few-samples"] == (
        "2 units never fired, and 10 samples are too few to call one dead; 289 more would settle it"
    )


@pytest.mark.parametrize(("largest", "expected"), [(2000.0, False), (2001.0, True), (np.inf, False)])
def test_explosion_is_growth_over_the_first_site(largest: float, expected: bool) -> None:
    first = site_stats("first", output_max=2.0)
    last = site_stats("last", output_max=[largest, 0, 0, 0])

    assert ("explosion" in found(diagnose(measurement(first, last)))) is expected
    assert "explosion" not in found(diagnose(measurement(last, first)))


def test_growth_that_overflows_is_an_explosion() -> None:
    first, last = site_stats("first", output_max=1e-200), site_stats("last", output_max=1e200)

    assert "explosion" in found(diagnose(measurement(first, last)))


@pytest.mark.parametrize(
    ("constant", "samples", "level"), [(0, 1000, None), (5, 1000, "note"), (64, 1000, "warning"), (64, 1, None)]
)
def test_constant_input_is_told(constant: int, samples: int, level: str | None) -> None:
    seen = measurement(
        site_stats(), inputs=(input_summary(constant_features=constant),), data=DataIdentity("x.npz", None, samples)
    )
    levels = [f.level for f in diagnose(seen).findings if f.id == "constant-input"]

    assert levels == ([level] if level else [])


@pytest.mark.parametrize(("largest", "off", "expected"), [(255.0, [0], True), (1.0, [0], False), (255.0, [], False)])
def test_inputs_are_suspect_where_units_are_off_in_every_layer(largest: float, off: list[int], expected: bool) -> None:
    seen = measurement(
        site_stats("first", off=off), site_stats("second", off=[1]), inputs=(input_summary(max=largest),)
    )
    messages = found(diagnose(seen))

    assert ("inputs-suspect" in messages) is expected
    if expected:
        assert "input 0 runs from 0 to 255" in messages["inputs-suspect"]


def test_synthetic_data_is_told() -> None:
    seen = measurement(site_stats())
    synthetic = dataclasses.replace(seen, data=dataclasses.replace(seen.data, synthetic=True))

    assert "synthetic-data" in found(diagnose(synthetic))


@pytest.mark.parametrize(("n", "level"), [(1, "note"), (24, "note"), (25, "warning")])
@pytest.mark.parametrize(
    ("family", "field", "stuck", "other", "slug"),
    [(Family.SMOOTH, "input_max", -1, 1, "negative-only"), (Family.SQUASHING, "flat", 1000, 0, "saturated")],
)
def test_a_few_stuck_units_are_a_note_and_many_a_warning(family, field, stuck, other, slug, n, level) -> None:
    stats = site_stats(family=family, units=100, **{field: [stuck] * n + [other] * (100 - n)})
    findings = {f.id: f for f in diagnose(measurement(stats)).findings}

    assert findings[slug].level == level
    assert findings[slug].message.startswith(f"features.1: {n} of 100 units never left")
