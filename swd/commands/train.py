"""`swd train` and `train.py`: check a configuration, build what it describes, and train."""

from __future__ import annotations

import csv
import errno
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from swd import __version__
from swd.callbacks import Checkpoint, Metrics, Progress, Samples, SaveAdapter, Students, Validation
from swd.callbacks.checkpoint import clear_runs, find_checkpoint
from swd.callbacks.fixed_losses import FixedLosses
from swd.callbacks.stopping import CheckStopping
from swd.commands import shared
from swd.commands.loggers import WITHOUT_WANDB, build_loggers, check_logger, end_loggers, recorded_id, start_loggers
from swd.commands.shared import quiet
from swd.config import GROUP, arguments_of, check, one_line, stored, to_yaml
from swd.config import build as build_group
from swd.io.files import claim_folder, write_json, write_text
from swd.io.job_log import print_line
from swd.io.masking import mask_text
from swd.modules import sharding
from swd.modules.checkpoints import Resumable, iterations
from swd.modules.distiller import Distiller
from swd.modules.finite import last_checkpoint
from swd.modules.training_task import WatchedTask
from swd.shapes.train_judge import JudgeData, JudgeTask
from swd.types import UserError

ROOT = shared.ROOT | {
    "task": GROUP,
    "loss": GROUP,
    "data": GROUP,
    "trainer": GROUP,
    "callbacks": GROUP,
    "logger": GROUP,
    "recipe": shared.RECIPE,
    "sample_prompts": list[str],
    "seed": int,
    "name": str,
    "output": str,
    "folder": str,
    "resume": str | None,
    "optimized_metric": str | None,
}
PACKAGES = ("torch", "lightning", "hydra-core", "diffusers", "peft", "transformers", "torchmetrics")


def run(cfg: DictConfig) -> float | None:
    """Train as the configuration says.

    Returns:
        The last value of `optimized_metric`, for a sweep that looks for the best settings; None without one.
    """
    check(cfg, ROOT)
    trained = fit(cfg)
    return None if cfg.optimized_metric is None else objective(cfg.optimized_metric, trained[1], Path(cfg.folder))


def objective(name: str, trainer: Trainer, folder: Path) -> float:
    """The last value of a logged metric; of a run that was done already, from its `metrics.csv`.

    Raises:
        UserError: if nothing of that name was logged.
    """
    if name in trainer.callback_metrics:
        return float(trainer.callback_metrics[name])
    logged = last_row(folder / "metrics.csv")
    if name not in logged:
        known = ", ".join(sorted({*trainer.callback_metrics, *logged}))
        raise UserError(f"optimized_metric={name} was not logged; the run is whole, and has {known}")
    return logged[name]


