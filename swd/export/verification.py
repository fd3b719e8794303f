"""An exported folder, loaded back in every way that it is meant for, must predict what its student predicts.

One network is in memory at a time, in float32, and no text encoder or VAE.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
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
from swd.modules.adapters import DIFFUSERS_WEIGHTS, MERGE, PEFT_WEIGHTS, Adapter, Lora, read_lora
from swd.modules.pretrained import Pretrained
from swd.modules.student import FullStudent
from swd.types import Size, UserError

COMFY_WEIGHTS = "comfyui.safetensors"
SHARE = 1e-3
"""By how much of the student's update a reloaded network may differ."""
ROUNDING = 100 * torch.finfo(torch.float32).eps
"""By how much of the prediction the order of float32 operations may change it."""
VISIBLE = 0.1
"""Size of an update, relative to the weights that it changes, that predictions show clearly."""


@torch.no_grad()
def check_adapter(folder: Path, adapter: Adapter, model: Pretrained, size: Size) -> None:
    """Raise UserError unless peft, diffusers and ComfyUI get from `folder` what the adapter's own file means to them.

    What is expected is what peft or diffusers themselves make of the file that was exported, so that a setting which
    this package has misread is noticed. A small update is enlarged alike on all sides, so that a loader that loads
    nothing cannot pass for rounding.

    Args:
        folder: as exported.
        adapter: what was exported.
        model: its base.
        size: latent size to predict at.
    """
    network = _network(model)
    base, gain = predict(network, model, size), gain_of(network, adapter)
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
        compare(way, predict(build(), model, size), expected, (expected - base).norm(), reader)


@torch.no_grad()
def check_network(folder: Path, student: FullStudent, model: Pretrained, size: Size) -> None:
    """Raise UserError unless diffusers gets the student's network from `folder`."""
    expected = predict(student.network(model).float().eval(), model, size)
    actual = predict(FullStudent(folder).network(model).float().eval(), model, size)
    compare("diffusers", actual, expected, torch.zeros(()))


def compare(way: str, actual: Tensor, expected: Tensor, update: Tensor, reader: str = "") -> None:
    """Raise UserError if a prediction differs by more than `SHARE` of the update's norm and more than rounding does.

    Args:
        way: what loaded the exported network.
        actual: its prediction.
        expected: the student's.
        update: norm of what the student changes in the prediction.
        reader: what loaded the student, and from where, if that was not this package itself.
    """
    error = (actual - expected).norm()
    if not error <= torch.maximum(SHARE * update, ROUNDING * expected.norm()):
        told = f" from what {reader}" if reader else ""
        fix = f"{MERGE}, or please report" if reader else "please report"
        raise UserError(
            f"export refused: the network loaded by {way} differs{told} by {error:.2g} in a prediction of norm "
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
    """What makes an adapter's update `VISIBLE`; at least 1, and 1 for an update that is zero."""
    weights = dict(network.named_parameters())
    update = whole = 0.0
    for module in adapter.modules:
        a, b = (adapter.state[f"{module}.lora_{kind}.weight"].double().flatten(1) for kind in "AB")
        update += ((b.T @ b) * (a @ a.T)).sum().item()  # the squared norm of b @ a
        whole += weights[f"{module}.weight"].square().sum().item()
    return max(1.0, VISIBLE * (whole / update) ** 0.5) if update > 0 else 1.0


def add(network: Any, state: Mapping[str, Tensor], gain: float = 1.0) -> None:
    """Add `gain * lora_B @ lora_A` to the weights of a network."""
    weights = dict(network.named_parameters())
    for key, b in state.items():
        module, _, kind = key.rpartition(".lora_")
        if kind == "B.weight":
            weight = weights[f"{module}.weight"]
            update = b.flatten(1) @ state[f"{module}.lora_A.weight"].flatten(1)
            weight += gain * update.to(weight).view_as(weight)


def scaled(network: Any, gain: float) -> Any:
    """A network with LoRA layers, their updates multiplied by `gain`."""
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling = {name: gain * scale for name, scale in layer.scaling.items()}
    return network


# Ways to load


def _network(model: Pretrained) -> Any:
    return model.network("cpu").network.float().eval()


def as_published(network: Any, adapter: Adapter, model: Pretrained, gain: float) -> tuple[str, Any]:
    """The student as somebody else's loader reads the adapter's own file, its update multiplied by `gain`.

    Args:
        network: the base, which is changed.
        adapter: what was exported.
        model: its base.
        gain: as of `gain_of`.

    Returns:
        What loaded it and from where, for messages; empty for an adapter that is in no file. And the network.

    Raises:
        UserError: if that loader refuses the file.
    """
    file = adapter.source
    if not file.is_file():
        add(network, adapter.state, gain)
        return "", network
    if file.name == PEFT_WEIGHTS:
        reader, load = "peft", partial(_with_peft, network, file.parent)
    else:
        lora = read_lora(file)
        reader, load = "peft", partial(_with_alphas, network, lora)
        if lora.as_diffusers and lora.prefix == model.backbone_class.subfolder:
            reader, load = "diffusers", partial(_with_diffusers, network, file, model)
        elif lora.as_diffusers and not lora.prefix:
            reader, load = "diffusers", partial(_with_bare_names, network, file)
    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.CRITICAL)  # what fails is told below
    try:
        loaded = load()
    except Exception as error:  # whatever these libraries make of a file that somebody wrote
        raise UserError(
            f"export refused: {reader} itself cannot load {file} ({one_line(error)[:200]}); {MERGE}"
        ) from None
    finally:
        diffusers_logging.set_verbosity(before)
    return f"{reader} makes of {file}", scaled(loaded, gain)


def _with_peft(network: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(network, str(folder)).eval()


def _with_diffusers(network: Any, file: Path, model: Pretrained) -> Any:
    part = model.backbone_class.subfolder
    others: dict[str, Any] = dict.fromkeys([*model.files.parts, *model.files.absent])
    others.pop("scheduler")
    pipe = model.pipeline(**others | {part: network})
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    return getattr(pipe, part).eval()


def _with_bare_names(network: Any, file: Path) -> Any:
    """What the network's own `save_lora_adapter` writes: names without the part's."""
    network.load_lora_adapter(str(file.parent), weight_name=file.name, prefix=None)
    return network.eval()


def _with_alphas(network: Any, lora: Lora) -> Any:
    """kohya's layout, which neither library reads for every family: peft is told the ranks and alphas of the file."""
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
    add(network, state, gain)
    return network


def comfyui_update(tensors: dict[str, Tensor], model: Pretrained, modules: list[str]) -> dict[str, Tensor]:
    """`lora_A` and `lora_B` by module, as ComfyUI understands a file: kohya's or diffusers' names, alpha / rank.

    Raises:
        UserError: if a module is missing, a name is left over, or shapes do not give the module's weight.
    """
    with torch.device("meta"):
        network = model.network_class.from_config(model.network_config)
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
    left, state = dict(tensors), {}
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
