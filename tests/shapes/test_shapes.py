"""Pictures of shapes and their captions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swd.shapes.dataset import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Mention,
    Object,
    Prompt,
    Scene,
    ShapesDataset,
    parse_caption,
    related,
    render,
    signed_distance,
)

DRAWS = 2000


@pytest.mark.parametrize("split", ["train", "val", "heldout", "all"])
def test_an_item_depends_on_seed_split_and_index_alone(split: str) -> None:
    one, other = ShapesDataset(split, 3, 100), ShapesDataset(split, 3, 50)
    for i in (7, 0, 49):  # in any order, whatever the length
        assert torch.equal(one[i]["pixels"], other[i]["pixels"])
        assert one[i]["prompt"] == other[i]["prompt"]
    assert not torch.equal(one[1]["pixels"], ShapesDataset(split, 4, 100)[1]["pixels"])


def test_the_first_picture_never_changes() -> None:
    item = ShapesDataset("train", 0, 1)[0]
    assert item["prompt"] == "a red cross right of a red star"
    assert item["pixels"].double().mean().item() == pytest.approx(-0.64006, abs=1e-4)


def test_held_out_pairs_are_never_trained_on() -> None:
    for split in ("train", "val"):
        dataset = ShapesDataset(split, 0, DRAWS)
        drawn = {(o.colour, o.shape) for i in range(DRAWS) for o in dataset.draw(i)[0].objects}
        assert not drawn & HELD_OUT
        assert len(drawn) == 64 - len(HELD_OUT)
    dataset = ShapesDataset("heldout", 0, DRAWS)
    for i in range(DRAWS):
        assert any((m.colour, m.shape) in HELD_OUT for m in dataset.draw(i)[1].mentions)


def test_scenes_keep_what_their_captions_say() -> None:
    dataset = ShapesDataset("all", 1, DRAWS)
    for i in range(DRAWS):
        scene, prompt = dataset.draw(i)
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects) == len(prompt.mentions)
        first = scene.objects[0]
        for relation, other in zip(prompt.relations, scene.objects[1:], strict=False):
            assert related(relation, (first.row, first.column), (other.row, other.column))
        for mention, thing in zip(prompt.mentions, scene.objects, strict=True):
            assert mention.shape == thing.shape
            assert mention.colour in (None, thing.colour)
            assert mention.size in (None, thing.size)
        assert prompt.background in (None, scene.background)


def test_every_caption_reads_back() -> None:
    for split in ("train", "heldout"):
        dataset = ShapesDataset(split, 2, DRAWS)
        for i in range(DRAWS):
            scene, prompt = dataset.draw(i)
            assert parse_caption(prompt.caption()) == prompt
            assert parse_caption(scene.caption()) == scene.prompt()


def test_captions_are_english() -> None:
    star, ring = Mention("star", "orange"), Mention("ring", "blue", "large")
    heart = Mention("heart")
    prompt = Prompt((star, ring, heart), ("left of", "above"), "gray")
    assert prompt.caption() == "an orange star left of a large blue ring and above a heart on a gray background"
    assert parse_caption("  An orange star  AND a heart. ") == Prompt((star, heart))


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red star near a ring", "red star", "a star left of a ring and a heart", "a star a ring"]
)
def test_other_text_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write it like"):
        parse_caption(text)


def test_relations_are_precise() -> None:
    assert related("left of", (1, 0), (1, 2))
    assert not related("left of", (0, 0), (1, 2))
    assert related("above", (0, 2), (2, 2))
    assert related("below", (2, 2), (0, 2))
    assert not related("right of", (1, 0), (1, 2))
    with pytest.raises(ValueError, match="unknown relation 'near'"):
        related("near", (0, 0), (0, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fill_their_size(shape: str) -> None:
    line = np.arange(-30, 30, 0.25)
    y, x = np.meshgrid(line, line, indexing="ij")
    inside = signed_distance(shape, x, y, 19.0) < 0
    for points in (x[inside], y[inside]):
        assert 0.6 * 19 < points.max() < 1.1 * 19
        assert 0.6 * 19 < -points.min() < 1.1 * 19


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_smooth(shape: str) -> None:
    """The signed distance has slope one across the outline, so that coverage blends over one pixel."""
    line = np.arange(-24, 24, 0.05)
    y, x = np.meshgrid(line, line, indexing="ij")
    distance = signed_distance(shape, x, y, 19.0)
    slope = np.hypot(*np.gradient(distance, 0.05))
    assert np.median(slope[np.abs(distance) < 0.5]) == pytest.approx(1, abs=0.02)


def test_pictures_show_colour_and_background() -> None:
    for colour, rgb in COLOURS.items():
        for background in BACKGROUNDS:
            scene = Scene((Object("circle", colour, "large", PLACES - 1, PLACES - 1),), background, seed=5)
            pixels = (render(scene) + 1) / 2
            assert pixels.shape == (3, 128, 128)
            assert pixels.dtype == torch.float32
            assert (pixels[:, 92:100, 92:100].mean((1, 2)) - torch.tensor(rgb)).abs().max() < 0.15
            corner = pixels[:, :30, :30].mean((1, 2))
            assert (corner - torch.tensor(BACKGROUNDS[background])).abs().max() < 0.15


def test_smaller_pictures_are_area_averages() -> None:
    scene = ShapesDataset("train", 0, 10).draw(3)[0]
    full = render(scene)
    for size in (96, 64, 48):
        assert torch.equal(render(scene, size), F.interpolate(full[None], size=(size, size), mode="area")[0])


def test_the_spectrum_is_not_flat() -> None:
    pixels = torch.stack([ShapesDataset("train", 0, 64)[i]["pixels"] for i in range(64)])
    power = torch.fft.rfft2(pixels.mean(1) - pixels.mean((1, 2, 3))[:, None, None]).abs().square().mean(0)
    low, middle, high = power[1:4, 1:4].mean(), power[10:16, 10:16].mean(), power[40:60, 40:60].mean()
    assert low > 10 * middle > 100 * high > 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        ShapesDataset("tset")
    with pytest.raises(ValueError, match="length"):
        ShapesDataset(length=0)
    with pytest.raises(IndexError, match="outside"):
        ShapesDataset(length=3)[3]
    with pytest.raises(ValueError, match="size must be at least 1"):
        render(ShapesDataset(length=1).draw(0)[0], 0)
    assert set(SIZES) == {"small", "large"} and len(RELATIONS) == 4
