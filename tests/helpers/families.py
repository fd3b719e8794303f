"""Tiny random pipelines of the families: the stock diffusers classes, saved once, no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import families_flux2
import qwen_image
import torch
import wan22
from diffusers import (
    AutoencoderDC,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tiny import build_vae
from tiny_chroma import chroma
from tiny_z_image import z_image
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from swd.modules.backbones import load_family
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes.pipeline import TEXT_TOKENS, build_clip_tokenizer, build_t5_tokenizer

Model = TypeVar("Model", bound=Pretrained)
FAMILIES = (
    "sd3",
    "sd35_medium",
    "flux",
    "sdxl",
    "wan",
    "sana",
    "qwen_image",
    "flux2_klein",
    "z_image",
    "chroma",
)
FAMILY = {name: name for name in FAMILIES} | {
    "sd35_medium": "sd3",
    "wan22_5b": "wan_5b",
    "wan22_a14b": "wan_high_noise",
}
"""`sd3` is as SD3.5 Large, `sd35_medium` has dual attention; `wan22_5b` and `wan22_a14b` have tests of their own."""
SIZES: dict[str, list[Any]] = {
    "sd3": [4, 6, 8],
    "sd35_medium": [4, 6, 8],
    "flux": [4, 6, 8],
    "sdxl": [4, 6, 8],
    "wan": [[1, 4, 4], [2, 6, 6], [3, 8, 8]],
    "sana": [4, 6, 8],
    "qwen_image": [4, 6, 8],
    "flux2_klein": [4, 6, 8],
    "z_image": [4, 6, 8],
    "chroma": [4, 6, 8],
    "wan22_5b": [[1, 4, 4], [2, 4, 4], [3, 4, 6]],
    "wan22_a14b": [[1, 4, 4], [2, 6, 6], [3, 8, 8]],
}
NON_SQUARE = dict.fromkeys(FAMILIES, (8, 12)) | {"wan": (3, 8, 12), "wan22_5b": (3, 6, 4), "wan22_a14b": (3, 8, 12)}
CHANNELS = dict.fromkeys(FAMILIES, 4) | {"wan": 16, "qwen_image": 16}
CHANNELS |= {"wan22_5b": wan22.CHANNELS_5B, "wan22_a14b": 16}
SIGMAS = [1.0, 0.8, 0.6]


def clip(vocabulary: int, width: int, projection: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(vocabulary: int, width: int, multilingual: bool = False) -> Any:
    options: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": 8,
        "d_ff": 2 * width,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return (UMT5EncoderModel(UMT5Config(**options)) if multilingual else T5EncoderModel(T5Config(**options))).eval()


def sd3(dual: tuple[int, ...] = ()) -> StableDiffusion3Pipeline:
    tokens, pieces = build_clip_tokenizer(), build_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=build_vae(4),
        text_encoder=clip(len(tokens), 16, True),
        tokenizer=tokens,
        text_encoder_2=clip(len(tokens), 16, True),
        tokenizer_2=tokens,
        text_encoder_3=t5(len(pieces), 32),
        tokenizer_3=pieces,
    )


def flux() -> FluxPipeline:
    tokens, pieces = build_clip_tokenizer(), build_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=build_vae(4),
        text_encoder=clip(len(tokens), 16, False),
        tokenizer=tokens,
        text_encoder_2=t5(len(pieces), 32),
        tokenizer_2=pieces,
    )


def sdxl() -> StableDiffusionXLPipeline:
    tokens = build_clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        vae=build_vae(4, 0.13, None),
        text_encoder=clip(len(tokens), 16, False),
        tokenizer=tokens,
        text_encoder_2=clip(len(tokens), 16, True),
        tokenizer_2=tokens,
        add_watermarker=False,
    )


def wan() -> WanPipeline:
    pieces = build_t5_tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return WanPipeline(
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderKLWan(
            base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=t5(len(pieces), 32, multilingual=True),
        tokenizer=pieces,
    )


def sana() -> SanaPipeline:
    pieces = build_t5_tokenizer()
    transformer = SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    blocks = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
            "block_out_channels": (8,) * 6,
            "qkv_multiscales": ((),) * 5 + ((5,),),
            "layers_per_block": (1,) * 6,
        }.items()
    }
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
        **blocks,
    )
    gemma = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=16,
        head_dim=8,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
    )
    return SanaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder,
        text_encoder=Gemma2Model(gemma).eval(),
        tokenizer=pieces,
    )


def wan22_5b() -> WanPipeline:
    pieces = build_t5_tokenizer()
    return wan22.wan22_5b(t5(len(pieces), 32, multilingual=True), pieces)


def wan22_a14b() -> WanPipeline:
    pieces = build_t5_tokenizer()
    return wan22.wan22_a14b(t5(len(pieces), 32, multilingual=True), pieces, wan().vae)


BUILDERS: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "sd35_medium": lambda: sd3((0,)),
    "flux": flux,
    "sdxl": sdxl,
    "wan": wan,
    "sana": sana,
    "qwen_image": qwen_image.build,
    "flux2_klein": families_flux2.klein,
    "z_image": z_image,
    "chroma": chroma,
    "wan22_5b": wan22_5b,
    "wan22_a14b": wan22_a14b,
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    pipeline = BUILDERS[name]()
    generator = torch.Generator().manual_seed(1)
    networks = [getattr(pipeline, part, None) for part in ("unet", "transformer", "transformer_2")]
    with torch.no_grad():  # zero-initialised layers would hide what comes before them
        for parameter in [parameter for network in networks if network for parameter in network.parameters()]:
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return pipeline


def save(name: str, folder: Path) -> Path:
    build(name).save_pretrained(folder)
    return folder


def settings(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Arguments of `Pretrained` for a pipeline that `save` wrote; plain values."""
    return {
        "family": FAMILY[name],
        "path": str(folder),
        "rank": 4,
        "precision": "fp32",
        "feature_blocks": [0],
        "max_text_tokens": TEXT_TOKENS,
        "size": SIZES[name][-1],
        "dmd_guidance_scale": 1.0 if name == "flux" else 3.0,
        "drawing_guidance_scale": 1.0 if name == "flux" else 3.0,
        "embedded_guidance": 4.5 if name == "flux" else None,
        "targets": load_family(FAMILY[name]).targets,
    } | more


def pretrained(name: str, folder: Path, kind: type[Model] = Pretrained, **more: Any) -> Model:  # type: ignore[assignment]
    return kind(**settings(name, folder, **more))


def random_state(model: Pretrained, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = model.networks(("student",)).adapter_state("student")  # type: ignore[attr-defined]
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def scheduler(name: str, model: Pretrained) -> Any:
    kind = model.backbone_class.process.prediction_type
    return ScaleSchedule(SIGMAS, SIZES[name]).scheduler(model.limits.divisor, kind)
