"""Stable Diffusion 3's attention over image and text tokens, with less work than in diffusers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from swd.modules.heads import heads_of
from swd.modules.in_pipelines import computes_as_in_pipelines


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
        is_stock = computes_as_in_pipelines() or type(self.processor) is not JointAttnProcessor2_0
        if is_stock or attention_mask is not None or kwargs:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        image = (self.to_q, self.to_k, self.to_v)
        query, key, value = heads_of(hidden_states, image, (self.norm_q, self.norm_k, None), self.heads)
        if encoder_hidden_states is None:
            return self._image_output(attention(query, key, value))
        text = [self.add_q_proj, self.add_k_proj, self.add_v_proj]
        norms = [self.norm_added_q, self.norm_added_k, None]
        first = int(self.context_pre_only)  # no queries there
        *text_query, text_key, text_value = heads_of(encoder_hidden_states, text[first:], norms[first:], self.heads)
        key = torch.cat([key, text_key], 1)
        value = torch.cat([value, text_value], 1)
        if self.context_pre_only:
            return self._image_output(attention(query, key, value)), None
        lengths = [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        attended, attended_text = attention(torch.cat([query, *text_query], 1), key, value).split(lengths, 1)
        return self._image_output(attended), self.to_add_out(attended_text.contiguous())

    def _image_output(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.to_out[1](self.to_out[0](tokens))
        return output


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of heads `[B, L, heads, D]`: `[B, L, heads D]`."""
    output = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return output.transpose(1, 2).flatten(2)


def install_attention(network: nn.Module) -> None:
    """Turn the attention layers of SD3's blocks into `JointAttention`, in place."""
    for module in network.modules():
        if type(module) is Attention and type(module.processor) is JointAttnProcessor2_0:
            module.__class__ = JointAttention
