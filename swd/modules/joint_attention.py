"""Stable Diffusion 3's attention over image and text tokens, with less work than in diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn


@dataclass
class _Order:
    """How networks compute; a plain attribute, since compiled code cannot read a `ContextVar` without a break.

    Attributes:
        stock: as diffusers does.
    """

    stock: bool = False


_order = _Order()


@contextmanager
def as_in_pipelines() -> Iterator[None]:
    """Context in which networks compute as diffusers does, bit for bit, so that stock pipelines draw the same."""
    before = _order.stock
    _order.stock = True
    try:
        yield
    finally:
        _order.stock = before


class JointAttention(Attention):
    """Diffusers' attention of image tokens, and of text tokens where a block has them, in the blocks of its SD3.

    But for rounding, the values are those of `JointAttnProcessor2_0`. The last block uses of the text only keys and
    values: here its queries are not made, and its output is None. Tokens are put together before heads change
    places with them, and taken apart in one piece, so that whole rows of memory are copied; and diffusers inspects
    the processor's signature at every call. Another processor, or an argument that SD3 does not give, goes through
    diffusers' own forward pass.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        is_stock = _order.stock or type(self.processor) is not JointAttnProcessor2_0
        if is_stock or attention_mask is not None or kwargs:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        query, key, value = self._image_heads(hidden_states)
        if encoder_hidden_states is None:
            return self._image_output(_attention(query, key, value))
        text_key, text_value = self._text_heads(encoder_hidden_states)
        key = torch.cat([key, text_key], 1)
        value = torch.cat([value, text_value], 1)
        if self.context_pre_only:
            return self._image_output(_attention(query, key, value)), None
        query = torch.cat([query, self._text_queries(encoder_hidden_states)], 1)
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        image, text = _attention(query, key, value).split(lengths, 1)
        return self._image_output(image), self.to_add_out(text.contiguous())

    def _image_heads(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, L, heads, D]` of image tokens."""
        query = self._heads(self.to_q(tokens))
        key = self._heads(self.to_k(tokens))
        return _normed(self.norm_q, query), _normed(self.norm_k, key), self._heads(self.to_v(tokens))

    def _text_heads(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, L, heads, D]` of text tokens."""
        key = self._heads(self.add_k_proj(tokens))
        return _normed(self.norm_added_k, key), self._heads(self.add_v_proj(tokens))

    def _text_queries(self, tokens: Tensor) -> Tensor:
        return _normed(self.norm_added_q, self._heads(self.add_q_proj(tokens)))

    def _heads(self, projected: Tensor) -> Tensor:
        """`[B, L, heads D]` as `[B, L, heads, D]`."""
        return projected.view(*projected.shape[:2], self.heads, -1)

    def _image_output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.to_out[1](self.to_out[0](tokens))
        return output


def _normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """Heads after their norm, if the network has one."""
    return heads if norm is None else norm(heads)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads `[B, L, heads, D]`: `[B, L, heads D]`."""
    output = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return output.transpose(1, 2).flatten(2)


def install_attention(network: nn.Module) -> None:
    """Turn the attention layers of SD3's blocks into `JointAttention`, in place."""
    for module in network.modules():
        if type(module) is Attention and type(module.processor) is JointAttnProcessor2_0:
            module.__class__ = JointAttention
