"""LoRA adapters in every layout that people have: a run, an export, a published PEFT folder, a diffusers LoRA file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swd.files import file_hash, write_aside, write_json
from swd.modules import hub
from swd.modules.pretrained import Pretrained, read_json
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS, SCHEDULER_CONFIG = "pytorch_lora_weights.safetensors", "scheduler_config.json"
NETWORK_CONFIG = "config.json"

MERGE = "merge it into the base (pipe.fuse_lora, pipe.save_pretrained) and give that folder as model.path"
"""What to do with an adapter that has no place in the student's."""

_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")


@dataclass(frozen=True)
class Adapter:
    """LoRA weights with their scale folded in.

    Attributes:
        state: `MODULE.lora_A.weight` `[r, in]` and `MODULE.lora_B.weight` `[out, r]`, float32; the update of a module
            is `lora_B @ lora_A`, nothing else.
        source: the file that they came from.
        base: the model that the adapter says it was trained on, if it does.
    """

    state: dict[str, Tensor]
    source: Path
    base: str | None = None

    @property
    def ranks(self) -> set[int]:
        """The ranks of its modules."""
        return {value.shape[0] for key, value in self.state.items() if key.endswith("lora_A.weight")}

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules."""
        return sorted(key.removesuffix(".lora_A.weight") for key in self.state if key.endswith("lora_A.weight"))

    @property
    def hash(self) -> str:
        """Of the file, for the record: SHA-256, the first 16 digits."""
        return file_hash(self.source)[:16]

    def check_fits(self, model: Pretrained) -> None:
        """Raise UserError, with both names, if it was made for another network."""
        check_fits(self, model)

    def network(self, model: Pretrained, device: torch.device | str = "cpu") -> Any:
        """The denoising network that a pipeline is built around: the base."""
        return model.network(device).network

    def load_into(self, pipe: Any, model: Pretrained) -> None:
        """Put the adapter on the network of a stock pipeline."""
        part = model.backbone_class.subfolder
        dtype = model.backbone_class(getattr(pipe, part)).dtype
        # The scale is folded in, and diffusers takes alpha = rank without any.
        pipe.load_lora_weights({f"{part}.{key}": value.to(dtype) for key, value in self.state.items()})


def locate(path: str, outputs: Path, key: str = "adapter") -> Path:
    """The folder or file behind what a user names.

    Args:
        path: an adapter folder, the folder of a network that was trained whole, a run folder, a `.safetensors` file, a
            repository on the hub, or "latest" for the newest run under `outputs`.
        outputs: where runs are.
        key: what the user calls it, for messages.

    Raises:
        UserError: if there is none.
    """
    if path == "latest":
        found = [*outputs.glob(f"**/adapter/{PEFT_CONFIG}"), *outputs.glob(f"**/student/{NETWORK_CONFIG}")]
        if not found:
            raise UserError(f"{key}=latest, but no run under {outputs} holds one; train first, or give {key}=FOLDER")
        return max(found, key=lambda file: file.stat().st_mtime).parent
    given = hub.adapter(path, key) if hub.is_hub_id(path) else Path(path)
    if given.is_file():
        if given.suffix != ".safetensors":
            raise UserError(f"{key}={path} is not a .safetensors file; other formats can run code and are never read")
        return given
    for candidate in (given, given / "adapter", given / "student"):
        if any((candidate / file).is_file() for file in (PEFT_CONFIG, DIFFUSERS_WEIGHTS)) or is_network(candidate):
            return candidate
    reason = "holds no adapter" if given.exists() else "does not exist"
    raise UserError(f"{key}={path} {reason}; give a run folder or a folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}")


def is_network(folder: Path) -> bool:
    """Whether a folder holds a diffusers model, as `save_student` writes it, rather than an adapter."""
    adapter = any((folder / file).is_file() for file in (PEFT_CONFIG, DIFFUSERS_WEIGHTS))
    return not adapter and (folder / NETWORK_CONFIG).is_file() and any(folder.glob("*.safetensors"))


def load(path: Path) -> Adapter:
    """Read what `locate` found.

    Raises:
        UserError: if weights are missing or damaged, or are no LoRA that can be folded.
    """
    if path.is_file():
        return _from_diffusers(path)
    if (path / PEFT_CONFIG).is_file():
        return _from_peft(path)
    if is_network(path):
        raise UserError(f"{path} holds a network that was trained whole, no adapter; give the folder of a LoRA run")
    return _from_diffusers(path / DIFFUSERS_WEIGHTS)


def _from_peft(folder: Path) -> Adapter:
    file = folder / PEFT_WEIGHTS
    if not file.is_file():
        raise UserError(f"adapter {folder} is incomplete: {PEFT_WEIGHTS} is missing")
    config = read_json(folder / PEFT_CONFIG)
    if config.get("use_dora") or config.get("peft_type", "LORA") != "LORA":
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise UserError(f"adapter {folder} is {kind}; only LoRA is known")
    tensors = _plain(_read(file))

    def scale(module: str, rank: int) -> float:
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
        return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))

    return Adapter(_fold(tensors, scale, file), file, config.get("base_model_name_or_path"))


def _from_diffusers(file: Path) -> Adapter:
    tensors = _plain(_read(file))
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in tensors.items() if key.endswith(".alpha")}
    settings = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in _metadata(file).items()}

    def scale(module: str, rank: int) -> float:
        # Without either, diffusers itself takes alpha = rank.
        alpha = alphas.get(module, _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank)))
        return float(alpha / rank)

    return Adapter(_fold({k: v for k, v in tensors.items() if ".lora_" in k}, scale, file), file)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter {file} cannot be read ({str(error).splitlines()[0]}); copy it again") from None


def _metadata(file: Path) -> dict[str, Any]:
    """Settings that diffusers stored beside the weights, empty without any."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        stored = json.loads(text)
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"adapter {file} has damaged metadata: lora_adapter_metadata is no JSON object; copy it again")
    return stored


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys without the prefixes of the layouts, A and B under peft's names."""
    plain = {}
    for key, value in tensors.items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        key = key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.").replace(".lora.down.", ".lora_A.")
        plain[key.replace(".lora.up.", ".lora_B.").replace(".default.", ".")] = value
    return plain


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry of peft's `rank_pattern` or `alpha_pattern` for a module."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _fold(tensors: Mapping[str, Tensor], scale: Any, file: Path) -> dict[str, Tensor]:
    """Multiply each lora_B by its module's scale."""
    state = {}
    for key, value in tensors.items():
        module, _, kind = key.rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise UserError(f"adapter {file} holds {key}, which is no LoRA weight")
        if f"{module}.lora_A.weight" not in tensors or f"{module}.lora_B.weight" not in tensors:
            raise UserError(f"adapter {file} is damaged: {module} has only one of lora_A and lora_B")
        rank = tensors[f"{module}.lora_A.weight"].shape[0]
        state[key] = value.float() * (scale(module, rank) if kind.startswith("B") else 1.0)
    if not state:
        raise UserError(f"adapter {file} holds no LoRA weights")
    return state


