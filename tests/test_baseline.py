"""What a baseline keeps, and what pruning takes out of it."""

from __future__ import annotations

from deadcheck.baseline import pruned, trimmed, worse
from deadcheck.comparison import compare
from deadcheck.policy import Compare
from deadcheck.record import RunRecord
from tests.records import scan_record, site_record


def test_units_that_came_back_are_accepted_no_longer() -> None:
    old = scan_record(
        site_record("a", dead=[(0, 9), (20, 29)], negative_only=[(50, 54)]), site_record("b", silent=[(3, 3)])
    )
    new = scan_record(site_record("a", dead=[(5, 22), (60, 60)], negative_only=[(50, 50)]), site_record("b"))
    a, b = pruned(old, compare(old, new).layers).sites

    # Of 0-9 and 20-29 still stuck: 5-9 and 20-22; of 50-54: 50. Unit 60 is new, and not accepted.
    assert (a.dead_units, a.negative_only_units) == (((5, 9), (20, 22)), ((50, 50),))
    assert (a.counts["dead"], a.counts["negative_only"], a.counts["live"]) == (8, 1, 91)
    assert (b.silent_units, b.counts["silent"], b.counts["live"]) == ((), 0, 100)
    assert sum(a.counts.values()) == a.units


def test_units_that_died_another_way_stay_accepted() -> None:
    old = scan_record(site_record(dead=[(0, 9)]))
    new = scan_record(site_record(negative_only=[(0, 9)]))

    assert pruned(old, compare(old, new).layers) == old


def test_a_baseline_holds_nothing_that_changes_from_run_to_run() -> None:
    record = scan_record(site_record(), run=RunRecord("now", 1.0, "here"), warnings=("w",), per_unit=({"zeros": [1]},))

    assert trimmed(record) == scan_record(site_record())


def test_worse_is_more_stuck_units_or_others() -> None:
    old = scan_record(site_record("a", dead=10), site_record("b", dead=10), site_record("c", dead=[(0, 9)]))
    new = scan_record(site_record("a", dead=11), site_record("b", dead=9), site_record("c", dead=[(1, 9), (20, 20)]))

    changes = compare(old, new)

    assert [change.key for change in worse(changes, Compare.UNITS)] == ["a", "c"]
    assert [change.key for change in worse(changes, Compare.RATES)] == ["a"]
