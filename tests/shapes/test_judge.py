"""The judge and how it scores pictures against captions."""

from pathlib import Path

import pytest
import torch

from swd.shapes.dataset import Object, Prompt, ShapesDataset, parse_caption
from swd.shapes.judge import Judge, Reading, prompt_accuracy, score_reading, summarise

ASSET = Path(__file__).parents[2] / "assets" / "shapes-judge"
STAR, RING = Object("star", "red", "small", 1, 0), Object("ring", "blue", "large", 1, 1)
PROMPT = parse_caption("a small red star left of a blue ring on a gray background")


def accuracy(prompt: Prompt, *objects: Object, background: str = "gray") -> dict[str, float]:
    return summarise([score_reading(prompt, Reading(objects, background))])


def test_a_right_picture_scores_one_in_any_order() -> None:
    for objects in ((STAR, RING), (RING, STAR)):
        result = accuracy(PROMPT, *objects)
        assert set(result.values()) == {1.0}
        assert set(result) == {"shape", "colour", "size", "relation", "background", "count", "mean", "exact_match"}


@pytest.mark.parametrize(
    ("objects", "background", "wrong", "share"),
    [
        ((Object("heart", "red", "small", 1, 0), RING), "gray", "shape", 0.5),
        ((Object("star", "pink", "small", 1, 0), RING), "gray", "colour", 0.5),
        ((Object("star", "red", "large", 1, 0), RING), "gray", "size", 0.0),
        ((Object("star", "red", "small", 0, 0), RING), "gray", "relation", 0.0),
        ((STAR, RING), "navy", "background", 0.0),
        ((STAR, RING, Object("heart", "red", "small", 0, 0)), "gray", "count", 0.0),
    ],
)
def test_each_wrong_attribute_is_found(objects: tuple[Object, ...], background: str, wrong: str, share: float) -> None:
    result = accuracy(PROMPT, *objects, background=background)
    assert result.pop("exact_match") == 0
    assert result.pop("mean") == pytest.approx((5 + share) / 6)
    assert {name: value for name, value in result.items() if value != 1} == {wrong: share}


def test_a_missing_object_fails_all_that_is_said_about_it() -> None:
    result = accuracy(PROMPT, STAR)
    assert (result["shape"], result["colour"], result["relation"], result["count"]) == (0.5, 0.5, 0, 0)
    assert result["size"] == 1
    assert accuracy(PROMPT)["shape"] == 0


def test_only_what_the_caption_names_is_scored() -> None:
    prompt = parse_caption("a star and a ring")
    assert set(accuracy(prompt, STAR, RING, background="sand")) == {"shape", "count", "mean", "exact_match"}


def test_same_shapes_are_matched_by_the_relation() -> None:
    prompt = parse_caption("a star left of a star and above a star")
    corner, right, below = (Object("star", "red", "small", *cell) for cell in ((0, 0), (0, 1), (1, 0)))
    assert accuracy(prompt, below, right, corner)["exact_match"] == 1
    assert accuracy(prompt, corner, right)["relation"] == 0.5  # nothing below


def test_wrong_input_is_named() -> None:
    judge = Judge()
    with pytest.raises(ValueError, match=r"\[B, 3, 128, 128\], got \(1, 3, 64, 64\)"):
        judge(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="1 pictures but 2 prompts"):
        prompt_accuracy(judge, torch.zeros(1, 3, 128, 128), ["a star", "a ring"])
    with pytest.raises(ValueError, match="cannot read the caption"):
        prompt_accuracy(judge, torch.zeros(1, 3, 128, 128), ["a dog"])
    with pytest.raises(ValueError, match="experiment=shapes_judge"):
        Judge.from_pretrained("nowhere")


def test_a_judge_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    judge = Judge(widths=(8, 8, 16), features=12).eval()
    judge.save_pretrained(tmp_path)
    again = Judge.from_pretrained(tmp_path)
    pixels = torch.rand(2, 3, 128, 128) * 2 - 1
    for name, logits in judge(pixels).items():
        assert torch.equal(logits, again(pixels)[name])
    assert again.features(pixels).shape == (2, 12)


@pytest.mark.skipif(not ASSET.exists(), reason="the judge is not trained yet")
def test_the_judge_reads_rendered_pictures() -> None:
    judge = Judge.from_pretrained(ASSET)
    dataset = ShapesDataset("heldout", 77, 128)
    pixels = torch.stack([dataset[i]["pixels"] for i in range(128)])
    captions = [dataset.draw(i)[0].caption() for i in range(128)]
    result = prompt_accuracy(judge, pixels, captions)
    assert result["mean"] > 0.985
    # Told something else about the same pictures, it does not agree.
    assert prompt_accuracy(judge, pixels, captions[1:] + captions[:1])["exact_match"] < 0.05
