"""TAEHV's decoder against a plain evaluation of its files' layers, its files, and its place in the pipelines."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import tiny_video_files
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_vae
from tiny_video_files import WAN21, WAN22, WAN22_SUPER
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from swd.commands.sample import check_tiny_vae
from swd.modules.drawing import DrawingOptions, build_pipeline, draw
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Request
from swd.modules.tiny_video import TinyVideoDecoder
from swd.modules.tiny_video_files import load_video_decoder
from swd.types import UserError

KINDS = {"wan21": WAN21, "wan22": WAN22, "wan22_super": WAN22_SUPER}


@pytest.fixture(params=KINDS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def latents(settings: dict[str, Any], frames: int, batch: int = 2) -> Tensor:
    shape = (batch, settings["latent_channels"], frames, 4, 6)
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(frames))


# The decoder

LAYERS = (
    "squeeze conv relu " + 2 * "block block block double grow conv " + "block block block double grow conv relu conv"
)
LAYERS_WIDE = "point " + 3 * "block block block conv relu shuffle grow " + "conv"


def slowly(weights: dict[str, Tensor], wide: bool, patch: int, clip: Tensor) -> Tensor:
    """Frames `[3, F', H', W']` of latents `[C, F, H, W]`: layer after layer by its number, one frame at a time."""
    layers = (LAYERS_WIDE if wide else LAYERS).split()
    before: dict[int, Tensor] = {}
    found: list[Tensor] = []

    def conv(x: Tensor, key: str, **options: Any) -> Tensor:
        return functional.conv2d(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"), **options)

    def block(x: Tensor, number: int) -> Tensor:
        key = f"decoder.{number}.conv"
        both = torch.cat([x, before.get(number, torch.zeros_like(x))], 1)
        before[number] = x
        if wide:
            inner = conv(conv(both, f"{key}.0", padding=3, groups=both.shape[1]), f"{key}.1")
            return conv(inner.relu(), f"{key}.3") + x
        inner = conv(conv(both, f"{key}.0", padding=1).relu(), f"{key}.2", padding=1)
        return (conv(inner.relu(), f"{key}.4", padding=1) + x).relu()

    def run(x: Tensor, number: int) -> None:
        if number == len(layers):
            found.append((functional.pixel_shuffle(x, patch).clamp(0, 1) * 2 - 1)[0])
            return
        if layers[number] == "grow":
            grown = conv(x, f"decoder.{number}.conv")
            for each in grown.chunk(len(grown[0]) // len(x[0]), 1):
                run(each, number + 1)
            return
        operations = {
            "squeeze": lambda: 3 * (x / 3).tanh(),
            "relu": lambda: x.relu(),
            "double": lambda: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
            "shuffle": lambda: functional.pixel_shuffle(x, 2),
            "block": lambda: block(x, number),
            "point": lambda: conv(x, f"decoder.{number}"),
            "conv": lambda: conv(x, f"decoder.{number}", padding=1),
        }
        run(operations[layers[number]](), number + 1)

    for each in clip.unbind(1):
        run(each[None], 0)
    return torch.stack(found[3:], 1)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_are_those_of_the_layers_one_frame_at_a_time(
    settings: dict[str, Any], frames: int, tmp_path: Path
) -> None:
    file = tiny_video_files.save(tmp_path / "a.safetensors", **settings)
    decoder = load_video_decoder(str(file), torch.float32, "file")
    z = latents(settings, frames)
    found = decoder.decode(z).sample
    expected = torch.stack([slowly(load_file(file), settings["wide"], settings["patch"], clip) for clip in z])
    side = 8 * settings["patch"]
    assert found.shape == (2, 3, 4 * (frames - 1) + 1, 4 * side, 6 * side)
    assert found.std() > 0.2 and (found.abs() < 1).float().mean() > 0.3, "pixels differ, and not all are at the limits"
    assert_close(found, expected, rtol=0, atol=1e-5)


def test_latents_together_or_one_by_one_are_the_same(settings: dict[str, Any]) -> None:
    decoder, z = tiny_video_files.decoder(**settings), latents(settings, 5)
    one_by_one = decoder.decode(z).sample
    for together in (2, 5):
        decoder.register_to_config(frames_at_once=together)
        assert_close(decoder.decode(z, return_dict=False)[0], one_by_one, rtol=0, atol=1e-5)


def test_a_later_latent_changes_no_earlier_frame(settings: dict[str, Any]) -> None:
    decoder, z = tiny_video_files.decoder(**settings), latents(settings, 4)
    before = decoder.decode(z).sample
    for place, first in ((1, 1), (3, 9)):
        changed = z.clone()
        changed[:, :, place] += 1
        differs = (decoder.decode(changed).sample - before).abs().amax((0, 1, 3, 4)) > 0
        assert not differs[:first].any() and differs[first:].all()


def test_a_picture_is_the_first_frame_and_costs_no_others(settings: dict[str, Any]) -> None:
    """Of the four frames of a first latent one is kept. Three pass no last layer; memory has the next ones."""
    decoder, z = tiny_video_files.decoder(**settings), latents(settings, 3)
    rows: list[int] = []
    decoder.last.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    picture, video = decoder.decode(z[:, :, 0]).sample, decoder.decode(z).sample
    assert_close(picture, video[:, :, 0], rtol=0, atol=1e-5)
    assert rows == [2, 2, 8, 8], "two clips: a frame each, then one, four and four"


def test_pixels_lie_between_minus_one_and_one(settings: dict[str, Any]) -> None:
    decoder = tiny_video_files.decoder(**settings)
    pixels = decoder.decode(100 * latents(settings, 2)).sample
    assert pixels.min() == -1 and pixels.max() == 1


def test_weights_have_the_dtype_asked_for_and_no_gradients(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tiny_video_files.save(tmp_path / "a.safetensors", **settings)
    decoder = load_video_decoder(str(file), torch.bfloat16, "file")
    assert decoder.dtype == torch.bfloat16 and not any(p.requires_grad for p in decoder.parameters())
    coarse, fine = (
        each.decode(latents(settings, 2).to(each.dtype)).sample.float()
        for each in (decoder, tiny_video_files.decoder(**settings))
    )
    assert (coarse - fine).abs().mean() < 0.05


def test_weights_in_main_memory_are_moved_before_it_decodes() -> None:
    """By the hook that diffusers' offloading puts on a part of the pipeline."""
    decoder, moved = tiny_video_files.decoder(**WAN21), []
    decoder._hf_hook = SimpleNamespace(pre_forward=moved.append)
    decoder.decode(latents(WAN21, 1))
    assert moved == [decoder]


