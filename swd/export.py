"""The student as one folder that stock diffusers, peft and ComfyUI load, with its schedule and its sampler.

`swd export run=... to=...` writes it, loads it back both ways, and refuses to finish if any output differs.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from swd import __version__, scheduler, train
from swd.adapters import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SCHEDULER_CONFIG,
    Adapter,
    check_fits,
    load,
    locate,
    write_layouts,
)
from swd.config import check
from swd.files import write_aside
from swd.modules.backbones.base import Backbone
from swd.modules.hub import is_hub_id
from swd.modules.pretrained import Pretrained
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError

ROOT = train.ROOT | {"run": str, "to": str, "verify": bool}
COMFY_WEIGHTS, SCHEDULER_FILE = "comfyui.safetensors", "scale_wise_scheduler.py"


def run(cfg: DictConfig) -> None:
    """Export what the configuration says; prints the folder."""
    check(cfg, ROOT)
    train.quiet()
    target = Path(cfg.to)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"to={cfg.to} exists already and is no empty folder; choose another")
    source = locate(cfg.run, Path(cfg.output))
    adapter = load(source)
    model: Pretrained = instantiate(model_of(source, cfg), _convert_="all")
    check_fits(adapter, model)
    schedule = schedule_of(source, cfg, model)
    print(export(adapter, model, schedule, target, cfg.verify))


def model_of(source: Path, cfg: DictConfig) -> Any:
    """The model that a run was trained with; the configuration's if the command line names one, or without a run."""
    file = source.parent / "config.yaml"
    named = any(re.match(r"\+*(model|experiment)[.=@]", override) for override in overrides())
    return cfg.model if named or not file.is_file() else OmegaConf.load(file).model


def overrides() -> list[str]:
    """What the command line sets, as far as there is one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def schedule_of(source: Path, cfg: DictConfig, model: Pretrained) -> ScaleWiseScheduler:
    """The schedule beside an adapter; for one that has none, the one on the command line."""
    folder = source if source.is_dir() else source.parent
    if (folder / SCHEDULER_CONFIG).is_file():
        return ScaleWiseScheduler.from_pretrained(folder)
    schedule = instantiate(cfg.schedule, _convert_="all")
    return schedule.scheduler(model.limits.divisor, model.backbone_class.process.prediction_type)


# Writing


def comfy_state(backbone: type[Backbone], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter under the names that ComfyUI reads for this family."""
    renamed = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".lora_")
        name = backbone.comfy_key(module)
        if name.startswith("lora_unet_"):  # kohya's layout
            kohya = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[kind]
            renamed[f"{name}.{kohya}"] = value.contiguous()
            renamed[f"{name}.alpha"] = torch.tensor(float(state[f"{module}.lora_A.weight"].shape[0]))
        else:
            renamed[f"{name}.lora_{kind}"] = value.contiguous()
    return renamed


def export(
    adapter: Adapter, model: Pretrained, schedule: ScaleWiseScheduler, target: Path, verify: bool = True
) -> Path:
    """Write the folder, load it back, compare, and only then move it to `target`.

    Raises:
        UserError: if what comes back predicts anything else than the adapter.
    """
    backbone = model.backbone_class

    def write(new: Path) -> None:
        new.mkdir()
        write_layouts(new, adapter.state, model.path, backbone.subfolder)
        comfy = comfy_state(backbone, adapter.state)
        if set(comfy) != {f"{backbone.subfolder}.{key}" for key in adapter.state}:
            save_file(comfy, new / COMFY_WEIGHTS)
        schedule.save_pretrained(new)
        (new / SCHEDULER_FILE).write_text(inspect.getsource(scheduler), encoding="utf-8")
        (new / "README.md").write_text(card(adapter, model, schedule), encoding="utf-8")
        if verify:
            compare(new, adapter, model, schedule)

    return write_aside(target, write)


# Checking


@torch.no_grad()
def compare(folder: Path, adapter: Adapter, model: Pretrained, schedule: ScaleWiseScheduler) -> None:
    """Raise UserError unless both ways of loading `folder` predict what the adapter's weights say."""
    size = schedule.base_sizes[0]
    expected = predict(merged(model, adapter), model, size)
    for way, network in (("peft", _with_peft(folder, model)), ("diffusers", _with_diffusers(folder, model))):
        actual = predict(network, model, size)
        error = ((actual - expected).norm() / expected.norm()).item()
        if not error < 1e-3:
            raise UserError(
                f"export refused: the network loaded by {way} differs by {error:.2g} (relative); please report"
            )


