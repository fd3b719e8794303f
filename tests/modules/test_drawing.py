"""What the teacher is guided away from when it draws."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from torch import Tensor

from swd.modules.drawing import build_pipeline, draw
from swd.modules.requests import Request
from swd.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("wan", tmp_path_factory.mktemp("wan") / "pipeline")


def test_a_negative_prompt_takes_the_place_of_the_empty_one(folder: Path) -> None:
    def drawn(negative: str | None) -> Tensor:
        model = families.pretrained("wan", folder, teacher_steps=2, negative_prompt=negative)
        requests = [Request("a red star", 1), Request("a blue ring", 2)]
        return torch.stack(draw(build_pipeline(model), model, requests, show_sizes=False)[0])

    plain = drawn(None)
    assert torch.equal(plain, drawn("")) and not torch.allclose(plain, drawn("a large green heart"), atol=1e-4)


def test_without_guidance_a_negative_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.negative_prompt has no effect where model\.drawing_guidance"):
        families.pretrained("wan", folder, negative_prompt="blurred", drawing_guidance_scale=1.0)


def test_prompts_stay_as_they_are_though_a_pipeline_overwrites_its_list(tmp_path: Path) -> None:
    """Z-Image's puts its chat template around them, in place: twice with the same list would be two templates."""
    model = families.pretrained("z_image", families.save("z_image", tmp_path / "z_image"), teacher_steps=1)
    pipe, requests = build_pipeline(model), [Request("a red star", 1), Request("a blue ring", 2)]
    prompts = [request.prompt for request in requests]
    pipe.encode_prompt(given := list(prompts))
    assert given != prompts
    encoders = model.encoders()
    first = encoders.text(prompts)
    assert prompts == [request.prompt for request in requests]
    assert torch.equal(encoders.text(prompts).embeds, first.embeds)
    drawn = [torch.stack(draw(pipe, model, requests, show_sizes=False)[0]) for _ in range(2)]
    assert torch.equal(*drawn) and [request.prompt for request in requests] == prompts


def test_a_pipeline_is_called_with_the_size_that_it_takes(tmp_path: Path) -> None:
    sizes = {"z_image": {"height": 32, "width": 48}, "sdxl": {"height": 64, "width": 96}}
    for name, expected in sizes.items():
        model = families.pretrained(name, families.save(name, tmp_path / name))
        assert model.size_arguments((4, 6), (8, 12)) == expected
    model = families.pretrained("wan", families.save("wan", tmp_path / "wan"))
    assert model.size_arguments((1, 4, 4), (3, 8, 8)) == {"height": 64, "width": 64, "num_frames": 9}
