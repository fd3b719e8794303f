"""`swd train` and `train.py`: check a configuration, build what it describes, and train."""

from __future__ import annotations

import csv
import errno
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
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
from swd.callbacks.memory_budget import MemoryBudget
from swd.callbacks.resume_rules import sayings
from swd.callbacks.space import CheckSpace
from swd.callbacks.stop_signal import StopOnSignal
from swd.callbacks.stopping import CheckStopping
from swd.commands import keys, processes
from swd.commands.cli import message_for_user
from swd.commands.loggers import WITHOUT_WANDB, build_loggers, check_logger, end_loggers, recorded_id, start_loggers
from swd.commands.requeue import earlier_run, go_on_writing, has_checkpoints, job_record, requeue
from swd.commands.shared import quiet
from swd.config import arguments_of, check, one_line, stored, to_yaml
from swd.config import build as build_group
from swd.data.encoded import EncodedPairs
from swd.io import signals
from swd.io.files import claim_folder, write_json, write_text
from swd.io.folder_lock import LOCK, clear_abandoned, held, refuse_living
from swd.io.job_log import print_line
from swd.io.masking import mask_text
from swd.io.memory import out_of_memory
from swd.io.ranks import ranks
from swd.io.signals import Stopped
from swd.modules import sharding
from swd.modules.checkpoint_files import CheckpointFiles, Resumable, iterations
from swd.modules.distiller import Distiller
from swd.modules.finite import last_checkpoint
from swd.modules.pretrained import Pretrained
from swd.modules.training_task import WatchedTask
from swd.shapes.train_judge import JudgeData, JudgeTask
from swd.types import UserError

ROOT = keys.TRAIN
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
        with signals.listening():
            return _fit(cfg, folder, *more)
    except (UserError, OSError, KeyboardInterrupt, Stopped):
        with suppress(OSError):
            folder.rmdir()  # which Hydra made; it stays if anything is in it
        raise


def _fit(cfg: DictConfig, folder: Path, *more: Callback) -> tuple[LightningModule, Trainer]:
    task, data = build_task_and_data(cfg)

    # Every process runs this; the first one says where the run lies and what it goes on from.
    start = processes.begin(partial(_start, cfg, folder, task))
    folder, checkpoint = _settled(cfg, start), start.checkpoint
    if checkpoint and iterations(checkpoint) >= cfg.trainer.max_steps:
        return finish(cfg, task, data, checkpoint, *more)
    trainer = build_trainer(cfg, folder, *more, checkpoint=checkpoint)
    check_callbacks(trainer, task, data)
    if not start.again:
        processes.on_first(partial(claim_folder, folder, reserve=True))

    # Train.
    try:
        with ExitStack() as stack:
            processes.on_first(lambda: stack.enter_context(held(folder, "give another folder=")))
            if ranks().first:
                _write_record(cfg, folder, start, trainer.loggers)
            with processes.own_processes(start):
                _train(cfg, trainer, task, data, checkpoint)
    except Stopped as stop:
        if ranks().first:
            drop_record(folder)
            requeue(stop)
        raise
    except (UserError, OSError, KeyboardInterrupt):
        if ranks().first:
            drop_record(folder)
        raise
    if not trainer.global_step:
        raise UserError(
            "no iteration was completed, so there is no student: a limit of the trainer ended the run before; leave "
            "out what limits it (trainer.max_time ...), and count iterations with trainer.max_steps"
        )
    return task, trainer


def _start(cfg: DictConfig, folder: Path, task: LightningModule) -> processes.Start:
    """Where the run lies and what it goes on from."""
    again = earlier_run(folder, command_line())
    if again is not None:
        (again / LOCK).unlink(missing_ok=True)  # SLURM has ended the job before it queued it again
        clear_runs(again)
        folder = again
    resume = str(again) if again is not None and has_checkpoints(again) else cfg.resume
    if cfg.resume:
        clear_runs(folder.parent if cfg.resume == "auto" else Path(cfg.resume))
    checkpoint = find_checkpoint(resume, folder.parent, cfg, cast(Resumable, task))
    if checkpoint:
        refuse_living(run_of(checkpoint), "train afresh with resume=null")
    if cfg.resume == "auto":
        clear_abandoned(folder.parent)
    return processes.Start(str(folder), checkpoint, again is not None)


def _write_record(cfg: DictConfig, folder: Path, start: processes.Start, loggers: Sequence[Logger]) -> None:
    """Write what a run folder says of its run, and make a folder that a requeued job goes on in ready for it."""
    record(cfg, folder, start.checkpoint, loggers)
    for line in sayings(Path(start.checkpoint), cfg) if start.checkpoint else []:
        print_line(line)
    if start.again:
        go_on_writing(loggers, folder, iterations(start.checkpoint) if start.checkpoint else 0)


def _settled(cfg: DictConfig, start: processes.Start) -> Path:
    """The run's folder, in the configuration too; one that Hydra made for this process alone is removed."""
    own, folder = Path(cfg.folder), Path(start.folder)
    if own != folder:
        with suppress(OSError):
            own.rmdir()
        cfg.folder = start.folder
    return folder


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
        processes.raise_failure_of_others()
        memory = out_of_memory(error)
        if memory is not None:
            at = f"training stopped at iteration {trainer.global_step + 1}: {memory}"
            raise UserError(f"{at}; {memory_advice(cfg)}; last good checkpoint: {last_checkpoint(trainer)}") from error
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
    signals.obey()


