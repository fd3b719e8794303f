"""Reads LoRA adapters in all their layouts (run, export, PEFT folder, diffusers LoRA file), and writes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from swd.config import one_line
from swd.io.files import check_checksums, file_hash, write_aside, write_checksums, write_json
from swd.modules import hub
from swd.modules.adapter_settings import Settings, read_settings, shown
from swd.modules.lora_names import with_own_names
from swd.modules.model_folders import read_json
from swd.modules.targets import is_target, targets_of
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

if TYPE_CHECKING:  # a model reads the adapters that are added to its base
    from swd.modules.pretrained import Pretrained

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
SCHEDULER_CONFIG = "scheduler_config.json"
NETWORK_CONFIG = "config.json"
BASE = "base.json"
"""File beside a student whose base was changed before it was trained, or is one of several experts: which base, which
adapters were added, and which expert."""
STUDENTS = "students"
"""Folder of a run with the students that were written while it trained."""
CHECKPOINTS = "checkpoints"
"""Folder of a run with its checkpoints."""
AVERAGE = "ema"
"""Folder inside a student's with the moving average of its weights, where one was kept (`task.ema`)."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Types of the layers that a LoRA can adapt."""

MERGE = "merge it into the base (pipe.fuse_lora, pipe.save_pretrained) and give that folder as model.path"
"""Advice in messages about an adapter that cannot become the student's."""

_PARTS = ("transformer.", "unet.")
_PREFIXES = ("base_model.model.", *_PARTS, "diffusion_model.")
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
"""Endings of a plain LoRA's keys, and the part that each names: those of peft, of kohya, old ones of diffusers."""
_NOT_THE_NETWORK = {
    "text_encoder": "a weight of a text encoder",
    "lora_te": "a weight of a text encoder",
    "text_model.": "a weight of a text encoder",
    "te1.": "a weight of a text encoder",
    "te2.": "a weight of a text encoder",
    "conditioner.": "a weight of a text encoder",
    "cond_stage_model.": "a weight of a text encoder",
    "vae.": "a weight of a VAE",
    "first_stage_model.": "a weight of a VAE",
}
"""Beginnings of the keys of other parts than the denoising network, and descriptions of them."""
_OTHER_KINDS = {
    r"lokr_": "a weight of LoKr",
    r"hada_": "a weight of LoHa",
    r"dora_scale|lora_magnitude_vector": "a weight of DoRA",
    r"lora_mid|lora_cp": "a weight of LoCon's core tensor",
    r"lora_embedding_": "a LoRA of an embedding",
    r"lora_(B|up)\.bias|lora_bias": "a bias of a LoRA",
    r"lora_E|ranknum": "a weight of AdaLoRA",
    r"vera_lambda": "a weight of VeRA",
    r"oft_|boft": "a weight of OFT",
    r"ia3": "a weight of IA3",
    r"\.diff_b$|\.bias$": "a bias that was trained whole",
    r"norm": "a normalization that was trained whole",
    r"\.diff$|\.set_weight$|\.weight$": "a weight that was trained whole, no LoRA weight",
}
"""Other content of LoRA files: a pattern in the key, and a description."""


@dataclass(frozen=True)
class Baked:
    """An adapter that was added to the base on which a student was trained.

    Attributes:
        name: its repository on the hub, or the name of its file or folder.
        weight: factor of its update of the weights.
        hash: of its weights, 16 hexadecimal digits, whatever the layout.
    """

    name: str
    weight: float
    hash: str

    def __str__(self) -> str:
        return f"{{path:{self.name},weight:{self.weight:g}}}"


