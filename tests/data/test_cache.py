"""Text and latents in a cache, and how exactly they come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from swd.data.cache import (
    Assembler,
    latents_name,
    pack_latents,
    pack_text,
    relative_error,
    view,
)
from swd.data.shards import CorruptSample
from swd.types import Conditioning


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)


def unpack_texts(packed: list[NDArray[np.uint8]]) -> Conditioning:
    assembler = Assembler(len(packed))
    for row, data in enumerate(packed):
        assembler.text(row, data)
    return assembler.conditioning()


def unpack_latents(packed: list[NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
    assembler = Assembler(len(packed))
    for row, data in enumerate(packed):
        assembler.latents(row, (8, 8), data)
    return assembler.posteriors()[(8, 8)]


def clip_and_t5(seed: int = 0) -> Conditioning:
    """As SD3 has it: CLIP's rows end in zeros, T5's are full."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, 589, 64, generator=generator)
    embeds[:, :77, 32:] = 0
    return Conditioning(embeds, torch.randn(1, 48, generator=generator))


def padded(used: int, seed: int = 0) -> Conditioning:
    """As Wan has it: zeros behind the prompt."""
    embeds = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(seed))
    embeds[:, used:] = 0
    return Conditioning(embeds)


def masked(used: int, seed: int = 0) -> Conditioning:
    """As SANA has it: padding holds something, and a mask says that nobody looks at it."""
    embeds = torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(seed))
    return Conditioning(embeds, mask=(torch.arange(128) < used)[None].long())


def unpadded(seed: int = 0) -> Conditioning:
    """As Qwen-Image has it: texts of their own lengths, which are padded when they are put together."""
    return masked((31, 34, 30)[seed], seed).map(lambda tensor: tensor[:, : (31, 34, 30)[seed]])


def time_ids(seed: int = 0) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[1024.0, 768, 0, 0, 1024, 768]])
    return Conditioning(torch.randn(1, 77, 64, generator=generator), torch.randn(1, 48, generator=generator), ids)


MAKERS = {
    "sd3": clip_and_t5,
    "wan": lambda s=0: padded(9 + s, s),
    "sana": lambda s=0: masked(30 + s, s),
    "sdxl": time_ids,
    "qwen_image": unpadded,
}


