"""The reports of a patch, by name."""

from __future__ import annotations

from collections.abc import Callable

from deadcheck.patch_result import PatchResult
from deadcheck.reports import as_patch, as_patch_json, as_patch_markdown
from deadcheck.reports.base import RenderOptions

PATCHES: dict[str, Callable[[PatchResult, RenderOptions], str]] = {
    "table": as_patch.render,
    "json": as_patch_json.render,
    "markdown": as_patch_markdown.render,
}
"""Name, as ``-f`` and ``--save-report`` take it -> the function that renders it."""
