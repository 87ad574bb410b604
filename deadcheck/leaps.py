"""Layers of torch that run unwatched in a pass that repeats the one before, which told what they do to the axes."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from deadcheck.follower import Follower
from deadcheck.layout import Flow, Known
from deadcheck.steps import Step

LAYERS: dict[type[nn.Module], Any] = {
    layer: attrgetter("training", *layer.__constants__)
    for layer in (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
        nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten,
    )
}  # fmt: skip
"""Layers that hold no activation and whose way depends on nothing but these attributes of theirs."""


class Leap(NamedTuple):
    """What a layer did, from its first operator to its last."""

    layer: nn.Module
    attributes: Any
    weights: list[Tensor | None]
    source: Flow
    """What was known of its input."""

    shape: torch.Size
    last: Step | None
    end: int
    """Steps so far when it ended; ``last`` is the one before."""

    known: Known | None
    """What was known of its output."""


class Leaps:
    """The layers of a pass that the pass before ran too, on inputs of which the very same was known."""

    def __init__(self) -> None:
        self._known: dict[int, Leap] = {}
        """By the number of steps so far when the layer began."""
        self._begun: tuple[int, Leap] | None = None
        self.running: Leap | None = None
        """The layer that runs unwatched, if one does."""

    def fork(self) -> Leaps:
        """Return one for another thread that runs the same model."""
        fork = Leaps()
        fork._known = dict(self._known)
        return fork

    def start(self) -> None:
        """Begin a pass."""
        self._begun = self.running = None

    def begin(self, layer: nn.Module, args: Any, follow: Follower) -> bool:
        """Tell whether one of the LAYERS that begins may run unwatched; if not, what it does is noted for next time."""
        self._begun = None
        if len(args) != 1 or type(args[0]) is not Tensor:
            return False
        source, at = follow.look(args[0]), follow.steps.count
        if not isinstance(source, Flow) or not _is_as_made(layer):
            return False
        attributes, shape, weights = LAYERS[type(layer)](layer), args[0].shape, _weights(layer)
        leap = self._known.get(at)
        if (
            leap is not None
            and leap.layer is layer
            and leap.source is source
            and leap.shape == shape
            and leap.attributes == attributes
            and list(map(id, leap.weights)) == list(map(id, weights))
            and leap.last is not None
            and follow.steps.is_at(leap.end, leap.last)
        ):
            self.running = leap
            return True
        if not layer.training:
            self._begun = at, Leap(layer, attributes, weights, source, shape, None, at, None)
        return False

    def end(self, layer: nn.Module, leap: Leap | None, output: Any, follow: Follower) -> None:
        """Go on from the output of a layer: known if it ran unwatched, and noted if it was watched."""
        if leap is not None and leap.last is not None:
            follow.steps.go_on(leap.end, leap.last)
            follow.learn(output, leap.known)
        elif self._begun is not None and self._begun[1].layer is layer:
            (at, begun), self._begun = self._begun, None
            steps = follow.steps.since(at)
            if steps and type(output) is Tensor and all(step.form is not None for step in steps):
                known = follow.look(output)
                self._known[at] = begun._replace(last=steps[-1], end=follow.steps.count, known=known)


def _is_as_made(layer: nn.Module) -> bool:
    """Tell whether nothing runs in a call of a layer of torch but torch's own code, and this probe's two hooks."""
    own = vars(layer)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    return len(torch_module._global_forward_hooks) == len(torch_module._global_forward_pre_hooks) == 1


def _weights(layer: nn.Module) -> list[Tensor | None]:
    return [*layer._parameters.values(), *layer._buffers.values()]
