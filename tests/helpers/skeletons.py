"""Pipeline folders of the models that ship as configuration: their networks' configuration, and no weights."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from torch import nn

from swd.modules.backbones import load_family
from swd.modules.family_folder import FamilyFolder
from swd.modules.pretrained import Pretrained
from swd.types import Role

_meta_network: Any = FamilyFolder.meta_network.func  # type: ignore[attr-defined]
_untrained_networks = Pretrained.untrained_networks

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


@functools.cache
def _shipped() -> dict[str, str]:
    """Names of the shipped models by their repositories."""
    return {options(name)["path"]: name for name in MODELS}


def hub(root: Path) -> Any:
    """A stand-in for `snapshot_download` that knows the shipped models."""

    def snapshot(repository: str, **kwargs: Any) -> str:
        name = _shipped()[repository]
        folder = root / name
        return str(folder if folder.exists() else skeleton(name, folder))

    return snapshot


_built: dict[str, nn.Module] = {}
"""Networks without weights, by what they are built of."""


def build_once(patch: pytest.MonkeyPatch) -> None:
    """Keep networks without weights, alone and with what is trained: those of 1,600 layers take seconds to build."""

    def once(key: str, build: Callable[[], nn.Module]) -> nn.Module:
        if key not in _built:
            _built[key] = build()
            gc.collect()  # and no more: 100,000 objects each, through which every search for garbage would go
            gc.freeze()
        return _built[key]

    def meta_network(self: FamilyFolder) -> nn.Module:
        return once(f"{self.network_class} {self.network_config}", lambda: _meta_network(self))

    def untrained_networks(self: Pretrained, roles: Sequence[Role]) -> nn.Module:
        key = f"{self.network_class} {self.network_config} {self.tuned} {tuple(roles)}"
        return once(key, lambda: _untrained_networks(self, roles))

    patch.setattr(FamilyFolder, "meta_network", property(meta_network))
    patch.setattr(Pretrained, "untrained_networks", untrained_networks)
