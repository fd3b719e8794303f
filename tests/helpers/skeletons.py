"""Pipeline folders of the models that ship as configuration: their networks' configuration, and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from swd.modules.backbones import load_family

NETWORKS = Path(__file__).parents[2] / "assets" / "published" / "networks"
CONF = Path(__file__).parents[2] / "conf"
VAE = {"wan22_5b": {"z_dim": 48, "scale_factor_temporal": 4, "scale_factor_spatial": 16}}
"""Configuration of the VAE where the number of its blocks does not say how much it shrinks pictures."""
MODELS = tuple(sorted(file.stem for file in NETWORKS.glob("*.json")))


def options(name: str) -> dict[str, Any]:
    """The model node of a shipped configuration."""
    base, own = (yaml.safe_load((CONF / f"{file}.yaml").read_text()) for file in ("model_base", f"model/{name}"))
    return {key: value for key, value in (base | own).items() if key not in ("_target_", "defaults")}


def skeleton(name: str, folder: Path) -> Path:
    """A folder that holds the network's configuration; its weights are empty files."""
    config = json.loads((NETWORKS / f"{name}.json").read_text())
    backbone = load_family(options(name)["family"])
    networks = (backbone.subfolder, *backbone.other_experts)
    key = "encoder_block_out_channels" if options(name)["family"] == "sana" else "block_out_channels"
    vae = VAE.get(name, {key: [1] * (6 if options(name)["family"] == "sana" else 4)})
    for sub, content in {**dict.fromkeys(networks, config), "vae": vae}.items():
        (folder / sub).mkdir(parents=True)
        (folder / sub / "config.json").write_text(json.dumps(content))
        save_file({}, folder / sub / "model.safetensors")
    index: dict[str, Any] = {part: ["diffusers", config["_class_name"]] for part in networks}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "_class_name": backbone.pipeline_type, **backbone.known_settings}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def hub(root: Path) -> Any:
    """A stand-in for `snapshot_download` that knows the shipped models."""
    known = {options(name)["path"]: name for name in MODELS}

    def snapshot(repository: str, **kwargs: Any) -> str:
        name = known[repository]
        folder = root / name
        return str(folder if folder.exists() else skeleton(name, folder))

    return snapshot
