"""`swd sample start=...`: a model draws on from noised pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from omegaconf import DictConfig
from PIL import Image

from swd.commands import sample
from swd.diffusion import rectified_flow_table
from swd.evaluation.candidates import given_pictures
from swd.io.pictures import to_pil
from swd.modules.drawing import build_pipeline
from swd.modules.requests import Requests, read_prompts
from swd.shapes.rendered import prompts_of
from swd.types import UserError

CAPTIONS = ["a red star above a blue ring", "a green circle", "a white heart"]


@pytest.fixture(scope="module")
def student(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A student's networks and the folder of its adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model, networks = tiny.save_trained_student(tiny_model, folder)
    return model, networks, folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout; one of its rows names a file that is not there."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    lines = ["index,file,caption"]
    for i, caption in enumerate(CAPTIONS):
        if i != 1:
            to_pil(2 * torch.rand(3, 64, 64, generator=generator) - 1).save(folder / f"{i}.png")
        lines.append(f"{i},{i}.png,{caption}")
    (folder / "metainfo.csv").write_text("\n".join(lines))
    return folder


def config(model: Path, folder: Path, **more: Any) -> DictConfig:
    return tiny.composed(tiny.drawing(model, folder, model__max_text_tokens=12, **more), "sample")


@torch.no_grad()
def test_a_student_draws_on_by_the_rest_of_its_schedule(student: Any, pictures: Path, tmp_path: Path, capfd) -> None:
    model, networks, adapter = student
    cfg = config(model.folder, tmp_path / "out", adapter=adapter, start=pictures, level=0.6, **{"from": 6}, seed=4)
    sample.run(cfg)
    assert "1 of 3 rows are left out: 1 missing" in capfd.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out" / "index.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"], row["start"]) for row in rows] == [
        (CAPTIONS[0], 4, "0.png"),
        (CAPTIONS[2], 5, "2.png"),
    ]

    # One step is left, so the picture is the student's prediction from the noised latent.
    job = sample.prepare(
        config(model.folder, tmp_path, adapter=adapter, start=pictures, level=0.603, **{"from": 6}, seed=4)
    )
    assert job.start is not None and job.schedule is not None
    assert (job.schedule.config.sigmas, job.schedule.base_sizes) == ([0.6], [(8, 8)])
    assert (job.start.noised.level, job.start.noised.source, job.start.noised.target) == (0.6, (6, 6), (8, 8))
    x_t = job.start.latents(build_pipeline(model), model, 0, job.requests)
    encoders = model.encoders()
    with networks.role("student"):
        velocity, _ = networks.backbone_of("student").predict(
            x_t, torch.full((2,), 0.6), encoders.encode_prompts([CAPTIONS[0], CAPTIONS[2]])
        )
    for row, expected in zip(rows, encoders.decode(x_t - 0.6 * velocity), strict=True):
        with Image.open(tmp_path / "out" / row["file"]) as drawn:
            assert pixels_apart(drawn, to_pil(expected)) <= 1


def pixels_apart(a: Image.Image, b: Image.Image) -> int:
    x, y = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (a, b))
    return int((x - y).abs().max())


def test_the_teacher_takes_its_own_steps_below_the_level(student: Any, pictures: Path, tmp_path: Path) -> None:
    model, _, _ = student
    more = {"adapter": None, "start": pictures, "level": 0.6, "from": 4, "upsample": "noisy", "n": 2}
    cfg = config(model.folder, tmp_path / "out", images_per_prompt=2, **more)
    job = sample.prepare(cfg)
    table = rectified_flow_table().tolist()
    assert job.start is not None and job.start.levels == (0.6, *table[19:28])
    sample.run(cfg)

    # `swd evaluate` finds prompts, seeds and files in the list.
    index = tmp_path / "out" / "index.jsonl"
    rows = read_prompts(index, "prompts")
    assert rows == [(CAPTIONS[0], 0), (CAPTIONS[0], 1), (CAPTIONS[2], 2), (CAPTIONS[2], 3)]
    found = given_pictures("drawn", str(tmp_path / "out"), Requests(rows, 1, 0))
    assert [file.name for file in found.files][1] == "a-red-star-above-a-blue-ring_seed1.png"
    with Image.open(found.files[0]) as first:
        assert (first.text["start_level"], first.text["start_from"], first.text["start_upsample"]) == (
            "0.6",
            "[4, 4]",
            "noisy",
        )
    with pytest.raises(UserError, match=r"index\.jsonl exists already"):
        sample.run(cfg)


def test_held_out_shapes_have_the_captions_of_an_evaluation(tmp_path: Path) -> None:
    cfg = tiny.composed([f"folder={tmp_path}", "adapter=null", "start=shapes", "n=3", "level=0.6", "from=8"], "sample")
    job = sample.prepare(cfg)
    assert [request.prompt for request in job.requests] == prompts_of(3) and job.start is not None
    assert job.start.pictures.read(2, (128, 128)).shape == (3, 128, 128)
    assert (job.start.noised.source, job.start.noised.target) == ((8, 8), (16, 16))


GOOD = {"level": 0.6, "from": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": None}, "needs level; give level=0.6"),
        ({"from": None}, "needs from; give from=4"),
        ({"level": 1.0}, "level=1.0; use a number between 0"),
        ({"level": 0}, "level=0; use a number between 0"),
        ({"level": 0.7}, "level=0.7 is none of the student's: 0.8, 0.6; use one of them"),
        ({"from": 9}, "from=9: pictures are enlarged from it to 8"),
        ({"from": 8, "level": 0.8}, "from=8: pictures are enlarged from it to 6"),
        ({"from": 0}, "from=0: pictures are enlarged .* use at least 1 and at most that"),
        ({"from": "[4,6]"}, r"from=\[4, 6\] would squash pictures of 8 .* use from='\[4, 4\]'"),
        ({"from": "[4,4,4]"}, r"from=\[4, 4, 4\]: pictures are enlarged"),
        ({"n": 3}, "n=3, but start=.* has 2 captioned pictures"),
        ({"n": 0}, "n=0; use at least 1"),
        ({"start": "nowhere"}, "start=nowhere does not exist"),
        ({"start": "shapes", "n": None}, "start=shapes draws as many .* give n=NUMBER"),
        ({"start": "shapes", "n": 2}, "start=shapes has pictures of 128x128"),
        ({"start": None}, "level=0.6 is of pictures to start from; give start=FOLDER"),
        ({"start": None, "level": None, "from": None, "upsample": "noisy"}, "upsample=noisy is of pictures"),
        ({"prompts_file": "p.txt"}, "prompts_file beside start=.* remove prompts_file"),
        ({"upsample": "both"}, "upsample='both' is not valid"),
    ],
)
def test_wrong_settings_are_refused(student: Any, pictures: Path, tmp_path: Path, change: dict, message: str) -> None:
    model, _, adapter = student
    with pytest.raises(UserError, match=message) as caught:
        sample.prepare(config(model.folder, tmp_path, **{"adapter": adapter, "start": pictures} | GOOD | change))
    assert "\n" not in str(caught.value)


def test_a_small_picture_is_not_enlarged(student: Any, tmp_path: Path) -> None:
    model, _, adapter = student
    Image.new("RGB", (48, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red star")
    cfg = config(model.folder, tmp_path / "out", adapter=adapter, start=tmp_path, **GOOD)
    with pytest.raises(UserError, match=r"start=.*: a\.png is 48x64, smaller than 64x64"):
        sample.run(cfg)
