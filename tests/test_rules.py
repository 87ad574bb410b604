"""The rules' codes, names and pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deadcheck import checks, gate
from deadcheck.errors import UsageError
from deadcheck.rules import RULES, find_rule, page, pages

ROOT = Path(__file__).parent.parent


def test_codes_and_names_are_unique_and_in_order() -> None:
    assert [rule.code for rule in RULES] == [f"DC{i:03}" for i in range(1, len(RULES) + 1)]
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_codes_keep_their_meaning() -> None:
    assert {rule.code: rule.name for rule in RULES} == {
        "DC001": "layer-mostly-dead", "DC002": "model-mostly-dead", "DC003": "layer-dead", "DC004": "output-constant",
        "DC005": "invalid", "DC006": "explosion", "DC007": "worse-than-baseline", "DC008": "newly-dead",
        "DC009": "saturated", "DC010": "too-few-samples", "DC011": "never-ran", "DC012": "synthetic-data",
        "DC013": "unused-ignore", "DC014": "negative-only", "DC015": "baseline-not-comparable",
        "DC016": "nothing-judged",
    }  # fmt: skip


def test_every_rule_is_judged_somewhere() -> None:
    source = "".join(Path(str(module.__file__)).read_text() for module in (checks, gate))

    assert {rule.name for rule in RULES} <= set(re.findall(r'"([a-z-]+)"', source))


def test_the_written_pages_are_those_of_the_rules() -> None:
    assert (ROOT / "docs" / "rules.md").read_text(encoding="utf-8") == pages()


@pytest.mark.parametrize("rule", RULES, ids=[rule.code for rule in RULES])
def test_a_page_says_what_why_and_what_to_do(rule) -> None:
    text = page(rule)

    for part in (rule.code, rule.name, rule.summary, "**By default**", "**Why.**", "**What to do.**", "**Settings.**"):
        assert part in text


@pytest.mark.parametrize("name", ["DC003", "dc003", "layer-dead", "Layer-Dead"])
def test_a_rule_is_found_by_code_or_name(name: str) -> None:
    assert find_rule(name).code == "DC003"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("negative", "did you mean negative-only?"), ("layerdead", "layer-dead?"), ("zzz", "there are DC001 to DC016")],
)
def test_an_unknown_rule_gets_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_rule(name)

    assert hint in str(caught.value)
