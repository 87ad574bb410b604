"""The gate's rules: each border from both sides in whole numbers, and what it refuses to judge."""

from __future__ import annotations

import datetime
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from deadcheck.diagnosis import Finding
from deadcheck.errors import ExitCode
from deadcheck.gate import GateResult, judge, with_unused
from deadcheck.policy import Compare, Ignore, LayerPolicy, Level, Policy
from deadcheck.record import Record
from deadcheck.sites import DataIdentity, Skipped
from tests.records import input_summary, scan_record, site_record

TODAY = datetime.date(2026, 1, 15)
SYNTHETIC = DataIdentity("random", None, 1000, True)


def gate(record: Record, baseline: Record | None = None, **policy: Any) -> GateResult:
    return judge(record, baseline, Policy(**policy), today=TODAY)


def found(result: GateResult, *levels: str) -> list[tuple[str, str, str]]:
    """What counts, as (rule, level, where)."""
    wanted = levels or ("error", "inconclusive", "warning")
    return [(item.rule, item.level, item.where) for item in result.findings if item.active and item.level in wanted]


def test_a_healthy_model_passes() -> None:
    result = gate(scan_record(site_record(dead=3), site_record("b")))

    assert (result.exit_code, found(result), result.judged) == (ExitCode.PASSED, [], 2)


# Shares: a share at its limit is allowed, one above it is not.

HALF, FIVE = Fraction(1, 2), Fraction(5, 100)


@pytest.mark.parametrize(
    ("dead", "units", "limit", "fails"),
    [
        (50, 100, HALF, False),
        (51, 100, HALF, True),
        (1, 2, HALF, False),
        (1_000_000, 2_000_000, HALF, False),
        (1_000_001, 2_000_000, HALF, True),
        (0, 100, Fraction(0), False),
        (1, 1_000_000, Fraction(0), True),
        # 7 % of 100 is 7; in floats 0.07 * 100 is 7.000000000000001, and 0.29 * 100 is 28.999999999999996.
        (7, 100, Fraction("0.07"), False),
        (8, 100, Fraction("0.07"), True),
        (29, 100, Fraction("0.29"), False),
        (30, 100, Fraction("0.29"), True),
        # A third is not a decimal: 33 of 99 is above 33.333333 %.
        (33, 99, Fraction("0.33333333"), True),
        (33, 99, Fraction("0.33333334"), False),
        (99, 100, Fraction("0.99"), False),
        (99, 100, Fraction("0.98999999"), True),
    ],
)
def test_the_share_of_a_layer(dead: int, units: int, limit: Fraction, fails: bool) -> None:
    result = gate(scan_record(site_record(units=units, dead=dead)), max_layer_dead=limit)

    assert (("DC001", "error", "features.1") in found(result)) is fails
    assert (result.exit_code is ExitCode.FAILED) is fails


@pytest.mark.parametrize(("dead", "warns"), [(24, False), (25, True), (0, False)])
def test_a_warning_begins_at_its_share(dead: int, warns: bool) -> None:
    result = gate(scan_record(site_record(dead=dead)))

    assert found(result) == ([("DC001", "warning", "features.1")] if warns else [])
    assert result.exit_code is ExitCode.PASSED


@pytest.mark.parametrize(("dead", "fails"), [(99, False), (100, True)])
def test_a_whole_layer(dead: int, fails: bool) -> None:
    result = gate(scan_record(site_record(dead=dead)))

    assert found(result, "error") == ([("DC003", "error", "features.1")] if fails else [])


def test_a_whole_layer_is_said_once() -> None:
    assert found(gate(scan_record(site_record(dead=100)), max_layer_dead=HALF)) == [("DC003", "error", "features.1")]


def test_a_limit_holds_where_the_rule_on_whole_layers_does_not() -> None:
    for policy in ({"rules": {"DC003": Level.OFF}}, {"rules": {"DC003": Level.WARN}},
                   {"ignores": (Ignore("DC003", "known"),)}):  # fmt: skip
        result = gate(scan_record(site_record(dead=100)), max_layer_dead=HALF, **policy)

        assert found(result, "error") == [("DC001", "error", "features.1")]


