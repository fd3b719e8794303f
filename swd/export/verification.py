"""Checks that an exported folder predicts what its student predicts, with every library that can load it.

Only one network is in memory at a time, in float32, and no text encoder or VAE.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from swd.config import one_line
from swd.modules.adapters import (
    DIFFUSERS_WEIGHTS,
    MERGE,
    PEFT_WEIGHTS,
    Adapter,
    Lora,
    adaptable,
    is_checkpoint,
    read_lora,
)
from swd.modules.checkpoint_student import CheckpointNetwork
from swd.modules.lora_names import table
from swd.modules.pretrained import Pretrained
from swd.modules.saved_student import FullStudent
from swd.types import Size, UserError

COMFY_WEIGHTS = "comfyui.safetensors"
SHARE = 1e-3
"""Largest difference of a reloaded network's prediction, relative to the student's update."""
ROUNDING = 100 * torch.finfo(torch.float32).eps
"""Largest difference that the order of float32 operations can explain, relative to the prediction."""
VISIBLE = 0.1
"""Size of an update, relative to the weights that it changes, that is clearly visible in predictions."""


@torch.no_grad()
def check_adapter(folder: Path, adapter: Adapter, model: Pretrained, size: Size) -> None:
    """Raise UserError unless peft, diffusers and ComfyUI load from `folder` the student that `adapter` describes.

    The reference is the original adapter file as peft or diffusers themselves read it, so that a setting which this
    package misreads is noticed. A small update is enlarged by the same factor on all sides: otherwise a loader that
    loads nothing at all would differ by no more than rounding.

    Args:
        folder: the exported folder.
        adapter: the exported adapter.
        model: its base.
        size: latent size to predict at.
    """
    network = _network(model)
    base = predict(network, model, size)
    gain = gain_of(network, adapter)
    reader, network = as_published(network, adapter, model, gain)
    expected = predict(network, model, size)
    del network
    if not any(value.any() for key, value in adapter.state.items() if ".lora_B." in key):
        warnings.warn("this adapter's update is zero: the student is the teacher", UserWarning, stacklevel=2)
    ways: dict[str, Callable[[], Any]] = {
        "peft": lambda: scaled(_with_peft(_network(model), folder), gain),
        "diffusers": lambda: scaled(_with_diffusers(_network(model), folder / DIFFUSERS_WEIGHTS, model), gain),
    }
    if (folder / COMFY_WEIGHTS).is_file():
        ways["ComfyUI"] = lambda: _with_comfyui(folder, model, adapter, gain)
    for way, build in ways.items():
        check_prediction(way, predict(build(), model, size), expected, (expected - base).norm(), reader)


@torch.no_grad()
def check_network(folder: Path, student: FullStudent | CheckpointNetwork, model: Pretrained, size: Size) -> None:
    """Raise UserError unless diffusers loads the student's network from `folder`."""
    expected = predict(student.network(model).float().eval(), model, size)
    actual = predict(FullStudent(folder).network(model).float().eval(), model, size)
    check_prediction("diffusers", actual, expected, torch.zeros(()))


def check_prediction(way: str, actual: Tensor, expected: Tensor, update: Tensor, reader: str = "") -> None:
    """Raise UserError if a prediction differs by more than `SHARE` of the update's norm and by more than rounding.

    Args:
        way: name of the library that loaded the exported network.
        actual: prediction of that network.
        expected: prediction of the student.
        update: norm of the change that the student makes to the base's prediction.
        reader: the library that loaded the student, and its file, if it was not this package.
    """
    error = (actual - expected).norm()
    if not error <= torch.maximum(SHARE * update, ROUNDING * expected.norm()):
        reference = f" from what {reader}" if reader else ""
        fix = f"{MERGE}, or please report" if reader else "please report"
        raise UserError(
            f"export refused: the network loaded by {way} differs{reference} by {error:.2g} in a prediction of norm "
            f"{expected.norm():.2g} that the student changes by {update:.2g}; {fix}"
        )


