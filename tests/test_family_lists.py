"""Lists of families and models that stand in texts, against what the families' own files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from swd import scheduler
from swd.modules.backbones import known_families, load_family
from swd.modules.model_options import families_of_options

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPORT, GENERATE = ((ROOT / "conf" / f"{name}.yaml").read_text(encoding="utf-8") for name in ("export", "generate"))
TITLES = {
    "chroma": "Chroma",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "flux2_klein": "FLUX.2",
    "qwen_image": "Qwen-Image",
    "sana": "SANA",
    "sd3": "SD3",
    "sdxl": "SDXL",
    "wan": "Wan",
    "wan_5b": "Wan",
    "wan_high_noise": "Wan",
    "wan_low_noise": "Wan",
    "z_image": "Z-Image",
}
"""What texts call each family."""
FAMILIES = {name: load_family(name) for name in known_families()}


def titles(*families: str) -> set[str]:
    return {TITLES[name] for name in families}


def named(text: str) -> set[str]:
    """The families that a text names."""
    return {title for title in TITLES.values() if title in text}


def between(text: str, pattern: str) -> str:
    """What the group of a pattern matches in a text, on one line."""
    found = re.search(pattern, " ".join(text.split()))
    assert found is not None, f"the text has no {pattern!r} any more; change it here"
    return found.group(1)


def test_every_family_has_a_title() -> None:
    assert set(TITLES) == set(FAMILIES)


def test_who_loads_an_export() -> None:
    """In the help of the command and in the README; the second list is of those whose layers have other names there."""
    known = titles(*(name for name, family in FAMILIES.items() if family.comfyui))
    others = titles(*(name for name, family in FAMILIES.items() if not family.comfyui))
    assert named(between(EXPORT, r"ComfyUI if it has the family: (.*?); not")) == known
    assert named(between(EXPORT, r"; not (.*?) \(of a run")) == others
    assert named(between(README, r"for diffusers, peft, ComfyUI \(not (.*?)\)")) == others
    renamed = [name for name, family in FAMILIES.items() if family.comfy_key("x") != f"{family.lora_prefix()}.x"]
    assert named(between(EXPORT, r"where it wants other names \((.*?)\)")) == titles(*renamed) & known


def test_how_a_pipeline_takes_latents() -> None:
    by_layout = {
        layout: titles(*(name for name, family in FAMILIES.items() if family.layout == layout))
        for layout in ("tokens", "patches")
    }
    assert named(between(README, r'So are .*?\. (FLUX.*?) take `layout="tokens"`')) == by_layout["tokens"]
    assert named(between(README, r'beside it, (\S+) `layout="patches"`')) == by_layout["patches"]
    assert named(between(scheduler.__doc__ or "", r"at every step\. (.*?) need `latents`")) == by_layout["tokens"]
    first = titles(*(name for name, family in FAMILIES.items() if family.called_with_first_size))
    assert named(between(scheduler.__doc__ or "", r"(\S+) refuses latents of another size")) == first


def test_who_is_fed_guidance() -> None:
    nodes = {
        name: yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text()) for name in families_of_options()
    }
    fed = {name for name, node in nodes.items() if node.get("embedded_guidance") is not None}
    assert set(re.findall(r"\w+", between(GENERATE, r"drawing_guidance_scale; ([\w ]+) are fed it"))) - {"and"} == fed


@pytest.mark.parametrize("option", families_of_options())
def test_the_readme_names_every_option(option: str) -> None:
    assert f"`{option}`" in README.replace("`model=", "`")
