"""`sample.py`: a run's student through the stock pipeline, bit for bit the sampler used in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from hydra.utils import instantiate
from PIL import Image

from swd import sample
from swd.adapters import check_fits, load, save_adapter
from swd.modules.pretrained import Pretrained
from swd.sampling import initial_latents, sample_latents
from swd.types import UserError

PROMPTS = ["a red star above a blue ring", "a green circle"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A model, networks with a non-zero student, and the student's adapter folder."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12)
    networks = model.networks(["student"])
    generator = torch.Generator().manual_seed(5)
    for parameter in networks.role_parameters("student"):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    state = networks.adapter_state("student")
    save_adapter(folder, state, 4, 4, tiny.build_schedule().scheduler(2), "tiny", "transformer")
    return model, networks, folder


def config(model: Pretrained, adapter: Path, folder: Path, **more: object):
    arguments = tiny.overrides(model.folder, folder, model__max_text_tokens=12, adapter=adapter, **more)
    cfg = tiny.composed(arguments, "sample")
    cfg.prompts = PROMPTS
    return cfg


def test_equals_the_training_sampler_bit_for_bit(made) -> None:
    model, networks, folder = made
    scheduler = tiny.build_schedule().scheduler(2)
    scheduler.keep_x0 = True
    encoders = model.encoders()
    latents = initial_latents([3, 4], model.channels, scheduler.base_sizes[0])
    latents = sample_latents(networks, scheduler, latents, encoders.encode_prompts(PROMPTS))

    pipe = sample.build_pipeline(model, load(folder), tiny.build_schedule().scheduler(2))
    requests = [sample.Request(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)]
    final, sizes = sample.draw(pipe, model, requests)
    assert torch.equal(torch.stack(final), encoders.decode(latents))
    assert torch.equal(torch.stack(sizes[0]), encoders.decode(scheduler.x0_predictions[0]))
    assert torch.equal(pipe.scheduler.x0_predictions[-1], latents)


def test_the_first_size_as_height_and_width_gives_the_same(made) -> None:
    """The short recipe of the README: no `latents`, the pipeline draws the noise itself."""
    model, _, folder = made
    pipe = sample.build_pipeline(model, load(folder), tiny.build_schedule().scheduler(2))
    final, _ = sample.draw(pipe, model, [sample.Request(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)])
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    side = 8 * tiny.SIZES[0]
    images = pipe(
        PROMPTS,
        height=side,
        width=side,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=12,
        generator=generators,
        output_type="pt",
    ).images
    torch.testing.assert_close(images * 2 - 1, torch.stack(final), rtol=0, atol=1e-6)  # it goes through [0, 1]


def test_run_writes_every_size_with_its_origin_and_never_overwrites(made, tmp_path: Path) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out", show_sizes="true", seed=3)
    sample.run(cfg)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert len(names) == 2 * (1 + len(tiny.SIZES))
    with Image.open(tmp_path / "out" / "a-red-star-above-a-blue-ring_seed3.png") as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == PROMPTS[0] and image.info["seed"] == "3"
    with Image.open(tmp_path / "out" / "a-green-circle_seed4_step1_32x32.png") as image:
        assert image.size == (32, 32)
    with pytest.raises(UserError, match="exists already"):
        sample.run(cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "holds nothing to draw"),
        ({"prompts": ["  "]}, "holds nothing to draw"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"adapter": "nowhere"}, "does not exist"),
        ({"seed": "x"}, "expected an integer"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(made, tmp_path: Path, change, message: str) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out")
    cfg.update(change)
    with pytest.raises(UserError, match=message):
        sample.run(cfg)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_network_is_refused(made, tmp_path: Path) -> None:
    model, networks, _ = made
    state = {k: torch.cat([v, v], 1) if ".lora_A." in k else v for k, v in networks.adapter_state("student").items()}
    adapter = save_adapter(tmp_path / "a", state, 4, 4, tiny.build_schedule().scheduler(2), "wider", "transformer")
    with pytest.raises(UserError, match=r"made for wider\) does not fit model tiny-sd3"):
        check_fits(load(adapter), model)


def test_without_an_adapter_the_teacher_draws(made) -> None:
    model = made[0]
    model.teacher_steps = 2
    pipe = sample.build_pipeline(model, None)
    images, sizes = sample.draw(pipe, model, [sample.Request("a red star", 0)])
    assert images[0].shape == (3, 64, 64) and sizes == []


def test_embedded_teacher_is_configured() -> None:
    model: Pretrained = instantiate(tiny.composed([], "sample").model, _convert_="all")
    assert (model.size, model.channels, model.limits.blocks) == ((16, 16), 16, 6)


# What can be asked for


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "a red star\n\n a ring \n", [("a red star", 5), ("a ring", 6)]),
        ("a.csv", 'seed,prompt\n3,"a star, red"\n,a ring\n', [("a star, red", 3), ("a ring", 6)]),
    ],
)
def test_prompts_from_a_file(made, tmp_path: Path, name: str, text: str, expected: list) -> None:
    (tmp_path / name).write_text(text)
    cfg = config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / name, seed=5)
    assert [(r.prompt, r.seed) for r in sample.plan(cfg)] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "caption\na star\n", "one must be called prompt"),
        ("a.csv", "prompt,seed\na star,x\n", "line 2: seed 'x'"),
        ("a.txt", "\n", "holds no prompt"),
    ],
)
def test_wrong_prompt_files_are_named(made, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        sample.plan(config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        sample.plan(config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("asked", "size"),
    [({}, (8, 8)), ({"height": 96}, (12, 8)), ({"height": 96, "width": 48}, (12, 6)), ({"aspect": "9:4"}, (6, 12))],
)
def test_final_size(made, tmp_path: Path, asked: dict, size: tuple[int, int]) -> None:
    assert sample.final_size(config(made[0], made[2], tmp_path, **asked), made[0]) == size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 100}, "height=100 is not a multiple of 16 pixels; use 96"),
        ({"aspect": "wide"}, "give WIDTH:HEIGHT"),
        ({"aspect": "1:1", "width": 64}, "one or the other"),
        ({"height": 1600}, "beyond the positional limit 12"),
        ({"frames": 5}, "draws pictures"),
    ],
)
def test_wrong_sizes_are_refused(made, tmp_path: Path, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample.final_size(config(made[0], made[2], tmp_path, **asked), made[0])


def test_two_pictures_never_share_a_name(made, tmp_path: Path) -> None:
    cfg = config(made[0], made[2], tmp_path / "out")
    cfg.prompts = ["a star", "A star!"]
    (tmp_path / "p.csv").write_text("prompt,seed\na star,1\nA star!,1\n")
    cfg.prompts_file = str(tmp_path / "p.csv")
    with pytest.raises(UserError, match="two requests would be called a-star_seed1"):
        sample.run(cfg)