def predict(network: Any, model: Pretrained, size: Size) -> Tensor:
    """One forward pass on random inputs, the same for every network of the model."""
    backbone = model.backbone_class(network, model.embedded_guidance)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.channels, *size, generator=generator)
    conditioning = backbone.random_conditioning(model.network_config, 1, 8)
    return backbone.call(x_t, torch.tensor([0.9]), conditioning).float()


# The update


def gain_of(network: Any, adapter: Adapter) -> float:
    """Factor by which an adapter's update becomes `VISIBLE`; at least 1, and 1 for an update that is zero."""
    weights = dict(network.named_parameters())
    update = whole = 0.0
    for module in adapter.modules:
        a, b = (adapter.state[f"{module}.lora_{kind}.weight"].double().flatten(1) for kind in "AB")
        update += ((b.T @ b) * (a @ a.T)).sum().item()  # the squared norm of b @ a
        whole += weights[f"{module}.weight"].square().sum().item()
    return max(1.0, VISIBLE * (whole / update) ** 0.5) if update > 0 else 1.0


def add_update(network: Any, state: Mapping[str, Tensor], gain: float = 1.0) -> None:
    """Add `gain * lora_B @ lora_A` to the weights of a network."""
    weights = dict(network.named_parameters())
    for key, b in state.items():
        module, _, kind = key.rpartition(".lora_")
        if kind == "B.weight":
            weight = weights[f"{module}.weight"]
            update = b.flatten(1) @ state[f"{module}.lora_A.weight"].flatten(1)
            weight += gain * update.to(weight).view_as(weight)


def scaled(network: Any, gain: float) -> Any:
    """The network, after its LoRA updates were multiplied by `gain`."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: gain * scale for name, scale in layer.scaling.items()}
    return network


# Ways to load


def _network(model: Pretrained) -> Any:
    return model.network("cpu").network.float().eval()


def as_published(network: Any, adapter: Adapter, model: Pretrained, gain: float) -> tuple[str, Any]:
    """The student as peft or diffusers reads the adapter's original file, with its update multiplied by `gain`.

    Args:
        network: the base, which is changed.
        adapter: the exported adapter.
        model: its base.
        gain: factor from `gain_of`.

    Returns:
        The reading library and the file, in words for messages, empty where no library reads the file; and the network.

    Raises:
        UserError: if that loader refuses the file.
    """
    file = adapter.source
    if not file.is_file() or is_checkpoint(file):
        add_update(network, adapter.state, gain)
        return "", network
    found = _reader_of(file, network, adapter, model)
    if found is None:
        add_update(network, adapter.state, gain)
        return "", network
    reader, load = found

    # Errors become one line, and the libraries' own messages are silenced.
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        loaded = load()
    except Exception as error:  # these libraries raise errors of many types for files that they cannot read
        raise UserError(
            f"export refused: {reader} itself cannot load {file} ({one_line(error)[:200]}); {MERGE}"
        ) from None
    finally:
        diffusers_logging.set_verbosity(before)
    return f"{reader} makes of {file}", scaled(loaded, gain)


def _reader_of(file: Path, network: Any, adapter: Adapter, model: Pretrained) -> tuple[str, Callable[[], Any]] | None:
    """Name of the library that reads an adapter's file, which depends on its layout, and a call that loads it.

    None where the file has names of its own for the layers and its scale is not beside its weights.
    """
    lora = read_lora(file)
    foreign = not lora.down.keys() <= set(adapter.modules)
    if foreign and (file.name == PEFT_WEIGHTS or not lora.alphas or len(lora.down) != len(adapter.modules)):
        return None
    if foreign:
        return "peft", partial(_with_alphas, network, _renamed(lora, model))
    if file.name == PEFT_WEIGHTS:
        return "peft", partial(_with_peft, network, file.parent)
    if lora.as_diffusers and lora.prefix == model.backbone_class.lora_prefix():
        return "diffusers", partial(_with_diffusers, network, file, model)
    if lora.as_diffusers and not lora.prefix:
        return "diffusers", partial(_with_bare_names, network, file)
    return "peft", partial(_with_alphas, network, lora)


def _renamed(lora: Lora, model: Pretrained) -> Lora:
    """The weights of a file, not scaled, under the names that the model has for its layers."""
    names = table(adaptable(model), model.backbone_class)
    down, up = ({names.get(module, module): value for module, value in each.items()} for each in (lora.down, lora.up))
    return replace(lora, down=down, up=up, alphas={names.get(key, key): value for key, value in lora.alphas.items()})


def _with_peft(network: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(network, str(folder)).eval()


def _with_diffusers(network: Any, file: Path, model: Pretrained) -> Any:
    part = model.backbone_class.subfolder
    others: dict[str, Any] = dict.fromkeys([*model.files.parts, *model.files.absent])
    others.pop("scheduler")
    # The pipeline reads the first expert's configuration where it loads into the second.
    others |= dict.fromkeys(model.backbone_class.other_experts, network)
    pipe = model.pipeline(**others | {part: network})
    pipe.load_lora_weights(str(file.parent), weight_name=file.name, **model.backbone_class.lora_arguments)
    return getattr(pipe, part).eval()


def _with_bare_names(network: Any, file: Path) -> Any:
    """Load the layout of the network's own `save_lora_adapter`: names without a prefix such as `transformer.`."""
    network.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=None)
    return network.eval()


