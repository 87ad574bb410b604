"""What is known of an operator before it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from deadcheck import activations, flows, fused, suspects

_OWN_NAMESPACES = ("aten", "prims", "prim", "profiler", "quantized", "mkldnn")
_FUSED = ("quantized_rnn_tanh_cell_dynamic",)
"""Operators with an activation inside whose names do not say so."""

_NOT_PLAIN = suspects.NAMES | {"_nested_tensor_from_mask_left_aligned"}

Remark = tuple[Callable[[tuple[Any, ...]], bool], str]
_EXPERTS = (
    "multiplies groups of rows by matrices of their own, as experts do; each unit was counted over all groups, so one "
    "that is dead in a single expert does not show"
)


def _is_instance_norm(args: tuple[Any, ...]) -> bool:
    """Tell whether this batch norm is what torch makes of an instance norm: one sample with the channels of all."""
    return args[0].shape[0] == 1 and args[3] is None


_REMARKS: dict[str, Remark] = {
    "native_batch_norm": (
        lambda args: bool(args[5]) and not _is_instance_norm(args),
        "normalised by the statistics of each batch, as in training",
    ),
    "native_dropout": (lambda args: True, "drew a random mask, as dropout does in training"),
    "bernoulli_": (lambda args: True, "drew a random mask, as dropout does in training"),
    "bernoulli": (lambda args: True, "drew a random mask, as dropout does in training"),
    "_grouped_mm": (lambda args: args[1].dim() == 3, _EXPERTS),
}


class Operator(NamedTuple):
    """An operator of torch, or of another library."""

    name: str
    """Without namespace and overload."""

    rule: Any
    """How it carries axes; see ``flows``."""

    resolve: Any
    """Tells which activation a call of it is, if any."""

    in_parts: Any
    """Runs it as the operators that it hides."""

    remark: Remark | None
    """Tells by its arguments whether a report is to say something of a call, and what that is."""

    is_plain: bool
    """Whether it can neither be nor complete an activation."""

    unseen: str | None
    """Why an activation inside it cannot be seen, where there may be one."""


GATES_INSIDE = frozenset(
    ("mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_lstm_mps", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
)
"""Operators that run a gated recurrent layer, or cell, as a whole."""


def operator_of(func: Any) -> Operator:
    """Return what is known of an overload of an operator."""
    namespace, _, name = func.name().partition("::")
    name = name.partition(".")[0]
    rule, resolve = flows.RULES.get(name), activations.OPERATORS.get(func.overloadpacket)
    in_parts = fused.FUSED.get(name)
    # Composite operators come whole where nothing above took them apart, as inside a fused one.
    if rule is None and resolve is None and in_parts is None and func._can_decompose():
        in_parts = func.decompose
    unseen = None
    if namespace not in _OWN_NAMESPACES:
        unseen = "not an operator of torch: an activation inside it cannot be seen"
    elif name in _FUSED or ("relu" in name and func.overloadpacket not in activations.OPERATORS):
        unseen = "an activation fused with its layer; its input cannot be seen"
    is_plain = resolve is None and in_parts is None and name not in _NOT_PLAIN
    return Operator(name, rule, resolve, in_parts, _REMARKS.get(name), is_plain, unseen)
