"""Every configuration of a metric builds, states all arguments, and says in one line what it lacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import yaml
from tiny import CONF

from swd.config import build_node, target_of
from swd.metrics.base import PictureMetric
from swd.types import UserError

NAMES = sorted(file.stem for file in (CONF / "metric").glob("*.yaml"))
SHIPPED = ("judge_fid", "judge_kid", "shapes_accuracy", "shapes_diversity", "shapes_exact")
"""Metrics whose weights come with the package."""


def node(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF / "metric" / f"{name}.yaml").read_text())
    return found


def nodes(value: Any) -> list[dict[str, Any]]:
    """All nodes in it that name a constructor."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict) and "_target_" in value else []
    return own + [each for part in inner for each in nodes(part)]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_a_metric_of_its_name(name: str) -> None:
    metric = build_node(node(name), f"metrics.{name}")
    assert isinstance(metric, PictureMetric)
    assert metric.name == name


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_states_all_arguments(name: str) -> None:
    for each in nodes(node(name)):
        parameters = inspect.signature(target_of(each["_target_"], name)).parameters
        # InceptionFeatures' preparation is left to its own default, SPEC's.
        missing = set(parameters) - set(each) - {"steps"}
        assert not missing, f"{each['_target_']} has {missing} too"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHIPPED])
def test_absent_weights_or_interpreters_are_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv(f"SWD_SCORER_{name.upper()}", raising=False)
    with pytest.raises(UserError) as raised:
        build_node(node(name), f"metrics.{name}").check()
    text = str(raised.value)
    assert "\n" not in text
    assert any(word in text for word in ("docs/", "hf download", "give")), text


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_that_are_shipped_are_found(name: str) -> None:
    metric = build_node(node(name), f"metrics.{name}")
    for extractor in metric.extractors:
        extractor.check()
        assert len(extractor.weights_id()) == 64


def test_names_of_preparations_tell_metrics_apart() -> None:
    built = {name: build_node(node(name), name) for name in ("fid", "kid", "patch_fid", "clip", "pickscore", "cmmd")}
    names = {name: [each.name for each in metric.extractors] for name, metric in built.items()}
    assert names == {
        "fid": ["inception-512bicubic-256lanczos-crop256"],
        "kid": ["inception-512bicubic-256lanczos-crop256"],
        "patch_fid": ["inception-crop299"],
        "clip": ["CLIP-ViT-H-14-laion2B-s32B-b79K-224bicubic-crop224-77tokens"],
        "pickscore": ["PickScore_v1-224bicubic-crop224-77tokens"],
        "cmmd": ["clip-vit-large-patch14-336-crop-336x336bicubic"],
    }
