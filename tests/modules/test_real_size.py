"""Networks at real size, on the meta device: no weights, no arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from costs import TEXT, TFLOP
from peft import LoraConfig
from skeletons import options, skeleton

from swd.export.student_folder import comfy_state
from swd.metrics.flops import forward_gflop
from swd.modules.pretrained import Pretrained
from swd.modules.targets import names_for_peft

KEYS = Path(__file__).parents[1] / "data"
MODELS = (
    "sd35_medium",
    "sd35_large",
    "flux_dev",
    "sdxl",
    "wan21_1_3b",
    "qwen_image",
    "flux2_klein_4b",
    "flux2_klein_9b",
    "flux2_dev",
    "z_image",
    "chroma1",
    "wan22_5b",
    "wan22_a14b_low",
)

PARAMETERS = {
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "flux_dev": 11_901_408_320,
    "sdxl": 2_567_463_684,
    "wan21_1_3b": 1_418_996_800,
    "wan22_5b": 4_999_787_712,
    "wan22_a14b_low": 14_288_491_584,
    "qwen_image": 20_430_401_088,
    "flux2_klein_4b": 3_875_544_576,
    "flux2_klein_9b": 9_078_581_248,
    "flux2_dev": 32_223_281_152,
    "z_image": 6_154_908_736,
    "chroma1": 8_899_983_424,
}
BLOCKS = {
    "sd35_medium": 24,
    "sd35_large": 38,
    "flux_dev": 57,
    "sdxl": 87,
    "wan21_1_3b": 30,
    "qwen_image": 60,
    "flux2_klein_4b": 25,
    "flux2_klein_9b": 32,
    "flux2_dev": 56,
    "z_image": 34,
    "chroma1": 57,
}
LORA_LAYERS = {
    "sd35_medium": 242,
    "sd35_large": 302,
    "flux_dev": 266,
    "sdxl": 700,
    "wan21_1_3b": 300,
    "qwen_image": 480,
    "flux2_klein_4b": 100,
    "flux2_klein_9b": 144,
    "flux2_dev": 192,
    "z_image": 238,
    "chroma1": 266,
}

WIDTH = {
    "sd35_medium": 1536,
    "sd35_large": 2432,
    "flux_dev": 3072,
    "sdxl": 1280,
    "wan21_1_3b": 1536,
    "qwen_image": 3072,
    "flux2_klein_4b": 3072,
    "flux2_klein_9b": 4096,
    "flux2_dev": 6144,
    "z_image": 3840,
    "chroma1": 3072,
    "wan22_5b": 3072,
    "wan22_a14b_low": 5120,
}
FURTHER = ("sd35_large", "flux2_klein_9b", "flux2_dev", "wan22_5b", "wan22_a14b_low")
"""Models whose network is of a class that another one of them has."""
BLOCKS |= {"wan22_5b": 30, "wan22_a14b_low": 40}
LORA_LAYERS |= {"wan22_5b": 300, "wan22_a14b_low": 400}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    folder = skeleton(name, tmp_path_factory.mktemp("real") / name)
    return Pretrained(**options(name) | {"path": str(folder)})


@pytest.fixture(scope="module")
def network(model: Pretrained) -> Any:
    return model.meta_network


@pytest.fixture(scope="module")
def lora(model: Pretrained) -> dict[str, torch.Tensor]:
    """Parameters of a student's adapter on a network of its own, by name."""
    with torch.device("meta"):
        network = model.network_class.from_config(model.network_config)
        network.add_adapter(LoraConfig(r=model.rank, target_modules=names_for_peft(network, model.targets)), "student")
    return {key: p for key, p in network.named_parameters() if ".lora_" in key}