# Files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pretrained]:
    folder = tmp_path_factory.mktemp("models")
    names = ("wan", "wan22_5b", "wan22_a14b", "qwen_image")
    return {name: families.pretrained(name, families.save(name, folder / name)) for name in names}


def test_files_fit_the_models_of_their_latents(models: dict[str, Pretrained], tmp_path: Path) -> None:
    wan21 = tiny_video_files.save(tmp_path / "wan21" / "any_name.safetensors", **WAN21)
    files = [tiny_video_files.save(tmp_path / "b.safetensors", **WAN22)]
    files += [tiny_video_files.save(tmp_path / "c.safetensors", **WAN22_SUPER)]
    for name, model in models.items():
        fit, other = ([wan21, wan21.parent], files) if name != "wan22_5b" else (files, [wan21])
        for file in fit:
            check_tiny_vae(str(file), model)
        for file in other:
            given, own = (16, 48) if name == "wan22_5b" else (48, 16)
            text = f"tiny_vae={file} decodes {given} channels, this model's latents have {own}; give taew2_"
            with pytest.raises(UserError, match=f"^{re.escape(text)}"):
                check_tiny_vae(str(file), model)


def damaged(folder: Path, kind: str) -> Path:
    """Something that is no decoder of Wan2.1's latents."""
    file = tiny_video_files.save(folder / f"{kind}.safetensors", **WAN21)
    if kind == "short":
        file.write_bytes(file.read_bytes()[:-8])
    if kind == "no_layer":
        save_file({key: value for key, value in load_file(file).items() if "decoder.13" not in key}, file)
    if kind == "narrow_layer":
        save_file(load_file(file) | {"decoder.9.conv.2.weight": torch.zeros(8, 4, 3, 3)}, file)
    if kind == "pixels":
        save_file(load_file(file) | {"decoder.22.weight": torch.zeros(5, 6, 3, 3)}, file)
    if kind == "nan":
        save_file(load_file(file) | {"decoder.22.bias": torch.tensor([0.0, torch.nan, 0.0])}, file)
    if kind == "whole_numbers":
        save_file({key: value.int() for key, value in load_file(file).items()}, file)
    if kind == "growth":
        tiny_video_files.save(file, **WAN21, growth=(2, 2, 2))
    if kind == "patch":
        tiny_video_files.save(file, **(WAN21 | {"patch": 2}))
    if kind == "weights.pth":
        file.with_suffix("").write_bytes(b"")
        return file.with_suffix("")
    if kind == "many":
        tiny_video_files.save(folder / "many" / "a.safetensors", **WAN21)
        tiny_video_files.save(folder / "many" / "b.safetensors", **WAN21)
        return folder / "many"
    if kind == "pictures":
        return save_tiny_vae(folder / "pictures", channels=16)
    return folder / "none" if kind == "missing" else file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "missing",
            r"does not exist; give taew2_1\.safetensors, downloaded from https://github\.com/madebyollin/taehv",
        ),
        ("short", r"is damaged or cannot be read \(.+\); download it again"),
        ("no_layer", r"is no decoder of TAEHV \(it has no decoder\.13\.conv\.weight\)"),
        (
            "narrow_layer",
            r"\(decoder\.9\.conv\.2\.weight is \(8, 4, 3, 3\), where \(8, 8, 3, 3\) would fit the others\)",
        ),
        ("pixels", r"\(decoder\.22\.weight is \(5, 6, 3, 3\), where \(3, 6, 3, 3\) would fit the others\)"),
        ("growth", "makes 8 frames of one, this model's decoder 4; give"),
        ("patch", "enlarges 16 times, this model's decoder 8 times; give"),
        ("weights.pth", r"is no \.safetensors file, and others can run code; give taew2_1"),
        ("many", r"holds 2 \.safetensors files; give taew2_1"),
        ("pictures", "is of the class AutoencoderTiny, which does not decode this model's latents; give taew2_1"),
        ("taehv", "is for HunyuanVideo, as its name says; give taew2_1"),
        ("taecvx", "is for CogVideoX, as its name says; give taew2_1"),
        ("taehv_fp16", "is for HunyuanVideo, as its name says; give taew2_1"),
        ("nan", r"has values in last\.bias that are not finite; give taew2_1"),
        ("whole_numbers", r"has \S+ of torch\.int32, which is no floating-point type; give taew2_1"),
    ],
)
def test_other_files_are_refused_in_one_line(
    models: dict[str, Pretrained], tmp_path: Path, kind: str, message: str
) -> None:
    path = damaged(tmp_path, kind)
    for name in ("wan", "qwen_image"):
        with pytest.raises(UserError, match=rf"^timing\.tiny_vae={path} .*{message}") as error:
            check_tiny_vae(str(path), models[name], "timing.tiny_vae")
        assert "\n" not in str(error.value)


