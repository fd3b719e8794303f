"""The scheduler under FLUX.2's pipelines: ids of the first size for the network, and for the picture after the loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swd.scheduler import ScaleWiseScheduler, pack, position_ids, to_layout, unpack

SIGMAS, SIZES = [1.0, 0.8, 0.6], [4, 6, 8]
CHANNELS = 4


def ids_of(size: tuple[int, ...]) -> Tensor:
    """Ids of the first picture of a batch as the pipelines make them, `[1, L, 4]`: zero, row, column, zero."""
    return F.pad(position_ids(size, dtype=torch.int64), (0, 1))[None]


class Flux2Transformer2DModel(torch.nn.Module):
    """Has the class name by which the scheduler knows FLUX.2; its prediction depends on the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, hidden_states: Tensor, img_ids: Tensor) -> Tensor:
        self.seen.append(img_ids)
        return hidden_states / 2 + 0.01 * img_ids.reshape(-1, 4).sum(-1)[:, None]


class Pipeline:
    """The loop of FLUX.2's pipelines: ids once, for the first latents, and tokens put back by them."""

    def __init__(self) -> None:
        self.transformer = Flux2Transformer2DModel()
        self.scheduler: Any = None

    @staticmethod
    def _unpack_latents_with_ids(tokens: Tensor, ids: Tensor, height: int | None = None, width: int = 0) -> Tensor:
        rows, columns = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
        picture = torch.zeros(len(tokens), tokens.shape[2], rows * columns)
        picture[:, :, ids[0, :, 1] * columns + ids[0, :, 2]] = tokens.transpose(1, 2)
        return picture.unflatten(2, (rows, columns))

    def __call__(self, latents: Tensor, reference: bool = False) -> Tensor:
        self.transformer.seen.clear()
        ids = ids_of(tuple(2 * side for side in latents.shape[2:]))
        tokens = latents.flatten(2).transpose(1, 2)
        self.scheduler.set_timesteps(3)
        for timestep in self.scheduler.timesteps:
            fed = torch.cat([ids, ids + 10], 1) if reference else ids
            output = self.transformer(hidden_states=tokens, img_ids=fed)
            tokens = self.scheduler.step(output, timestep, tokens, return_dict=False)[0]
        return self._unpack_latents_with_ids(tokens, ids, height=ids[..., 1].max() + 1)


class SameSize:
    """A scheduler of another kind: sizes stay."""

    timesteps = torch.tensor([1000.0, 500.0])

    def set_timesteps(self, steps: int) -> None:
        pass

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (sample - output / 2,)


def attached(sizes: Any = SIZES) -> Pipeline:
    pipe = Pipeline()
    return ScaleWiseScheduler(sigmas=SIGMAS, sizes=sizes, divisor=2).attach(pipe)


def noise(pipe: Pipeline, height: int, width: int, layout: str = "patches") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made: Tensor = pipe.scheduler.initial_latents(2, CHANNELS, height, width, generator=generator, layout=layout)
    return made


def by_hand(pipe: Pipeline, height: int, width: int) -> Tensor:
    """The same loop on maps of another scheduler."""
    alone = ScaleWiseScheduler(sigmas=SIGMAS, sizes=SIZES, divisor=2)
    x = alone.initial_latents(2, CHANNELS, height, width, generator=torch.Generator().manual_seed(0))
    network = Flux2Transformer2DModel()
    for timestep in alone.timesteps:
        size = tuple(x.shape[2:])
        output = unpack(network(hidden_states=pack(x), img_ids=ids_of(size)), size)
        x = alone.step(output, timestep, x).prev_sample
    return to_layout(x, "patches")


@pytest.mark.parametrize("sides", [(8, 8), (12, 8), (8, 12)])
def test_a_call_is_the_loop_by_hand(sides: tuple[int, int]) -> None:
    pipe = attached()
    drawn = pipe(noise(pipe, *sides))
    assert drawn.shape == (2, 16, sides[0] // 2, sides[1] // 2)
    assert torch.equal(drawn, by_hand(pipe, *sides))
    assert [len(ids) for ids in pipe.transformer.seen] == [x * y // 4 for x, y in pipe.scheduler.sizes]
    copied = copy.deepcopy(pipe)
    pipe(noise(pipe, 8, 8))  # whose sizes must not reach the copy
    assert torch.equal(copied(noise(copied, *sides)), drawn)


def test_latents_from_elsewhere_begin_at_the_first_size() -> None:
    pipe = attached()
    assert pipe(torch.randn(1, 16, 2, 3)).shape == (1, 16, 4, 6)
    with pytest.raises(ValueError, match=r"first latent has size \(8, 8\), but this schedule starts at \(4, 4\)"):
        pipe(torch.randn(1, 16, 4, 4))


def test_another_scheduler_s_call_is_left_alone() -> None:
    pipe = attached()
    pipe(noise(pipe, 8, 12))
    pipe.scheduler = SameSize()
    turned = torch.randn(1, 16, 6, 4)  # as many tokens as the call before ended with
    stock = Pipeline()
    stock.scheduler = SameSize()
    assert torch.equal(pipe(turned), stock(turned))


def test_one_size_throughout_and_a_schedule_that_is_attached_later() -> None:
    pipe = attached([8, 8, 8])
    assert pipe(noise(pipe, 8, 8)).shape == (2, 16, 4, 4)
    ScaleWiseScheduler(sigmas=SIGMAS, sizes=[4, 4, 8], divisor=2).attach(pipe)
    assert pipe(noise(pipe, 8, 12)).shape == (2, 16, 4, 6) and len(pipe.transformer._forward_pre_hooks) == 1


def test_reference_pictures_are_refused() -> None:
    pipe = attached()
    with pytest.raises(ValueError, match="image= was given, but this model was distilled for text alone") as caught:
        pipe(noise(pipe, 8, 8), reference=True)
    assert "\n" not in str(caught.value)