def check_fits(adapter: Adapter, model: Pretrained) -> None:
    """Raise UserError, with both names, if the adapter was made for another network."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.meta_network.named_parameters()}
    for module in adapter.modules:
        shape = shapes.get(f"{module}.weight")
        inner = adapter.state[f"{module}.lora_A.weight"].shape[1]
        outer = adapter.state[f"{module}.lora_B.weight"].shape[0]
        if shape is None or (outer, inner) != shape[:2]:
            made_for = f"made for {adapter.base}" if adapter.base else "made for a model that it does not name"
            found = "which this model does not have" if shape is None else f"{(outer, inner)} against {shape}"
            raise UserError(
                f"adapter {adapter.source.parent} ({made_for}) does not fit model {model.name}: {module}, {found}"
            )


def check_start(model: Pretrained) -> None:
    """Read `model.init_adapter` and keep its weights for `read_adapter`, if the student can start from them.

    Raises:
        UserError: if it is for another network, or has other modules or another rank.
    """
    assert model.init_adapter is not None
    adapter = load(locate(model.init_adapter, Path("outputs"), "model.init_adapter"))
    check_fits(adapter, model)
    where, ranks = f"model.init_adapter={model.init_adapter}", sorted(adapter.ranks)
    if len(ranks) > 1:
        raise UserError(
            f"{where} has modules of rank {', '.join(map(str, ranks))}, but the student's have one rank, "
            f"model.rank={model.rank}; {MERGE}"
        )
    if ranks != [model.rank]:
        raise UserError(f"{where} has rank {ranks[0]}, but model.rank={model.rank}; set model.rank={ranks[0]}")
    check_modules(adapter, model)
    ours = model.rank / (model.rank if model.alpha is None else model.alpha)
    model.initial = {key: value * (ours if ".lora_B." in key else 1.0) for key, value in adapter.state.items()}


def read_adapter(model: Pretrained) -> dict[str, Tensor]:
    """The weights that the student starts from, as `SharedBase.load_adapter` takes them; `model` lets go of them.

    Raises:
        UserError: as `check_start`, if that was not called before.
    """
    if model.initial is None:
        check_start(model)
    state, model.initial = model.initial, None
    assert state is not None
    return state


def check_modules(adapter: Adapter, model: Pretrained) -> None:
    """Raise UserError unless an adapter has weights for the layers that `model.targets` names, and for no others."""
    layers = [
        name
        for name, layer in model.meta_network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    ours, theirs = {name for name in layers if named(name, model.targets)}, set(adapter.modules)
    if ours == theirs:
        return
    only = (
        f"{len(names)} {who} (e.g. {min(names)})"
        for names, who in ((theirs - ours, "only in the adapter"), (ours - theirs, "only in model.targets"))
        if names
    )
    names = targets_of(theirs, layers)
    fix = f"set 'model.targets=[{','.join(names)}]'" if len(names) <= 16 else MERGE
    raise UserError(
        f"model.init_adapter={model.init_adapter} adapts other layers than model.targets={list(model.targets)}: "
        f"{', '.join(only)}; {fix}"
    )


def named(layer: str, targets: Sequence[str]) -> bool:
    """Whether a layer is one of `targets`, as peft reads them: by its path or by the end of it."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def targets_of(modules: set[str], layers: Sequence[str]) -> list[str]:
    """Short names that together mean exactly `modules` among `layers`."""
    found: set[str] = set()
    for module in sorted(modules):
        parts = module.split(".")
        for start in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[start:])
            if start == 0 or (not parts[start].isdigit() and modules.issuperset(n for n in layers if named(n, [end]))):
                found.add(end)
                break
    return sorted(found)