# In pipelines


@pytest.mark.parametrize("name", ["wan", "wan22_5b", "qwen_image"])
def test_it_decodes_what_the_network_drew(models: dict[str, Pretrained], name: str, tmp_path: Path) -> None:
    """Without the mean and standard deviation of the VAE, in ours and in the stock pipeline's own decoding."""
    model = models[name]
    model.teacher_steps = 2
    settings = WAN22 if name == "wan22_5b" else WAN21
    file = tiny_video_files.save(tmp_path / "a.safetensors", **settings)
    pipe = build_pipeline(model, cfg=DrawingOptions(tiny_vae=str(file)))
    assert isinstance(pipe.vae, TinyVideoDecoder) and pipe.vae.dtype == torch.float32

    seen: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: (seen.append(z), decode(z, **options))[1]
    drawn = draw(pipe, model, [Request("a red star", 1)], show_sizes=False)[0][0]
    arguments = {
        **model.backbone_class.sampling_arguments(model.max_text_tokens, None),
        **model.backbone_class.guidance_arguments(model.drawing_guidance_scale),
        **model.size_arguments(model.size, model.size),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(1),
    }
    stock = pipe(prompt="a red star", output_type="pt", **arguments)[0][0]

    networks_own = pipe(prompt="a red star", output_type="latent", **arguments | {"generator": seeded(1)})[0]
    networks_own = model.backbone_class.from_output(networks_own, model.size, model.backbone_class.encoders_type(pipe))
    assert_close(seen[0], networks_own, rtol=0, atol=1e-6)
    assert seen[1].ndim == 5 and torch.equal(seen[1].flatten(), seen[0].flatten())
    assert drawn.shape == (3, *model.pixel_size(model.size))
    stock = 2 * (stock.transpose(0, 1) if model.backbone_class.video else stock) - 1
    assert_close(drawn, stock, rtol=0, atol=1e-5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_compiling_the_coders_compiles_a_step_of_it(
    models: dict[str, Pretrained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is replaced by one that counts the calls of what it was given."""
    calls: Counter[str] = Counter()

    def counting(function: Any, **options: Any) -> Any:
        owner = type(function.__self__).__name__
        return lambda *args, **kwargs: (calls.update([owner]), function(*args, **kwargs))[1]

    model = models["wan"]
    file = str(tiny_video_files.save(tmp_path / "a.safetensors", **WAN21))
    plain = build_pipeline(model, cfg=DrawingOptions(tiny_vae=file))
    monkeypatch.setattr(torch, "compile", counting)
    compiled = build_pipeline(model, cfg=DrawingOptions(tiny_vae=file, compile="whole", compile_coders=True))
    model.teacher_steps = 1
    requests = [Request("a red star", 1)]
    drawn = [draw(pipe, model, requests, show_sizes=False)[0][0] for pipe in (plain, compiled)]
    assert torch.equal(*drawn) and calls["TinyVideoDecoder"] == model.size[0] == 3
