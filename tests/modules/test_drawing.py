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
