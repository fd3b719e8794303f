"""Wan2.2 TI2V-5B where it differs from Wan2.1: a timestep a token in the stock pipeline, 48 channels at 16x."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer
from tiny import composed
from torch import Tensor
from torch.testing import assert_close

from swd.commands import encode, generate, sample
from swd.data.iterations import Iterations
from swd.data.shards import ShardSet
from swd.data.webdataset import ShardData
from swd.export import student_folder, verification
from swd.io import video
from swd.losses import DMD, GAN, MMD
from swd.modules.adapters import Adapter
from swd.modules.distiller import Distiller
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.sampling import sample_latents
from swd.schedule import ScaleSchedule
from swd.types import PictureBatch, UserError

NAME = "wan22_5b"
SIZES = families.SIZES[NAME]
PROMPTS = ["a red star", "a large blue ring above a small heart"]
PIXELS = (9, 64, 96)
"""Of the last size: frames, height, width."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(NAME, tmp_path_factory.mktemp(NAME) / "pipeline")


@pytest.fixture(scope="module")
def model(folder: Path) -> Pretrained:
    return families.pretrained(NAME, folder)


def noise(size: Any) -> Tensor:
    return torch.randn(2, families.CHANNELS[NAME], *size, generator=torch.Generator().manual_seed(0))


def randomised(model: Pretrained, *roles: Any) -> SharedBase:
    networks = model.networks(roles or ("student",))
    assert isinstance(networks, SharedBase)
    generator = torch.Generator().manual_seed(5)
    for role in networks.roles:
        for parameter in networks.role_parameters(role):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return networks


def schedule(model: Pretrained) -> Any:
    return families.scheduler(NAME, model)


def test_sizes_are_those_of_its_vae(model: Pretrained) -> None:
    assert (model.channels, model.factor, model.frame_factor) == (48, 16, 4)
    assert model.pixel_size((3, 4, 6)) == PIXELS and model.latent_size(PIXELS) == (3, 4, 6)
    assert model.limits.native == (31, 44, 80) and model.frame_rate == 24
    with pytest.raises(UserError, match="3 is not divisible by 2"):
        model.limits.check_size((3, 3, 4))
    with pytest.raises(
        UserError, match=r"expand_timesteps, which model\.family=wan .*; model=wan22_5b fits this folder"
    ):
        families.pretrained("wan", model.folder)