def memory_advice(cfg: DictConfig) -> str:
    """Settings that need less memory, the cheapest first, with their values now, unless they save already."""
    advice = []
    batch = OmegaConf.select(cfg, "data.batch_size")
    if batch and batch > 1:
        advice.append(f"a smaller data.batch_size (now {batch})")
    parts = OmegaConf.select(cfg, "task.accumulate")
    share = batch // ranks().world if batch else 0
    more = [k for k in range(parts + 1, share + 1) if share % k == 0] if parts else []
    if more:
        advice.append(f"task.accumulate={more[0]} (now {parts})")
    for key, frugal, values in (
        ("task.checkpointing", (True,), "true"),
        ("model.precision", ("bf16", "fp16"), "bf16"),
        ("model.quantization", ("int8", "fp8"), "int8 or fp8"),
    ):
        group, _, name = key.partition(".")
        value = OmegaConf.select(cfg, key)
        if name in (cfg.get(group) or {}) and value not in frugal:
            advice.append(f"{key}={values} (now {'null' if value is None else str(value).lower()})")
    return f"try, in this order, {', '.join(advice)}" if advice else "use a smaller model"


MEASURES = (Samples, Metrics, Validation, FixedLosses)
"""Callbacks that draw or measure, and write nothing that a run needs."""


def _turn(callback: Callback) -> int:
    """Order of callbacks: checkpoint and student are written before anything that draws or measures can fail.

    What looks at measurements, the checkpoints of the best of them too, comes after what takes them.
    """
    turns: tuple[tuple[type[Callback], ...], ...] = (
        (Checkpoint, OnExceptionCheckpoint),
        (SaveAdapter, Students),
        (StopOnSignal,),
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


def _line(error: BaseException) -> str | None:
    """The line for an error in training; None if it is a defect of the program."""
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return f"callbacks: {one_line(error)}"
    return message_for_user(error)


def _tidy(trainer: Trainer) -> None:
    """On a process that ends because of another one."""
    end_loggers(trainer, failed=True)
    if trainer.is_global_zero:
        drop_record(Path(trainer.default_root_dir))


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
        if value is None:  # taken out by `~KEY`
            raise UserError(f"{key} has no value; give {key}={least} or more")
        if value < least:
            raise UserError(f"{key}={value}; use {least} or more")

    # Task and data, with the trainer's options.
    task: LightningModule = build_group(cfg, "task")
    record_adapters(cfg, task)
    data = build_group(cfg, "data")
    options = trainer_options(cfg)
    check_trainer(options, task)
    check_data(task, data)
    model = getattr(task, "model", None)
    if isinstance(model, Pretrained):
        model.check_trainable()
    check_logger(cfg, is_trial(cfg))
    world = processes.count(options)
    if data.batch_size % world:
        raise UserError(
            f"data.batch_size={data.batch_size} does not divide over {world} processes; use a multiple of {world}"
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
        task.check_data(data)
        task.check_processes(world)
        task.check_batch(data.batch_size, world)
    sharding.check_strategy(options.get("strategy"), task, world, int(options.get("num_nodes", 1)))
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
    processes.settle_devices(options)
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
    timeout = options.pop("timeout", processes.TIMEOUT)
    memory = options.pop("memory_gb", None)
    processes.distribute(options, timeout)
    callbacks = list(build_group(cfg, "callbacks").values())
    if processes.count(options) > 1:
        callbacks.insert(0, processes.Watch(timeout, _line, _tidy))
    if is_trial(cfg):
        callbacks = [c for c in callbacks if not isinstance(c, (Checkpoint, SaveAdapter, Students, *MEASURES))]
    callbacks += [*more, CheckSpace(), StopOnSignal(), *([] if memory is None else [MemoryBudget(memory)])]
    if any(isinstance(callback, EarlyStopping) for callback in callbacks):
        callbacks.append(CheckStopping(checkpoint))
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
        trainer = Trainer(**fixed | options)
        # For every callback that writes checkpoints.
        trainer.strategy.checkpoint_io = CheckpointFiles(trainer.strategy.root_device)
        return trainer
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
    """Raise UserError if data are of one task alone and the task is another, or the judge is to train on other data."""
    judged = isinstance(data, JudgeData)
    if isinstance(task, JudgeTask) and not judged:
        raise UserError("task=judge learns from labelled pictures of shapes; choose them with data=judge")
    if judged and not isinstance(task, JudgeTask):
        raise UserError(
            "data=judge is for task=judge alone; choose captioned pictures, e.g. data=shapes or data=images"
        )
    if isinstance(data, EncodedPairs) and not isinstance(task, Distiller):
        raise UserError("data=shapes_encoded is for task=distill alone; choose data=shapes, which keeps the pictures")


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


def command_line() -> str:
    """The command that was given, as a user would repeat it, without credentials."""
    program = Path(sys.argv[0]).name
    program = "swd" if program in ("__main__.py", "cli.py") else program  # python -m swd
    command = [os.environ["SWD_COMMAND"]] if "SWD_COMMAND" in os.environ else []  # of the installed `swd`
    return mask_text(" ".join([program, *command, *sys.argv[1:]]))


def record_adapters(cfg: DictConfig, task: Any) -> None:
    """Put the hashes of the adapters of the base into the configuration, which resuming and sampling compare."""
    adapters = getattr(getattr(task, "model", None), "adapters", ())
    if adapters:
        OmegaConf.update(cfg, "model.adapters", [adapter.record for adapter in adapters], force_add=True)


def record(cfg: DictConfig, folder: Path, checkpoint: str | None, loggers: Sequence[Logger] = ()) -> None:
    """Write configuration, command and versions into the run folder, without credentials (see `swd.config.stored`)."""
    write_json(
        folder / "run.json",
        {
            "command": command_line(),
            "resumed_from": checkpoint,
            "python": platform.python_version(),
            "versions": {"swd": __version__} | {name: version(name) for name in PACKAGES},
        }
        | recorded_id(loggers)
        | job_record(),
    )
    write_text(folder / "config.yaml", to_yaml(stored(cfg)))
