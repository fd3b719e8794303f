"""Students in the run folder: at the end, every so many iterations, and when a run ends before its time."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError
from torch import Tensor

from swd.config import one_line
from swd.io.files import write_aside
from swd.io.job_log import print_line
from swd.modules.adapters import (
    AVERAGE,
    NETWORK_CONFIG,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    SCHEDULER_CONFIG,
    STUDENTS,
    fill_adapter,
    fill_student,
)
from swd.modules.distiller import Distiller
from swd.modules.finite import all_finite, last_checkpoint, stop_unless_finite
from swd.modules.layouts import gathered, is_sharded, reshard
from swd.modules.networks import SharedBase
from swd.types import Checks, UserError

Weights = dict[str, Tensor]
"""A student's weights: an adapter's in peft's layout, or all of a network by their names in diffusers."""


class Students(Callback):
    """Write the student into `students/` of the run folder every so many iterations.

    `students/iteration-000500/` holds what `adapter/` or `student/` holds at the end, so that a run that is killed
    leaves students, and students of different iterations can be compared.

    Args:
        every: iterations between students.
        keep: how many are kept, the newest; None: all.
    """

    def __init__(self, every: int = 500, keep: int | None = None) -> None:
        if every < 1 or (keep is not None and keep < 1):
            raise UserError(f"callbacks.students: every={every}, keep={keep}; use at least 1 of each, or keep=null")
        self.every = every
        self.keep = keep

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if isinstance(pl_module, Distiller) and trainer.global_step % self.every == 0:
            folder = Path(trainer.default_root_dir) / STUDENTS
            write_student(trainer, pl_module, folder / f"iteration-{trainer.global_step:06d}")
            if trainer.is_global_zero and self.keep is not None:
                for old in sorted(folder.glob("iteration-*"))[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)


class SaveAdapter(Callback):
    """Write the student and its schedule into the run folder when training ends, also if an exception ends it.

    An adapter goes to `adapter/`; a student that was trained whole to `student/`, as a diffusers model.
    """

    def __init__(self) -> None:
        self._written = 0  # iterations done when the student was written, or when this run was started

    def missing(self, run: Path, task: LightningModule, iterations: int) -> str | None:
        """The student's folder if a run of so many iterations lacks its student, else None."""
        if not isinstance(task, Distiller):
            return None
        folder = student_folder(run, task)
        parts = [folder, folder / AVERAGE] if task.ema else [folder]
        return None if all(is_whole(part, task) for part in parts) else str(folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the student.

        Raises:
            UserError: if it or its predictions are not finite, or there is no room.
        """
        # Without a single iteration there is no student, only fresh weights.
        if isinstance(pl_module, Distiller) and trainer.global_step:
            write_student(trainer, pl_module, student_folder(Path(trainer.default_root_dir), pl_module))
            self._written = trainer.global_step

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the student of a run that an error or Ctrl-C ended, if its weights and predictions are finite.

        Other processes may go on or have ended, so nothing here waits for them.
        """
        done = trainer.global_step
        if not (isinstance(pl_module, Distiller) and trainer.is_global_zero and done > self._written):
            return
        if is_sharded(pl_module):
            warnings.warn(
                f"no student of iteration {done} was written: its weights are divided over processes that may have "
                "ended; go on with resume=auto",
                stacklevel=2,
            )
            return
        folder = student_folder(Path(trainer.default_root_dir), pl_module)
        try:
            if all(student_checks(pl_module).values()):
                save(folder, pl_module)
                print_line(f"the student of iteration {done} is in {folder}")
        except Exception as error:  # the error that ended the run is raised after this one, which must not hide it
            warnings.warn(f"no student of iteration {done} was written: {one_line(error)}", stacklevel=2)


def student_folder(run: Path, task: Distiller) -> Path:
    """Where the student of a finished run lies."""
    return run / ("student" if task.model.tuning == "full" else "adapter")


def is_whole(folder: Path, task: Distiller) -> bool:
    """Whether all files of a student are in a folder."""
    if task.model.tuning == "full":
        return (folder / NETWORK_CONFIG).is_file() and any(folder.glob("*.safetensors"))
    return all((folder / name).is_file() for name in (PEFT_CONFIG, PEFT_WEIGHTS, SCHEDULER_CONFIG))


def student_checks(task: Distiller) -> Checks:
    """Whether the student's weights, their average and what the networks predict are finite, by name."""
    trained = [p.detach() for p in task.networks.role_parameters("student")]
    checks = {"weights of the student": all_finite(trained)}
    if task.average is not None:
        checks["average of the student's weights"] = all_finite([p.detach() for p in task.average.parameters()])
    return checks | task.predictions()


def write_student(trainer: Trainer, task: Distiller, folder: Path) -> None:
    """Write the student to a folder, on all processes at the same iteration.

    Raises:
        UserError: on all of them, if it or its predictions are not finite, or there is no room.
    """
    place = f"iteration {trainer.global_step}, before the student is written"
    stop_unless_finite(trainer, student_checks(task), place, "no student was written")
    # All processes gather what is divided, the first one writes.
    weights = student_weights(task)
    failure = ""
    if trainer.is_global_zero:
        try:
            save(folder, task, weights)
        except (OSError, SafetensorError) as error:
            failure = (
                f"the student cannot be written to {trainer.default_root_dir} ({one_line(error)}); make room and give "
                f"the same command with resume={last_checkpoint(trainer)}"
            )
    failure = trainer.strategy.broadcast(failure)
    if failure:
        raise UserError(failure)


def student_weights(task: Distiller) -> dict[str, Weights]:
    """The student's weights, and the average of them if there is one, by the folder inside its own that they go to.

    All processes call it at the same time where weights are divided; the first one then has them whole, on the CPU.
    """
    found = {".": weights_of(task)}
    if task.average is not None:
        with task.averaged_student():
            found[AVERAGE] = weights_of(task)
    return found


def weights_of(task: Distiller) -> Weights:
    """The weights with which the student predicts now: an adapter's, or all of a network that is trained whole."""
    if isinstance(task.networks, SharedBase):
        return task.networks.adapter_state("student")
    network = task.networks.backbone_of("student").network
    reshard(network)
    state: Weights = gathered(network.state_dict())
    return state


def save(folder: Path, task: Distiller, weights: dict[str, Weights] | None = None) -> Path:
    """Write the student aside, then rename it; the average of its weights, if there is one, lies in a folder in it.

    Args:
        folder: the student's.
        task: the distillation.
        weights: from `student_weights`; None: as they are now, on one process alone.
    """
    parts = student_weights(task) if weights is None else weights

    def write(new: Path) -> None:
        for name, state in parts.items():
            fill(new / name, task, state)

    return write_aside(folder, write)


def fill(folder: Path, task: Distiller, weights: Weights) -> None:
    """Write a student of these weights, and its schedule, into a folder that is made."""
    model, networks = task.model, task.networks
    if not isinstance(networks, SharedBase):
        config = networks.backbone_of("student").diffusers_model.config
        with torch.device("meta"):
            network: Any = model.network_class.from_config(config)
        network.load_state_dict(weights, assign=True)
        fill_student(folder, network, task.scheduler(), model.name, model.backbone_class.expert())
        return
    fill_adapter(
        folder,
        weights,
        model.rank,
        model.rank if model.alpha is None else model.alpha,
        task.scheduler(),
        base=model.name,
        part=model.backbone_class.lora_prefix(),
        baked=[adapter.baked for adapter in model.own_adapters],
        expert=model.backbone_class.expert(),
    )
