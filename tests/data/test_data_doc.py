"""The table of docs/data.md against what is packed and counted, and its commands against the configuration."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import skeletons
import torch
from costs import TEXT, TFLOP
from tiny import composed

from docs import table
from swd.commands import encode, generate, import_pictures
from swd.config import check
from swd.data.cache import Precision, pack_latents, pack_text
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import Conditioning

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
PROMPT = dict.fromkeys(("wan21_1_3b", "sana_1600m", "qwen_image", "qwen_image_2512", "z_image", "chroma1"), 100)
PROMPT |= {"wan22_5b": 100, "wan22_a14b_high": 100, "wan22_a14b_low": 100}
"""Tokens of a prompt, for families whose padding is not stored."""
A100 = 312 * 0.4
"""TFLOP/s, as in docs/models.md."""
VAE = dict(zip((32, 48, 64, 80, 96, 128), (0.27, 0.62, 1.12, 1.78, 2.61, 4.88), strict=True))
T5, CLIP, DECODE = 4.84, 0.1, 10.47
ENCODERS = {"sdxl": CLIP, "wan21_1_3b": T5, "chroma1": T5, "z_image": 3.87}
ENCODERS |= {"flux2_klein_4b": 4.27, "flux2_klein_9b": 7.9, "flux2_dev": 23.6}
"""TFLOP of a prompt; that of T5 and CLIP elsewhere. Qwen3 4B takes 512 tokens of 2 FLOP a weight, and attention."""
# Qwen2.5-VL's language model with its head at 128 + 34 tokens, and the VAE of Qwen-Image, by the same count.
QWEN, QWEN_DECODE = 2.30, 11.68
QWEN_VAE = dict(zip((64, 80, 96, 128), (1.77, 2.79, 4.06, 7.39), strict=True))


@pytest.fixture(params=skeletons.MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str, tmp_path: Path) -> Pretrained:
    return Pretrained(**skeletons.options(name) | {"path": str(skeletons.skeleton(name, tmp_path / name))})


def conditioning(name: str, model: Pretrained) -> Conditioning:
    """Of the shape that the family has, with zeros where it has zeros."""
    tokens = PROMPT.get(name, TEXT.get(name, 0))
    row = model.backbone_class.random_conditioning(model.network_config, 1, tokens)
    if name.startswith("sd35"):
        row.embeds[:, :77, 2048:] = 0
    return row


def sizes_of(name: str) -> list[tuple[int, ...]]:
    node = composed(["folder=x", "name=y", f"model={name}"]).schedule
    return list(ScaleSchedule(list(node.sigmas), [s if isinstance(s, int) else list(s) for s in node.sizes]).sizes)


def packed(name: str, model: Pretrained, precision: Precision) -> tuple[int, int]:
    """Bytes of a sample's text and latents."""
    latents = 0
    for size in sizes_of(name):
        mean = torch.zeros(model.channels, *size)
        latents += len(pack_latents(mean, None if name == "sana_1600m" else mean, precision))
    return len(pack_text(conditioning(name, model), precision)), latents


def test_bytes(name: str, model: Pretrained) -> None:
    text, latents = packed(name, model, "bf16")
    small = sum(packed(name, model, "int8"))
    counted = [f"{text / 1e6:.2f}", f"{latents / 1e6:.2f}", f"{(text + latents) / 1e4:.0f}", f"{small / 1e4:.0f}"]
    assert table(DOC, "model | text")[name][:4] == counted


def test_hours(name: str, model: Pretrained) -> None:
    """A100 hours of 100,000 samples at the assumed use of its peak; only where costs are counted."""
    draw, code = table(DOC, "model | text")[name][4:6]
    sides, passes = [size[-1] for size in sizes_of(name)], 1 if model.drawing_guidance_scale == 1 else 2
    if name == "sana_1600m":
        assert (draw, code) == ("-", "-")
        return
    cost = float(TFLOP[name][max(TFLOP[name])])
    text = ENCODERS.get(name, T5 + CLIP)
    decode = 0 if model.backbone_class.video else DECODE
    vae = VAE
    if model.family == "qwen_image":
        text, decode, vae = QWEN, QWEN_DECODE, QWEN_VAE
    assert float(draw.replace(",", "")) == pytest.approx(
        1e5 * (model.teacher_steps * passes * cost + decode + text) / A100 / 3600, rel=0.01
    )
    if model.backbone_class.video:
        assert code == "-"
    else:
        assert float(code) == pytest.approx(1e5 * (sum(vae[s] for s in sides) + text) / A100 / 3600, abs=0.06)


def commands() -> list[str]:
    return [line for block in re.findall(r"```(?:bash)?\n(.*?)```", DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in commands() if " swd " in f" {line}" or "train.py" in line])
def test_commands_compose(line: str) -> None:
    words = shlex.split(line, comments=True)
    start = words.index("swd") if "swd" in words else words.index("train.py")
    command = words[start + 1] if words[start] == "swd" else "train"
    roots = {"generate": generate.ROOT, "import": import_pictures.ROOT, "encode": encode.ROOT}
    arguments = [word for word in words[start + 1 + (command != "train") :] if not word.startswith("-")]
    given = ["folder=x", "name=y"] if command in ("train", "demo") else []
    check(composed([*arguments, *given], command), roots.get(command))
