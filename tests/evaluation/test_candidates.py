"""Names of rows, folders of pictures, and steps at given noise levels."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from swd.evaluation.candidate_pictures import CandidatePainter, check_levels
from swd.evaluation.candidates import DrawingModel, given_pictures
from swd.evaluation.entries import check_row_names, name_of
from swd.evaluation.plan import Plan, chunks_of, mine
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests
from swd.types import UserError

ROWS = [("a red star", None), ("a green circle", None), ("two rings", 9)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("teacher", "teacher"),
        ("yresearch/swd-large-4-steps", "swd-large-4-steps"),
        ("outputs/shapes-swd/2026-01-31_12-00-00", "shapes-swd_2026-01-31_12-00-00"),
        ("outputs/mine/adapter", "mine_adapter"),
        ("lora/x.safetensors", "x"),
        ("my pictures/", "my-pictures"),
        ("../..", "model"),
    ],
)
def test_the_name_of_a_row_that_is_given_none(source: str, name: str) -> None:
    assert name_of(source) == name
    check_row_names([name])


@pytest.mark.parametrize("name", ["", "_reference", "a/b", "..", "a b", "é", "x" * 101])
def test_names_are_names_of_folders(name: str) -> None:
    with pytest.raises(UserError, match="is no name of a row"):
        check_row_names([name])


def test_a_list_says_which_file_is_of_which_row(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "index.csv").write_text("index,file,seed\n2,a.png,9\n0,b.png,\n1,c.png,1\n7,z.png,7\n")
    found = given_pictures("theirs", str(tmp_path), Requests(ROWS, 1, 0))
    assert [file.name for file in found.files] == ["b.png", "c.png", "a.png"]
    with pytest.raises(UserError, match="row 1 has seed 1, and here it is 5"):
        given_pictures("theirs", str(tmp_path), Requests(ROWS, 1, 4))


def test_a_changed_picture_changes_the_identity(tmp_path: Path) -> None:
    for row in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{row}.png")
    requests = Requests(ROWS, 1, 0)
    before = given_pictures("theirs", str(tmp_path), requests).settings()
    assert given_pictures("other", str(tmp_path), requests).settings() == before
    os.utime(tmp_path / "1.png", ns=(0, 0))
    assert given_pictures("theirs", str(tmp_path), requests).settings() != before
    (tmp_path / "01.png").write_bytes((tmp_path / "1.png").read_bytes())
    with pytest.raises(UserError, match="are both of row 1"):
        given_pictures("theirs", str(tmp_path), requests)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_chunk_belongs_to_one_process(world: int) -> None:
    chunks = chunks_of(11, 2)
    assert [row for rows in chunks for row in rows] == list(range(11))
    found = [each for rank in range(world) for each in mine(chunks, (rank, world))]
    assert sorted(found, key=lambda each: each[0]) == list(enumerate(chunks))


def test_a_teacher_at_given_levels_takes_guided_euler_steps_there(tiny_model: Path, tmp_path: Path) -> None:
    model = Pretrained(
        "sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12,
        drawing_guidance_scale=2.0, teacher_steps=3,
    )  # fmt: skip
    candidate = DrawingModel("few", "teacher", model, None, None, (8, 8), 3, tiny.SIGMAS)
    plan = Plan(tmp_path, "p", Requests(ROWS[:2], 1, 3), (candidate,), 2, 2)
    drawn = torch.stack(CandidatePainter(plan, candidate).draw(range(2)))

    networks, encoders = model.networks(["student"]), model.encoders()
    text, empty = (encoders.encode_prompts(texts) for texts in (["a red star", "a green circle"], [""]))
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    with torch.no_grad():
        for sigma, below in itertools.pairwise([*tiny.SIGMAS, 0.0]):
            x0 = networks.guided_x0(x, torch.full((2,), sigma), text, empty, 2.0)
            x = x + (below - sigma) * (x - x0) / sigma
    torch.testing.assert_close(drawn, encoders.decode(x), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="use falling numbers"):
        check_levels("few", [0.5, 0.5], model)