def same(a: Conditioning, b: Conditioning, **tolerance: float) -> None:
    for name in ("embeds", "pooled", "time_ids", "mask"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x.float(), y.float(), **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_comes_back_bit_for_bit(maker: str, dtype: torch.dtype) -> None:
    rows = [MAKERS[maker](seed) for seed in range(3)]
    rows = [
        Conditioning(c.embeds.to(dtype), None if c.pooled is None else c.pooled.to(dtype), c.time_ids, c.mask)
        for c in rows
    ]
    precision = "fp32" if dtype == torch.float32 else "bf16"
    back = unpack_texts([array(pack_text(row, precision)) for row in rows])
    expected = Conditioning.cat(rows)
    if expected.mask is not None:  # what is masked may change: nobody sees it
        expected = Conditioning(expected.embeds * expected.mask[..., None], None, None, expected.mask)
    assert back.embeds.dtype == dtype
    same(back, expected)


@pytest.mark.parametrize(
    ("maker", "kept"), [("sd3", 77 * 32 + 512 * 64 + 48), ("wan", 9 * 64), ("sana", 30 * 64), ("sdxl", 77 * 64 + 48)]
)
def test_zeros_and_masked_padding_are_not_stored(maker: str, kept: int) -> None:
    size = len(pack_text(MAKERS[maker](), "bf16"))
    assert 2 * kept <= size < 2 * kept + 1000


def test_padding_to_the_length_of_others_is_cut() -> None:
    rows = [unpadded(seed) for seed in range(3)]
    together = Conditioning.cat(rows)
    for i, row in enumerate(rows):
        same(together.rows(slice(i, i + 1)).unpadded(), row)
    whole = masked(30)  # SANA's padding is computed, and as long for every text
    same(whole.unpadded(), whole)
    assert padded(9).unpadded().embeds.shape == (1, 128, 64)


def test_zeros_inside_the_text_are_kept() -> None:
    embeds = torch.ones(1, 6, 8)
    embeds[0, 2], embeds[0, 3, 1], embeds[0, 4, 6:] = 0, 0, 0
    same(unpack_texts([array(pack_text(Conditioning(embeds), "fp32"))]), Conditioning(embeds))
    nothing = Conditioning(torch.zeros(1, 6, 8))
    same(unpack_texts([array(pack_text(nothing, "fp32"))]), nothing)


@pytest.mark.parametrize("maker", ["sd3", "wan", "sdxl"])
def test_8_bit_text_is_close_and_half_as_large(maker: str) -> None:
    row = padded(100) if maker == "wan" else MAKERS[maker]()
    small, plain = pack_text(row, "int8"), pack_text(row, "bf16")
    back = unpack_texts([array(small)])
    error = ((back.embeds.float() - row.embeds).norm() / row.embeds.norm()).item()
    assert 0 < error < 0.015 and len(small) < 0.62 * len(plain)
    assert back.embeds.dtype == torch.bfloat16
    assert torch.equal(back.embeds == 0, row.embeds == 0) or (back.embeds[row.embeds == 0] == 0).all()


def posterior(size: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(4, *size, generator=generator) * torch.tensor([0.1, 1, 10, 100]).view(4, *([1] * len(size)))
    return mean, torch.rand(4, *size, generator=generator) / 10


@pytest.mark.parametrize("size", [(6, 8), (3, 4, 6)])
@pytest.mark.parametrize(("precision", "error"), [("fp32", 0.0), ("bf16", 4e-3), ("int8", 1.2e-2)])
def test_latents_come_back(size: tuple[int, ...], precision: str, error: float) -> None:
    pairs = [posterior(size, seed) for seed in range(2)]
    mean, std = unpack_latents([array(pack_latents(*pair, precision)) for pair in pairs])  # type: ignore[arg-type]
    assert mean.shape == std.shape == (2, 4, *size)
    for found, expected in ((mean, [m for m, _ in pairs]), (std, [s for _, s in pairs])):
        for row, wanted in zip(found.float(), expected, strict=True):
            for channel, exact in zip(row, wanted, strict=True):  # a scale of its own for each channel
                assert ((channel - exact).norm() / exact.norm()).item() <= error
    wrong, whole = relative_error(pairs[0][0], precision)  # type: ignore[arg-type]
    assert (wrong / whole) ** 0.5 == pytest.approx(((mean[0].float() - pairs[0][0]).norm() / pairs[0][0].norm()).item())


def test_without_a_deviation_there_is_nothing_to_draw() -> None:
    mean, _ = posterior((4, 4))
    found, std = unpack_latents([array(pack_latents(mean, None, "fp32"))])
    assert torch.equal(found[0], mean) and std.shape == found.shape and not std.any()


def test_names_of_sizes() -> None:
    assert latents_name((64, 80)) == "64x80.safetensors" and latents_name((3, 4, 4)) == "3x4x4.safetensors"


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_a_damaged_file_is_corrupt(cut: int) -> None:
    with pytest.raises(CorruptSample, match="no safetensors file"):
        view(array(pack_latents(*posterior((4, 4)), "fp32")[:cut]))


def test_what_does_not_belong_together_is_corrupt() -> None:
    a, b = (array(pack_latents(*posterior(size), "fp32")) for size in ((4, 4), (4, 6)))
    with pytest.raises(CorruptSample, match="beside"):
        unpack_latents([a, b])
    with pytest.raises(CorruptSample, match="belong"):
        unpack_texts([array(pack_text(clip_and_t5(), "fp32")), array(pack_text(padded(3), "fp32"))])


def test_a_pickle_is_never_loaded() -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("a pickle was loaded",))

    with pytest.raises(CorruptSample):
        view(array(pickle.dumps(Trap())))
