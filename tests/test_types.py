"""Small data classes that the package shares."""

import torch

from swd.types import Conditioning


def test_rows_of_a_conditioning() -> None:
    embeds = torch.arange(12.0).reshape(3, 2, 2)
    pooled = torch.arange(6.0).reshape(3, 2)
    whole = Conditioning(embeds, pooled)

    part = whole.rows(slice(1, 2))
    assert part.embeds.tolist() == [[[4.0, 5.0], [6.0, 7.0]]] and part.mask is None and part.time_ids is None
    assert part.pooled is not None and part.pooled.tolist() == [[2.0, 3.0]]
    chosen = whole.rows([2, 0, 2])
    assert chosen.embeds[:, 0, 0].tolist() == [8.0, 0.0, 8.0]

    embeds.zero_()  # a slice is a view, a list makes a copy
    assert part.embeds.abs().sum() == 0 and chosen.embeds[0, 0, 0] == 8.0
