"""The model's own names of the layers in a LoRA, made of those that ComfyUI, kohya's scripts and trainers write.

ComfyUI's names are read by the table with which they are written (`Backbone.comfy_key`). Layouts that hold several of
the model's layers as one, such as q, k and v, are converted by diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from swd.types import UserError

if TYPE_CHECKING:  # a model reads the adapters that are added to its base
    from swd.modules.backbones.base import Backbone
    from swd.modules.pretrained import Pretrained

KOHYA = "lora_unet_"
"""Beginning of names in kohya's layout, in which underscores stand for the dots of a path."""
_ROOTS = ("transformer.", "unet.", "diffusion_model.")
"""What diffusers and ComfyUI put before the names of the denoising network."""


def bare(name: str) -> str:
    """A layer's name without what diffusers and ComfyUI put before it."""
    return next((name.removeprefix(root) for root in _ROOTS if name.startswith(root)), name)


def kohya(name: str) -> str:
    """A layer's name in kohya's layout."""
    return name if name.startswith(KOHYA) else KOHYA + name.replace(".", "_")


def table(layers: Iterable[str], backbone: type[Backbone]) -> dict[str, str]:
    """The model's own name of a layer by each other name for it: ComfyUI's, and both of them in kohya's layout.

    A name that two layers share is left out.
    """
    found: dict[str, str | None] = {}
    for layer in layers:
        comfy = bare(backbone.comfy_key(layer))
        for name in {comfy, kohya(comfy), kohya(layer)}:
            found[name] = layer if found.get(name, layer) == layer else None
    return {name: layer for name, layer in found.items() if layer is not None}


def with_own_names(state: Mapping[str, Tensor], layers: Iterable[str], model: Pretrained) -> dict[str, Tensor]:
    """LoRA weights under the names of the model's own layers; as they are where a name stands for no layer.

    Args:
        state: `MODULE.lora_A.weight` and `MODULE.lora_B.weight` with any program's names of modules, their scale folded
            in.
        layers: paths of the layers of the model's network that a LoRA can adapt.
        model: the model.

    Raises:
        UserError: if two modules are names of one layer.
    """
    own = set(layers)
    modules = {key.rpartition(".lora_")[0] for key in state}
    if modules <= own:
        return dict(state)
    names = {name: name for name in own} | table(own, model.backbone_class)
    if not modules <= names.keys():
        return _by_diffusers(state, model) or dict(state)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, part = key.rpartition(".lora_")
        new = f"{names[module]}.lora_{part}"
        if new in renamed:
            raise UserError(f"the adapter has two names for the layer {names[module]}, one is {module}; remove one")
        renamed[new] = value
    return renamed


def _by_diffusers(state: Mapping[str, Tensor], model: Pretrained) -> dict[str, Tensor] | None:
    """The weights as the family's stock pipeline converts them from kohya's layout; None if it does not know them.

    Its converters may leave out what they do not know. So numbers that tell every row from all others are converted
    too, and each must come out again.
    """
    # The weights, and numbers of the same shapes in their place: of modules, and of rows.
    modules = sorted({key.rpartition(".lora_")[0] for key in state})
    downs = {module: state[f"{module}.lora_A.weight"] for module in modules}
    ups = {module: state[f"{module}.lora_B.weight"] for module in modules}
    rows = torch.arange(1, 1 + sum(len(up) for up in ups.values()), dtype=torch.float64)
    parts = rows.split([len(up) for up in ups.values()])
    numbered_downs = {
        module: torch.full_like(down, number, dtype=torch.float64)
        for number, (module, down) in enumerate(downs.items(), 1)
    }
    numbered_ups = {
        module: part.view(-1, *[1] * (up.ndim - 1)).expand_as(up).clone()
        for (module, up), part in zip(ups.items(), parts, strict=True)
    }

    # Both converted; every number must come out again.
    try:
        numbered = _converted(numbered_downs, numbered_ups, model)
        found = _converted(downs, ups, model)
    except Exception:  # the converters raise errors of many types for names that they do not know
        return None
    for ending, expected in ((".lora_A.weight", len(modules)), (".lora_B.weight", len(rows))):
        values = [value.flatten() for key, value in numbered.items() if key.endswith(ending)]
        if not values or torch.cat(values).unique().numel() != expected:
            return None
    return found


def _converted(downs: Mapping[str, Tensor], ups: Mapping[str, Tensor], model: Pretrained) -> dict[str, Tensor]:
    """LoRA weights that the stock pipeline made of kohya's layout, under names without a beginning."""
    tensors: dict[str, Tensor] = {}
    for module, down in downs.items():
        name = kohya(module)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": ups[module]}
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))  # a scale of 1
    pipeline: Any = getattr(diffusers, model.backbone_class.pipeline_type)
    made = pipeline.lora_state_dict(tensors, unet_config=model.meta_network.config)
    weights = made[0] if isinstance(made, tuple) else made
    return {bare(key): value for key, value in convert_unet_state_dict_to_peft(weights).items()}