def _with_alphas(network: Any, lora: Lora) -> Any:
    """Load kohya's layout, which neither library reads for every family, with peft and the file's ranks and alphas."""
    ranks = {f"^{re.escape(module)}": weight.shape[0] for module, weight in lora.down.items()}
    alphas = {f"^{re.escape(module)}": lora.alphas.get(module, float(a.shape[0])) for module, a in lora.down.items()}
    config = LoraConfig(target_modules=list(lora.down), rank_pattern=ranks, alpha_pattern=alphas)
    network.add_adapter(config, "default")
    state = {f"{module}.lora_A.weight": weight for module, weight in lora.down.items()}
    state |= {f"{module}.lora_B.weight": weight for module, weight in lora.up.items()}
    set_peft_model_state_dict(network, state, "default")
    return network.eval()


def _with_comfyui(folder: Path, model: Pretrained, adapter: Adapter, gain: float) -> Any:
    state = comfyui_update(load_file(folder / COMFY_WEIGHTS), model, adapter.modules)
    network = _network(model)
    add_update(network, state, gain)
    return network


def comfyui_update(tensors: dict[str, Tensor], model: Pretrained, modules: list[str]) -> dict[str, Tensor]:
    """`lora_A` and `lora_B` of each module as ComfyUI reads them: kohya's or diffusers' names, scaled by alpha / rank.

    Raises:
        UserError: if a module is missing, a name is left over, or shapes do not give the module's weight.
    """
    with torch.device("meta"):
        network = model.network_class.from_config(model.network_config)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    left = dict(tensors)
    state = {}
    for module in modules:
        name = model.backbone_class.comfy_key(module)
        kohya = f"{name}.lora_up.weight" in left
        a = left.pop(f"{name}.lora_{'down' if kohya else 'A'}.weight", None)
        b = left.pop(f"{name}.lora_{'up' if kohya else 'B'}.weight", None)
        alpha = left.pop(f"{name}.alpha", None)
        if a is None or b is None:
            raise UserError(f"export refused: ComfyUI finds no {name} in {COMFY_WEIGHTS}; please report")
        if b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != shapes[f"{module}.weight"][:2]:
            raise UserError(
                f"export refused: {COMFY_WEIGHTS} holds {name} as {tuple(b.shape)} times {tuple(a.shape)}, which is "
                f"no {tuple(shapes[f'{module}.weight'])}; please report"
            )
        state[f"{module}.lora_A.weight"] = a
        state[f"{module}.lora_B.weight"] = b * (1.0 if alpha is None else float(alpha) / a.shape[0])
    if left:
        raise UserError(f"export refused: ComfyUI does not know {min(left)} in {COMFY_WEIGHTS}; please report")
    return state