# Writing


def save_adapter(
    folder: Path, state: dict[str, Tensor], rank: int, alpha: float, scheduler: ScaleWiseScheduler, base: str, part: str
) -> Path:
    """Write the adapter of a run: for `PeftModel.from_pretrained` and `pipe.load_lora_weights`, with its schedule.

    Args:
        folder: replaced as a whole once the new one is complete.
        state: LoRA weights in peft's layout without a prefix, `MODULE.lora_A.weight` `[r, in]`, `MODULE.lora_B.weight`
            `[out, r]`.
        rank: r.
        alpha: folded into `lora_B` as alpha / rank, since loaders disagree about where to look for it.
        scheduler: the sampler.
        base: what the adapter was trained on, for the record.
        part: the pipeline's name of the network, "transformer" or "unet".
    """
    folded = {k: v * (alpha / rank) if ".lora_B." in k else v for k, v in state.items()}

    def write(new: Path) -> None:
        new.mkdir()
        write_layouts(new, folded, base, part)
        scheduler.save_pretrained(new)

    return write_aside(folder, write)


def save_student(folder: Path, network: Any, scheduler: ScaleWiseScheduler) -> Path:
    """Write a student that was trained whole: a diffusers model, for a pipeline's `transformer=`, and its schedule."""

    def write(new: Path) -> None:
        network.save_pretrained(new)
        scheduler.save_pretrained(new)

    return write_aside(folder, write)


def write_layouts(folder: Path, state: dict[str, Tensor], base: str, part: str) -> None:
    """peft's and diffusers' files of an adapter whose scale is folded in."""
    state = {key: value.contiguous() for key, value in state.items()}
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / PEFT_WEIGHTS)
    save_file({f"{part}.{k}": v for k, v in state.items()}, folder / DIFFUSERS_WEIGHTS)
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}
    rank = max(ranks.values())
    others = {module: r for module, r in sorted(ranks.items()) if r != rank}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": "gaussian",
        "inference_mode": True,
    }
    write_json(folder / PEFT_CONFIG, config)
