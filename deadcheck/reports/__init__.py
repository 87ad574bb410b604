"""Reports, each a function of a diagnosis that returns text."""

from deadcheck.reports import as_json, as_table
from deadcheck.reports.base import Render, RenderOptions

__all__ = ["REPORTS", "Render", "RenderOptions"]

REPORTS: dict[str, Render] = {
    "table": as_table.render,
    "json": as_json.render,
}
"""Name, as ``-f`` and ``-o`` take it -> the function that renders it."""
