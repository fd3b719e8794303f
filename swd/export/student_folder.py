"""Writes a student as one folder that diffusers and peft load, with its schedule and its sampler.

ComfyUI loads it too if it knows the family. `swd export run=... to=...` writes the folder, loads it back with each of
these libraries, and fails if a prediction differs from the student's.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swd import __version__, scheduler
from swd.config import (
    PRETRAINED,
    allowed_here,
    build,
    build_node,
    check_recorded,
    node_of,
    one_line,
    overrides,
    read_recorded,
    to_plain,
    with_schedules,
)
from swd.export.verification import COMFY_WEIGHTS, check_adapter, check_network
from swd.io.files import check_checksums, write_aside, write_checksums
from swd.io.limits import LARGEST_SIDE, STEPS
from swd.modules.adapters import (
    DIFFUSERS_WEIGHTS,
    NETWORK_CONFIG,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SCHEDULER_CONFIG,
    Adapter,
    is_checkpoint,
    run_folder,
    write_base,
    write_layouts,
)
from swd.modules.backbones import load_family
from swd.modules.backbones.base import Backbone
from swd.modules.checkpoint_student import CheckpointNetwork
from swd.modules.hub import is_hub_id
from swd.modules.model_folders import read_json
from swd.modules.pretrained import Pretrained
from swd.modules.saved_student import FullStudent, Student
from swd.schedule import ScaleSchedule
from swd.scheduler import ScaleWiseScheduler
from swd.types import Size, UserError, WrongProcess

SCHEDULER_FILE = "scale_wise_scheduler.py"
"""Name of the sampler's source in the exported folder."""
SCHEDULE = "swd.schedule.ScaleSchedule"
ASSET = "swd://"
"""Beginning of the paths of models that ship with the package."""


def check_target(target: Path) -> None:
    """Raise UserError unless a folder can be written at `to`. Creates nothing."""
    if target == Path():
        raise UserError("to is empty; name the folder to write")
    try:
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise UserError(f"to={target} exists already and is no empty folder; choose another")
        above = next(parent for parent in target.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"to={target} cannot be written ({error.strerror}); choose another folder") from None


def recorded_model(source: Path, cfg: DictConfig) -> Any:
    """Configuration of the model that a run was trained with, with the changes from the command line.

    If the command line names a model, or `source` is not part of a run, it is the model of `cfg`. A run may come from
    somebody else, so only plain data are read from it, see `swd.config.check_recorded`.

    Raises:
        UserError: if the run's configuration is damaged, or holds anything but a model's plain values.
    """
    run = run_folder(source)
    named = any(re.match(r"\+*(model|experiment)[=@]", override) for override in overrides())
    if named or run is None or not (run / "config.yaml").is_file():
        return node_of(cfg, "model")
    file = run / "config.yaml"
    node = read_recorded(file).get("model")
    if isinstance(node, dict):
        node |= _changed_here(node_of(cfg, "model"))
    check_recorded(node, "model", PRETRAINED, file)
    return node


def _changed_here(given: dict[str, Any]) -> dict[str, Any]:
    """The values of a model that the command line changes, by key."""
    changed = [override.lstrip("+") for override in overrides()]
    keys = [re.split(r"[.=\[]", each.removeprefix("model."))[0] for each in changed if each.startswith("model.")]
    return {key: given[key] for key in keys if key in given}


def build_model(node: dict[str, Any], cfg: DictConfig) -> Pretrained:
    """Build the model from the configuration that `recorded_model` returned."""
    model: Pretrained = build_node({"_target_": PRETRAINED} | node, "model", allowed_here(cfg))
    return model


def schedule_of(source: Path, cfg: DictConfig, model: Pretrained) -> ScaleWiseScheduler:
    """The schedule that the command line names, else the one beside a student, else the model's default.

    Raises:
        UserError: if the file beside the student is damaged, for another scheduler, or does not fit the model.
    """
    # Where the schedule is from.
    file = (source if source.is_dir() else source.parent) / SCHEDULER_CONFIG
    chosen = any(re.match(r"\+*schedule[.=@]", override) for override in overrides())
    expected = model.backbone_class.process.prediction_type
    if is_checkpoint(source) and not chosen:
        return recorded_schedule(source.parent.parent / "config.yaml", model)
    if file.is_file() and not chosen:
        sampler = read_schedule(file)
        if sampler.config.prediction_type != expected:
            raise UserError(
                f"{file} is for prediction_type={sampler.config.prediction_type}, but {model.family} predicts "
                f"{expected}; name the model that it belongs to"
            )
    else:
        schedule: ScaleSchedule = build(cfg, "schedule")
        try:
            sampler = schedule.scheduler(model.limits.divisor, expected)
        except WrongProcess as error:
            raise with_schedules(error) from None
        if not chosen:
            warnings.warn(
                f"no {SCHEDULER_CONFIG} beside {source}: taking the model's default schedule, sizes "
                f"{to_plain(cfg.schedule)['sizes']}; name its own with schedule=",
                UserWarning,
                stacklevel=2,
            )

    # It must fit the model, and a recorded one must be the file that was written.
    for size in sampler.base_sizes:
        model.limits.check_size(size)
    if not chosen:
        check_checksums(file.parent, (file.name,))
    return sampler


