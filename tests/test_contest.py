"""Which of two ways to run batches wins: each has its turns, and a clock of our own says how long they take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deadcheck import contest
from deadcheck.contest import Contest

TURN = "T" * 13 + "A" * 4


def run(monkeypatch: pytest.MonkeyPatch, together: Callable[[int], float], alone: Callable[[int], float]) -> str:
    """Run 40 batches; batch ``n`` takes as many seconds as the function of its way says. Return the ways, T or A."""
    now, tried, ways = 0.0, Contest(), ""
    monkeypatch.setattr(contest.time, "monotonic", lambda: now)
    for number in range(40):
        if tried.is_together:
            ways += "T"
            now += together(number)
            tried.started_together()
        else:
            ways += "A"
            with tried.alone():
                now += alone(number)
    return ways


@pytest.mark.parametrize(("together", "winner"), [(0.9, "T"), (0.96, "T"), (0.98, "A"), (1.5, "A")])
def test_after_two_turns_each_the_way_that_takes_less_time_by_three_in_a_hundred_goes_on(
    together: float, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, lambda number: together, lambda number: 1.0) == TURN * 2 + winner * 6


def test_batches_in_which_a_way_warms_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {*range(5), *range(17, 22), 13, 30}

    def seconds(number: int) -> float:
        return 100.0 if number in slow else 1.0

    assert run(monkeypatch, lambda n: 0.9 * seconds(n), seconds).endswith("TTTTTT")
    assert run(monkeypatch, lambda n: 1.1 * seconds(n), seconds).endswith("AAAAAA")


def test_a_batch_alone_that_waited_for_something_else_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda number: 1.1, lambda number: 50.0 if number in (14, 31) else 1.0).endswith("AAAAAA")


def test_both_turns_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, lambda number: 0.8 if number < 17 else 1.3, lambda number: 1.0).endswith("AAAAAA")
    assert run(monkeypatch, lambda number: 1.1 if number < 17 else 0.6, lambda number: 1.0).endswith("TTTTTT")
