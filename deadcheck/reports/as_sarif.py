"""SARIF 2.1.0, for code scanning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deadcheck import __version__
from deadcheck.breach import Breach
from deadcheck.ranges import listed
from deadcheck.reports.base import Outcome, RenderOptions, worst_code
from deadcheck.reports.locations import fingerprints, uri
from deadcheck.rules import RULES, page
from deadcheck.safe_text import shown

_MOST = 5_000
"""Results that GitHub takes from one run."""

_LEVELS = {"error": "error", "inconclusive": "error", "warning": "warning", "note": "note"}


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render all findings as one run; models that failed are notifications of it."""
    found = [(outcome, item) for outcome in outcomes for item in outcome.findings]
    prints = fingerprints(found)
    results = [_result(outcome, item, print_) for (outcome, item), print_ in zip(found, prints, strict=True)]
    notes = [_notification(outcome) for outcome in outcomes if outcome.failure is not None]
    if len(results) > _MOST:
        notes.append({"level": "warning", "message": {"text": f"{len(results) - _MOST:,} more findings are left out"}})
    run = {
        "tool": {
            "driver": {"name": "deadcheck", "version": __version__, "rules": [_rule(i) for i in range(len(RULES))]}
        },
        "invocations": [
            {
                "executionSuccessful": not any(outcome.failure for outcome in outcomes),
                "exitCode": int(worst_code(outcomes, options)),
                "toolExecutionNotifications": notes,
            }
        ],
        "columnKind": "unicodeCodePoints",
        "results": results[:_MOST],
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1, allow_nan=False, ensure_ascii=True) + "\n"


def _rule(index: int) -> dict[str, Any]:
    rule = RULES[index]
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.fix, "markdown": page(rule)},
        "defaultConfiguration": {"level": "error" if rule.default.startswith(("Fails", "Exit")) else "warning"},
    }


def _result(outcome: Outcome, item: Breach, fingerprint: str) -> dict[str, Any]:
    codes = [rule.code for rule in RULES]
    units = f" ({listed(item.units)})" if item.units else ""
    location: dict[str, Any] = {}
    if outcome.model is not None:
        # A binary file has no lines, and code scanning shows only what has one.
        location["physicalLocation"] = {"artifactLocation": {"uri": uri(outcome.model)}, "region": {"startLine": 1}}
    if item.where:
        location["logicalLocations"] = [{"fullyQualifiedName": shown(item.where), "kind": "member"}]
    result: dict[str, Any] = {
        "ruleId": item.rule or item.id,
        "level": _LEVELS[item.level],
        "message": {"text": shown(item.message) + units},
        "locations": [location] if location else [],
        "partialFingerprints": {"deadcheck/v1": fingerprint},
    }
    if item.rule in codes:
        result["ruleIndex"] = codes.index(item.rule)
    if item.ignored is not None:
        result["suppressions"] = [
            {"kind": "external", "status": "accepted", "justification": shown(item.ignored.reason)}
        ]
    return result


def _notification(outcome: Outcome) -> dict[str, Any]:
    assert outcome.failure is not None
    note: dict[str, Any] = {"level": "error", "message": {"text": shown(f"{outcome.name}: {outcome.failure.message}")}}
    if outcome.model is not None:
        note["locations"] = [{"physicalLocation": {"artifactLocation": {"uri": uri(outcome.model)}}}]
    return note
