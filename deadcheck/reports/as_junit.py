"""JUnit XML: a suite per model, a case per layer."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from deadcheck.breach import Breach
from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.safe_text import shown

_MODEL = "model"
"""Case of what concerns a model as a whole."""


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render errors as failures, what kept the gate from judging as errors, ignored findings as skipped cases."""
    suites = [_suite(outcome) for outcome in outcomes]
    root = ElementTree.Element("testsuites", {"name": "deadcheck", **_added(suites)})
    root.extend(suites)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(outcome: Outcome) -> ElementTree.Element:
    seconds = outcome.record.run.seconds if outcome.record is not None and outcome.record.run is not None else 0.0
    suite = ElementTree.Element("testsuite", name=shown(outcome.name))
    places: dict[str, list[Breach]] = {"": []}
    if outcome.record is not None:
        places.update({site.key: [] for site in outcome.record.sites})
    for item in outcome.findings:
        places.setdefault(item.where, []).append(item)
    for where, items in places.items():
        suite.append(_case(outcome, where, items))
    cases = list(suite)
    numbers = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    suite.set("tests", str(len(cases)))
    for name, tag in numbers.items():
        suite.set(name, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{seconds:.3f}")
    return suite


def _case(outcome: Outcome, where: str, items: Sequence[Breach]) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=shown(outcome.name), name=shown(where) or _MODEL, time="0")
    judged = outcome.gate is not None
    failed = [item for item in items if judged and item.active and item.level == "error"]
    unsure = [item for item in items if item.active and item.level == "inconclusive"]
    reasons = [item.ignored.reason for item in items if item.ignored is not None]
    if outcome.failure is not None and not where:
        _child(case, "error", outcome.status, outcome.failure.message, outcome.failure.message)
    elif failed:
        _result(case, "failure", failed)
    elif unsure:
        _result(case, "error", unsure)
    elif reasons and not any(item.active and item.level != "note" for item in items):
        _child(case, "skipped", "ignored", "; ".join(reasons), None)
    rest = [item for item in items if item not in failed and item not in unsure]
    if rest:
        ElementTree.SubElement(case, "system-out").text = "\n".join(_line(item) for item in rest)
    return case


def _result(case: ElementTree.Element, tag: str, items: Sequence[Breach]) -> None:
    _child(case, tag, items[0].rule or items[0].id, items[0].message, "\n".join(_line(item) for item in items))


def _child(case: ElementTree.Element, tag: str, kind: str, message: str, text: str | None) -> None:
    child = ElementTree.SubElement(case, tag, type=shown(kind), message=shown(message))
    child.text = None if text is None else "\n".join(shown(line) for line in text.split("\n"))


def _line(item: Breach) -> str:
    why = "" if item.ignored is None else f" (because {item.ignored.reason})"
    return shown(f"{item.rule or item.id} {item.level if item.active else 'ignored'}: {item.message}{why}")


def _added(suites: Sequence[ElementTree.Element]) -> dict[str, str]:
    return {
        name: str(sum(int(suite.get(name, "0")) for suite in suites))
        for name in ("tests", "failures", "errors", "skipped")
    }