def recorded_schedule(file: Path, model: Pretrained) -> ScaleWiseScheduler:
    """The sampler of the schedule that a run's configuration records.

    Raises:
        UserError: if that is damaged, or does not fit the model.
    """
    node = read_recorded(file).get("schedule")
    check_recorded(node, "schedule", SCHEDULE, file)
    assert isinstance(node, dict)  # `check_recorded` takes nothing else
    schedule: ScaleSchedule = build_node({"_target_": SCHEDULE} | node, "schedule")
    expected = model.backbone_class.process.prediction_type
    schedule.check_process(expected)
    for size in schedule.sizes:
        model.limits.check_size(size)
    return schedule.scheduler(model.limits.divisor, expected)


def read_schedule(file: Path) -> ScaleWiseScheduler:
    """The sampler that a `scheduler_config.json` describes.

    Raises:
        UserError: if it is damaged or for another scheduler class.
    """
    config = read_json(file)
    kind = config.get("_class_name")
    if kind != ScaleWiseScheduler.__name__:
        raise UserError(
            f"{file} is for {kind or 'no class'}, not for {ScaleWiseScheduler.__name__}; remove it and give schedule="
        )
    try:
        check_sampler_numbers(config)
        sampler: ScaleWiseScheduler = ScaleWiseScheduler.from_config(config)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {one_line(error)}); copy it again") from None
    return sampler


def check_sampler_numbers(config: Mapping[str, Any]) -> None:
    """Check the numbers of a sampler's configuration, before it computes with them.

    Raises:
        ValueError, LookupError or TypeError: for the first one that is missing or out of range, or for an unknown
            setting, whose effect would be lost.
    """
    missing = [key for key in ("sigmas", "sizes") if key not in config]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    known = inspect.signature(ScaleWiseScheduler.__init__).parameters
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        raise ValueError(f"{unknown[0]} is not understood")
    if config.get("num_train_timesteps", STEPS) != STEPS:
        raise ValueError(f"num_train_timesteps is {str(config['num_train_timesteps'])[:60]}; use {STEPS}")
    if len(config["sigmas"]) > STEPS:
        raise ValueError(f"{len(config['sigmas'])} sigmas; at most {STEPS} are known")
    ScaleSchedule(config["sigmas"], config["sizes"])
    sides = [side for size in config["sizes"] for side in (size if isinstance(size, list) else [size])]
    whole = {"sizes": (sides, LARGEST_SIDE)} | {
        key: ([config[key]], LARGEST_SIDE) for key in ("divisor", "num_train_timesteps") if key in config
    }
    for key, (values, most) in whole.items():
        for value in values:
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{key} is {str(value)[:60]}; use whole numbers from 1 to {most}")


# Writing