def merged(model: Pretrained, adapter: Adapter) -> Any:
    """The network with the adapter added to its weights, in float32."""
    network = _network(model)
    weights = dict(network.named_parameters())
    for module in adapter.modules:
        weight = weights[f"{module}.weight"]
        update = adapter.state[f"{module}.lora_B.weight"] @ adapter.state[f"{module}.lora_A.weight"]
        weight += update.to(weight).view_as(weight)
    return network


def _network(model: Pretrained) -> Any:
    return model.network("cpu").network.float().eval()


def _with_peft(folder: Path, model: Pretrained) -> Any:
    return PeftModel.from_pretrained(_network(model), str(folder)).eval()


def _with_diffusers(folder: Path, model: Pretrained) -> Any:
    part = model.backbone_class.subfolder
    pipe = model.pipeline(**{part: _network(model)})
    pipe.load_lora_weights(str(folder), weight_name=DIFFUSERS_WEIGHTS)
    return getattr(pipe, part).eval()


def predict(network: Any, model: Pretrained, size: Size) -> Tensor:
    """One forward pass on random inputs, the same for every network of the model."""
    backbone = model.backbone_class(network, model.embedded_guidance)
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, model.channels, *size, generator=generator)
    conditioning = backbone.random_conditioning(model.network_config, 1, 8)
    return backbone.call(x_t, torch.tensor([0.9]), conditioning).float()


# The card

_SNIPPET = """import torch
from diffusers import {pipeline}
from {module} import ScaleWiseScheduler  # the file in this folder

pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("FOLDER", weight_name="{weights}")
scheduler = ScaleWiseScheduler.from_pretrained("FOLDER")
scheduler.attach(pipe)
latents = scheduler.initial_latents({initial}, generator=torch.Generator().manual_seed(0))
result = pipe(
    "a prompt",
    latents=latents.to("cuda", torch.bfloat16),
    num_inference_steps={steps},
{arguments}
)
"""


def card(adapter: Adapter, model: Pretrained, schedule: ScaleWiseScheduler) -> str:
    """README of an exported folder: what it is, and a snippet that samples it without `swd` installed."""
    backbone, final = model.backbone_class, schedule.base_sizes[-1]
    pixels = model.pixel_size(final)
    base = model.path if is_hub_id(model.path) else str(model.folder)
    arguments = dict(backbone.sampling_arguments(model.max_text_tokens, model.embedded_guidance))
    arguments |= {"height": pixels[-2], "width": pixels[-1]}
    if backbone.video:
        arguments["num_frames"] = pixels[0]
    initial = f"1, channels={model.channels}" + (", packed=True" if backbone.packed else "")
    snippet = _SNIPPET.format(
        pipeline=backbone.pipeline_type,
        module=SCHEDULER_FILE.removesuffix(".py"),
        base=base,
        weights=DIFFUSERS_WEIGHTS,
        initial=initial,
        steps=len(schedule.config.sigmas),
        arguments="\n".join(f"    {key}={value!r}," for key, value in arguments.items()),
    )
    sizes = ", ".join("x".join(map(str, size)) for size in schedule.base_sizes)
    return (
        f"---\nbase_model: {model.path}\nlibrary_name: diffusers\ntags: [lora, scale-wise-distillation]\n---\n"
        f"# Scale-wise student of {model.path}\n\n"
        f"A LoRA of rank {max(adapter.ranks)} that draws in {len(schedule.config.sigmas)} steps, at latent sizes "
        f"{sizes} and noise levels {', '.join(f'{s:.4g}' for s in schedule.config.sigmas)} "
        "([Scale-wise Distillation](https://arxiv.org/abs/2503.16397)).\n\n"
        f"```python\n{snippet}```\n\n"
        f"Files: `{PEFT_WEIGHTS}` with `{PEFT_CONFIG}` for peft, `{DIFFUSERS_WEIGHTS}` for diffusers (and "
        f"ComfyUI, unless `{COMFY_WEIGHTS}` is there), `{SCHEDULER_CONFIG}` and `{SCHEDULER_FILE}` for the sampler.\n\n"
        f"Exported by swd {__version__}.\n"
    )
