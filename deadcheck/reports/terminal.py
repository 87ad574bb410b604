"""What a terminal would show, as text: of a given width, in colour where wanted, in plain ASCII where needed."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console

from deadcheck.reports.base import RenderOptions
from deadcheck.safe_text import inert


def drawn(draw: Callable[[Console], None], options: RenderOptions) -> str:
    """Return what is printed to the console that ``draw`` is given."""
    out = io.StringIO()
    console = Console(
        file=out, width=options.width, force_terminal=options.color, no_color=not options.color, highlight=False,
        color_system="standard" if options.color else None, legacy_windows=False, emoji=False, markup=False,
    )  # fmt: skip
    draw(console)
    text = inert("\n".join(line.rstrip() for line in out.getvalue().split("\n")))
    return text if options.unicode else text.encode("ascii", "backslashreplace").decode("ascii")
