"""A tiny random Z-Image pipeline of the stock classes."""

from __future__ import annotations

from chat_tokenizer import build_chat_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from tiny import build_vae
from transformers import Qwen3Config, Qwen3Model


def z_image() -> ZImagePipeline:
    tokens = build_chat_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    qwen = Qwen3Config(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_vae(4),
        text_encoder=Qwen3Model(qwen).eval(),
        tokenizer=tokens,
    )
