"""Bytes on a device, counted without weights at real size, and the tables of the documentation that show them."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import save_file
from skeletons import options

from docs import table
from swd.losses import GAN
from swd.losses.base import LossTerm
from swd.modules.device_memory import Kept, cache_bytes, encoder_bytes, kept, kept_divided
from swd.modules.dry_run import networks_on_meta, terms_on_meta
from swd.modules.pretrained import Pretrained
from swd.modules.published import copied_folder, published, published_folder
from swd.types import UserError

DOCS = Path(__file__).parents[2] / "docs"
SCALE = table((DOCS / "scale.md").read_text(), "model | a copy on each GPU")
MODELS = table((DOCS / "models.md").read_text(), "model | base")
FAST = ("sd35_large", "sd35_medium", "flux_dev")
"""Models that are counted in every run of the tests; it takes some seconds for each."""
GPUS = {"sd35_medium": 24, "sd35_large": 40, "flux_dev": 80}
"""GB of cards that a training on cached data fits by the bytes that it keeps."""


def pretrained(name: str, folder: Path, **more: object) -> Pretrained:
    given = options(name)
    path = folder / name
    path = path if path.exists() else published_folder(name, given["family"], path)
    return Pretrained(**given | {"path": str(path)} | more)


def heads_of(model: Pretrained) -> dict[str, LossTerm]:
    return {"gan": GAN(blocks=model.feature_blocks)}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in published()]
)
def test_weights_of_every_model_in_8_bits_and_not(name: str, tmp_path: Path) -> None:
    model = pretrained(name, tmp_path)
    networks = networks_on_meta(model, ("student", "fake"))
    heads = terms_on_meta(heads_of(model), model.limits.width)
    found = kept(networks, heads)
    parameters = sum(p.numel() for p in model.meta_network.parameters())
    buffers = 2 * sum(b.numel() for b in networks.backbone.buffers())
    assert found.base == 2 * parameters + buffers
    assert (
        found.trained["student"]
        == found.trained["fake"]
        == 16
        * sum(
            model.rank * (layer.in_features + layer.out_features)  # type: ignore[operator]
            for layer in networks.backbone.network.modules()
            if hasattr(layer, "lora_A")
        )
    )

    # In 8 bits: a byte for each weight of the blocks' linear layers, four for the scale of each row.
    small = kept(networks_on_meta(pretrained(name, tmp_path, quantization="int8"), ("student", "fake")))
    assert small.trained == {role: found.trained[role] for role in ("student", "fake")}
    share = {"sdxl": 0.62, "sana_1600m": 0.76}.get(name, 0.56)  # convolutions are not linear layers
    assert small.base - buffers < share * (found.base - buffers)
    if name == "sd35_large":
        weights = (found.total - found.base) / 4  # trained ones alone, without gradients and moments
        assert found.base - buffers + weights <= 17.5e9
        assert small.base - buffers + weights <= 9.5e9

    # What the documentation shows.
    if name in SCALE:
        whole, divided, _ = SCALE[name]
        shown = None if "without the heads" in whole else heads
        assert whole.split(",")[0] == f"{kept(networks, shown).total / 1e9:.1f}"
        assert divided == f"{kept_divided(networks, 8, shown)[0] / 1e9:.1f}"
    if name in MODELS:
        cells = [found.base, found.trained["student"], sum(encoder_bytes(model).values())]
        rounded = [f"{value / 1e9:.1f}" for value in cells]
        assert MODELS[name][:2] == rounded[:2]
        assert MODELS[name][4] == rounded[2]
    if name in GPUS:
        assert found.total < 0.95e9 * GPUS[name]


@pytest.mark.parametrize("name", ["sd35_medium", "sdxl"])
def test_counts_are_those_of_networks_with_weights(name: str, tmp_path: Path) -> None:
    model = families.pretrained(name, families.save(name, tmp_path / name))
    real, counted = (
        kept(networks)
        for networks in (model.networks(("student",)), networks_on_meta(model, ("student",), torch.float32))
    )
    assert real == counted
    halves = kept_divided(networks_on_meta(model, ("student",)), 2)
    assert halves[1] < halves[0] < kept(networks_on_meta(model, ("student",))).total + halves[1]
    encoders = model.encoders()
    expected = {"vae": encoders.vae} | dict(zip(list(encoder_bytes(model))[1:], encoders.text_models, strict=True))
    assert encoder_bytes(model) == {
        part: sum(p.numel() * p.element_size() for p in module.parameters()) for part, module in expected.items()
    }


def test_sums_and_cache() -> None:
    assert (Kept(10, {"student": 16, "heads": 32}).total, Kept(10, {"student": 16, "heads": 32}).gradients) == (58, 12)
    model = Pretrained(**options("shapes"))
    # Two sizes of 8 channels with mean and deviation, 48 text tokens, and the pooled text, at 2 bytes a number.
    width, pooled = model.backbone_class.conditioning_widths(model.network_config)
    channels = model.channels
    expected = 2 * (2 * channels * (36 + 64) + 48 * width + (pooled or 0))
    assert cache_bytes(model, [(6, 6), (8, 8), (8, 8)]) == expected


def test_a_folder_needs_its_configurations_alone(tmp_path: Path) -> None:
    whole = families.save("sd3", tmp_path / "whole")
    bare = tmp_path / "bare"
    for file in whole.glob("**/*config.json"):
        (bare / file.parent.name).mkdir(parents=True, exist_ok=True)
        (bare / file.parent.name / file.name).write_text(file.read_text())
    with pytest.raises(UserError, match=r"has no model_index\.json"):
        copied_folder(bare, "sd3", tmp_path / "a")
    (bare / "model_index.json").write_text((whole / "model_index.json").read_text())
    model = families.pretrained("sd3", copied_folder(bare, "sd3", tmp_path / "b"))
    assert encoder_bytes(model) == encoder_bytes(families.pretrained("sd3", whole))
    (bare / "vae" / "config.json").unlink()
    save_file({}, bare / "vae" / "model.safetensors")
    with pytest.raises(UserError, match=r"vae/config\.json cannot be read"):
        copied_folder(bare, "sd3", tmp_path / "c")
