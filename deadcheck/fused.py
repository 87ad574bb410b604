"""Runs operators that hide an activation as the operators they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activate = Callable[[Any, Tensor], Tensor]
"""Runs the operator of an activation."""


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, *rest: Any, activate: Activate = lambda operator, x: operator(x)
) -> Tensor:
    """Run ``aten::_transformer_encoder_layer_fwd``, shape (batch, tokens, features), operator by operator.

    The same operators as in ``aten/src/ATen/native/transformers/transformer.cpp``, in place where they are there, so
    that the same bits come out and in the same time.
    """
    (qkv, qkv_bias, out, out_bias, use_gelu, norm_first, eps, scale1, shift1, scale2, shift2,
     widen, widen_bias, narrow, narrow_bias, mask, mask_type) = (*rest, None, None)[:17]  # fmt: skip

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.native_layer_norm(x, (embed_dim,), scale, shift, eps)[0]

    x = norm(src, scale1, shift1) if norm_first else src
    layer = (embed_dim, num_heads, qkv, qkv_bias, out, out_bias)
    x = torch._native_multi_head_attention(x, x, x, *layer, mask, False, True, mask_type)[0].add_(src)
    x = x if norm_first else norm(x, scale1, shift1)
    hidden = F.linear(norm(x, scale2, shift2) if norm_first else x, widen, widen_bias)
    hidden = activate(torch.ops.aten.gelu_.default if use_gelu else torch.ops.aten.relu_.default, hidden)
    y = F.linear(hidden, narrow, narrow_bias).add_(x)
    return y if norm_first else norm(y, scale2, shift2)


FUSED: dict[str, Callable[..., Any]] = {
    "_transformer_encoder_layer_fwd": encoder_layer,
}
"""Operators of aten that are run in parts, by name."""


def cond(predicate: Any, on_true: Callable[..., Any], on_false: Callable[..., Any], operands: Any = ()) -> Any:
    """Run ``torch.cond`` as the branch that it takes."""
    return (on_true if bool(predicate) else on_false)(*operands)


def while_loop(condition: Callable[..., Any], body: Callable[..., Any], carried: Any, extra: Any = ()) -> Any:
    """Run ``torch.while_loop`` turn by turn."""
    carried = tuple(carried)
    while bool(condition(*carried, *extra)):
        carried = tuple(body(*carried, *extra))
    return carried


def with_grad_mode(enabled: bool, run: Callable[..., Any], *operands: Any) -> Any:
    """Run a part of an exported program that was written under ``torch.no_grad`` or the like."""
    with torch.set_grad_enabled(enabled):
        return run(*operands)


def with_autocast(
    device: str, dtype: Any, enabled: bool, cached: Any, run: Callable[..., Any], *operands: Any
) -> Any:  # fmt: skip
    """Run a part of an exported program that was written under ``torch.autocast``."""
    with torch.autocast(device, dtype, enabled, cached):
        return run(*operands)


HIGHER_ORDER: dict[str, Callable[..., Any]] = {
    "cond": cond,
    "while_loop": while_loop,
    "wrap_with_set_grad_enabled": with_grad_mode,
    "wrap_with_autocast": with_autocast,
}
"""Operators that call functions, by name, as calls of these functions."""