@dataclass(frozen=True)
class Adapter:
    """LoRA weights with their scale folded in.

    Attributes:
        state: `MODULE.lora_A.weight` `[r, in]` and `MODULE.lora_B.weight` `[out, r]`, float32; the update of a module
            is `lora_B @ lora_A`, nothing else.
        source: the file that they came from.
        base: name of the model that it was trained on, if the adapter records one.
        baked: adapters that were added to that model before, if the adapter records any.
        expert: the network's name in a pipeline of several experts, if the adapter records one.
    """

    state: dict[str, Tensor]
    source: Path
    base: str | None = None
    baked: tuple[Baked, ...] = ()
    expert: str | None = None

    def __contains__(self, module: str) -> bool:
        """Whether it adapts a module."""
        return f"{module}.lora_A.weight" in self.state

    def update(self, module: str, device: torch.device | None = None) -> Tensor:
        """Its update of a module's weight, `[out, in]` or `[out, in, *kernel]`, float32; computed on `device`."""
        down, up = (self.state[f"{module}.lora_{kind}.weight"].to(device) for kind in "AB")
        return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])

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
        """First 16 digits of the SHA-256 of its file, for records."""
        return file_hash(self.source)[:16]

    def fitted(self, model: Pretrained) -> Adapter:
        """The same under the names that the model has for its layers; raises as `check_model`."""
        own = with_model_names(self, model)
        own.check_model(model)
        return own

    def check_model(self, model: Pretrained) -> None:
        """Raise UserError, with both names, if it was made for another network, or on a base with other adapters."""
        check_model(self, model)
        given = [entry.baked for entry in model.own_adapters]
        if self.baked and [(b.hash, b.weight) for b in self.baked] != [(b.hash, b.weight) for b in given]:
            needed, here = (f"[{','.join(map(str, baked))}]" for baked in (self.baked, given))
            raise UserError(
                f"adapter {self.source.parent} was trained on {self.base or 'a base'} with model.adapters={needed}, by "
                f"hash {', '.join(b.hash for b in self.baked)}, but here they are {here}; give the same"
            )

    def network(self, model: Pretrained, device: torch.device | str = "cpu") -> Any:
        """The denoising network that a pipeline is built around: the base."""
        return model.network(device).network

    def load_into(self, pipe: Any, model: Pretrained) -> None:
        """Put the adapter on the network of a stock pipeline."""
        backbone = model.backbone_class
        dtype = backbone(getattr(pipe, backbone.subfolder)).dtype
        # The scale is folded in: without an alpha, diffusers takes alpha = rank.
        weights = {f"{backbone.lora_prefix()}.{key}": value.to(dtype) for key, value in self.state.items()}
        pipe.load_lora_weights(weights, **backbone.lora_arguments)

    @torch.no_grad()
    def fold_into(self, network: nn.Module) -> None:
        """Add the update of every module to its weight, in place: `W + lora_B lora_A`.

        The sum is computed in float32 and rounded once, to the weight's dtype. A folded network costs what its base
        does; without folding, each adapted layer has two more products.

        Args:
            network: the base, whose layers hold plain weights (no 8-bit ones).
        """
        add_updates(network, [(self, 1.0)])


