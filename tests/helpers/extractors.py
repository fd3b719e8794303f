"""Small extractors with fixed random weights, and pictures for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swd.metrics.base import Drawn, Reference, TextExtractor
from swd.metrics.fid import Frechet
from swd.metrics.kid import Kid
from swd.metrics.streaming import StreamedMetrics, frechet_metric

WIDTH = 6


class TinyExtractor(TextExtractor):
    """6 features of pictures shrunk to 4 x 4; of a prompt, its first letters."""

    def __init__(self, name: str = "tiny", present: bool = True) -> None:
        super().__init__()
        self.name = name
        self.present = present
        self.builds = 0

    @property
    def width(self) -> int:
        return WIDTH

    def check(self) -> None:
        if not self.present:
            raise FileNotFoundError(self.name)

    def weights_id(self) -> str:
        return "0" * 64

    def prepare(self, picture: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(picture.float() / 255, 4)

    def build(self) -> nn.Module:
        self.builds += 1
        network = nn.Linear(48, WIDTH)
        weights = torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(1))
        network.load_state_dict({"weight": weights, "bias": torch.zeros(WIDTH)})
        return network

    def embed(self, network: nn.Module, prepared: Tensor) -> Tensor:
        features: Tensor = network(prepared.flatten(1))
        return features

    def embed_prompts(self, network: nn.Module, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(ord(letter)) for letter in f"{prompt:6.6}"] for prompt in prompts])


def pictures(count: int, seed: int, side: int = 8, brightness: int = 256) -> Tensor:
    """Random pictures, uint8 `[count, 3, side, side]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, brightness, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def streamed_scores(rank: int, world: int, folder: Path) -> None:
    """Write, as process `rank` of `world`, what the metrics for training give of 30 pictures; its share is its own."""
    import torch.distributed as dist

    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    drawn, extractor = pictures(30, 0), TinyExtractor()
    reference = Reference({"tiny": extractor(pictures(40, 1, brightness=200))})
    every = StreamedMetrics([Frechet(extractor), Kid(extractor)], reference=reference)
    few = StreamedMetrics([Kid(extractor)], reference=reference)
    sums = frechet_metric(extractor, reference)
    # The last process has places 0 and 1 again, as a sampler pads, and only the first has any of `few`.
    mine = [*range(rank, 30, world), *([0, 1] if rank == world - 1 and world > 1 else [])]
    for start in range(0, len(mine), 3 + rank):
        places = torch.tensor(mine[start : start + 3 + rank])
        every.update(drawn[places], places)
    if rank == 0:
        few.update(drawn[:9], torch.arange(9))
    sums.update(drawn[rank::world], real=False)
    scores = {"every": every.compute(), "few": few.compute(), "sums": sums.compute()}
    torch.save(scores, folder / f"scores{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def drawn_of(extractor: TinyExtractor, images: Tensor, prompts: Sequence[str] = ()) -> Drawn:
    """The pictures' features as a metric takes them."""
    return Drawn({extractor.name: extractor(images)}, prompts)
