"""GitLab's code quality report."""

from __future__ import annotations

import json
from collections.abc import Sequence

from deadcheck.breach import Breach
from deadcheck.reports.base import Outcome, RenderOptions
from deadcheck.reports.locations import fingerprints, relative
from deadcheck.safe_text import shown

_SEVERITIES = {"error": "critical", "inconclusive": "major", "warning": "minor", "note": "info"}


def render(outcomes: Sequence[Outcome], options: RenderOptions) -> str:
    """Render every finding, and every model that failed, as an issue of its file."""
    found = [(outcome, item) for outcome in outcomes for item in (*_failed(outcome), *outcome.findings)]
    issues = [
        {
            "description": _words(item),
            "check_name": item.rule or item.id,
            "fingerprint": fingerprint,
            "severity": _SEVERITIES[item.level] if item.active else "info",
            "location": {"path": shown(relative(outcome.name)), "lines": {"begin": 1}},
        }
        for (outcome, item), fingerprint in zip(found, fingerprints(found), strict=True)
    ]
    return json.dumps(issues, indent=1, ensure_ascii=True) + "\n"


def _failed(outcome: Outcome) -> list[Breach]:
    if outcome.failure is None:
        return []
    return [Breach(outcome.status, "error", "", outcome.failure.message)]


def _words(item: Breach) -> str:
    why = "" if item.ignored is None else f" (ignored: {item.ignored.reason})"
    return shown(item.message + why)