@torch.no_grad()
def add_updates(network: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Add adapters to a network: `W + sum(weight * B A)` of each layer, in float32, rounded once to the layer's dtype.

    Args:
        network: the diffusers model, which is changed; its layers hold plain weights.
        adapters: each with its weight; their scales are folded in.
    """
    for module in sorted({module for adapter, _ in adapters for module in adapter.modules}):
        layer: Any = network.get_submodule(module)
        changed = layer.weight.float()
        for adapter, weight in adapters:
            if module in adapter:
                changed = changed + weight * adapter.update(module, changed.device)
        layer.weight.copy_(changed)


def locate(path: str, outputs: Path, key: str = "adapter", ema: bool | None = None) -> Path:
    """Find the folder or file of a student that a user names.

    Args:
        path: an adapter folder, the folder of a network that was trained whole, a run folder, a `.safetensors` file, a
            checkpoint in a run's folder of checkpoints, a repository on the hub, or "latest" for the newest student of
            a run under `outputs`. A run that has not ended has the newest student that it wrote so far.
        outputs: folder of the runs.
        key: name of the option in messages.
        ema: True: the moving average of its weights; False: its weights as they were trained; None: the average if
            there is one. Of a checkpoint, `load_student` chooses.

    Raises:
        UserError: if there is none.
    """
    if path == "latest":
        return _choose(_latest(outputs, key), ema, f"{key}={path}")
    given = hub.adapter(path, key) if hub.is_hub_id(path) else Path(path)
    if given.is_file():
        if given.suffix != ".safetensors" and not is_checkpoint(given):
            raise UserError(f"{key}={path} is not a .safetensors file; other formats can run code and are never read")
        if given.suffix == ".safetensors" and ema:
            raise UserError(f"{key}={path} is one file, so there is no average beside it; leave out ema=true")
        return given
    written = sorted((given / STUDENTS).glob("iteration-*"), reverse=True)
    for candidate in (given, given / "adapter", given / "student", *written):
        if any((candidate / file).is_file() for file in (PEFT_CONFIG, DIFFUSERS_WEIGHTS)) or is_network(candidate):
            return _choose(candidate, ema, f"{key}={path}")
    reason = "holds no adapter" if given.exists() else "does not exist"
    raise UserError(f"{key}={path} {reason}; give a run folder or a folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}")


def _latest(outputs: Path, key: str) -> Path:
    """The newest student of all runs under `outputs`."""
    places = [("adapter", PEFT_CONFIG), ("student", NETWORK_CONFIG)]
    places += [(f"{STUDENTS}/*", PEFT_CONFIG), (f"{STUDENTS}/*", NETWORK_CONFIG)]
    found = [file for folder, name in places for file in outputs.glob(f"**/{folder}/{name}")]
    if not found:
        raise UserError(f"{key}=latest, but no run under {outputs} holds one; train first, or give {key}=FOLDER")
    return max(found, key=lambda file: file.stat().st_mtime).parent


def _choose(folder: Path, ema: bool | None, where: str) -> Path:
    """The folder of a student's average, or of its trained weights."""
    average = folder / AVERAGE
    if ema is False and folder.name == AVERAGE:
        raise UserError(f"{where} is an average; for the trained weights give {folder.parent}, or leave out ema=false")
    if ema is True and folder.name != AVERAGE and not average.is_dir():
        raise UserError(f"{where} holds no average of its weights: task.ema was off when it was trained; leave out ema")
    return average if ema is not False and average.is_dir() else folder


def is_checkpoint(path: Path) -> bool:
    """Whether a path is that of a checkpoint in a folder of a run."""
    inside = path.parent.name == CHECKPOINTS or (path.parent.parent / "config.yaml").is_file()
    return path.suffix == ".ckpt" and inside


def run_folder(source: Path) -> Path | None:
    """The folder of the run that a student is part of, as `locate` returned it; None if it is part of none."""
    if is_checkpoint(source):
        return source.parent.parent
    folder = source if source.is_dir() else source.parent
    folder = folder.parent if folder.name == AVERAGE else folder
    if folder.parent.name == STUDENTS:
        return folder.parent.parent
    return folder.parent if folder.name in ("adapter", "student") else None


def is_network(folder: Path) -> bool:
    """Whether a folder holds a diffusers model, as `save_student` writes it, rather than an adapter."""
    adapter = any((folder / file).is_file() for file in (PEFT_CONFIG, DIFFUSERS_WEIGHTS))
    return not adapter and (folder / NETWORK_CONFIG).is_file() and any(folder.glob("*.safetensors"))


def load(path: Path) -> Adapter:
    """Read the adapter at a path that `locate` returned.

    Raises:
        UserError: if weights are missing or damaged, or are no LoRA that can be folded.
    """
    if is_checkpoint(path):
        raise UserError(f"{path} is a checkpoint; make an adapter of it first: swd export run={path} to=FOLDER")
    return replace(_in_any_layout(path), expert=read_expert(path if path.is_dir() else path.parent))


def _in_any_layout(path: Path) -> Adapter:
    """Read an adapter's weights from a file or a folder."""
    if path.is_file():
        if path.name != PEFT_WEIGHTS:
            return _from_diffusers(path)
        if not (path.parent / PEFT_CONFIG).is_file():
            raise UserError(f"adapter {path} has no {PEFT_CONFIG} beside it, which says its scale; give both")
        return _from_peft(path.parent)
    if (path / PEFT_CONFIG).is_file():
        return _from_peft(path)
    if is_network(path):
        raise UserError(f"{path} holds a network that was trained whole, no adapter; give the folder of a LoRA run")
    return _from_diffusers(path / DIFFUSERS_WEIGHTS)


def _from_peft(folder: Path) -> Adapter:
    """Read an adapter in peft's layout."""
    file = folder / PEFT_WEIGHTS
    if not file.is_file():
        raise UserError(f"adapter {folder} is incomplete: {PEFT_WEIGHTS} is missing")
    check_checksums(folder, (PEFT_WEIGHTS, PEFT_CONFIG))
    config = read_json(folder / PEFT_CONFIG)
    if config.get("use_dora") or config.get("peft_type") not in ("LORA", None):
        kind = "DoRA" if config.get("use_dora") else shown(config.get("peft_type"))
        raise UserError(f"adapter {folder} is {kind}; only LoRA is known")
    settings = read_settings(config, f"adapter {folder}")
    named = config.get("base_model_name_or_path")
    base = named if isinstance(named, str) else None
    lora = read_lora(file)
    for module, alpha in lora.alphas.items():  # kohya's alphas, which peft ignores
        rank = lora.down[module].shape[0]
        if not math.isclose(alpha / rank, settings.scale(module, rank), rel_tol=1e-3):
            raise UserError(
                f"adapter {file} has {module}.alpha={alpha:g}, but by {PEFT_CONFIG} its weights are multiplied by "
                f"{settings.scale(module, rank):g} (alpha / rank); leave one of the two out"
            )
    return _fold(lora, settings, file, base, read_baked(folder))


def _from_diffusers(file: Path) -> Adapter:
    """Read an adapter in the layout of diffusers or of kohya, which is one file."""
    check_checksums(file.parent, (file.name,))
    lora = read_lora(file)
    stored = _metadata(file)
    baked = read_baked(file.parent)
    if not stored:
        return _fold(lora, None, file, baked=baked)
    if lora.alphas:
        raise UserError(
            f"adapter {file} says its alpha twice, in lora_adapter_metadata and as {min(lora.alphas)}.alpha; "
            "leave one out"
        )
    return _fold(lora, read_settings(stored, f"adapter {file}"), file, baked=baked)


def read_baked(folder: Path) -> tuple[Baked, ...]:
    """The adapters on whose base the student in a folder was trained; none if it records none.

    Raises:
        UserError: if the record is damaged.
    """
    record = _read_base(folder)
    return baked_of(record["adapters"], folder / BASE) if "adapters" in record else ()


def read_expert(folder: Path) -> str | None:
    """The expert that the student in a folder is of, by its name in the pipeline; None if it records none.

    Raises:
        UserError: if the record is damaged.
    """
    expert = _read_base(folder).get("expert")
    if not isinstance(expert, str | None):
        raise UserError(f"{folder / BASE} is damaged: expert is {shown(expert)}; copy it again")
    return expert


def _read_base(folder: Path) -> dict[str, Any]:
    """The record about a student's base; empty if there is none."""
    file = folder / BASE
    if not file.is_file():
        return {}
    check_checksums(folder, (BASE,))
    return read_json(file)


def baked_of(entries: Any, file: Path) -> tuple[Baked, ...]:
    """Recorded adapters of a base; raises UserError, naming the file, for anything else."""
    found = []
    for entry in entries if isinstance(entries, list) else [entries]:
        values = (entry.get(key) for key in ("name", "weight", "hash")) if isinstance(entry, dict) else (None,) * 3
        name, weight, digest = values
        if not (isinstance(name, str) and isinstance(weight, int | float) and isinstance(digest, str)):
            raise UserError(f"{file} is damaged: adapters holds {shown(entry)}; copy it again")
        found.append(Baked(name, float(weight), digest))
    return tuple(found)


# Reading


@dataclass(frozen=True)
class Lora:
    """Weights of a LoRA file as they are, their scale not yet folded in.

    Attributes:
        down: `lora_A` by module, `[r, in]` or `[r, in, *kernel]`.
        up: `lora_B` by module, `[out, r]` or `[out, r, 1, ...]`.
        alphas: kohya's alpha tensors by module.
        as_diffusers: whether the names are those that diffusers writes and reads.
        prefix: common beginning of all keys, without the dot; empty if they have none.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    alphas: dict[str, float]
    as_diffusers: bool
    prefix: str


def read_lora(file: Path) -> Lora:
    """Read a file with a LoRA's weights, in any layout.

    Raises:
        UserError: for the first key that is damaged, or is no part of a plain LoRA of the denoising network.
    """
    weights: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}}
    alphas: dict[str, float] = {}
    prefixes: set[str] = set()
    endings: set[str] = set()
    tensors = _read(file)
    if not any(_unnamed(key).endswith(tuple(_ENDINGS)) for key in tensors):
        only = f": {min(tensors)} is {_other_kind(min(tensors))}" if tensors else ""
        raise UserError(f"adapter {file} holds no LoRA weights{only}")

    # Sort the tensors by module.
    for key, value in tensors.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        module, ending = _split(key, prefix, file)
        prefixes.add(prefix)
        endings.add(ending)
        part = _ENDINGS[ending]
        if module in (alphas if part == "alpha" else weights[part]):
            raise UserError(f"adapter {file} holds two keys for {module}, the second is {key}; remove one")
        if part == "alpha":
            alphas[module] = _alpha(value, key, file)
        else:
            weights[part][module] = _weight(value, key, file)

    # Each module has both factors, and they fit each other.
    down = weights["down"]
    up = weights["up"]
    for module in sorted({*down, *up, *alphas}):
        _check_pair(module, down.get(module), up.get(module), file)
    named = any(key != _unnamed(key) for key in tensors)  # diffusers writes no adapter names into keys
    native = endings <= {".lora_A.weight", ".lora_B.weight"} and len(prefixes) == 1 and not named
    return Lora(down, up, alphas, native, prefixes.pop().removesuffix(".") if len(prefixes) == 1 else "")


def _unnamed(key: str) -> str:
    """A key without the name of peft's default adapter, which a saved state dict of a whole peft model has."""
    return key.replace(".default.", ".")


def _split(key: str, prefix: str, file: Path) -> tuple[str, str]:
    """Split a key into the path of its module and its ending.

    Raises:
        UserError: for anything that is no part of a plain LoRA of the denoising network.
    """
    plain = key.removeprefix(prefix)
    for other in _PREFIXES:  # a further prefix, as peft models write it
        plain = plain.removeprefix(other)
    plain = _unnamed(plain)
    for start, kind in _NOT_THE_NETWORK.items():
        if key.startswith(start) or plain.startswith(start):
            raise UserError(
                f"adapter {file} holds {key}, {kind}; only LoRA of the denoising network is known, so {MERGE}"
            )
    for end in _ENDINGS:
        if plain.endswith(end) and plain != end:
            return plain.removesuffix(end), end
    raise UserError(f"adapter {file} holds {key}, {_other_kind(plain)}; only plain LoRA is known, so {MERGE}")


def _other_kind(key: str) -> str:
    """Description of a key that is no part of a plain LoRA."""
    return next((kind for sign, kind in _OTHER_KINDS.items() if re.search(sign, key)), "no LoRA weight")


def _weight(value: Tensor, key: str, file: Path) -> Tensor:
    if not value.is_floating_point():
        raise UserError(f"adapter {file} holds {key} as {value.dtype}; only floating-point weights are known")
    value = value.float()
    if not value.isfinite().all():
        raise UserError(f"adapter {file} is damaged: {key} is not finite; copy it again, or train it again")
    return value


def _alpha(value: Tensor, key: str, file: Path) -> float:
    alpha = float(value) if value.numel() == 1 else math.nan
    if not 0 < alpha < math.inf:
        given = f"{alpha:g}" if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
        raise UserError(f"adapter {file} is damaged: {key} is {given}, not a finite number above 0; copy it again")
    return alpha


def _check_pair(module: str, a: Tensor | None, b: Tensor | None, file: Path) -> None:
    """Raise UserError unless lora_A and lora_B of a module are both there and multiply to an update."""
    damaged = f"adapter {file} is damaged: {module}"
    if a is None and b is None:
        raise UserError(f"{damaged} has an alpha, but no LoRA weights")
    if a is None or b is None:
        raise UserError(f"{damaged} has only one of lora_A and lora_B")
    sizes = f"lora_A of shape {tuple(a.shape)} and lora_B of shape {tuple(b.shape)}"
    if a.ndim < 2 or a.ndim != b.ndim or not a.numel() or not b.numel():
        raise UserError(f"{damaged} has {sizes}; expected [r, in] and [out, r]")
    if a.shape[0] != b.shape[1] or any(side != 1 for side in b.shape[2:]):
        raise UserError(f"{damaged} has {sizes}, whose ranks differ; expected [r, in] and [out, r]")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"adapter {file} cannot be read ({one_line(error)[:160]}); copy it again") from None


