"""A tiny random SD3 pipeline and what tests build from it; no stored weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import Tensor
from torch.testing import assert_close

from swd.commands.cli import hydra_options
from swd.modules.adapters import save_adapter
from swd.modules.backbones.sd3 import SD3Backbone
from swd.modules.checkpoint_files import read_checkpoint
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes.pipeline import build_clip_encoder, build_clip_tokenizer, build_t5_encoder, build_t5_tokenizer
from swd.types import Conditioning, Role

CONF = Path(__file__).parents[2] / "conf"
CHANNELS, WIDTH, BLOCKS = 4, 16, 3
SIGMAS, SIZES = (1.0, 0.8, 0.6), (4, 6, 8)
TEXT_WIDTH, POOLED_WIDTH, TEXT_TOKENS = 128, 128, 12


def build_transformer(seed: int = 0) -> SD3Transformer2DModel:
    """Patch 2, latents up to 12x12, dual attention in the first block as in SD3.5 medium."""
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def build_vae(channels: int = CHANNELS, scale: float = 1.7, shift: float | None = 0.1) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_pipeline() -> StableDiffusion3Pipeline:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    transformer = build_transformer()
    vae = build_vae()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=vae,
        text_encoder=build_clip_encoder(len(clip), 1),
        tokenizer=clip,
        text_encoder_2=build_clip_encoder(len(clip), 2),
        tokenizer_2=clip,
        text_encoder_3=build_t5_encoder(len(t5), 3),
        tokenizer_3=t5,
    )


def build_networks(
    rank: int = 4,
    alpha: float | None = None,
    roles: Sequence[Role] = ("student", "fake"),
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    seed: int = 0,
) -> SharedBase:
    """Roles on the tiny transformer, with LoRA weights that are not zero."""
    networks = SharedBase(SD3Backbone(build_transformer().to(dtype)), rank, alpha, roles=roles, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    for role in roles:
        for parameter in networks.role_parameters(role):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if checkpointing:
        networks.enable_checkpointing()
    return networks


def in_float64(networks: SharedBase) -> SharedBase:
    """The same networks, in place, computing in float64: what is equal but for rounding is equal to 1e-10 then."""
    networks.double()
    networks.backbone._dtype = None
    for layer in networks._layers:
        layer.cast_input_dtype_enabled = False
    return networks


def build_schedule() -> ScaleSchedule:
    return ScaleSchedule(SIGMAS, SIZES)


def build_conditioning(batch: int = 2, seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
        torch.randn(batch, POOLED_WIDTH, generator=generator),
    )


def build_latents(batch: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def overrides(model: Path, folder: Path, **more: Any) -> list[str]:
    """Command-line arguments that train the tiny pipeline; `__` in a keyword stands for a dot."""
    values = {
        "folder": folder,
        "name": "tiny",
        "model.path": model,
        "model.size": 8,
        "model.rank": 4,
        "model.precision": "fp32",
        "model.feature_blocks": "[1]",
        "schedule.sigmas": list(SIGMAS),
        "schedule.sizes": list(SIZES),
        "data.dataset.resolution": 64,
        "data.batch_size": 4,
        "task.critic_updates": 2,
        "trainer.max_steps": 2,
        "trainer.accelerator": "cpu",
        "callbacks": "checkpoint",
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={'null' if value is None else value}" for key, value in values.items()]


def drawing(model: Path, folder: Path, **more: Any) -> list[str]:
    """`overrides` for commands that do not train: what is of the model, its schedule and the command alone."""
    training = ("name", "data.", "task.", "trainer.", "callbacks", "loss")
    return [argument for argument in overrides(model, folder, **more) if not argument.startswith(training)]


def exporting(model: Path, **more: Any) -> list[str]:
    """`drawing` for a command that has no folder of pictures."""
    return [argument for argument in drawing(model, Path(), **more) if not argument.startswith("folder=")]


def composed(arguments: Sequence[str], command: str = "train") -> DictConfig:
    """The configuration that a command line composes to."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **hydra_options(initialize_config_dir)):
        return compose(command, list(arguments))


def save_trained_student(model_folder: Path, adapter: Path) -> tuple[Pretrained, SharedBase]:
    """A model and the networks of a student that is not zero, whose adapter is written into a folder."""
    model = Pretrained("sd3", str(model_folder), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12)
    networks = model.networks(["student"])
    generator = torch.Generator().manual_seed(5)
    for parameter in networks.role_parameters("student"):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapter, networks.adapter_state("student"), 4, 4, build_schedule().scheduler(2), "tiny", "transformer")
    return model, networks


def save_tiny_vae(folder: Path, channels: int = 4, blocks: int = 4) -> Path:
    """A distilled decoder with random weights, of latents of `channels` channels; it enlarges 2^(blocks - 1) times."""
    torch.manual_seed(0)
    AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * blocks,
        decoder_block_out_channels=(8,) * blocks,
        num_encoder_blocks=(1,) * blocks,
        num_decoder_blocks=(1,) * blocks,
    ).save_pretrained(folder)
    return folder


def keys_of(node: Any, path: str = "") -> list[str]:
    """Every key of a configuration, dotted."""
    found = []
    for key, value in node.items():
        found.append(f"{path}{key}")
        if isinstance(value, dict):
            found += keys_of(value, f"{path}{key}.")
    return found


def assert_same_weights(ours: Path, expected: Path) -> None:
    """The checkpoints of iteration 2 in two folders have the same weights, up to the rounding of other batches."""
    files = [file for folder in (expected, ours) for file in folder.glob("**/iteration-2.ckpt")]
    known, found = (read_checkpoint(file)["state_dict"] for file in files)
    assert known.keys() == found.keys()
    for key, value in known.items():
        assert_close(found[key], value, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
