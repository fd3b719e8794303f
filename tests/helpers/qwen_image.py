"""A tiny random Qwen-Image pipeline of the stock classes."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import AddedToken
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from swd.shapes.dataset import WORDS

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>")
SYSTEM = "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial rel"
"""Beginning of the pipeline's system text; as one token, so that its template has as many as with the real vocabulary:
34 before the prompt, which the pipeline cuts after encoding, and 5 behind it."""


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level: every word of the captions is one token, and any other text can be tokenized too."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    bytes_ = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    vocab = {token: i for i, token in enumerate([*bytes_, *SPECIAL])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], unk_token=None, pad_token=SPECIAL[0], model_max_length=1024)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in (*SPECIAL, SYSTEM)])
    # With its line break, which the first word of a prompt would swallow as it does a space.
    tokenizer.add_tokens([AddedToken(word) for word in ("system", "user\n", "assistant")])
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True) for word in WORDS])
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two layers, and a vision tower that no text reaches."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=ids["<|vision_start|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build() -> QwenImagePipeline:
    """The pipeline, its dynamic shift as published."""
    tokenizer = build_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    shift = {"base_image_seq_len": 256, "max_image_seq_len": 8192, "base_shift": 0.5, "max_shift": 0.9}
    return QwenImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, **shift),
        vae=AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        text_encoder=build_text_encoder(tokenizer, 16),
        tokenizer=tokenizer,
    )
