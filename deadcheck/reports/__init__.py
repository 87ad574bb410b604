"""Reports, each a function of what became of some models that returns text."""

from deadcheck.reports import (
    as_concise,
    as_github,
    as_gitlab,
    as_json,
    as_junit,
    as_markdown,
    as_sarif,
    as_table,
    as_text,
)
from deadcheck.reports.base import Failure, Outcome, Render, RenderOptions, worst_code

__all__ = ["REPORTS", "Failure", "Outcome", "Render", "RenderOptions", "worst_code"]

REPORTS: dict[str, Render] = {
    "table": as_table.render,
    "text": as_text.render,
    "concise": as_concise.render,
    "json": as_json.render,
    "markdown": as_markdown.render,
    "sarif": as_sarif.render,
    "junit": as_junit.render,
    "github": as_github.render,
    "gitlab": as_gitlab.render,
}
"""Name, as ``-f`` and ``-o`` take it -> the function that renders it."""
