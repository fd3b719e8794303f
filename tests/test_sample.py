"""`sample.py`: a run's student through the stock pipeline, bit for bit the sampler used in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hydra.utils import instantiate
from PIL import Image

from swd import sample
from swd.export import save_adapter
from swd.images import to_pil
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
    expected = [to_pil(x) for x in encoders.decode(latents)]
    expected_first = [to_pil(x) for x in encoders.decode(scheduler.x0_predictions[0])]

    pipe = sample.build_pipeline(model, folder)
    requests = [sample.Request(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)]
    final, sizes = sample.draw(pipe, model, requests)
    assert torch.equal(torch.stack(sizes_of(final)), torch.stack(sizes_of(expected)))
    assert torch.equal(torch.stack(sizes_of(sizes[0])), torch.stack(sizes_of(expected_first)))
    assert torch.equal(pipe.scheduler.x0_predictions[-1], latents)


def sizes_of(images: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(image).copy()) for image in images]


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
        sample.build_pipeline(model, adapter)


def test_without_an_adapter_the_teacher_draws(made) -> None:
    model = made[0]
    model.teacher_steps = 2
    pipe = sample.build_pipeline(model, None)
    images, sizes = sample.draw(pipe, model, [sample.Request("a red star", 0)])
    assert images[0].size == (64, 64) and sizes == []


def test_embedded_teacher_is_configured() -> None:
    model: Pretrained = instantiate(tiny.composed([], "sample").model, _convert_="all")
    assert (model.native_size, model.channels, model.limits.blocks) == (16, 16, 6)
