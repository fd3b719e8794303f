"""Features of DINOv2 and CLIP against transformers' networks called by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from swd.metrics import weights
from swd.metrics.clip_pictures import ClipPictureFeatures
from swd.metrics.dinov2 import Dinov2Features
from swd.types import UserError

PICTURES = [
    torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8)
    for height, width in ((300, 260), (50, 90))
]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dinov2-tiny"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "clip-tiny"
    shared = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {"hidden_size": 8, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1} | shared
    vision = {"hidden_size": 16, "image_size": 28, "patch_size": 14} | shared
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder


def resized(picture: Tensor, side: int, square: bool) -> Tensor:
    """Pillow's bicubic resize, of the largest square in the middle if `square`, in [0, 1]."""
    image = Image.fromarray(picture.permute(1, 2, 0).numpy())
    if square:
        width, height = image.size
        short = min(image.size)
        image = image.crop(((width - short) // 2, (height - short) // 2, (width + short) // 2, (height + short) // 2))
    array = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1)


def test_dinov2_features_are_the_normalised_class_token(dino: Path) -> None:
    extractor = Dinov2Features(str(dino))
    assert (extractor.name, extractor.width) == ("dinov2-tiny-224x224bicubic", 16)
    found = extractor(PICTURES)
    pixels = torch.stack([resized(each, 224, square=False) for each in PICTURES])
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    network = Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        expected = network(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_clip_features_are_the_normalised_picture_embedding(clip: Path) -> None:
    extractor = ClipPictureFeatures(str(clip), side=28)
    assert (extractor.name, extractor.width) == ("clip-tiny-crop-28x28bicubic", 12)
    found = extractor(PICTURES)
    pixels = torch.stack([resized(each, 28, square=True) for each in PICTURES])
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    network = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = network.vision_model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).pooler_output
        expected = network.visual_projection(pooled)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_picture_alone_has_the_features_it_has_in_a_batch(dino: Path, clip: Path) -> None:
    for extractor in (Dinov2Features(str(dino)), ClipPictureFeatures(str(clip), side=28)):
        torch.testing.assert_close(extractor([PICTURES[1]])[0], extractor(PICTURES)[1], rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing(dino: Path) -> None:
    extractor = Dinov2Features(str(dino))
    plain = extractor(PICTURES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(PICTURES), plain)


def test_what_is_absent_or_wrong_is_one_line(dino: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"=dino/dino is not on this machine and the hub cannot be reached"):
        Dinov2Features("dino/dino").check()
    with pytest.raises(UserError, match=r"nowhere is no folder; give a folder with config\.json"):
        ClipPictureFeatures(str(tmp_path / "nowhere")).check()
    with pytest.raises(UserError, match="is a network of type 'clip'; give one of type 'dinov2'"):
        Dinov2Features(str(clip)).check()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((dino / "config.json").read_text())
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pickled has no \.safetensors weights"):
        Dinov2Features(str(tmp_path / "pickled")).check()


def test_weights_that_do_not_fit_are_refused(dino: Path, tmp_path: Path) -> None:
    config = json.loads((dino / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((dino / "model.safetensors").read_bytes())
    for change, fault in (({"hidden_size": 32}, "have other shapes"), ({"num_hidden_layers": 3}, "has no weights enc")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=fault):
            Dinov2Features(str(tmp_path)).load()


def test_weights_are_known_by_their_content(dino: Path, tmp_path: Path) -> None:
    first = Dinov2Features(str(dino)).weights_id()
    copy = tmp_path / "other"
    Dinov2Model.from_pretrained(dino).save_pretrained(copy)
    assert Dinov2Features(str(copy)).weights_id() == first
    changed = Dinov2Model.from_pretrained(dino)
    changed.layernorm.bias.data += 1
    changed.save_pretrained(copy)
    assert Dinov2Features(str(copy)).weights_id() != first


def test_a_file_is_hashed_again_only_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "a", []
    monkeypatch.setattr(weights, "file_hash", lambda path: read.append(path) or path.read_text())
    for content in ("one", "one", "three"):
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        assert weights.cached_file_hash(file) == content
    assert len(read) == 2
