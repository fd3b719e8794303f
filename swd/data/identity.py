"""Records the model and the sizes of a cache, so that training with others is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swd.config import first_difference
from swd.io.files import joint_hash
from swd.modules.hub import is_hub_id
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule

_SAMPLE = 2**16


def identity(model: Pretrained, schedule: ScaleSchedule) -> dict[str, Any]:
    """Everything that the encoded values depend on, as plain values for a manifest."""
    return {
        "model": model.name,
        "family": model.family,
        "max_text_tokens": model.max_text_tokens,
        "parts": {part: fingerprint(model.folder / part) for part in encoder_parts(model)},
        "sizes": [list(size) for size in schedule.sizes],
    }


def difference(stored: Mapping[str, Any], model: Pretrained, schedule: ScaleSchedule) -> str | None:
    """Description of the first difference between a cache and what training needs; None if the cache fits.

    A schedule may use fewer sizes than the cache has if it ends at the same one. Weights are compared if both sides
    have them. The name of the model is not compared, since a folder may be moved.
    """
    now = identity(model, schedule)
    if stored["parts"].keys() != now["parts"].keys():
        return f"it has the encoders {', '.join(stored['parts'])}, now {', '.join(now['parts'])}"
    for part, values in now["parts"].items():
        for key in values.keys() & stored["parts"][part].keys():
            if values[key] != stored["parts"][part][key]:
                return f"{part} is not the one of {stored['model']} ({key} differ)"
    kept = {key: stored[key] for key in ("family", "max_text_tokens")}
    if kept["family"] in model.backbone_class.other_experts.values():  # of the same pipeline, with the same encoders
        kept["family"] = model.family
    changed = first_difference(kept, {key: now[key] for key in kept})
    if changed:
        return changed
    missing = [size for size in now["sizes"] if size not in stored["sizes"]]
    if missing or now["sizes"][-1] != stored["sizes"][-1]:
        return f"schedule.sizes was {_sides(stored['sizes'])}, now {_sides(now['sizes'])}"
    return None


def _sides(sizes: list[list[int]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in sizes)


def encoder_parts(model: Pretrained) -> list[str]:
    """Names of the pipeline's subfolders that compute text conditioning and latents."""
    return ["vae", *(name for name in model.parts if name.startswith(("text_encoder", "tokenizer")))]


def fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of a subfolder's configuration and of samples of its weights, if there are any (all would take long)."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    settings = [file for file in files if file.suffix in (".json", ".txt", ".model") and "index" not in file.name]
    weights = [file for file in files if file.suffix == ".safetensors"]
    found = {"settings": _hash(file.read_bytes() for file in settings)}
    if weights:
        found["weights"] = _hash(_samples(file) for file in weights)
    return found


def whole_fingerprint(model: Pretrained) -> str:
    """Identity of a pipeline's weights: the commit on the hub, or a hash of samples of its files.

    If adapters were added to them, a hash of that and of these.
    """
    if is_hub_id(model.path):
        base = model.folder.name
    else:
        parts = {part: fingerprint(model.folder / part) for part in sorted(model.parts)}
        base = _hash([json.dumps(parts, sort_keys=True).encode()])
    added = [f"{entry.hash} {entry.weight} {entry.expert or ''}".strip().encode() for entry in model.adapters]
    return _hash([base.encode(), *added]) if added else base


def quantized_layers(model: Pretrained) -> dict[str, Any]:
    """Entry of records about the layers that are stored in 8 bits beside those of the blocks; empty without."""
    return {"targets": list(model.targets)} if model.quantization else {}


def attention_kernel(model: Pretrained) -> dict[str, Any]:
    """Entry of records about the kernel of attention; empty for PyTorch's choice."""
    return {} if model.attention == "native" else {"attention": model.attention}


def _hash(parts: Iterable[bytes]) -> str:
    return joint_hash(parts)[:16]


def _samples(file: Path) -> bytes:
    """Length of a file, evenly spaced samples of its content, and its end."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        parts = [str(size).encode()]
        for place in (*range(0, size, max(_SAMPLE, size // 16)), max(size - _SAMPLE, 0)):
            stream.seek(place)
            parts.append(stream.read(_SAMPLE))
    return b"".join(parts)
