"""Blocks of Stable Diffusion 3 with fewer operations than in diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from swd.modules.in_pipelines import computes_as_in_pipelines
from swd.modules.lora_linear import has_hooks


class JointBlock(JointTransformerBlock):
    """Diffusers' block of SD3, whose values it gives but for rounding; `install_blocks` makes these of diffusers' own.

    Norms are scaled and shifted, and results gated and added, in one operation each. Blocks with
    feed-forward layers in chunks, or with hooks on the first norms, go through diffusers' own forward pass.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        if joint_attention_kwargs or self._is_stock():
            stock: tuple[Tensor | None, Tensor] = super().forward(
                hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
            )
            return stock
        image = hidden_states
        text = encoder_hidden_states
        values = F.silu(temb)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *of_second = _modulations(self.norm1, values)
        of_text = _modulations(self.norm1_context, values)
        if self.context_pre_only:
            scale_text, shift_text = of_text
        else:
            shift_text, scale_text, gate_text, shift_text_mlp, scale_text_mlp, gate_text_mlp = of_text
        # Attention
        normed = self.norm1.norm(image)
        normed_text = _modulated(self.norm1_context.norm(text), shift_text, scale_text)
        attended, attended_text = self.attn(_modulated(normed, shift, scale), normed_text)
        image = torch.addcmul(image, attended, gate)
        if self.use_dual_attention:
            shift, scale, gate = of_second
            image = torch.addcmul(image, self.attn2(_modulated(normed, shift, scale)), gate)
        # Feed-forward layers
        image = torch.addcmul(image, self.ff(_modulated(self.norm2(image), shift_mlp, scale_mlp)), gate_mlp)
        if self.context_pre_only:
            return None, image
        text = torch.addcmul(text, attended_text, gate_text)
        normed_text = _modulated(self.norm2_context(text), shift_text_mlp, scale_text_mlp)
        return torch.addcmul(text, self.ff_context(normed_text), gate_text_mlp), image

    def _is_stock(self) -> bool:
        """Whether diffusers' own forward pass is to run."""
        heard = has_hooks(self.norm1) or has_hooks(self.norm1_context)
        return computes_as_in_pipelines() or heard or self._chunk_size is not None


def install_blocks(network: nn.Module) -> None:
    """Turn SD3's blocks in a network into `JointBlock`, in place."""
    for module in network.modules():
        if type(module) is JointTransformerBlock:
            module.__class__ = JointBlock


def _modulations(norm: Any, values: Tensor) -> Sequence[Tensor]:
    """Shifts, scales and gates `[B, 1, W]` of an adaptive layer norm, in its order."""
    found: Tensor = norm.linear(values)
    return found.view(len(found), -1, 1, values.shape[-1]).unbind(1)


def _modulated(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`normed (1 + scale) + shift` (adaLN, arXiv 2212.09748, section 3.2)."""
    return torch.addcmul(shift, normed, 1 + scale)