def _metadata(file: Path) -> dict[str, Any]:
    """Settings that diffusers stored beside the weights, without the part's name; empty without any.

    Raises:
        UserError: if they are damaged, or of more parts than the denoising network.
    """
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"adapter {file} has damaged metadata: lora_adapter_metadata is no JSON object; copy it again")
    plain: dict[str, Any] = {}
    for key, value in stored.items():
        short = next((key.removeprefix(p) for p in _PARTS if key.startswith(p)), key)
        if short in plain or "." in short:
            raise UserError(f"adapter {file} has settings for more than the denoising network ({key}); {MERGE}")
        plain[short] = value
    return plain


def _fold(
    lora: Lora, settings: Settings | None, file: Path, base: str | None = None, baked: tuple[Baked, ...] = ()
) -> Adapter:
    """Multiply each lora_B by its module's scale."""
    state: dict[str, Tensor] = {}
    for module, a in lora.down.items():
        rank = a.shape[0]
        # Without settings and alpha, diffusers itself takes alpha = rank.
        scale = lora.alphas.get(module, float(rank)) / rank if settings is None else settings.scale(module, rank)
        b = lora.up[module] * scale
        if not b.isfinite().all():
            raise UserError(f"adapter {file} is damaged: {module} times its scale {scale:g} is not finite")
        state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return Adapter(state, file, base, baked)


