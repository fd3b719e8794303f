"""What Qwen-Image has beside the contract of all families: the length of guided velocities, and padded texts."""

from __future__ import annotations

import families
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from swd.modules.backbones.qwen_image import QwenImageBackbone
from swd.modules.pretrained import Pretrained
from swd.types import Conditioning


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("qwen_image", families.save("qwen_image", tmp_path_factory.mktemp("qwen") / "pipeline"))


def patch_lengths(velocity: Tensor) -> Tensor:
    """Length of each 2x2 patch over all channels, in the patch's four places: `[B, 1, H, W]`."""
    squares = velocity.square().sum(1, keepdim=True)
    sums = torch.nn.functional.avg_pool2d(squares, 2) * 4
    return sums.sqrt().repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_guided_velocities_keep_their_length_in_each_token() -> None:
    generator = torch.Generator().manual_seed(0)
    text, empty, x_t = torch.randn(3, 2, 16, 4, 6, dtype=torch.float64, generator=generator).unbind()
    guided = QwenImageBackbone.guide(text, empty, 4.0)
    plain = empty + 4 * (text - empty)
    assert_close(guided, plain * patch_lengths(text) / patch_lengths(plain))
    assert_close(QwenImageBackbone.guide(text, empty, 1.0), text)
    # Of clean predictions, at any level.
    sigma = torch.tensor([0.9, 0.2], dtype=torch.float64).view(2, 1, 1, 1)
    x0 = QwenImageBackbone.guide(x_t - sigma * text, x_t - sigma * empty, 4.0, x_t)
    assert_close(x0, x_t - sigma * guided)
    # A velocity of zero has no direction.
    text[:, :, :2, :2] = empty[:, :, :2, :2] = 0
    assert not QwenImageBackbone.guide(text, empty, 4.0)[:, :, :2, :2].any()


def test_an_encoded_text_does_not_depend_on_others_but_for_padding(model: Pretrained) -> None:
    """Nor does a prediction; without a prompt the text is one space, as its vendor guides."""
    encoders, backbone = model.encoders(), model.network()
    short, long = "a red star", "a large blue ring above a small heart"
    together, alone, nothing = (encoders.encode_prompts(texts) for texts in ([short, long], [short], [""]))
    assert together.mask is not None and alone.mask is not None and nothing.mask is not None
    assert together.mask.sum(1).tolist() == [3 + 5, 8 + 5] and alone.mask.all() and nothing.mask.tolist() == [[1] * 6]
    assert_close(together.embeds[:1, :8], alone.embeds)
    assert not together.embeds[0, 8:].any()
    assert_close(encoders.encode_prompts([" "]).embeds, nothing.embeds)
    x, sigma = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.7])
    with torch.no_grad():
        padded = backbone.predict(x, sigma, together.rows([0]))[0]
        assert_close(padded, backbone.predict(x, sigma, alone)[0], rtol=1e-4, atol=1e-5)
        unmasked = Conditioning(together.rows([0]).embeds)
        assert (padded - backbone.predict(x, sigma, unmasked)[0]).abs().max() > 1e-3


def test_no_size_leaves_its_positions(model: Pretrained) -> None:
    limits = model.limits
    assert limits.max_side is not None
    network = model.network().network
    tokens = limits.max_side // 2
    with torch.no_grad():
        _, text = network.pos_embed([[(1, 2, tokens)]], max_txt_seq_len=1024, device=torch.device("cpu"))  # type: ignore[operator]
        assert len(text) == 1024
        _, text = network.pos_embed([[(1, 2, tokens + 2)]], max_txt_seq_len=1024, device=torch.device("cpu"))  # type: ignore[operator]
        assert len(text) < 1024