@pytest.mark.parametrize(("dead", "fails"), [(30, False), (31, True)])
def test_the_share_of_the_model(dead: int, fails: bool) -> None:
    # 30 of 100 + 50 = 150 units are 20 %.
    result = gate(scan_record(site_record(dead=dead), site_record("b", units=50)), max_model_dead=Fraction(20, 100))

    assert found(result, "error") == ([("DC002", "error", "")] if fails else [])


def test_there_is_no_limit_by_default() -> None:
    assert gate(scan_record(site_record(units=1000, dead=999))).exit_code is ExitCode.PASSED


@pytest.mark.parametrize(("invalid", "fails"), [(0, False), (1, True)])
def test_one_invalid_unit(invalid: int, fails: bool) -> None:
    result = gate(scan_record(site_record(invalid=invalid)))

    assert found(result) == ([("DC005", "error", "features.1")] if fails else [])


@pytest.mark.parametrize(("constant", "fails"), [(None, False), (False, False), (True, True)])
def test_a_constant_output(constant: bool | None, fails: bool) -> None:
    result = gate(scan_record(site_record(), output_constant=constant))

    assert found(result) == ([("DC004", "error", "")] if fails else [])


@pytest.mark.parametrize(("saturated", "warns"), [(24, False), (25, True)])
def test_saturated_units(saturated: int, warns: bool) -> None:
    record = scan_record(site_record(saturated=saturated))

    assert found(gate(record)) == ([("DC009", "warning", "features.1")] if warns else [])
    assert (gate(record, rules={"DC009": Level.ERROR}).exit_code is ExitCode.FAILED) is warns


@pytest.mark.parametrize(("largest", "warns"), [(2000.0, False), (2000.1, True), (None, False)])
def test_growth(largest: float | None, warns: bool) -> None:
    # The first layer that gave anything reaches 2, so 2000 is a growth of 1000.
    record = scan_record(
        site_record("nothing", max_abs_output=0.0), site_record("a", max_abs_output=2.0),
        site_record("b", max_abs_output=largest),
    )  # fmt: skip

    assert found(gate(record)) == ([("DC006", "warning", "b")] if warns else [])


# Silent units count as dead; so do units of leaky activations that never leave the negative side.


@pytest.mark.parametrize(("silent", "fails"), [(50, False), (51, True)])
def test_silent_units_count_as_dead(silent: int, fails: bool) -> None:
    result = gate(scan_record(site_record(silent=silent)), max_layer_dead=HALF)

    assert (result.exit_code is ExitCode.FAILED) is fails


@pytest.mark.parametrize(
    ("dead", "leaking", "rule"),
    [(50, 0, None), (51, 0, "DC001"), (0, 50, None), (0, 51, "DC014"), (50, 1, "DC014"), (51, 40, "DC001")],
)
def test_a_patched_model_does_not_pass_for_want_of_zeros(dead: int, leaking: int, rule: str | None) -> None:
    result = gate(scan_record(site_record(dead=dead, negative_only=leaking)), max_layer_dead=HALF)

    assert [item[0] for item in found(result, "error")] == ([] if rule is None else [rule])


def test_a_layer_that_leaks_alone_fails_as_a_dead_one_does() -> None:
    # The same layer, before and after its ReLU was replaced.
    assert found(gate(scan_record(site_record(dead=100)))) == [("DC003", "error", "features.1")]
    assert found(gate(scan_record(site_record(negative_only=100)))) == [("DC014", "error", "features.1")]
    assert found(gate(scan_record(site_record(dead=40, negative_only=60))))[0] == ("DC014", "error", "features.1")
    assert gate(scan_record(site_record(negative_only=99))).exit_code is ExitCode.PASSED


def test_the_model_share_counts_them_too() -> None:
    record = scan_record(site_record(dead=10, negative_only=41))

    assert found(gate(record, max_model_dead=HALF), "error") == [("DC014", "error", "")]