def with_model_names(adapter: Adapter, model: Pretrained) -> Adapter:
    """The adapter under the names that the model has for its layers, where those of its file stand for them.

    Raises:
        UserError: if two modules are names of one layer.
    """
    return replace(adapter, state=with_own_names(adapter.state, adaptable(model), model))


def adaptable(model: Pretrained) -> dict[str, nn.Module]:
    """Layers of the model's network that a LoRA can adapt, by their paths."""
    return {name: layer for name, layer in model.meta_network.named_modules() if isinstance(layer, _LAYERS)}


def check_expert(where: str, expert: str | None, model: Pretrained) -> None:
    """Raise UserError for what was made for another expert of a pipeline than the model's network.

    Args:
        where: beginning of the message.
        expert: the network's name in its pipeline; None where no record says it.
        model: the model.
    """
    part = model.backbone_class.subfolder
    if expert not in (None, part):
        raise UserError(
            f"{where} is of the expert {expert}, but model.family={model.family} is {part} of {model.name}; give one "
            "of that expert, or the model of the other"
        )


def check_model(adapter: Adapter, model: Pretrained) -> None:
    """Raise UserError, with both names, if the adapter was made for another network."""
    check_expert(f"adapter {adapter.source.parent}", adapter.expert, model)
    check_layers(adapter, model)


