"""The student's adapter as a folder that stock diffusers and peft load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from swd.files import write_aside, write_json
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS, SCHEDULER_CONFIG = "pytorch_lora_weights.safetensors", "scheduler_config.json"


def save_adapter(
    folder: Path, state: dict[str, Tensor], rank: int, alpha: float, scheduler: ScaleWiseScheduler, base: str, part: str
) -> Path:
    """Write one folder for `PeftModel.from_pretrained` and for `pipe.load_lora_weights`, with its schedule.

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
    scale = alpha / rank
    folded = {k: (v * scale if ".lora_B." in k else v).contiguous() for k, v in state.items()}

    def write(new: Path) -> None:
        new.mkdir()
        save_file({f"base_model.model.{k}": v for k, v in folded.items()}, new / PEFT_WEIGHTS)
        save_file({f"{part}.{k}": v for k, v in folded.items()}, new / DIFFUSERS_WEIGHTS)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({k.rsplit(".lora_", 1)[0] for k in folded}),
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": "gaussian",
            "inference_mode": True,
        }
        write_json(new / PEFT_CONFIG, config)
        scheduler.save_pretrained(new)

    return write_aside(folder, write)


def find_adapter(path: str, outputs: Path) -> Path:
    """The adapter folder behind what a user names.

    Args:
        path: an adapter folder, a run folder, or "latest" for the newest run under `outputs`.

    Raises:
        UserError: if there is none.
    """
    if path == "latest":
        found = sorted(outputs.glob(f"**/adapter/{PEFT_CONFIG}"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError(
                f"adapter=latest, but no run under {outputs} holds one; train first, or give adapter=FOLDER"
            )
        return found[-1].parent
    folder = Path(path)
    for candidate in (folder, folder / "adapter"):
        if (candidate / PEFT_CONFIG).is_file():
            return candidate
    reason = "holds no adapter" if folder.exists() else "does not exist"
    raise UserError(f"adapter={path} {reason}; give a run folder or a folder with {PEFT_CONFIG} and {PEFT_WEIGHTS}")


def load_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA weights without a prefix, and the peft configuration, of an adapter folder.

    Raises:
        UserError: if the weights are missing; only safetensors are read.
    """
    weights = folder / PEFT_WEIGHTS
    if not weights.is_file():
        raise UserError(f"adapter {folder} is incomplete: {PEFT_WEIGHTS} is missing")
    config: dict[str, Any] = json.loads((folder / PEFT_CONFIG).read_text())
    return {k.removeprefix("base_model.model."): v for k, v in load_file(weights).items()}, config