def comfy_state(backbone: type[Backbone], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter under the names that ComfyUI reads for this family."""
    renamed: dict[str, Tensor] = {}
    for module in (key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")):
        down, up = (state[f"{module}.lora_{kind}.weight"].contiguous() for kind in "AB")
        renamed |= backbone.comfy_weights(module, down, up)
    return renamed


def export(
    student: Student, model: Pretrained, schedule: ScaleWiseScheduler, target: Path, verify: bool = True
) -> Path:
    """Write the folder under a temporary name, load it back, compare, and only then move it to `target`.

    Raises:
        UserError: if a network that is loaded back predicts anything else than the student.
    """
    # Everything that the folder holds.
    content = AdapterContent(student, model) if isinstance(student, Adapter) else NetworkContent(student, model)

    def write(new: Path) -> None:
        new.mkdir()
        content.write(new)
        schedule.save_pretrained(new)
        (new / SCHEDULER_FILE).write_text(inspect.getsource(scheduler), encoding="utf-8")
        (new / "README.md").write_text(card(content, model, schedule), encoding="utf-8")
        write_checksums(new)
        if verify:
            content.check(new, schedule.base_sizes[0])

    # If anything fails, nothing stays behind.
    made = [parent for parent in target.absolute().parents if not parent.exists()]
    try:
        return write_aside(target, write)
    except BaseException as error:
        for parent in made:  # created by this export; the innermost first
            with suppress(OSError):
                parent.rmdir()
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(
                f"to={target} cannot be written ({reason[:160]}); free space, or choose another folder"
            ) from None
        raise


class Content(Protocol):
    """The exported student: its files, their check, and its description for the card."""

    about: str
    files: str
    tags: str
    loading: str
    """Lines of the card's snippet that build `pipe`."""
    classes: str
    """Names that these lines import from diffusers."""

    def write(self, folder: Path) -> None:
        """Write the weights into a folder."""

    def check(self, folder: Path, size: Size) -> None:
        """Raise UserError unless the weights in a folder predict, at a latent size, what the student predicts."""


class AdapterContent:
    """An adapter in the layouts of peft, diffusers and ComfyUI."""

    tags = "lora, scale-wise-distillation"

    def __init__(self, adapter: Adapter, model: Pretrained) -> None:
        self.adapter = adapter
        self.model = model
        ranks = sorted(adapter.ranks)
        self.about = f"A LoRA of rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'}"
        self.files = f"`{PEFT_WEIGHTS}` with `{PEFT_CONFIG}` for peft, `{DIFFUSERS_WEIGHTS}` for diffusers"
        if model.backbone_class.comfyui:
            self.files += f", `{COMFY_WEIGHTS if self._renamed() else DIFFUSERS_WEIGHTS}` for ComfyUI"
        self.classes = model.backbone_class.pipeline_type
        base = f"{base_arguments(model)}, torch_dtype=torch.bfloat16"
        self.loading = "\n".join(
            [
                f'pipe = {self.classes}.from_pretrained({base}).to("cuda")',
                *adding(model),
                _lora_call("FOLDER", model.backbone_class.lora_arguments),
            ]
        )
        for other, family in model.backbone_class.other_experts.items():
            self.loading += f"\n{_lora_call('OTHER', load_family(family).lora_arguments)}  # the student of {other}"

    def _renamed(self) -> dict[str, Tensor]:
        """Weights under ComfyUI's names; empty if it does not know the family or reads diffusers' own names."""
        backbone = self.model.backbone_class
        state = self.adapter.state
        comfy = comfy_state(backbone, state) if backbone.comfyui else {}
        return comfy if set(comfy) != {f"{backbone.lora_prefix()}.{key}" for key in state} else {}

    def write(self, folder: Path) -> None:
        model = self.model
        baked = [adapter.baked for adapter in model.own_adapters]
        write_layouts(folder, self.adapter.state, model.name, model.backbone_class.lora_prefix())
        write_base(folder, model.name, baked, model.backbone_class.expert())
        renamed = self._renamed()
        if renamed:
            save_file(renamed, folder / COMFY_WEIGHTS)

    def check(self, folder: Path, size: Size) -> None:
        check_adapter(folder, self.adapter, self.model, size)


class NetworkContent:
    """A network that was trained whole, as a diffusers model."""

    tags = "scale-wise-distillation"
    files = f"`{NETWORK_CONFIG}` and the `.safetensors` beside it for diffusers"

    def __init__(self, student: Student, model: Pretrained) -> None:
        assert isinstance(student, FullStudent | CheckpointNetwork)
        self.student = student
        self.model = model
        backbone = model.backbone_class
        part = backbone.subfolder
        network = backbone.network_type
        self.about = f"A {network}, trained whole,"
        self.classes = f"{network}, {backbone.pipeline_type}"
        folders = {part: "FOLDER"} | dict.fromkeys(backbone.other_experts, "OTHER")
        self.loading = "".join(
            f'{name} = {network}.from_pretrained("{folder}", torch_dtype=torch.bfloat16)\n'
            for name, folder in folders.items()
        )
        networks = ", ".join(f"{name}={name}" for name in folders)
        self.loading += (
            f"pipe = {backbone.pipeline_type}.from_pretrained(\n"
            f"    {base_arguments(model)}, {networks}, torch_dtype=torch.bfloat16\n"
            f').to("cuda")'
        )

    def write(self, folder: Path) -> None:
        self.student.write(folder, self.model)
        write_base(folder, self.model.name, (), self.model.backbone_class.expert())

    def check(self, folder: Path, size: Size) -> None:
        check_network(folder, self.student, self.model, size)


# The card

_SNIPPET = """import torch
from diffusers import {classes}
from {module} import ScaleWiseScheduler  # the file in this folder

{loading}
scheduler = ScaleWiseScheduler.from_pretrained("FOLDER")
scheduler.attach(pipe)
latents = scheduler.initial_latents({initial}, generator=torch.Generator().manual_seed(0))
{result} = pipe(
    prompt="a prompt",
    latents=latents.to("cuda", {latents_dtype}),
    num_inference_steps={steps},
{arguments}
).{output}[0]
"""


def _lora_call(folder: str, arguments: Mapping[str, Any]) -> str:
    """The line that loads an exported adapter into the stock pipeline."""
    return f'pipe.load_lora_weights("{folder}", weight_name="{DIFFUSERS_WEIGHTS}"{_more(arguments)})'


def _more(arguments: Mapping[str, Any]) -> str:
    """Further arguments of a call, as code."""
    return "".join(f", {key}={value!r}" for key, value in arguments.items())


def base_arguments(model: Pretrained) -> str:
    """Arguments of `from_pretrained` for the base: its id on the hub, or BASE, never a folder of this machine."""
    base = model.path if is_hub_id(model.path) else "BASE"
    return f'"{base}"' + (f', revision="{model.revision}"' if model.revision and is_hub_id(model.path) else "")


def adding(model: Pretrained) -> list[str]:
    """Lines that add to the pipeline's network what was added to the base before the student was trained."""
    lines = []
    backbone = model.backbone_class
    families = {name: load_family(family) for name, family in backbone.other_experts.items()}
    for number, adapter in enumerate(model.adapters, 1):
        more = _more(families.get(adapter.expert or "", backbone).lora_arguments)
        # Where the pipeline has one network, it is the one that is changed.
        parts = f"components=[{adapter.expert!r}], " if adapter.expert else ""
        path = adapter.path if is_hub_id(adapter.path) else f"ADAPTER_{number}"
        lines += [
            f'pipe.load_lora_weights("{path}"{more})',
            f"pipe.fuse_lora({parts}lora_scale={adapter.weight:g})",
            "pipe.unload_lora_weights()",
        ]
    return lines


def about_adapters(model: Pretrained) -> str:
    """Paragraph of the card about them; empty if nothing was added."""
    if not model.adapters:
        return ""
    entries = "; ".join(
        f"`ADAPTER_{number}` is `{entry.baked.name}` at weight {entry.weight:g} (hash {entry.hash})"
        + (f", for `{entry.expert}`" if entry.expert else "")
        for number, entry in enumerate(model.adapters, 1)
    )
    return (
        "The student was trained on that base with adapters added to it, and belongs on top of these: "
        f"{entries}. ComfyUI takes each with a LoRA loader at its weight, beside this one at 1.\n\n"
    )


def placeholders(model: Pretrained) -> str:
    """Explanation of the words in capitals in the snippet."""
    text = "`FOLDER` is this folder"
    for other in model.backbone_class.other_experts:
        text += f", `OTHER` that of the student of `{other}`, which takes the other steps: both belong together"
    if is_hub_id(model.path):
        return f"{text}."
    own = model.path.startswith(ASSET)
    base = f"`{model.path.removeprefix(ASSET)}` of swd" if own else f"the diffusers pipeline `{model.name}`"
    return f"{text}, `BASE` that of {base}, on which the student was trained."


def card(content: Content, model: Pretrained, schedule: ScaleWiseScheduler) -> str:
    """README of an exported folder: a description, and a snippet that samples it without `swd` installed."""
    # The snippet.
    backbone = model.backbone_class
    arguments = dict(backbone.sampling_arguments(model.max_text_tokens, model.embedded_guidance))
    arguments |= model.size_arguments(schedule.base_sizes[0], schedule.base_sizes[-1])
    initial = f"1, channels={model.channels}" + ("" if backbone.layout == "map" else f", layout={backbone.layout!r}")
    snippet = _SNIPPET.format(
        classes=content.classes,
        module=SCHEDULER_FILE.removesuffix(".py"),
        loading=content.loading,
        initial=initial,
        latents_dtype="torch.float32" if backbone.float_latents else "torch.bfloat16",
        steps=len(schedule.config.sigmas),
        arguments="\n".join(f"    {key}={value!r}," for key, value in arguments.items()),
        result="frames" if backbone.video else "image",
        output="frames" if backbone.video else "images",
    )

    # The text around it.
    note = ""
    if backbone.called_with_first_size:
        note = " Height and width are those of the first step; the picture comes out at the size of the last."
    sizes = ", ".join("x".join(map(str, size)) for size in schedule.base_sizes)
    base = f"base_model: {model.path}\n" if is_hub_id(model.path) else ""
    return (
        f"---\n{base}library_name: diffusers\ntags: [{content.tags}]\n---\n"
        f"# Scale-wise student of {model.name}\n\n"
        f"{content.about} that draws in {len(schedule.config.sigmas)} steps, at latent sizes "
        f"{sizes} and noise levels {', '.join(f'{s:.4g}' for s in schedule.config.sigmas)} "
        "([Scale-wise Distillation](https://arxiv.org/abs/2503.16397)).\n\n"
        f"```python\n{snippet}```\n\n"
        f"{placeholders(model)}{note}\n\n"
        f"{about_adapters(model)}"
        f"Files: {content.files}, `{SCHEDULER_CONFIG}` and `{SCHEDULER_FILE}` for the sampler.\n\n"
        f"Exported by swd {__version__}.\n"
    )
