"""The embedded teacher's skeleton: a complete, small `StableDiffusion3Pipeline` built without any download.

The tokenizers know the words of the captions. The text encoders are random and frozen: each word has its own vector,
positions and neighbouring words are added at comparable strength, and the transformer learns to read the result.
`build_shapes_pipeline` builds the pipeline with an untrained VAE and transformer; `swd.shapes.train_vae` and
`swd.modules.flow_matching` train those.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from swd.modules.fresh_weights import draw_normal
from swd.shapes.dataset import WORDS

TEXT_TOKENS = 24
"""Length of each of the two token sequences (CLIP's and T5's); the longest caption needs 23 and 22."""
_CLIP_WIDTH = 64
_T5_WIDTH = 128
_T5_OFFSETS = (-1, -2, -3, -4, 1, 2, 3, 4)
"""The neighbour that each T5 head looks at, in tokens."""


# --- tokenizers -------------------------------------------------------------------------------------------------


def _byte_symbols() -> list[str]:
    """The printable characters by which byte-level BPE represents the 256 bytes, in byte order (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(extra)) for b in range(256)]


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one symbol."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in split for pair in itertools.pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in split:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def build_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE: every word of the captions is one token, and any other text can be tokenized too."""
    merges = _merges(WORDS)
    symbols = _byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS)


def build_t5_tokenizer() -> T5TokenizerFast:
    """Unigram: every word of the captions is one piece; other text is split into letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    known = {piece for piece, _ in pieces}
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    pieces += [(letter, -8.0) for letter in letters if letter not in known]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)


# --- networks ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def build_clip_encoder(vocab_size: int, seed: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder of width 64 and two layers; words have deviation 1, positions 0.7."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=_CLIP_WIDTH,
        intermediate_size=2 * _CLIP_WIDTH,
        projection_dim=_CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act="gelu",
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    encoder = CLIPTextModelWithProjection(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            draw_normal(parameter, 1.0, generator)
        elif "position_embedding" in name:
            draw_normal(parameter, 0.7, generator)
        elif parameter.ndim == 2:
            draw_normal(parameter, parameter.shape[1] ** -0.5, generator)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def build_t5_encoder(vocab_size: int, seed: int) -> T5EncoderModel:
    """A random T5 encoder of width 128; its relative position bias makes each head attend to one neighbour."""
    heads = len(_T5_OFFSETS)
    config = T5Config(
        vocab_size=vocab_size,
        d_model=_T5_WIDTH,
        d_kv=_T5_WIDTH // heads,
        d_ff=2 * _T5_WIDTH,
        num_layers=2,
        num_heads=heads,
        relative_attention_num_buckets=32,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )

    # Random weights, apart from the position bias and the norms.
    encoder = T5EncoderModel(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in encoder.named_parameters():
        if "relative_attention_bias" in name:
            parameter.zero_()
            for head, offset in enumerate(_T5_OFFSETS):  # bucket of an offset: |offset|, plus 16 to the right
                parameter[abs(offset) + 16 * (offset > 0), head] = 6.0
        elif "shared" in name or "embed_tokens" in name:
            draw_normal(parameter, 1.0, generator)
        elif parameter.ndim == 2:
            # T5 does not divide attention scores by sqrt(d_kv), so the query's weights are scaled down instead.
            width = parameter.shape[1] * (config.d_kv if name.endswith("q.weight") else 1)
            draw_normal(parameter, width**-0.5, generator)
        else:
            parameter.fill_(1.0)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def build_vae(channels: tuple[int, ...] = (16, 32, 64, 80), latent_channels: int = 16, seed: int = 0) -> AutoencoderKL:
    """An untrained 8x autoencoder with the layout of SD3's (no quant convolutions).

    Weights are chosen so that convolutions keep the variance of their input and residual branches start small. With the
    library's own initialisation the signal fades on its way through, and training takes several times as long.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    generator = torch.Generator().manual_seed(seed)
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            draw_normal(
                module.weight, (0.1 if name.endswith("conv2") else 1.0) / module.weight[0].numel() ** 0.5, generator
            )
            assert module.bias is not None  # each convolution of `AutoencoderKL` has one
            module.bias.zero_()
    return vae


def build_transformer(layers: int = 6, heads: int = 4, head_dim: int = 32) -> SD3Transformer2DModel:
    """An untrained SD3 transformer: patch 1, 16x16 latents (24x24 at most), 3.6M parameters."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=2 * _CLIP_WIDTH,
        pos_embed_max_size=24,
        qk_norm="rms_norm",
    )


def build_shapes_pipeline(seed: int = 0) -> StableDiffusion3Pipeline:
    """The whole pipeline with an untrained VAE and transformer; equal seeds give equal weights."""
    clip = build_clip_tokenizer()
    t5 = build_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_vae(seed=seed)
        transformer = build_transformer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=build_clip_encoder(len(clip), seed + 1),
        tokenizer=clip,
        text_encoder_2=build_clip_encoder(len(clip), seed + 2),
        tokenizer_2=clip,
        text_encoder_3=build_t5_encoder(len(t5), seed + 3),
        tokenizer_3=t5,
    )


def save_pipeline(pipeline: StableDiffusion3Pipeline, folder: str | Path) -> None:
    """Write the pipeline with half-precision weights that load as float32 by default."""
    folder = Path(folder)
    pipeline.to(torch.float16).save_pretrained(folder)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        # transformers loads in the dtype written here; diffusers loads the transformer and the VAE as float32.
        config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
    pipeline.to(torch.float32)