def last_row(file: Path) -> dict[str, float]:
    """The last value of every metric in a run's `metrics.csv`; empty without the file."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


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
    except (UserError, OSError, KeyboardInterrupt):
        with suppress(OSError):
            folder.rmdir()  # which Hydra made; it stays if anything is in it
        raise


def _fit(cfg: DictConfig, folder: Path, *more: Callback) -> tuple[LightningModule, Trainer]:
    task, data = build_task_and_data(cfg)
    # Under a launcher each process runs this; only the first one owns the folder.
    owner = int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
    if owner and cfg.resume:
        clear_runs(folder.parent if cfg.resume == "auto" else Path(cfg.resume))
    checkpoint = find_checkpoint(cfg.resume, folder.parent, cfg, cast(Resumable, task))
    if checkpoint and iterations(checkpoint) >= cfg.trainer.max_steps:
        return finish(cfg, task, data, checkpoint, *more)
    trainer = build_trainer(cfg, folder, *more, checkpoint=checkpoint)
    check_callbacks(trainer, task, data)
    if owner:
        claim_folder(folder, reserve=True)
    try:
        if owner:
            record(cfg, folder, checkpoint, trainer.loggers)
        _train(cfg, trainer, task, data, checkpoint)
    except (UserError, OSError, KeyboardInterrupt):
        if owner:
            drop_record(folder)
        raise
    if not trainer.global_step:
        raise UserError(
            "no iteration was completed, so there is no student: a limit of the trainer ended the run before; leave "
            "out what limits it (trainer.max_time ...), and count iterations with trainer.max_steps"
        )
    return task, trainer


def _train(cfg: DictConfig, trainer: Trainer, task: LightningModule, data: Any, checkpoint: str | None) -> None:
    """Call `trainer.fit`; failures that a user can do something about are raised as UserError."""
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    callbacks.sort(key=_turn)
    done = False
    try:
        start_loggers(trainer, cfg)
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        done = True
    except MisconfigurationException as error:
        raise UserError(f"trainer: {one_line(error)}") from None
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and not isinstance(error, SafetensorError):
            raise
        raise UserError(
            f"training stopped: {one_line(error)}; make room; last good checkpoint: {last_checkpoint(trainer)}"
        ) from None
    except Exception as error:
        if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(f"callbacks: {one_line(error)}") from None
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        raise UserError(f"logger=wandb: {one_line(error)[:300]}; {WITHOUT_WANDB}") from error
    except SystemExit:  # Lightning raises it for Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        end_loggers(trainer, failed=not done)


MEASURES = (Samples, Metrics, Validation, FixedLosses)
"""Callbacks that draw or measure, and write nothing that a run needs."""


def _turn(callback: Callback) -> int:
    """Order of callbacks: checkpoint and student are written before anything that draws or measures can fail.

    What looks at measurements, the checkpoints of the best of them too, comes after what takes them.
    """
    turns: tuple[tuple[type[Callback], ...], ...] = (
        (Checkpoint, OnExceptionCheckpoint),
        (SaveAdapter, Students),
        MEASURES,
        (CheckStopping,),
        (ModelCheckpoint,),
        (Progress,),
    )
    return next((turn for turn, kinds in enumerate(turns, 1) if isinstance(callback, kinds)), 0)


def run_of(checkpoint: str) -> Path:
    """The run folder that a checkpoint lies in."""
    return Path(checkpoint).parent.parent


def drop_record(folder: Path) -> None:
    """Remove the record of how a run was started if the run wrote nothing else."""
    started = {"config.yaml", "run.json"}
    if {file.name for file in folder.iterdir()} <= started:
        for name in started:
            (folder / name).unlink(missing_ok=True)


def finish(
    cfg: DictConfig, task: LightningModule, data: Any, checkpoint: str, *more: Callback
) -> tuple[LightningModule, Trainer]:
    """Write the files that a run lacks whose iterations are all done, into the run's own folder.

    The folder that Hydra made for this command is removed.

    Args:
        cfg: the configuration; its `folder` becomes the run's.
        task: from `build_task_and_data`.
        data: from `build_task_and_data`.
        checkpoint: the run's last one.
        more: callbacks of a caller that goes on with the trained task; the task is then loaded even if no file is
            missing.
    """
    run = run_of(checkpoint)
    done = iterations(checkpoint)
    with suppress(OSError):
        Path(cfg.folder).rmdir()  # which Hydra made; it stays if anything is in it
    cfg.folder = str(run)
    plain = OmegaConf.merge(cfg, {"logger": None})  # a logger would begin its files again
    trainer = build_trainer(cast(DictConfig, plain), run, *more)

    # Files that are missing, and how each is written.
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    callbacks[:] = [c for c in callbacks if not isinstance(c, ModelCheckpoint | EarlyStopping)]  # nothing to save
    late = [c for c in callbacks if isinstance(c, SaveAdapter | Samples)]
    missing: dict[str, Callable[[], None]] = {
        path: partial(c.write, trainer, task) for c in sorted(late, key=_turn) if (path := c.missing(run, task, done))
    }
    if isinstance(task, WatchedTask) and task.older_than(Path(checkpoint)):
        missing[str(task.target)] = task.export

    # Load the task for them, through a training without iterations.
    if missing or more:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Total length of .* is zero")  # true: no batch is left
            _train(cfg, trainer, task, data, checkpoint)
        task.to(trainer.strategy.root_device)
    for write in missing.values():
        write()
    if trainer.is_global_zero:
        wrote = [path for path in missing if Path(path).exists()]
        also = f"wrote {', '.join(wrote)} from {checkpoint}, and " if wrote else ""
        print_line(f"the iterations of {run} ({done}) are all done; {also}nothing else is left to do")
    return task, trainer


def prepare(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """Build task and data, and check the trainer and the checkpoint that `resume` names: all before training.

    Raises:
        UserError: for wrong input.
    """
    built = build_task_and_data(cfg)
    check_callbacks(build_trainer(cfg, Path(cfg.folder)), *built)
    if cfg.resume not in (None, "auto"):
        find_checkpoint(cfg.resume, Path(cfg.output), cfg, cast(Resumable, built[0]))
    return built


def build_task_and_data(cfg: DictConfig) -> tuple[LightningModule, Any]:
    """The task and its data, checked against each other; no weights are loaded.

    Raises:
        UserError: for wrong input.
    """
    # Plain numbers.
    check(cfg)
    if not cfg.seed < 2**31:
        raise UserError(f"seed={cfg.seed}; use a number below 2^31")
    for key, least in (("seed", 0), ("trainer.max_steps", 1)):
        value = OmegaConf.select(cfg, key)
        if value < least:
            raise UserError(f"{key}={value}; use {least} or more")

    # Task and data, with the trainer's options.
    task: LightningModule = build_group(cfg, "task")
    data = build_group(cfg, "data")
    options = trainer_options(cfg)
    check_trainer(options, task)
    check_data(task, data)
    check_logger(cfg, is_trial(cfg))
    processes = _processes(options)
    if data.batch_size % processes:
        raise UserError(
            f"data.batch_size={data.batch_size} does not divide over {processes} processes; "
            f"use a multiple of {processes}"
        )

    # A trial (`fast_dev_run`) must leave nothing behind.
    if is_trial(cfg) and not isinstance(task, Distiller):
        raise UserError(
            f"trainer.fast_dev_run tries a distillation; {type(task).__name__} would write what it trains: use "
            "trainer.max_steps=2, and another folder to write to"
        )
    if is_trial(cfg) and cfg.resume is not None:
        raise UserError("trainer.fast_dev_run tries a fresh run; leave out resume")

    # Data and losses against the model, the schedule and the number of processes.
    if isinstance(task, Distiller) and hasattr(data, "check"):
        data.check(task.model, task.schedule)
    if isinstance(task, Distiller):
        task.check_processes(processes)
        task.check_batch(data.batch_size, processes)
    sharding.check_strategy(options.get("strategy"), task, processes, int(options.get("num_nodes", 1)))
    return task, data


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """The Trainer's arguments in the configuration; `fast_dev_run` counts iterations, as `max_steps` does.

    Raises:
        UserError: for `devices` that name no devices.
    """
    options = arguments_of(cfg, "trainer")
    tried = options.pop("fast_dev_run", False)
    if tried < 0:
        raise UserError(f"trainer.fast_dev_run={tried}; use true, or how many iterations are tried")
    if tried:
        options |= {"max_steps": int(tried)}
    check_devices(options)
    return options


def is_trial(cfg: DictConfig) -> bool:
    """Whether the run is a trial of a few iterations that keeps nothing (`trainer.fast_dev_run`)."""
    return bool(OmegaConf.select(cfg, "trainer.fast_dev_run", default=False))


def build_trainer(cfg: DictConfig, folder: Path, *more: Callback, checkpoint: str | None = None) -> Trainer:
    """The Trainer, with options that this project sets itself: steps are iterations, and data keep their own order.

    Args:
        cfg: the configuration.
        folder: of the run.
        more: callbacks beside the configured ones.
        checkpoint: the one that the run goes on from.
    """
    options = trainer_options(cfg)
    options["strategy"] = sharding.strategy_for(options.get("strategy", "auto"), _processes(options))
    callbacks = list(build_group(cfg, "callbacks").values())
    if is_trial(cfg):
        callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, SaveAdapter, Students, *MEASURES))]
    callbacks += more
    if any(isinstance(callback, EarlyStopping) for callback in callbacks):
        callbacks.append(CheckStopping())
    fixed: dict[str, Any] = {
        "max_epochs": -1,  # only steps end a run: a finished epoch must not keep a longer run from continuing
        "default_root_dir": str(folder),
        "callbacks": callbacks,
        "logger": [] if is_trial(cfg) else build_loggers(cfg, folder, checkpoint),
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    try:
        return Trainer(**fixed | options)
    except UserError:
        raise
    except Exception as error:  # whatever Lightning raises for an option that does not suit this machine
        raise UserError(f"trainer: {one_line(error)[:400]}") from error


def check_callbacks(trainer: Trainer, task: LightningModule, data: Any) -> None:
    """Let callbacks refuse, before any model is loaded, what they could not do with this task and these data.

    Raises:
        UserError: by a callback's `check_fit`.
    """
    for callback in cast(Any, trainer).callbacks:
        if hasattr(callback, "check_fit"):
            callback.check_fit(task, data)


FIXED = {
    "default_root_dir": "give folder=FOLDER",
    "callbacks": "add one with +callbacks.NAME._target_=CLASS",
    "logger": "choose one with logger=NAME",
    "enable_progress_bar": "callbacks.progress shows how far a training is",
    "use_distributed_sampler": "the data divide themselves over processes",
    "barebones": "it leaves out what writes the student",
    "val_check_interval": "nothing is validated while a task trains",
}
"""Options of the Trainer that the project sets itself, and what a user does instead."""
LIMITS = ("limit_train_batches", "overfit_batches")
"""Options of the Trainer that end an epoch early; here one epoch is the whole run."""


def check_trainer(options: dict[str, Any], task: LightningModule) -> None:
    """Raise UserError for an option of the Trainer with which a task cannot train, or would train nothing."""
    for key, fix in FIXED.items():
        if options.get(key):
            raise UserError(f"trainer.{key}={options[key]} cannot be set; {fix}")
    check_precision(options.get("precision"), task)
    epochs = options.get("max_epochs")
    if epochs is not None and epochs < 1 and epochs != -1:
        raise UserError(
            f"trainer.max_epochs={epochs} trains nothing; leave it out, trainer.max_steps counts iterations"
        )
    for key in LIMITS:
        value = options.get(key) or (0 if key == "limit_train_batches" and key in options else None)
        if value is None:
            continue
        if (value if isinstance(value, int) else int(value * options["max_steps"])) < 1:
            raise UserError(
                f"trainer.{key}={value} is less than one iteration; leave it out, trainer.max_steps counts iterations"
            )
    if not task.automatic_optimization:
        for key, idle, fix in (
            ("gradient_clip_val", (None, 0), "gradients are clipped to task.clip"),
            ("accumulate_grad_batches", (None, 1), "task.accumulate divides a batch into parts"),
        ):
            if options.get(key) not in idle:
                raise UserError(f"trainer.{key}={options[key]} has no effect in a distillation; {fix}")


def check_precision(precision: Any, task: LightningModule) -> None:
    """Raise UserError for a `trainer.precision` that a task cannot train with, with the reason."""
    known = {None: "32-true", 32: "32-true", "32": "32-true", "bf16": "bf16-mixed", 16: "16-mixed", "16": "16-mixed"}
    name = str(known.get(precision, precision))
    if name == "32-true":
        return
    where = f"trainer.precision={precision}"
    if isinstance(task, Distiller):
        raise UserError(
            f"{where} cannot be set for a distillation: adapters and losses stay in float32, and model.precision=bf16 "
            "says how the frozen network computes; leave it out"
        )
    if name not in ("bf16-mixed", "16-mixed"):
        raise UserError(f"{where} would change the weights and data of {type(task).__name__} too; use bf16-mixed or 32")
    if name == "16-mixed" and not torch.cuda.is_available():
        raise UserError(f"{where} scales gradients, which needs a GPU; use bf16-mixed or 32")


def check_data(task: LightningModule, data: Any) -> None:
    """Raise UserError if the judge is to train on other data than its own, or another task on the judge's."""
    judged = isinstance(data, JudgeData)
    if isinstance(task, JudgeTask) and not judged:
        raise UserError("task=judge learns from labelled pictures of shapes; choose them with data=judge")
    if judged and not isinstance(task, JudgeTask):
        raise UserError(
            "data=judge is for task=judge alone; choose captioned pictures, e.g. data=shapes or data=images"
        )


