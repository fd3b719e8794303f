"""What Chroma's stock classes do to masks, and that the family mends it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import families
import pytest
import torch
from torch import Tensor

from swd.modules.pretrained import Pretrained
from swd.types import Conditioning


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("chroma", families.save("chroma", tmp_path_factory.mktemp("chroma") / "pipeline"))


def texts(model: Pretrained, *kept: int) -> Conditioning:
    """A row for each number of tokens that are not masked."""
    plain = model.backbone_class.random_conditioning(model.network_config, len(kept), 7)
    return replace(plain, mask=(torch.arange(7) < torch.tensor(kept)[:, None]).float())


def test_a_mask_of_numbers_hides_nothing_from_the_stock_network_until_it_is_mended(tmp_path: Path) -> None:
    pipe = families.build("chroma")
    generator = torch.Generator().manual_seed(0)
    embeds, other = torch.randn(2, 1, 5, 32, generator=generator)
    other[:, :2] = embeds[:, :2]
    image = torch.randn(1, 4, 16, generator=generator)
    mask = torch.tensor([[1.0, 1, 0, 0, 0, 1, 1, 1, 1]])

    def predicted(text: Tensor) -> Tensor:
        inputs = {"hidden_states": image, "encoder_hidden_states": text, "attention_mask": mask}
        ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(5, 3)}
        with torch.no_grad():
            output: Tensor = pipe.transformer(**inputs, **ids, timestep=torch.ones(1), return_dict=False)[0]
        return output

    assert not torch.allclose(predicted(embeds), predicted(other), atol=1e-3)
    families.load_family("chroma").mend(pipe)
    assert torch.equal(predicted(embeds), predicted(other))


def test_what_is_recomputed_sees_the_mask_of_its_own_pass(model: Pretrained) -> None:
    """Two passes with different masks before one backward pass: outputs and gradients as without checkpointing."""
    x, sigma = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.6])
    found = []
    for checkpointing in (False, True):
        backbone = model.network()
        backbone.train()
        if checkpointing:
            backbone.diffusers_model.enable_gradient_checkpointing()
        own = getattr(backbone.network, "_gradient_checkpointing_func", None)
        outputs = [backbone.predict(x, sigma, texts(model, *kept))[0] for kept in ((4, 7), (2, 1))]
        sum(output.square().mean() for output in outputs).backward()  # type: ignore[union-attr]
        assert getattr(backbone.network, "_gradient_checkpointing_func", None) is own
        gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
        assert not torch.equal(*outputs) and len(gradients) > 20
        found.append([*outputs, *gradients])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))
