"""Marks in a TorchScript or exported program that tell the probe, while it runs, where each operator stands.

The marks are operators of our own that compute nothing. They are only ever put into a copy in memory, never saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

_LIBRARY = torch.library.Library("deadcheck", "FRAGMENT")
# Conservative: without that, a compiler may take out an operator whose result nobody uses.
_LIBRARY.define("place(str text) -> ()", alias_analysis="CONSERVATIVE")
_LIBRARY.define("recurrent(Tensor[] inputs, Tensor output, str text) -> ()", alias_analysis="CONSERVATIVE")
_LIBRARY.impl("place", lambda text: None, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrent", lambda inputs, output, text: None, "CompositeExplicitAutograd")

PLACE: Any = torch.ops.deadcheck.place.default
"""``place(text)``: what follows stands at the place that the text spells."""

RECURRENT: Any = torch.ops.deadcheck.recurrent.default
"""``recurrent(inputs, output, text)``: a gated recurrent layer, whose gates were passed over, gave this output."""


class Place(NamedTuple):
    """Where an operator of a program stands."""

    path: str = ""
    """Module path that it came from; empty for the model itself."""

    number: int = 0
    """Number of the activation in its program, in the order of the code."""

    is_module: bool = False
    """Whether that module is an activation itself, so that its path names the site."""

    is_gate: bool = False
    """Whether it is a part of a gated recurrent layer."""

    kind: str = ""
    """Name of the gated recurrent layer, ``lstm`` or ``gru``."""

    def spelled(self) -> str:
        """Return the text of a mark."""
        return f"{self.number}:{int(self.is_module)}:{int(self.is_gate)}:{self.kind}:{self.path}"


def read(text: str) -> Place:
    """Return the place that a mark's text spells."""
    number, is_module, is_gate, kind, path = text.split(":", 4)
    return Place(path, int(number), is_module == "1", is_gate == "1", kind)
