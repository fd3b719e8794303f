"""An update's inputs: the same from pictures and from what a cache holds of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch import Tensor

from swd.losses import MMD
from swd.modules.distiller import Distiller
from swd.modules.inputs import InputBuilder, Inputs
from swd.modules.pretrained import Pretrained
from swd.schedule import Resizing, ScaleSchedule, downscale
from swd.types import Cached, CachedBatch, Conditioning, PictureBatch, SeededDraws, Size, UserError

PROMPTS = ["a red star", "a green heart"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """SDXL's conditioning names a size, and it takes zeros in place of the empty prompt."""
    return families.pretrained("sdxl", families.save("sdxl", tmp_path_factory.mktemp("sdxl") / "pipeline"))


@pytest.fixture
def schedule() -> ScaleSchedule:
    return ScaleSchedule(families.SIGMAS, families.SIZES["sdxl"])


class Stored:
    """A cache with an empty prompt of its own."""

    def __init__(self, row: Conditioning) -> None:
        self.row = row
        self.asked: list[Size | None] = []

    def empty(self, bucket: Size | None) -> Conditioning:
        self.asked.append(bucket)
        return self.row


def tensors(inputs: Inputs) -> list[Tensor]:
    texts = [getattr(c, key) for c in (inputs.conditioning, inputs.empty) for key in ("embeds", "pooled", "time_ids")]
    return [inputs.source, inputs.target, *texts]


@pytest.mark.parametrize("step", [0, 1])
def test_a_cache_gives_the_inputs_that_its_pictures_give(
    model: Pretrained, schedule: ScaleSchedule, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.rand(2, 3, *model.pixel_size(model.size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = SeededDraws(3, iteration=step)
    builder = InputBuilder(model, schedule)
    expected = builder.build(PictureBatch(pixels, prompts=PROMPTS), step, draws, "here")
    assert expected.interval == schedule.interval(step) and expected.place == "here" and expected.draws == draws

    encoders = builder.encoders(pixels.device)
    posteriors = {size: encoders.distribution(downscale(pixels, model.pixel_size(size))) for size in schedule.sizes}
    batch = CachedBatch(Cached(encoders.encode_prompts(PROMPTS, model.size), posteriors), prompts=PROMPTS)
    cached = InputBuilder(model, schedule)
    cached.cache = Stored(encoders.encode_prompts([""], model.size))
    monkeypatch.setattr(type(model), "encoders", None)  # a cache needs none
    cached.load(pixels.device)
    for ours, theirs in zip(tensors(cached.build(batch, step, draws)), tensors(expected), strict=True):
        assert torch.equal(ours, theirs)


def test_a_caches_empty_prompt_is_read_once_for_each_bucket(model: Pretrained, schedule: ScaleSchedule) -> None:
    builder = InputBuilder(model, schedule)
    row = Conditioning(torch.ones(1, 4, 8), torch.ones(1, 8), torch.ones(1, 6))
    builder.cache = stored = Stored(row)
    for bucket in (None, (64, 64), None, (64, 64)):
        empty = builder.empty(bucket, torch.device("cpu"))
        assert not empty.embeds.any() and empty.time_ids is not None and empty.time_ids.all()
    assert stored.asked == [None, (64, 64)]


def test_without_a_cache_the_encoders_are_loaded_once(
    model: Pretrained, schedule: ScaleSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[torch.device] = []
    load = type(model).encoders

    def counted(self: Pretrained, device: torch.device) -> Any:
        loaded.append(device)
        return load(self, device)

    monkeypatch.setattr(type(model), "encoders", counted)
    builder = InputBuilder(model, schedule)
    assert not loaded
    builder.load(torch.device("cpu"))
    assert builder.encoders(torch.device("cpu")) is builder.encoders(torch.device("cpu"))
    assert loaded == [torch.device("cpu")]


def test_each_bucket_has_its_size_in_the_conditioning_and_its_own_schedule(
    model: Pretrained, schedule: ScaleSchedule
) -> None:
    builder, cpu = InputBuilder(model, schedule), torch.device("cpu")
    sizes = {None: (64, 64), (48, 80): (48, 80), (80, 48): (80, 48)}
    for bucket, (height, width) in [*sizes.items(), (None, (64, 64))]:
        conditioning = builder.encode_prompts(PROMPTS, bucket, cpu)
        assert conditioning.time_ids is not None
        assert conditioning.time_ids.tolist() == [[height, width, 0, 0, height, width]] * 2
        assert model.pixel_size(builder.schedule_for(bucket).sizes[-1]) == (height, width)


def test_a_text_is_encoded_once_for_all_sizes(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = model.encoders()
    texts: list[list[str]] = []
    text = type(encoders).text

    def counted(self: Any, prompts: list[str]) -> Conditioning:
        texts.append(prompts)
        return text(self, prompts)

    monkeypatch.setattr(type(encoders), "text", counted)
    small, large = (encoders.encode_prompts(PROMPTS, size) for size in ((8, 8), (16, 12)))
    assert texts == [PROMPTS] and torch.equal(small.embeds, large.embeds)
    assert small.time_ids is not None and large.time_ids is not None
    assert small.time_ids[0].tolist() != large.time_ids[0].tolist()


def test_a_cascade_reaches_the_latents(model: Pretrained, schedule: ScaleSchedule) -> None:
    """The target stays as it is; the source is encoded from the shrunken target. One size needs one encoding."""
    pixels = torch.rand(2, 3, *model.pixel_size((12, 12)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = SeededDraws(3, iteration=1)
    batch = PictureBatch(pixels, prompts=PROMPTS)
    direct = InputBuilder(model, schedule).build(batch, 1, draws)
    cascade = InputBuilder(model, schedule, Resizing("cascade"))
    inputs = cascade.build(batch, 1, draws)
    large = downscale(pixels, model.pixel_size((6, 6)))
    encoders = cascade.encoders(pixels.device)
    assert torch.equal(inputs.target, direct.target) and torch.equal(inputs.target, encoders.encode(large, draws))
    assert torch.equal(inputs.source, encoders.encode(downscale(large, model.pixel_size((4, 4))), draws))
    assert not torch.allclose(inputs.source, direct.source, atol=1e-3)
    first = cascade.build(batch, 0, draws)
    assert first.source is first.target


def test_a_cache_is_shrunk_already(model: Pretrained, schedule: ScaleSchedule) -> None:
    cache, pictures = SimpleNamespace(is_cache=True), SimpleNamespace()
    Distiller(model, schedule, {"mmd": MMD(blocks=(0,))}).check_data(cache)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"downscale": "cascade"}, r"^task\.downscale=cascade is of pictures"),
        ({"downscale": "cascade", "frames": "nearest"}, r"^task\.downscale=cascade and task\.frames=nearest is of"),
    ]
    for options, message in cases:
        task = Distiller(model, schedule, {"mmd": MMD(blocks=(0,))}, **options)
        task.check_data(pictures)
        with pytest.raises(UserError, match=message):
            task.check_data(cache)