def test_parameters(name: str, network: Any) -> None:
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_repeated_blocks_hold_nearly_all_weights(name: str, model: Pretrained, network: Any) -> None:
    blocks = model.backbone_class(network).repeated_blocks
    inside = sum(p.numel() for block in blocks for p in block.parameters())
    share = {"sdxl": 0.9, "flux2_klein_4b": 0.9, "flux2_klein_9b": 0.9, "chroma1": 0.96}.get(name, 0.97)
    assert len(blocks) == BLOCKS[name] and inside / PARAMETERS[name] > share


def test_lora_layers_and_their_rank(name: str, lora: dict[str, torch.Tensor]) -> None:
    a = [p for key, p in lora.items() if ".lora_A.student." in key]
    assert len(a) == LORA_LAYERS[name]
    assert {p.shape[0] for p in a} == {128 if name in ("flux_dev", "chroma1") or name.startswith("wan") else 64}


def check_cost(name: str, model: Pretrained, size: Any) -> None:
    text = model.backbone_class.random_conditioning(model.network_config, 1, TEXT[name])
    expected = TFLOP[name][size]
    unit = 10.0 ** -len(expected.split(".")[1])
    # Half a unit of the last digit, and a little: 2.894998 is known as 2.90.
    sides = (size, size) if isinstance(size, int) else size
    assert forward_gflop(model, sides, text) / 1000 == pytest.approx(float(expected), abs=0.501 * unit), size


def test_cost_of_a_forward_pass_at_three_sizes(name: str, model: Pretrained) -> None:
    """Cost is of second order in a size's tokens, so that three sizes decide it.

    Of the further models of a network's class the largest size is counted: they have other numbers in the same code.
    """
    sizes = list(TFLOP[name])
    for size in [sizes[-1]] if name in FURTHER else [sizes[0], sizes[len(sizes) // 2], sizes[-1]]:
        check_cost(name, model, size)


@pytest.mark.slow
def test_cost_of_a_forward_pass_at_every_size(name: str, model: Pretrained) -> None:
    for size in TFLOP[name]:
        check_cost(name, model, size)


def test_features_at_the_chosen_block(name: str, model: Pretrained, network: Any) -> None:
    backbone = model.backbone_class(network, model.embedded_guidance)
    text = model.backbone_class.random_conditioning(model.network_config, 2, TEXT[name]).to("meta")
    size = model.size
    x = torch.empty(2, model.channels, *size, device="meta")
    with torch.no_grad(), torch.device("meta"):
        feature = backbone.features(x, torch.ones(2, device="meta"), text, model.feature_blocks)[0]
    tokens = {"sdxl": 32 * 32, "wan21_1_3b": 21 * 30 * 52, "wan22_5b": 31 * 22 * 40}
    tokens = (tokens | {"wan22_a14b_low": 21 * 30 * 52}).get(name, 64 * 64)
    width = WIDTH[name]
    assert tuple(feature.shape) == (2, tokens, width) and model.limits.width == width


def test_exported_keys_and_shapes_are_those_that_comfyui_reads(
    name: str, model: Pretrained, lora: dict[str, torch.Tensor]
) -> None:
    """`comfyui_keys.json`: names under which ComfyUI finds a weight, `*` counting from 0: how many, outputs, inputs."""
    known = json.loads((KEYS / "comfyui_keys.json").read_text())[name]
    expected = {
        pattern.replace("*", str(i)): (outer, inner)
        for pattern, (count, outer, inner) in known.items()
        for i in range(count)
    }
    state = {key.replace(".student.", "."): p for key, p in lora.items()}
    renamed = comfy_state(model.backbone_class, state)
    found: dict[str, list[int]] = {}
    for key, value in renamed.items():
        for end, place, axis in (
            (".lora_B.weight", 0, 0),
            (".lora_up.weight", 0, 0),
            (".lora_A.weight", 1, 1),
            (".lora_down.weight", 1, 1),
        ):
            if key.endswith(end):
                found.setdefault(key.removesuffix(end), [0, 0])[place] = value.shape[axis]
    assert {key: tuple(shape) for key, shape in found.items()} == expected
    assert len(expected) == LORA_LAYERS[name]