def test_latents_have_the_statistics_of_its_vae(model: Pretrained) -> None:
    encoders = model.encoders()
    pixels = torch.rand(2, 3, *PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, std = encoders.distribution(pixels)
    with torch.no_grad():
        own = encoders.vae.encode(pixels).latent_dist
        assert encoders.vae.dtype == torch.float32
    config = encoders.vae.config
    mean, scale = (torch.tensor(v).view(1, 48, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    assert found.shape == (2, 48, 3, 4, 6)
    assert_close(found, (own.mean - mean) / scale, rtol=1e-4, atol=1e-5)
    assert_close(std, own.std / scale, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(encoders.decode(found), encoders.vae.decode(own.mean).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4)


def test_features_gradients_and_checkpointing(model: Pretrained) -> None:
    """An early exit gives the whole pass's features; recomputing changes no prediction, feature or gradient."""
    x, sigma = noise(SIZES[-1]), torch.tensor([0.9, 0.6])
    text = model.backbone_class.random_conditioning(model.network_config, 2, 7)
    found = []
    for checkpointing in (False, True):
        networks = randomised(model)
        if checkpointing:
            networks.enable_checkpointing()
        networks.train()
        x0, features = networks.x0("student", x, sigma, text, (1,))
        assert x0.shape == x.shape and features[0].shape == (2, 3 * 2 * 3, 24)
        assert torch.equal(networks.features("student", x, sigma, text, (1,))[0], features[0])
        (x0.square().mean() + features[0].square().mean()).backward()
        gradients = [p.grad for p in networks.role_parameters("student") if p.grad is not None]
        found.append([x0, features[0], *gradients])
    assert len(found[0]) == len(found[1]) > 8 and all(map(torch.equal, *found))


@pytest.mark.parametrize("size", [tuple(SIZES[-1]), families.NON_SQUARE[NAME]])
def test_the_stock_pipeline_draws_what_training_draws(model: Pretrained, size: Any) -> None:
    """Sizes grow from step to step, and with them the number of tokens that the pipeline makes timesteps for."""
    networks = randomised(model)
    pipe = sample.build_pipeline(model, Adapter(networks.adapter_state("student"), Path("none")), schedule(model))
    assert pipe.config.expand_timesteps
    requests = [sample.Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    shapes: list[tuple[int, ...]] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["timestep"].shape)), with_kwargs=True
    )
    final, steps = sample.draw(pipe, model, requests, size)
    assert shapes == [(2,)] * 3

    sampler, encoders = schedule(model), model.encoders()
    generators = [torch.Generator().manual_seed(request.seed) for request in requests]
    start = sampler.initial_latents(2, model.channels, size[1], size[2], size[0], generators)
    clean = sample_latents(networks, sampler, start, encoders.encode_prompts(PROMPTS, size))
    assert tuple(clean.shape[2:]) == size and len(steps) == 3
    assert_close(torch.stack(final), encoders.decode(clean), rtol=1e-3, atol=1e-3)


def test_timesteps_that_differ_between_tokens_are_left_alone(model: Pretrained) -> None:
    """As those of a pipeline that starts from a picture; and those of calls beside a sampling."""
    pipe = sample.build_pipeline(model)
    scheduler = schedule(model)
    scheduler.attach(pipe)
    seen: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    text = model.backbone_class.random_conditioning(model.network_config, 2, 7).embeds
    time = torch.full((2, 6), 900.0)
    given = time.clone()
    given[:, 0] = 0.0
    predictions = []
    for in_call, each in ((True, given), (True, time), (False, time)):
        scheduler._in_call = in_call
        with torch.no_grad():
            fed = {"hidden_states": noise((1, 4, 6)), "timestep": each, "encoder_hidden_states": text}
            predictions.append(pipe.transformer(**fed).sample)
    assert torch.equal(seen[0], given) and torch.equal(seen[1], time[:, 0]) and torch.equal(seen[2], time)
    assert_close(predictions[1], predictions[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[0], predictions[1], atol=1e-3)


@pytest.mark.parametrize("guidance", [1.0, 9.0])
def test_dmds_guided_prediction_is_the_stock_pipelines(model: Pretrained, guidance: float) -> None:
    """At every step of the stock pipeline's own sampler, which feeds one timestep a token."""
    teacher = families.pretrained(NAME, model.folder, drawing_guidance_scale=guidance, teacher_steps=3)
    pipe = sample.build_pipeline(teacher)
    seen: list[tuple[Tensor, float, Tensor]] = []
    original = pipe.scheduler.step

    def watched(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((prediction.clone(), float(timestep), sample.clone()))
        return original(prediction, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    size = families.NON_SQUARE[NAME]
    sample.draw(pipe, teacher, [sample.Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)], size)
    task = Distiller(teacher, ScaleSchedule([1.0], [size]), {"mmd": MMD(blocks=[0])})
    task.configure_model()
    text = task.encode_prompts(PROMPTS)
    assert len(seen) == 3
    for prediction, timestep, x_t in seen:
        sigma = torch.full((2,), timestep / 1000)
        with torch.no_grad():
            ours = task.networks.guided_x0(x_t, sigma, text, task.empty, guidance)
        assert_close(ours, teacher.backbone_class.process.to_x0(x_t, prediction, sigma), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_two_iterations_of_all_losses_train_the_student(folder: Path, precision: str, tmp_path: Path) -> None:
    model = families.pretrained(NAME, folder, precision=precision)
    losses = {"dmd": DMD(guidance_scale=2.0), "mmd": MMD(blocks=[0]), "gan": GAN(blocks=[0])}
    task = Distiller(model, ScaleSchedule(families.SIGMAS, SIZES), losses, critic_updates=1, lr=1e-3)
    task.configure_model()
    before = {key: p.detach().clone() for key, p in task.named_parameters()}
    pixels = [torch.rand(2, 3, *PIXELS, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(4)]
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(task, Iterations([PictureBatch(each, prompts=PROMPTS) for each in pixels], 2))
    assert {"dmd", "mmd", "gan"} <= set(task.last_metrics)
    assert all(value.isfinite() for value in task.last_metrics.values())
    changed = {key for key, p in task.named_parameters() if not torch.equal(p, before[key])}
    assert changed <= {key for key, p in task.named_parameters() if p.requires_grad}
    assert all(any(part in key for key in changed) for part in ("student", "fake", "head"))
    pictures, steps = task.sample(PROMPTS, [1, 2], keep_x0=True)
    assert tuple(pictures.shape) == (2, 3, *PIXELS) and pictures.isfinite().all() and len(steps) == 3


def test_export_loads_everywhere_and_its_snippet_draws_the_same(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter loads the folder with diffusers, peft and as ComfyUI; the card's code then draws with it."""
    student = Adapter(families.random_state(model), tmp_path / "x")
    made = student_folder.export(student, model, schedule(model), tmp_path / "made")
    assert (made / verification.COMFY_WEIGHTS).is_file()
    text = (made / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    for old, new in {"FOLDER": made, "BASE": model.folder, "cuda": "cpu", "bfloat16": "float32"}.items():
        code = code.replace(old, str(new))
    monkeypatch.syspath_prepend(str(made))
    names: dict[str, Any] = {}
    exec(code, names)
    pipe = sample.build_pipeline(model, student, schedule(model))
    ours = sample.draw(pipe, model, [sample.Request("a prompt", 0)])[0][0]
    drawn = torch.from_numpy(names["frames"]).movedim(-1, 0)
    assert drawn.std() > 0.02 and drawn.shape == (3, *PIXELS)
    assert_close(drawn, (ours + 1) / 2, rtol=0, atol=1e-3)


def options(folder: Path, *more: str) -> list[str]:
    return [
        "model=wan22_5b",
        f"model.path={folder}",
        "model.precision=fp32",
        "model.size=[3,4,6]",
        "model.feature_blocks=[0]",
        "model.max_text_tokens=24",
        *more,
    ]


def test_generate_draws_with_the_published_settings_and_encode_caches_it(
    folder: Path, model: Pretrained, tmp_path: Path
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,seed\na red star,3\n")
    given = [f"prompts={tmp_path / 'prompts.csv'}", f"out={tmp_path / 'drawn'}"]
    plan = generate.prepare(composed(options(folder, *given), "generate"))
    told = plan.job.settings
    assert (told["steps"], told["guidance_scale"], told["files"]["fps"]) == (50, 5.0, 24)
    assert told["model"]["negative_prompt"].startswith("色调艳丽") and plan.size == (3, 4, 6)
    generate.run(composed(options(folder, *given, "steps=2"), "generate"))
    pipe = model.pipeline()
    stock = pipe(
        prompt=PROMPTS[0],
        negative_prompt=told["model"]["negative_prompt"],
        num_frames=PIXELS[0],
        height=PIXELS[1],
        width=PIXELS[2],
        num_inference_steps=2,
        guidance_scale=5.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    expected = video.write(tmp_path / "a.mp4", torch.from_numpy(stock).permute(3, 0, 1, 2) * 2 - 1, 24).read_bytes()
    drawn = ShardSet(str(tmp_path / "drawn")).read(0, ["mp4"])["mp4"].tobytes()
    assert drawn == expected

    sizes = str(SIZES).replace(" ", "")
    data = ["data=webdataset", f"data.path={tmp_path / 'drawn'}", "data.size=[9,64,96]", "data.workers=0"]
    data += [f"out={tmp_path / 'cache'}", f"schedule.sigmas={families.SIGMAS}".replace(" ", "")]
    encode.run(composed(options(folder, *data, f"schedule.sizes={sizes}", "precision=fp32"), "encode"))
    cache = ShardData(str(tmp_path / "cache"), batch_size=1)
    cache.check(model, ScaleSchedule(families.SIGMAS, SIZES))
    source: Any = cache.source
    cached = source.collate([source[0, 2]]).cached.posteriors
    (tmp_path / "b.mp4").write_bytes(drawn)
    mean, _ = model.encoders().distribution(video.read(tmp_path / "b.mp4")[None])
    assert set(cached) == {(2, 4, 4), (3, 4, 6)}  # what the last step needs
    assert_close(cached[3, 4, 6][0], mean, rtol=1e-4, atol=1e-4)


def test_a_distilled_model_is_no_teacher(model: Pretrained, tmp_path: Path) -> None:
    copy = shutil.copytree(model.folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    with pytest.raises(UserError, match=r"was distilled to few steps already \(is_distilled in its model_index.json\)"):
        families.pretrained(NAME, copy)
    (copy / "model_index.json").write_text(json.dumps(index | {"is_distilled": False}))
    assert families.pretrained(NAME, copy).family == "wan_5b"
