"""Runs operators that hide an activation as the operators they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_layer(src: Tensor, embed_dim: int, num_heads: int, *rest: Any) -> Tensor:
    """Run ``aten::_transformer_encoder_layer_fwd``, shape (batch, tokens, features), as a layer that is not fused.

    The same operators in the same order as ``torch/nn/modules/transformer.py``, ``TransformerEncoderLayer.forward``.
    """
    (qkv, qkv_bias, out, out_bias, use_gelu, norm_first, eps, scale1, shift1, scale2, shift2,
     widen, widen_bias, narrow, narrow_bias, mask, mask_type) = (*rest, None, None)[:19]  # fmt: skip

    def attend(x: Tensor) -> Tensor:
        layer = (embed_dim, num_heads, qkv, qkv_bias, out, out_bias)
        return attention(x, x, x, *layer, mask, need_weights=False, mask_type=mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        act = F.gelu if use_gelu else F.relu
        return F.linear(act(F.linear(x, widen, widen_bias)), narrow, narrow_bias)

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), scale, shift, eps)

    if norm_first:
        src = src + attend(norm(src, scale1, shift1))
        return src + feed(norm(src, scale2, shift2))
    src = norm(src + attend(src), scale1, shift1)
    return norm(src + feed(src), scale2, shift2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int, qkv: Tensor, qkv_bias: Tensor,
    out: Tensor, out_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True, average: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Run ``aten::_native_multi_head_attention``, shape (batch, tokens, features), as ``torch.nn.functional`` does."""
    padding = mask if mask_type == 1 else None
    over = mask if mask_type != 1 else None
    if over is not None and over.dim() == 4:
        over = over.reshape(-1, *over.shape[2:])
    attended, weights = F.multi_head_attention_forward(
        query.transpose(1, 0), key.transpose(1, 0), value.transpose(1, 0), embed_dim, num_heads, qkv, qkv_bias,
        None, None, False, 0.0, out, out_bias, training=False, key_padding_mask=padding, need_weights=need_weights,
        attn_mask=over, average_attn_weights=average,
    )  # fmt: skip
    return attended.transpose(1, 0), query.new_empty(0) if weights is None else weights


FUSED: dict[str, Callable[..., Any]] = {
    "_transformer_encoder_layer_fwd": encoder_layer,
    "_native_multi_head_attention": attention,
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