def check_devices(options: dict[str, Any]) -> None:
    """Raise UserError for `trainer.devices` that name no devices; a number in quotes becomes a number in `options`."""
    devices = options.get("devices", "auto")
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = options["devices"] = int(devices)
    listed = devices.split(",") if isinstance(devices, str) and devices != "auto" else devices
    wrong = devices == "" or (isinstance(devices, int) and (devices == 0 or devices < -1))
    if isinstance(listed, list):
        wrong = wrong or not listed or not all(str(part).strip().isdigit() for part in listed)
    if wrong:
        raise UserError(f"trainer: devices={devices!r} names no devices; give how many, a list of GPUs, or auto")
    kind = str(options.get("accelerator", "auto"))
    on_cpu = kind == "cpu" or (kind == "auto" and not torch.cuda.is_available() and not mps_is_available())
    if on_cpu and (isinstance(listed, list) or devices == -1):
        raise UserError(
            f"trainer: devices={devices!r} chooses among GPUs, and this runs on the CPU; give a number of processes, "
            "e.g. trainer.devices=1"
        )


def mps_is_available() -> bool:
    """Whether this is a Mac with a GPU that torch can use."""
    return bool(torch.backends.mps.is_available())


def _processes(options: dict[str, Any]) -> int:
    devices = options.get("devices", 1)
    nodes = options.get("num_nodes", 1)
    if isinstance(devices, str) and devices != "auto":
        devices = int(devices) if devices.lstrip("-").isdigit() else devices.split(",")
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if options.get("accelerator") != "cpu" else 1
    return max(devices if isinstance(devices, int) else len(devices), 1) * max(int(nodes), 1)


def record(cfg: DictConfig, folder: Path, checkpoint: str | None, loggers: Sequence[Logger] = ()) -> None:
    """Write configuration, command and versions into the run folder, without credentials (see `swd.config.stored`)."""
    program = Path(sys.argv[0]).name
    program = "swd" if program in ("__main__.py", "cli.py") else program  # python -m swd
    command = [os.environ["SWD_COMMAND"]] if "SWD_COMMAND" in os.environ else []  # of the installed `swd`
    write_json(
        folder / "run.json",
        {
            "command": mask_text(" ".join([program, *command, *sys.argv[1:]])),
            "resumed_from": checkpoint,
            "python": platform.python_version(),
            "versions": {"swd": __version__} | {name: version(name) for name in PACKAGES},
        }
        | recorded_id(loggers),
    )
    write_text(folder / "config.yaml", to_yaml(stored(cfg)))
