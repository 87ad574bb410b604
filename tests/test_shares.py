"""Shares: read as they are written, compared as whole numbers, spelled without a lie."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadcheck.errors import UsageError
from deadcheck.shares import exceeds, percent, reaches, share, spelled


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5%", Fraction(1, 20)), ("0.05", Fraction(1, 20)), ("2.5 %", Fraction(1, 40)), ("100%", Fraction(1)),
        ("0", Fraction(0)), ("0%", Fraction(0)), ("1.0", Fraction(1)), ("0.07", Fraction(7, 100)),
        ("1e-05", Fraction(1, 100_000)), ("33.333333%", Fraction(33_333_333, 100_000_000)),
    ],
)  # fmt: skip
def test_a_share_is_read_exactly(text: str, value: Fraction) -> None:
    assert share(text) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("5", "5 could mean 5% or 5 times; write 5% or 0.05"), ("1", "write 1% or 0.01"), ("50", "write 50% or 0.5"),
        ("101%", "'101%' is not a share"), ("1.5", "'1.5' is not a share"), ("-1%", "is not a share"),
        ("five", "write it as 5% or 0.05"), ("", "is not a share"), ("1/3", "is not a share"), ("nan", "not a share"),
        ("%", "not a share"), ("1e999", "not a share"), ("\u0665%", "not a share"),
    ],
)  # fmt: skip
def test_what_is_no_share_is_told_how_to_write(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        share(text)

    assert words in str(caught.value)


@given(part=st.integers(0, 10**7), whole=st.integers(1, 10**7), cents=st.integers(0, 100))
def test_comparisons_are_those_of_fractions(part: int, whole: int, cents: int) -> None:
    limit = Fraction(cents, 100)

    assert exceeds(part, whole, limit) is (Fraction(part, whole) > limit)
    assert reaches(part, whole, limit) is (part > 0 and Fraction(part, whole) >= limit)


@given(whole=st.integers(1, 10**7), data=st.data(), cents=st.integers(0, 100))
def test_a_percentage_never_lies_about_the_ends_or_the_limit(whole: int, data: st.DataObject, cents: int) -> None:
    part = data.draw(st.integers(0, whole))
    limit = Fraction(cents, 100)
    for text in (percent(part, whole), percent(part, whole, limit)):
        assert (text == "0%") is (part == 0)
        assert (text == "100%") is (part == whole)
        assert text not in ("0.0%", "100.0%")
    beside = percent(part, whole, limit)
    if "<" not in beside and ">" not in beside:
        assert (Fraction(beside.rstrip("%")) == limit * 100) is (Fraction(part, whole) == limit)


@pytest.mark.parametrize(
    ("limit", "text"),
    [(Fraction(5, 100), "5%"), (Fraction(25, 1000), "2.5%"), (Fraction(0), "0%"), (Fraction(1), "100%"),
     (Fraction(1, 3), "33.33333333%")],
)  # fmt: skip
def test_limits_are_spelled_as_percentages(limit: Fraction, text: str) -> None:
    assert spelled(limit) == text
