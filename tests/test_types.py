"""Small data classes that the package shares."""

import pytest
import torch

from swd.types import Conditioning, UserError


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


def test_texts_of_several_lengths_are_padded_with_masked_tokens() -> None:
    long = Conditioning(torch.randn(2, 5, 3), mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    short = Conditioning(torch.randn(1, 2, 3), mask=torch.tensor([[1, 1]]))
    bare = Conditioning(torch.randn(1, 5, 3))
    both = Conditioning.cat([long, short, bare])
    assert both.mask is not None and both.mask.dtype == torch.int64
    assert both.mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0], [1] * 5]
    assert torch.equal(both.embeds[:2], long.embeds) and torch.equal(both.embeds[2, :2], short.embeds[0])
    assert not both.embeds[2, 2:].any() and torch.equal(both.embeds[3:], bare.embeds)


def test_texts_that_cannot_be_stacked_are_refused() -> None:
    long, short = Conditioning(torch.randn(1, 5, 3)), Conditioning(torch.randn(1, 2, 3))
    with pytest.raises(UserError, match=r"^encoded texts of 2 and 5 tokens without a mask cannot be stacked; encode"):
        Conditioning.cat([long, short])
    pooled = Conditioning(torch.randn(1, 5, 3), torch.randn(1, 4))
    for parts in ([long, pooled], [pooled, long]):
        with pytest.raises(UserError, match=r"^encoded texts cannot be stacked: only some of them have pooled; encode"):
            Conditioning.cat(parts)
