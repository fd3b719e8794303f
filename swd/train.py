"""`train.py`: compose -> check -> instantiate -> fit."""

from __future__ import annotations

import errno
import os
import platform
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from swd.callbacks import Progress, Samples, SaveAdapter
from swd.callbacks.checkpoint import clear_runs, find_checkpoint
from swd.callbacks.fixed import FixedLosses
from swd.checkpoints import Resumable, iterations
from swd.config import check, one_line
from swd.files import claim_folder, write_json, write_text
from swd.finite import last_checkpoint
from swd.io.progress import say
from swd.modules.distiller import Distiller
from swd.modules.pretrain.common import WatchedTask
from swd.types import UserError

ROOT = {
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "resume": str | None,
    "sample_prompts": list[str],
}
PACKAGES = ("swd", "torch", "lightning", "hydra-core", "diffusers", "peft", "transformers", "torchmetrics")


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
    try:
        return _fit(cfg, folder, *more)
    except (UserError, KeyboardInterrupt):
        with suppress(OSError):
            folder.rmdir()  # which Hydra made; it stays if anything is in it
        raise


def _fit(cfg: DictConfig, folder: Path, *more: Callback) -> tuple[LightningModule, Trainer]:
    task, data = build(cfg)
    # Under a launcher each process runs this; only the first one owns the folder.
    owner = int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    if owner and cfg.resume:
        clear_runs(folder.parent if cfg.resume == "auto" else Path(cfg.resume))
    checkpoint = find_checkpoint(cfg.resume, folder.parent, cfg, cast(Resumable, task))
    if checkpoint and iterations(checkpoint) >= cfg.trainer.max_steps:
        return finish(cfg, task, data, checkpoint, *more)
    trainer = build_trainer(cfg, folder, *more)
    if owner:
        record(cfg, claim_folder(folder, reserve=True), checkpoint)
    try:
        _train(trainer, task, data, checkpoint)
    except (UserError, KeyboardInterrupt):
        if owner:
            drop_record(folder)
        raise
    return task, trainer


def _train(trainer: Trainer, task: LightningModule, data: Any, checkpoint: str | None) -> None:
    """`trainer.fit`, with what a user can mend told in one line."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    callbacks.sort(key=_turn)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error)}") from None
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not isinstance(error, SafetensorError):
            raise
        raise UserError(
            f"training stopped: {one_line(error)}; make room; last good checkpoint: {last_checkpoint(trainer)}"
        ) from None
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def _turn(callback: Callback) -> int:
    """Order of callbacks: checkpoint and student are written before anything that draws or measures can fail."""
    if isinstance(callback, ModelCheckpoint):
        return 1
    if isinstance(callback, SaveAdapter):
        return 2
    return 4 if isinstance(callback, Progress) else 3 if isinstance(callback, Samples | FixedLosses) else 0


def run_of(checkpoint: str) -> Path:
    """The run folder that a checkpoint lies in."""
    return Path(checkpoint).parent.parent


def drop_record(folder: Path) -> None:
    """Remove the record of how a run was started where nothing else came of it."""
    started = {"config.yaml", "run.json"}
    if {file.name for file in folder.iterdir()} <= started:
        for name in started:
            (folder / name).unlink(missing_ok=True)


def finish(
    cfg: DictConfig, task: LightningModule, data: Any, checkpoint: str, *more: Callback
) -> tuple[LightningModule, Trainer]:
    """Write what a run whose iterations are all done still lacks, into its own folder; no new one is left.

    Args:
        cfg: the configuration; `folder` becomes the run's.
        task, data: as `build` made them.
        checkpoint: the last one of the run.
        more: callbacks of a caller who goes on with the trained task; it is then loaded even if nothing is missing.
    """
    run, done = run_of(checkpoint), iterations(checkpoint)
    with suppress(OSError):
        Path(cfg.folder).rmdir()  # which Hydra made; it stays if anything is in it
    cfg.folder = str(run)
    plain = OmegaConf.merge(cfg, {"logger": None})  # a logger would start its files afresh
    trainer = build_trainer(cast(DictConfig, plain), run, *more)
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    callbacks[:] = [c for c in callbacks if not isinstance(c, ModelCheckpoint)]  # nothing to save
    late = [c for c in callbacks if isinstance(c, SaveAdapter | Samples)]
    missing: dict[str, Callable[[], None]] = {
        path: partial(c.on_train_end, trainer, task)
        for c in sorted(late, key=_turn)
        if (path := c.missing(run, task, done))
    }
    if isinstance(task, WatchedTask) and task.older_than(Path(checkpoint)):
        missing[str(task.target)] = task.export
    if missing or more:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of .* is zero")  # rightly: no batch is left
            _train(trainer, task, data, checkpoint)
        task.to(trainer.strategy.root_device)
    for write in missing.values():
        write()
    if trainer.is_global_zero:
        wrote = [path for path in missing if Path(path).exists()]
        also = f"wrote {', '.join(wrote)} from {checkpoint}, and " if wrote else ""
        say(f"the iterations of {run} ({done}) are all done; {also}nothing else is left to do")
    return task, trainer


def prepare(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """`build`, and a named checkpoint is looked at: all that can be checked of a run before its turn.

    Raises:
        UserError: for wrong input.
    """
    built = build(cfg)
    if cfg.resume not in (None, "auto"):
        find_checkpoint(cfg.resume, Path(cfg.output), cfg, cast(Resumable, built[0]))
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
    task: LightningModule = instantiate(cfg.task, _convert_="all")
    data = instantiate(cfg.data, _convert_="all")
    processes = _processes(trainer_options(cfg))
    if data.batch_size % processes:
        raise UserError(
            f"data.batch_size={data.batch_size} does not divide over {processes} processes; "
            f"use a multiple of {processes}"
        )
    if isinstance(task, Distiller) and hasattr(data, "check"):
        data.check(task.model, task.schedule)
    if isinstance(task, Distiller):
        task.check_processes(processes)
    return task, data


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments in the configuration."""
    return dict(instantiate(cfg.trainer, _convert_="all", _partial_=True).keywords)


def build_trainer(cfg: DictConfig, folder: Path, *more: Callback) -> Trainer:
    """The Trainer with this project's fixed choices: manual optimization counts iterations, order is our own."""
    options = trainer_options(cfg)
    if options.get("strategy") == "auto" and _processes(options) > 1:
        # Student and fake network step in turn, so some parameters have no gradient in each update.
        # Buffers never change, and SD3.5 Medium's hold 0.45 GB.
        options["strategy"] = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    callbacks = [instantiate(node, _convert_="all") for node in (cfg.get("callbacks") or {}).values()]
    callbacks += more
    logger: Any = instantiate(cfg.logger, _convert_="all") if cfg.get("logger") else False
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
    """Write the resolved configuration, the command and the versions into the run folder."""
    versions = {name: version(name) for name in PACKAGES}
    command = [os.environ["SWD_COMMAND"]] if "SWD_COMMAND" in os.environ else []  # of the installed `swd`
    write_json(
        folder / "run.json",
        {
            "command": " ".join([Path(sys.argv[0]).name, *command, *sys.argv[1:]]),
            "resumed_from": checkpoint,
            "python": platform.python_version(),
            "versions": versions,
        },
    )
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


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