# Against a baseline.


def grown(before: int, after: int, **policy: Any) -> list[tuple[str, str, str]]:
    old, new = scan_record(site_record(dead=before)), scan_record(site_record(dead=after))
    return found(gate(new, old, **policy), "error", "inconclusive")


@pytest.mark.parametrize(("after", "fails"), [(10, False), (15, False), (16, True), (3, False)])
def test_newly_dead_units(after: int, fails: bool) -> None:
    assert grown(10, after) == ([("DC008", "error", "features.1")] if fails else [])


@pytest.mark.parametrize(("after", "fails"), [(15, False), (16, True)])
def test_a_worse_share(after: int, fails: bool) -> None:
    expected = [("DC007", "error", "features.1")] if fails else []

    assert grown(10, after, compare=Compare.RATES) == expected
    assert grown(10, after, max_new_dead=None) == expected


@pytest.mark.parametrize(("after", "fails"), [(10, False), (11, True)])
def test_a_ratchet_that_never_gives(after: int, fails: bool) -> None:
    assert bool(grown(10, after, max_new_dead=Fraction(0), max_worse=Fraction(0))) is fails


def test_other_units_of_the_same_number_are_newly_dead_and_no_worse_share() -> None:
    old = scan_record(site_record(dead=[(0, 19)]))
    new = scan_record(site_record(dead=[(80, 99)]))
    result = gate(new, old)

    assert found(result, "error") == [("DC008", "error", "features.1")]
    assert next(item for item in result.findings if item.rule == "DC008").units == ((80, 99),)
    assert gate(new, old, compare=Compare.RATES).exit_code is ExitCode.PASSED


def test_a_patched_model_is_no_better_than_its_baseline() -> None:
    old = scan_record(site_record(dead=80))
    patched = scan_record(site_record(negative_only=80, activation="leaky_relu"))
    worse = scan_record(site_record(negative_only=86, activation="leaky_relu"))

    assert gate(patched, old).exit_code is ExitCode.PASSED
    assert found(gate(worse, old), "error") == [("DC014", "error", "features.1")]
    assert "activations were replaced: features.1 (relu then, leaky_relu now)" in gate(patched, old).notes
    # And the ReLU again, with the same units dead, is no news either.
    assert gate(old, patched).exit_code is ExitCode.PASSED


def test_units_that_were_silent_are_not_newly_dead() -> None:
    old = scan_record(site_record(silent=50))

    assert gate(scan_record(site_record(dead=50)), old).exit_code is ExitCode.PASSED


@pytest.mark.parametrize(
    ("old", "words"),
    [
        (scan_record(site_record("other")), "layers of the baseline are not in the model: other"),
        (scan_record(site_record(), site_record("b")), "layers of the baseline are not in the model: b"),
        (scan_record(site_record(units=64)), "another number of units: features.1 (64 then, 100 now)"),
        (scan_record(), "the baseline holds no layers"),
        (scan_record(site_record(), data=DataIdentity("net.sample.npz", "ffff", 1000)), "the data is not the same"),
        (
            scan_record(site_record(), data=DataIdentity("loader.py:make", None, 1000)),
            "cannot be told whether the data",
        ),
        (scan_record(site_record(), samples=999), "samples is not the same (999 then, 1,000 now)"),
        (scan_record(site_record(), data=SYNTHETIC), "the baseline was scanned on random numbers"),
        (scan_record(site_record(), rules_version=0), "other rules (version 0 then, 1 now)"),
    ],
)
def test_what_cannot_be_compared_is_not_judged(old: Record, words: str) -> None:
    result = gate(scan_record(site_record(dead=10)), old)

    assert result.exit_code is ExitCode.NOTHING_JUDGED
    assert {item[0] for item in found(result)} == {"DC015"}
    assert any(words in item.message for item in result.findings)


def test_a_rule_that_fails_fails_whatever_the_baseline_is() -> None:
    result = gate(scan_record(site_record(dead=100)), scan_record(site_record("other")))

    assert result.exit_code is ExitCode.FAILED


