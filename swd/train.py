"""`train.py`: compose -> check -> instantiate -> fit."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from swd import __version__
from swd.callbacks.checkpoint import find_checkpoint
from swd.config import arguments_of, check, one_line, stored, to_yaml
from swd.config import build as build_group
from swd.files import claim_folder, write_json, write_text
from swd.masking import mask_text
from swd.modules.distiller import Distiller
from swd.types import UserError

ROOT = {"seed": int, "name": str, "output": str, "folder": str, "resume": str | None, "allow": list[str]}
PACKAGES = ("torch", "lightning", "hydra-core", "diffusers", "peft", "transformers", "torchmetrics")


def run(cfg: DictConfig) -> None:
    """Train what the configuration says."""
    check(cfg, ROOT)
    fit(cfg)


def fit(cfg: DictConfig, *more: Callback) -> tuple[LightningModule, Trainer]:
    """Check, build and train; everything that the run makes goes to `cfg.folder`.

    Args:
        cfg: the composed configuration.
        more: callbacks beside the configured ones.

    Raises:
        UserError: for wrong input, before any model is loaded.
    """
    quiet()
    folder = Path(cfg.folder)
    task, data = build(cfg)
    checkpoint = find_checkpoint(cfg.resume, folder.parent, cfg)
    # Under a launcher each process runs this; only the first one owns the folder.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0:
        record(cfg, claim_folder(folder, reserve=True), checkpoint)
    trainer = build_trainer(cfg, folder, *more)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error)}") from None
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    return task, trainer


def prepare(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """`build`, and a named checkpoint is looked at: all that can be checked of a run before its turn.

    Raises:
        UserError: for wrong input.
    """
    built = build(cfg)
    if cfg.resume not in (None, "auto"):
        find_checkpoint(cfg.resume, Path(cfg.output), cfg)
    return built


def build(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """The task and its data, checked against each other; no weights are loaded.

    Raises:
        UserError: for wrong input.
    """
    check(cfg)
    if not cfg.seed < 2**31:
        raise UserError(f"seed={cfg.seed}; use a number below 2^31")
    for key, least in (("seed", 0), ("trainer.max_steps", 1)):
        value = OmegaConf.select(cfg, key)
        if value < least:
            raise UserError(f"{key}={value}; use {least} or more")
    task: LightningModule = build_group(cfg, "task")
    data = build_group(cfg, "data")
    processes = _processes(trainer_options(cfg))
    if data.batch_size % processes:
        raise UserError(
            f"data.batch_size={data.batch_size} does not divide over {processes} processes; "
            f"use a multiple of {processes}"
        )
    if isinstance(task, Distiller) and hasattr(data, "check"):
        data.check(task.model, task.schedule)
    return task, data


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments in the configuration."""
    return arguments_of(cfg, "trainer")


def build_trainer(cfg: DictConfig, folder: Path, *more: Callback) -> Trainer:
    """The Trainer with this project's fixed choices: manual optimization counts iterations, order is our own."""
    options = trainer_options(cfg)
    if options.get("strategy") == "auto" and _processes(options) > 1:
        # Student and fake network step in turn, so some parameters have no gradient in each update.
        # Buffers never change, and SD3.5 Medium's hold 0.45 GB.
        options["strategy"] = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    callbacks = list(build_group(cfg, "callbacks").values())
    callbacks += more
    logger: Any = build_group(cfg, "logger") or False
    fixed = {
        "max_epochs": -1,  # steps count; a finished epoch must not keep a longer run from continuing
        "default_root_dir": str(folder),
        "callbacks": callbacks,
        "logger": logger,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    try:
        return Trainer(**fixed | options)
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {one_line(error)}") from None


def _processes(options: dict[str, Any]) -> int:
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    if isinstance(devices, str) and devices != "auto":
        devices = int(devices) if devices.lstrip("-").isdigit() else devices.split(",")
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if options.get("accelerator") != "cpu" else 1
    return max(devices if isinstance(devices, int) else len(devices), 1) * max(int(nodes), 1)


def record(cfg: DictConfig, folder: Path, checkpoint: str | None) -> None:
    """Write configuration, command and versions into the run folder, without credentials (see `swd.config.stored`)."""
    command = [os.environ["SWD_COMMAND"]] if "SWD_COMMAND" in os.environ else []  # of the installed `swd`
    write_json(
        folder / "run.json",
        {
            "command": mask_text(" ".join([Path(sys.argv[0]).name, *command, *sys.argv[1:]])),
            "resumed_from": checkpoint,
            "python": platform.python_version(),
            "versions": {"swd": __version__} | {name: version(name) for name in PACKAGES},
        },
    )
    write_text(folder / "config.yaml", to_yaml(stored(cfg)))


def use_own_gpu() -> None:
    """Under a launcher, give each process of a machine a GPU of its own."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if local is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


def quiet() -> None:
    """Silence notices that a user cannot act on."""
    import logging

    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
