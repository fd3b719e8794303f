"""Tiny random pipelines of FLUX.2: the stock diffusers classes, and a tokenizer that knows the captions' words."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from swd.shapes.dataset import WORDS
from swd.shapes.pipeline import TEXT_TOKENS

WIDTH = 16
"""Width of the text encoder; three of its layers side by side are the network's text."""
TEMPLATE = (
    "{% if enable_thinking is defined and not enable_thinking %}<|brief|>{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}<|end|>{% endif %}"
)
"""A chat's text behind one token, if it is asked for as the pipeline asks for it."""

DEV_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}<|brief|>{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)
"""A chat's text behind one token in place of the system message."""


def qwen_tokenizer(template: str = TEMPLATE) -> Qwen2Tokenizer:
    """Byte-level BPE: every word of the captions is one token, with and without a space before it."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    merges += [("Ġ", word) for word in WORDS]
    merges = list(dict.fromkeys(merges))
    tokens = dict.fromkeys([*bytes_to_unicode().values(), *("".join(pair) for pair in merges)])
    vocab = {token: number for number, token in enumerate([*tokens, "<|endoftext|>", "<|brief|>", "<|end|>"])}
    special = ["<|brief|>", "<|end|>"]
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        model_max_length=TEXT_TOKENS,
        additional_special_tokens=special,
        chat_template=template,
    )


def vae() -> AutoencoderKLFlux2:
    """Its statistics are not 0 and 1, with which a normalisation that is left out would not be seen."""
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    ).eval()
    generator = torch.Generator().manual_seed(2)
    made.bn.running_mean.copy_(0.3 * torch.randn(16, generator=generator))
    made.bn.running_var.copy_(1 + torch.randn(16, generator=generator).square())
    return made


def transformer(guidance_embeds: bool = False) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def text_encoder(vocabulary: int, layers: int) -> Qwen3ForCausalLM:
    config: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": WIDTH, "num_hidden_layers": layers}
    config |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**config, initializer_range=0.3, tie_word_embeddings=True)).eval()


def klein() -> Flux2KleinPipeline:
    """The pipeline reads layers 9, 18 and 27 of the text encoder."""
    tokenizer = qwen_tokenizer()
    return Flux2KleinPipeline(
        transformer=transformer(),
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=text_encoder(len(tokenizer), 28),
        tokenizer=tokenizer,
    )


def dev() -> Flux2Pipeline:
    """The pipeline reads layers 10, 20 and 30 of the text encoder; it only warns of one that is no Mistral 3."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(DEV_TEMPLATE)
    return Flux2Pipeline(
        transformer=transformer(guidance_embeds=True),
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=text_encoder(len(tokenizer), 31),
        tokenizer=tokenizer,
    )