def test_data_without_a_fingerprint_is_compared_by_name_and_said() -> None:
    data = DataIdentity("loader.py:make", None, 1000)
    result = gate(scan_record(site_record(), data=data), scan_record(site_record(), data=data))

    assert result.exit_code is ExitCode.PASSED
    assert "rests on its name" in result.notes[0]


# What cannot be judged.


@pytest.mark.parametrize(("samples", "enough"), [(298, False), (299, True)])
def test_too_few_samples(samples: int, enough: bool) -> None:
    result = gate(scan_record(site_record(samples=samples), samples=samples))

    assert (result.exit_code is ExitCode.PASSED) is enough
    assert found(result) == ([] if enough else [("DC010", "inconclusive", "")])


def test_what_it_takes_follows_the_thresholds() -> None:
    # ln 0.05 / ln 0.997 = 997.1
    record = scan_record(site_record(), samples=997)
    stricter = replace(record, thresholds=replace(record.thresholds, p_dead=0.003))

    assert gate(record).exit_code is ExitCode.PASSED
    assert gate(stricter).exit_code is ExitCode.NOTHING_JUDGED
    assert gate(stricter, min_samples=997).exit_code is ExitCode.PASSED


def test_too_few_samples_neither_pass_nor_fail() -> None:
    few = scan_record(site_record(samples=100, silent=100), samples=100)
    result = gate(few, max_layer_dead=HALF)

    assert result.exit_code is ExitCode.NOTHING_JUDGED
    assert ("DC003", "warning", "features.1") in found(result)
    assert "(unproven: too little was seen to judge)" in next(i for i in result.findings if i.rule == "DC003").message
    # Where the user says that fewer are enough, silent units count as dead.
    assert gate(few, min_samples=100).exit_code is ExitCode.FAILED


def test_one_sample_proves_a_nan() -> None:
    assert gate(scan_record(site_record(samples=1, invalid=1), samples=1)).exit_code is ExitCode.FAILED
    assert gate(scan_record(site_record(invalid=1), data=SYNTHETIC)).exit_code is ExitCode.FAILED


def test_random_data_cannot_pass_or_fail() -> None:
    for site in (site_record(), site_record(dead=100)):
        result = gate(scan_record(site, data=SYNTHETIC), min_samples=0)

        assert result.exit_code is ExitCode.NOTHING_JUDGED
        assert ("DC012", "inconclusive", "") in found(result)


def test_samples_that_are_all_the_same_are_one() -> None:
    same = input_summary(constant_features=64)
    result = gate(scan_record(site_record(), inputs=(same,), output_constant=True))

    assert found(result) == [("DC010", "inconclusive", ""), ("DC004", "warning", "")]
    # One input of two that varies is enough.
    assert gate(scan_record(site_record(), inputs=(same, input_summary()))).exit_code is ExitCode.PASSED


@pytest.mark.parametrize(
    ("silent", "code", "rules"),
    [(50, 0, ["DC001"]), (51, 3, ["DC010", "DC001"]), (100, 3, ["DC010", "DC003"])],
)
def test_a_branch_that_few_samples_reached(silent: int, code: int, rules: list[str]) -> None:
    # Within the limits although its silent units are counted as dead, it passes; above them nothing is proved.
    branch = site_record("branch", samples=20, silent=silent)
    result = gate(scan_record(site_record(), branch), max_layer_dead=HALF)

    assert (result.exit_code, [item[0] for item in found(result)]) == (code, rules)


def test_no_layer_is_nothing_to_judge() -> None:
    assert found(gate(scan_record())) == [("DC016", "inconclusive", "")]
    off = gate(scan_record(site_record()), layers=(LayerPolicy("*", Level.OFF),))
    assert (found(off), off.judged) == ([("DC016", "inconclusive", "")], 0)


def test_a_part_that_never_ran_is_said() -> None:
    skipped = (Skipped("Sequential", "experts.3", "never ran on this sample"), Skipped("where", "b", "by hand"))
    result = gate(scan_record(site_record(), skipped=skipped))

    assert found(result) == [("DC011", "warning", "experts.3")]
    assert gate(scan_record(site_record(), skipped=skipped), rules={"DC011": Level.ERROR}).exit_code is ExitCode.FAILED