def check_layers(adapter: Adapter, model: Pretrained) -> None:
    """Raise UserError, with both names, if the network has not all layers that the adapter changes."""
    layers: dict[str, Any] = adaptable(model)
    for module in adapter.modules:
        layer = layers.get(module)
        inner = adapter.state[f"{module}.lora_A.weight"].shape[1:]
        outer = adapter.state[f"{module}.lora_B.weight"].shape[0]
        shape = None if layer is None else tuple(layer.weight.shape)
        if (outer, *inner) != shape:
            made_for = f"made for {adapter.base}" if adapter.base else "made for a model that it does not name"
            found = "which this model does not have" if shape is None else f"{(outer, *inner)} against {shape}"
            raise UserError(
                f"adapter {adapter.source.parent} ({made_for}) does not fit model {model.name}: {module}, {found}"
            )


def check_start(model: Pretrained) -> None:
    """Read `model.init_adapter` and keep its weights for `read_adapter`, if the student can start from them.

    Raises:
        UserError: if it is for another network, or has other modules or another rank.
    """
    assert model.init_adapter is not None
    adapter = with_model_names(load(locate(model.init_adapter, Path("outputs"), "model.init_adapter")), model)
    check_model(adapter, model)
    where = f"model.init_adapter={model.init_adapter}"
    ranks = sorted(adapter.ranks)
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
    """The weights that the student starts from, for `SharedBase.load_adapter`; `model` keeps no reference to them.

    Raises:
        UserError: as `check_start`, if that was not called before.
    """
    if model.initial is None:
        check_start(model)
    state = model.initial
    model.initial = None
    assert state is not None  # `check_start` sets it or raises
    return state


