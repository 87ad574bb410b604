"""What an inspection finds, and what every kind of file's inspector fills in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that a file claims to hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Inspection:
    """What a file claims to hold and the names it would import; made without building anything."""

    path: str
    bytes: int
    kind: str
    """``torch-module``, ``state-dict``, ``checkpoint``, ``torchscript``, ``pt2``, ``safetensors`` or ``hf-dir``."""

    what: str
    """The same in words."""

    tensors: tuple[TensorInfo, ...] = ()
    classes: tuple[tuple[str, int], ...] = ()
    """Classes of modules that it names, and how many modules of each."""

    names: tuple[str, ...] = ()
    """Other classes and functions that it names."""

    activations: tuple[tuple[str, str], ...] = ()
    """(module path or place, activation), as far as the file tells."""

    entries: tuple[tuple[str, str], ...] = ()
    """Entries of a checkpoint, and what each holds."""

    prefix: str | None = None
    """Prefix that a wrapper left on the names of the weights."""

    sample: str | None = None
    """The sample that a scan would use."""

    problems: tuple[str, ...] = ()
    """What is wrong with it, or would run; empty for a file that is fine."""

    refused: bool = False
    """Whether a scan would refuse it as it is."""

    next: str = ""
    """The command to type next; empty where there is none."""


@dataclass
class Found:
    """What is put together while a file is read."""

    kind: str = ""
    what: str = ""
    tensors: list[TensorInfo] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    activations: list[tuple[str, str]] = field(default_factory=list)
    entries: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    refused: bool = False
    is_hopeless: bool = False
    """Whether no flag makes it fit for a scan."""

    has_sample: bool = False
    """Whether the file itself holds inputs to run it on."""