@pytest.mark.parametrize("key", ["experts.3", "experts.3.act", "experts.3:relu#1", "experts.3.1:relu#2"])
def test_a_part_that_ran_in_the_baseline_and_never_runs_now_fails(key: str) -> None:
    module = key.partition(":")[0]
    old = scan_record(site_record(), site_record(key, module=module))
    new = scan_record(site_record(), skipped=(Skipped("Sequential", "experts.3", "never ran on this sample"),))

    assert found(gate(new, old)) == [("DC011", "error", "experts.3")]
    # A part that comes to life is no obstacle.
    back = scan_record(site_record(), skipped=(Skipped("Sequential", "experts.3", "never ran on this sample"),))
    assert gate(old, back).exit_code is ExitCode.PASSED
    # Another expert's death does not explain it.
    other = scan_record(site_record(), skipped=(Skipped("Sequential", "experts.33", "never ran on this sample"),))
    assert gate(other, old).exit_code is ExitCode.NOTHING_JUDGED


# Levels, layers, ignores.


def test_the_first_pattern_that_matches_holds() -> None:
    layers = (
        LayerPolicy("head.0", max_layer_dead=Fraction(9, 10)), LayerPolicy("head.*", max_layer_dead=Fraction(1, 10)),
    )  # fmt: skip
    record = scan_record(site_record("head.0", dead=60), site_record("head.1", dead=11), site_record("body", dead=51))

    assert found(gate(record, max_layer_dead=HALF, layers=layers), "error") == [
        ("DC001", "error", "head.1"), ("DC001", "error", "body"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("level", "expected"), [(Level.ERROR, [("DC003", "error")]), (Level.WARN, [("DC003", "warning")]), (Level.OFF, [])]
)
def test_a_layer_may_weigh_less(level: Level, expected: list[tuple[str, str]]) -> None:
    record = scan_record(site_record("aux.1", dead=100), site_record("body"))
    result = gate(record, layers=(LayerPolicy("aux.*", level),))

    assert [(rule, at) for rule, at, _ in found(result)] == expected
    assert result.judged == (1 if level is Level.OFF else 2)


def test_a_pattern_matches_keys_and_modules() -> None:
    record = scan_record(site_record("block:relu#1", module="block", dead=100))

    for pattern in ("block", "block:*", "b*"):
        assert gate(record, layers=(LayerPolicy(pattern, Level.WARN),)).exit_code is ExitCode.PASSED


@pytest.mark.parametrize("rule", ["DC003", "DC005", "DC004"])
@pytest.mark.parametrize(("level", "code"), [(Level.ERROR, 1), (Level.WARN, 0), (Level.OFF, 0)])
def test_a_rule_may_weigh_less(rule: str, level: Level, code: int) -> None:
    record = {
        "DC003": scan_record(site_record(dead=100)),
        "DC004": scan_record(site_record(), output_constant=True),
        "DC005": scan_record(site_record(invalid=1)),
    }[rule]
    result = gate(record, rules={rule: level})

    assert result.exit_code == code
    assert (rule in [item.rule for item in result.findings]) is (level is not Level.OFF)


def test_an_ignored_finding_stays_visible() -> None:
    result = gate(scan_record(site_record(dead=100)), ignores=(Ignore("DC003", "frozen", until=TODAY),))
    ignored = next(item for item in result.findings if item.rule == "DC003")

    assert result.exit_code is ExitCode.PASSED
    assert ignored.ignored is not None
    assert (ignored.ignored.reason, ignored.ignored.until, ignored.active) == ("frozen", "2026-01-15", False)


@pytest.mark.parametrize(("until", "code"), [(TODAY, 0), (TODAY - datetime.timedelta(days=1), 1), (None, 0)])
def test_an_ignore_holds_through_its_last_day(until: datetime.date | None, code: int) -> None:
    result = gate(scan_record(site_record(dead=100)), ignores=(Ignore("DC003", "frozen", until=until),))

    assert result.exit_code == code


@pytest.mark.parametrize(
    ("ignore", "fits"),
    [
        (Ignore("DC003", "r", layer="features.*"), True),
        (Ignore("DC003", "r", layer="head.*"), False),
        (Ignore("DC003", "r", model="*.pt"), True),
        (Ignore("DC003", "r", model="other.pt"), False),
        (Ignore("DC001", "r"), False),
    ],
)
def test_an_ignore_fits_its_rule_layer_and_model(ignore: Ignore, fits: bool) -> None:
    assert (gate(scan_record(site_record(dead=100)), ignores=(ignore,)).exit_code is ExitCode.PASSED) is fits


def unused(record: Record, **policy: Any) -> GateResult:
    rules = Policy(**policy)
    result = judge(record, None, rules, today=TODAY)
    return with_unused([("net.pt", record, result), ("other.pt", record, result)], rules, today=TODAY)[0]


def test_unused_and_expired_ignores_and_patterns_are_reported() -> None:
    record = scan_record(site_record(dead=100))
    old = TODAY - datetime.timedelta(days=1)
    result = unused(
        record, ignores=(Ignore("DC003", "used"), Ignore("DC005", "unused"), Ignore("DC004", "expired", until=old)),
        layers=(LayerPolicy("features.*"), LayerPolicy("feature.*")),
    )  # fmt: skip
    messages = [item.message for item in result.findings if item.rule == "DC013"]

    assert len(messages) == 3
    assert "(unused) fits no finding any more" in messages[0]
    assert "(expired) expired on 2026-01-14" in messages[1]
    assert "'feature.*' of policy.layers matches no layer" in messages[2]
    assert result.exit_code is ExitCode.PASSED
    healthy = scan_record(site_record())
    assert unused(healthy, ignores=(Ignore("DC005", "unused"),), rules={"DC013": Level.OFF}).findings == ()
    failing = unused(scan_record(site_record()), ignores=(Ignore("DC005", "x"),), rules={"DC013": Level.ERROR})
    assert failing.exit_code is ExitCode.FAILED


def test_what_the_scan_noticed_is_carried_and_never_fails() -> None:
    noticed = (
        Finding("inputs-suspect", "error", "", "units are off in every layer"),
        Finding("layer-dead", "error", "features.1", "said again by the rule"),
        Finding("constant-input", "note", "", "5 elements"),
    )
    result = gate(scan_record(site_record(), findings=noticed))

    assert [(item.id, item.level, item.rule) for item in result.findings] == [
        ("inputs-suspect", "warning", ""), ("constant-input", "note", ""),
    ]  # fmt: skip
    assert result.exit_code is ExitCode.PASSED


def test_the_worst_comes_first_and_layers_stay_in_order() -> None:
    record = scan_record(
        site_record("a", dead=30), site_record("b", dead=100), site_record("c", dead=100), site_record("d", dead=100)
    )
    result = gate(record, ignores=(Ignore("DC003", "known", layer="c"),))

    assert [(item.level, item.where, item.active) for item in result.findings] == [
        ("error", "b", True), ("error", "d", True), ("warning", "a", True), ("warning", "c", True),
        ("error", "c", False),
    ]  # fmt: skip


def test_messages_name_the_numbers_and_the_limit() -> None:
    result = gate(scan_record(site_record(dead=60, silent=1)), max_layer_dead=Fraction(60, 100))
    breach = result.findings[0]

    assert breach.message == "features.1: 61 of 100 units (61.0%) are dead; allowed: 60%"
    assert (breach.count, breach.of, breach.limit) == (61, 100, "60%")
    # 100,001 of 200,000 are 50.0005 %: never printed as the 50 % that are allowed.
    close = gate(scan_record(site_record(units=200_000, dead=100_001)), max_layer_dead=HALF).findings[0]
    assert close.message == "features.1: 100,001 of 200,000 units (50.001%) are dead; allowed: 50%"
