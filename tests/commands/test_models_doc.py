"""The tables of docs/models.md against counts on the meta device, and its commands against the configuration."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import skeletons
import torch
import transformers
import yaml
from costs import TEXT
from tiny import CONF, composed
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from docs import table
from swd.commands.train import build_task_and_data
from swd.modules import hub
from swd.modules.pretrained import Pretrained
from swd.modules.targets import is_target

TEXT_OF_DOC = (Path(__file__).parents[2] / "docs" / "models.md").read_text()


@pytest.fixture(scope="module", params=skeletons.MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = skeletons.skeleton(name, tmp_path_factory.mktemp("real") / name)
    return Pretrained(**skeletons.options(name) | {"path": str(folder)})


def adapted(model: Pretrained) -> list[nn.Linear]:
    modules = model.meta_network.named_modules()
    return [layer for key, layer in modules if isinstance(layer, nn.Linear) and is_target(key, model.targets)]


def count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def qwen_vl() -> transformers.Qwen2_5_VLConfig:
    """Of Qwen2.5-VL-7B."""
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)


@cache
def encoders() -> dict[str, int]:
    """Parameters of the text encoders and VAEs, of the shapes that their papers and libraries give them."""
    t5: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    t5["feed_forward_proj"] = "gated-gelu"
    clip = {"l": (768, 3072, 12, 12), "g": (1280, 5120, 32, 20)}
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vae: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
    }
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    deep: dict[str, Any] = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    deep |= {"encoder_block_types": blocks, "decoder_block_types": blocks}
    gemma = {"vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8}
    gemma |= {"num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216}
    qwen: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 2560, "num_hidden_layers": 36, "head_dim": 128}
    qwen |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728}
    with torch.device("meta"):
        built: dict[str, nn.Module] = {
            f"clip-{k}": transformers.CLIPTextModelWithProjection(
                transformers.CLIPTextConfig(projection_dim=v[0], **dict(zip(keys, v, strict=True)))
            )
            for k, v in clip.items()
        }
        built["t5"] = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **t5))
        built["umt5"] = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=256384, **t5))
        built["gemma"] = transformers.Gemma2Model(transformers.Gemma2Config(**gemma))
        built["qwen3-4b"] = transformers.Qwen3Model(transformers.Qwen3Config(**qwen))
        built["vae"] = diffusers.AutoencoderKL(latent_channels=16, **vae)
        built["qwen-vl"] = transformers.Qwen2_5_VLForConditionalGeneration(qwen_vl())
        built["vae-qwen"] = diffusers.AutoencoderKLQwenImage()
        qwen = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
        small = qwen | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
        large = qwen | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        for size, tied, each in (("4b", True, small), ("8b", False, large)):
            config = transformers.Qwen3Config(tie_word_embeddings=tied, **each)
            built[f"qwen3-{size}"] = transformers.Qwen3ForCausalLM(config)
        text = {"model_type": "mistral", "vocab_size": 131072, "head_dim": 128, "tie_word_embeddings": False}
        text |= {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40}
        text |= {"num_attention_heads": 32, "num_key_value_heads": 8}
        vision = {"model_type": "pixtral", "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
        mistral = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
        built["mistral"] = transformers.Mistral3ForConditionalGeneration(mistral)
        built["vae-flux2"] = diffusers.AutoencoderKLFlux2()
        built["vae-wan"], built["vae-sana"] = diffusers.AutoencoderKLWan(), diffusers.AutoencoderDC(**deep)
        patches: dict[str, Any] = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "z_dim": 48}
        patches |= {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48, "is_residual": True}
        built["vae-wan22"] = diffusers.AutoencoderKLWan(base_dim=160, decoder_base_dim=256, **patches)
    return {key: count(module) for key, module in built.items()}


PARTS = {
    "sd35_medium": ("clip-l", "clip-g", "t5", "vae"),
    "sd35_large": ("clip-l", "clip-g", "t5", "vae"),
    "flux_dev": ("clip-l", "t5", "vae"),
    "sdxl": ("clip-l", "clip-g", "vae"),
    "wan21_1_3b": ("umt5", "vae-wan"),
    "wan22_5b": ("umt5", "vae-wan22"),
    "wan22_a14b_high": ("umt5", "vae-wan"),
    "wan22_a14b_low": ("umt5", "vae-wan"),
    "sana_1600m": ("gemma", "vae-sana"),
    "qwen_image": ("qwen-vl", "vae-qwen"),
    "qwen_image_2512": ("qwen-vl", "vae-qwen"),
    "flux2_klein_4b": ("qwen3-4b", "vae-flux2"),
    "z_image": ("qwen3-4b", "vae"),
    "chroma1": ("t5", "vae"),
    "flux2_klein_9b": ("qwen3-8b", "vae-flux2"),
    "flux2_dev": ("mistral", "vae-flux2"),
}

WHOLE = ("vae", "vae-wan", "vae-wan22", "vae-qwen", "vae-flux2")
"""Those that are held in float32."""


def test_parameters_and_layers(name: str, model: Pretrained) -> None:
    network, parameters, steps, _, lora, batch = table(TEXT_OF_DOC, "`model=`")[name]
    cfg = composed(["folder=x", "name=y", f"model={name}"])
    assert network and int(parameters.replace(",", "")) == count(model.meta_network)
    assert lora == f"{model.rank}, {len(adapted(model))}"
    assert int(batch) == cfg.data.batch_size and int(steps.partition(":")[0]) == len(cfg.schedule.sizes)


@pytest.mark.parametrize("option", [file.stem for file in (CONF / "model").glob("[!_]*.yaml")])
def test_guidance(option: str) -> None:
    model = composed(["folder=x", "name=y", f"model={option}"]).model
    dmd, _, drawing, steps, _ = table(TEXT_OF_DOC, "guidance of")[option]
    assert [float(dmd), float(drawing)] == [model.dmd_guidance_scale, model.drawing_guidance_scale]
    assert int(steps) == model.teacher_steps


def test_memory(name: str, model: Pretrained) -> None:
    network = model.meta_network
    base = 2 * (count(network) + sum(buffer.numel() for buffer in network.buffers()))
    adapter = 16 * sum(model.rank * (layer.in_features + layer.out_features) for layer in adapted(model))
    beside = sum(encoders()[part] * (4 if part in WHOLE else 2) for part in PARTS[name])
    counted = [base, adapter, base + adapter, base + 2 * adapter, beside]
    assert table(TEXT_OF_DOC, "model | base")[name] == [f"{value / 1e9:.1f}" for value in counted]
    blocks = model.backbone_class(network).repeated_blocks
    linear = {layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    scales = 4 * sum(layer.out_features for layer in linear)
    small = f"{(base - sum(layer.weight.numel() for layer in linear) + scales) / 1e9:.1f}"
    for shown, whole in {
        "flux_dev": "instead of 23.8 for FLUX",
        "sd35_large": "instead of 16.3 for SD3.5",
        "qwen_image": "instead of 40.9 for Qwen-Image",
        "flux2_dev": "instead of 64.4 for FLUX.2",
    }.items():
        assert name != shown or re.search(rf"{small}( GB)? {whole}", TEXT_OF_DOC)


def test_seconds_follow_from_the_counted_work(name: str) -> None:
    _, _, swd, mmd, beside = (cell.partition(",")[0] for cell in table(TEXT_OF_DOC, "model | F ")[name])
    batch = int(table(TEXT_OF_DOC, "`model=`")[name][-1])
    iterations = composed(["folder=x", "name=y", f"model={name}"]).trainer.max_steps
    for updates, work, cells in ((6, swd, slice(0, 2)), (1, mmd, slice(2, 4))):
        seconds, hours = table(TEXT_OF_DOC, "model | all losses, s")[name][cells]
        if seconds == "-":
            continue
        expected = batch * (float(work) + updates * float(beside)) / (8 * 312 * 0.4)
        assert float(seconds) == pytest.approx(expected, abs=0.6 if expected > 20 else 0.1)
        assert float(hours.removesuffix(" h")) == pytest.approx(iterations * expected / 3600, rel=0.1)


@pytest.mark.slow
def test_work(name: str, model: Pretrained) -> None:
    """Costs of whole passes and of passes up to the feature block, at every size of the schedule."""
    backbone = model.backbone_class(model.meta_network, model.embedded_guidance)
    texts = TEXT | {"sana_1600m": 300}
    text = backbone.random_conditioning(model.network_config, 1, texts[name]).to("meta")
    sigma, whole, early = torch.ones(1, device="meta"), 0.0, 0.0
    schedule = composed(["folder=x", "name=y", f"model={name}"]).schedule
    covers = model.backbone_class.process.covers
    sizes = [size for size, level in zip(schedule.sizes, schedule.sigmas, strict=True) if covers(level)]
    for size in sizes:
        size = (size, size) if isinstance(size, int) else tuple(size)
        x = torch.empty(1, model.channels, *size, device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone.call(x, sigma, text)
        whole += counter.get_total_flops() / 1e12 / len(sizes)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            backbone.features(x, sigma, text, model.feature_blocks)
        early += counter.get_total_flops() / 1e12 / len(sizes)
    passes = 25 if model.dmd_guidance_scale == 1 else 26
    expected = [f"{whole:.2f}", f"{early / whole:.2f}", f"{passes * whole + 21 * early:.0f}"]
    assert table(TEXT_OF_DOC, "model | F ")[name][:4] == [*expected, f"{3 * whole + 4 * early:.0f}"]


def commands() -> list[str]:
    return [line for block in re.findall(r"```\n(.*?)```", TEXT_OF_DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("python train.py")])
def test_commands_build(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", skeletons.hub(tmp_path / "hub"))
    monkeypatch.setattr("swd.modules.distiller.check_start", lambda model: None)  # the adapters are elsewhere
    for folder, file in (("pictures", "a.png"), ("videos", "a.mp4")):
        (tmp_path / folder).mkdir()
        for entry in (file, "a.txt"):
            (tmp_path / folder / entry).write_text("a red star")
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(line, comments=True)[2:]
    assert any(a.startswith("trainer.devices=") for a in arguments)
    task, _ = build_task_and_data(composed([*arguments, "folder=x", "name=y"]))
    assert task.model.init_adapter == next((a.partition("=")[2] for a in arguments if "init_adapter" in a), None)


def test_named_configurations_exist() -> None:
    shown = set(table(TEXT_OF_DOC, "`model=`"))
    assert shown == {file.stem for file in (CONF / "model").glob("[!_]*.yaml")}
    assert all(yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) for name in shown)
