"""A tiny random Chroma pipeline of the stock classes."""

from __future__ import annotations

from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tiny import build_vae
from transformers import T5Config, T5EncoderModel

from swd.shapes.pipeline import build_t5_tokenizer


def chroma() -> ChromaPipeline:
    pieces = build_t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    t5 = T5Config(
        vocab_size=len(pieces),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build_vae(4),
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=pieces,
    )