def check_modules(adapter: Adapter, model: Pretrained) -> None:
    """Raise UserError unless an adapter has weights for the layers that `model.targets` names, and for no others."""
    layers = list(adaptable(model))
    ours = {name for name in layers if is_target(name, model.targets)}
    theirs = set(adapter.modules)
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


# Writing


def save_adapter(
    folder: Path, state: dict[str, Tensor], rank: int, alpha: float, scheduler: ScaleWiseScheduler, base: str, part: str
) -> Path:
    """Write an adapter as `fill_adapter` does, aside; a folder that is there is replaced as a whole."""
    return write_aside(folder, lambda new: fill_adapter(new, state, rank, alpha, scheduler, base, part))


def fill_adapter(
    new: Path,
    state: dict[str, Tensor],
    rank: int,
    alpha: float,
    scheduler: ScaleWiseScheduler,
    base: str,
    part: str,
    baked: Sequence[Baked] = (),
    expert: str | None = None,
) -> None:
    """Write the adapter of a run, for `PeftModel.from_pretrained` and `pipe.load_lora_weights`, and its schedule.

    Args:
        new: the folder, which is made.
        state: LoRA weights in peft's layout without a prefix, `MODULE.lora_A.weight` `[r, in]`, `MODULE.lora_B.weight`
            `[out, r]`.
        rank: r.
        alpha: folded into `lora_B` as alpha / rank, because loaders look for it in different places.
        scheduler: the sampler, saved as the schedule.
        base: name of the model that the adapter was trained on, for the record.
        part: what keys begin with in a file for the pipeline, see `Backbone.lora_prefix`.
        baked: adapters that were added to that model before.
        expert: the network's name where the pipeline has several, see `Backbone.expert`.
    """
    new.mkdir()
    write_layouts(new, fold_alpha(state, rank, alpha), base, part)
    write_base(new, base, baked, expert)
    scheduler.save_pretrained(new)
    write_checksums(new)


def fold_alpha(state: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """LoRA weights whose `lora_B` are multiplied by alpha / rank."""
    return {k: v * (alpha / rank) if ".lora_B." in k else v for k, v in state.items()}


def save_student(folder: Path, network: Any, scheduler: ScaleWiseScheduler) -> Path:
    """Write a student that was trained whole as `fill_student` does, aside."""
    return write_aside(folder, lambda new: fill_student(new, network, scheduler))


def fill_student(
    new: Path, network: Any, scheduler: ScaleWiseScheduler, base: str = "", expert: str | None = None
) -> None:
    """Write a student that was trained whole: a diffusers model, for a pipeline's `transformer=`, and its schedule.

    Args:
        new: the folder, which is made.
        network: the diffusers model.
        scheduler: the sampler, saved as the schedule.
        base: name of the model that it started from, for the record where there are several experts.
        expert: the network's name where the pipeline has several, see `Backbone.expert`.
    """
    network.save_pretrained(new)
    write_base(new, base, (), expert)
    scheduler.save_pretrained(new)
    write_checksums(new)


def write_base(folder: Path, base: str, baked: Sequence[Baked], expert: str | None) -> None:
    """Write what a student's base was made of and which expert it is; nothing for a plain base of one network."""
    record: dict[str, Any] = {"base": base, "adapters": [asdict(entry) for entry in baked]}
    if baked or expert:
        write_json(folder / BASE, record | ({"expert": expert} if expert else {}))


def write_layouts(folder: Path, state: dict[str, Tensor], base: str, part: str) -> None:
    """Write an adapter, its scale folded in, in the layouts of peft and of diffusers."""
    state = {key: value.contiguous() for key, value in state.items()}
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / PEFT_WEIGHTS)
    save_file({f"{part}.{k}": v for k, v in state.items()}, folder / DIFFUSERS_WEIGHTS)
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}
    write_json(folder / PEFT_CONFIG, _peft_config(ranks, base))


def _peft_config(ranks: dict[str, int], base: str) -> dict[str, Any]:
    """The peft configuration of an adapter whose scale is folded in, from the ranks of its modules."""
    rank = max(ranks.values())
    others = {module: r for module, r in sorted(ranks.items()) if r != rank}
    return {
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
