"""Small distillations on every layout of weights, in one process and in a group of gloo processes.

Each process of such a group trains all cases that it is given, and the first one writes what comes out, so that many
comparisons cost one start.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from processes import run_together
from torch import Tensor

from swd.callbacks import Checkpoint, Monitor, Sentinel, Students
from swd.callbacks.sentinel import restore_task
from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs
from swd.modules.layouts import gathered
from swd.modules.pretrained import Pretrained
from swd.modules.sharding import DDP, Sharded
from swd.schedule import ScaleSchedule
from swd.types import Cached, CachedBatch, Conditioning, UserError

BATCH = 4
"""Samples of the global batch, however many processes share it."""
LOSSES: dict[str, tuple[str, ...]] = {
    "dmd": ("dmd",),
    "mmd": ("mmd",),
    "gan": ("gan",),
    "dmd_gan": ("dmd", "gan"),
    "dmd_mmd": ("dmd", "mmd"),
    "mmd_gan": ("mmd", "gan"),
    "swd": ("dmd", "mmd", "gan"),
}
OWN_SEED = -1
SIGMAS = [1.0, 0.8, 0.6]
TERMS = {"dmd": DMD, "mmd": MMD, "gan": GAN}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: of its results.
        family: whose tiny pipeline `model` names.
        loss: one of `LOSSES`.
        layout: one, ddp, fsdp or hsdp (groups of two).
        iterations: how many.
        model: arguments of `Pretrained`.
        sizes: of the schedule; its sigmas are `SIGMAS`.
        task: options of `Distiller`; `OWN_SEED` as seed gives each process another one.
        terms: options of the loss terms, by name; "gan_2" is one more `GAN`.
        callbacks: names in `CALLBACKS`; their files go to the folder of the case's name.
        spoilt: number of a batch whose last sample is not finite.
        resume: a checkpoint to go on from, relative to the folder of all cases; its newest one if it is a folder.
    """

    name: str
    family: str = "sd3"
    loss: str = "swd"
    layout: str = "one"
    iterations: int = 3
    model: dict[str, Any] = field(default_factory=dict)
    sizes: list[Any] = field(default_factory=lambda: [4, 6, 8])
    task: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)
    callbacks: list[str] = field(default_factory=list)
    spoilt: int | None = None
    resume: str | None = None


@dataclass(frozen=True)
class Result:
    """What came out of a training.

    Attributes:
        weights: all that is trained, by name, at the end.
        metrics: of every iteration, by name.
        seen: what each process saw, in their order.
    """

    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    seen: list[dict[str, Any]]


class Encoded(LightningDataModule):
    """Encoded batches of random numbers: each process has its own rows of the same global ones."""

    is_cache = True

    def __init__(self, task: Distiller, spoilt: int | None = None, batch: int = BATCH) -> None:
        super().__init__()
        self.spoilt = spoilt
        self.task = task
        self.sizes = task.schedule.sizes
        self.batch = batch
        self.first = 0
        self.count = batch

    def setup(self, stage: str) -> None:
        trainer: Any = self.trainer
        self.count = self.batch // trainer.world_size
        self.first = trainer.global_rank * self.count

    def conditioning(self, batch: int, seed: int) -> Conditioning:
        model = self.task.model
        config = dict(model.network_config)
        return model.backbone_class.random_conditioning(config, batch, 6, seed)

    def __getitem__(self, number: int) -> CachedBatch:
        generator = torch.Generator().manual_seed(number)
        channels = self.task.model.channels
        rows = slice(self.first, self.first + self.count)
        means = {size: torch.randn(self.batch, channels, *size, generator=generator) for size in self.sizes}
        for mean in means.values() if number == self.spoilt else ():
            mean[-1] = float("nan")
        posteriors = {size: (mean[rows], torch.full_like(mean[rows], 0.1)) for size, mean in means.items()}
        conditioning = self.conditioning(self.batch, number).rows(rows)
        return CachedBatch(Cached(conditioning, posteriors), prompts=["a star"] * self.count)

    def empty(self, bucket: Any) -> Conditioning:
        return self.conditioning(1, 99)

    def train_dataloader(self) -> Any:
        first = self.task.updates  # where a resumed run goes on
        return Iterations([self[number] for number in range(first, 24)], self.task.batches_per_iteration)


class Record(Callback):
    """Keeps the metrics of every iteration, and what this process alone sees."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.seen: dict[str, Any] = {"sizes": [], "noise": [], "gradients": [], "error": None}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distiller)
        pl_module.observers.append(self.observe)
        # FSDP2 takes the types of a group of weights from those that require a gradient at its first forward pass.
        for role in ("fake", "student", "teacher"):
            if role in ("teacher", *pl_module.roles):
                with pl_module.networks.role(role):
                    pass

    def observe(self, inputs: Inputs) -> dict[str, Tensor]:
        self.seen["sizes"].append(list(inputs.interval.target))
        self.seen["noise"] += [float(row.sum()) for row in inputs.draws.noise("student/noise", inputs.target)]
        return {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen["gradients"] = sorted({*self.seen["gradients"], *(str(each.dtype) for each in gradients)})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Distiller)
        self.rows.append({name: float(value) for name, value in pl_module.last_metrics.items()})


class GoBack(Callback):
    """Takes weights and optimizers back to those of the first iteration after the second, as `Sentinel` does."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Distiller)
        strategy = trainer.strategy
        if trainer.global_step == 1:
            states = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
            kept = {"state_dict": pl_module.kept_state(strategy.lightning_module_state_dict())}
            self.kept = copy.deepcopy(strategy.broadcast(kept | {"optimizer_states": states}))
        elif trainer.global_step == 2:
            restore_task(pl_module, self.kept, 1.0)


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "checkpoint": lambda: Checkpoint(every=1),
    "students": lambda: Students(every=2),
    "monitor": lambda: Monitor(every=1, prompts=1, seeds=2),
    "sentinel": Sentinel,
    "back": GoBack,
}


def a_task(case: Case) -> Distiller:
    terms = {}
    for name in dict.fromkeys((*LOSSES[case.loss], *case.terms)):
        kind = name.partition("_")[0]
        blocks = {} if kind == "dmd" else {"blocks": (0,)}
        terms[name] = TERMS[kind](**blocks | case.terms.get(name, {}))
    options = {"critic_updates": 2, "lr": 1e-4} | case.task
    if options.get("seed") == OWN_SEED:
        options["seed"] = int(os.environ["RANK"])
    return Distiller(Pretrained(**case.model), ScaleSchedule(SIGMAS, case.sizes), terms, **options)


def strategy_of(layout: str) -> Any:
    return {
        "one": lambda: "auto",
        "ddp": DDP,
        "fsdp": Sharded,
        "hsdp": lambda: Sharded(shard=2),
    }[layout]()


def a_trainer(case: Case, folder: Path, *callbacks: Callback) -> Trainer:
    """A trainer of this process, in its group unless the case is of one process alone."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    quiet["enable_checkpointing"] = "checkpoint" in case.callbacks
    several = case.layout != "one"
    return Trainer(
        max_steps=case.iterations,
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if several else 1,
        strategy=strategy_of(case.layout),
        plugins=[TorchElasticEnvironment()] if several else [],
        callbacks=[*callbacks, *(CALLBACKS[name]() for name in case.callbacks)],
        default_root_dir=folder / case.name,
        use_distributed_sampler=False,
        **quiet,
    )


def train(case: Case, folder: Path) -> Result:
    """Train a case; all processes of a group call it, and the first one has the weights.

    A line that ends the training on a process is kept in what that one saw.
    """
    torch.manual_seed(0)
    record = Record()
    task = a_task(case)
    (folder / case.name).mkdir(exist_ok=True)
    trainer = a_trainer(case, folder, record)
    start = None if case.resume is None else newest(folder / case.resume)
    try:
        trainer.fit(task, datamodule=Encoded(task, case.spoilt), ckpt_path=start, weights_only=True if start else None)
    except UserError as error:
        record.seen["error"] = str(error)
    weights = {key: value.detach().float().clone() for key, value in gathered(task.kept_state()).items()}
    return Result(weights, record.rows, everyone(record.seen) if case.layout != "one" else [record.seen])


def everyone(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def newest(path: Path) -> str:
    """A checkpoint, or the newest one of a run's folder."""
    files = [path] if path.is_file() else list((path / "checkpoints").glob("iteration-*"))
    return str(max(files, key=lambda file: file.stat().st_mtime_ns))


PROGRAM = "import sys, pathlib, layouts; layouts.main(pathlib.Path(sys.argv[1]))"


def train_all(cases: list[Case], world: int, folder: Path) -> None:
    """Train cases on so many processes at once; `result` reads what comes out."""
    file = folder / f"cases-{world}.json"
    file.write_text(json.dumps([asdict(case) for case in cases]))
    run_together([sys.executable, "-c", PROGRAM, str(file)], world, folder, limit=900)


def result(folder: Path, name: str) -> Result:
    """The result of a case that was trained before."""
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    return Result(**found)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    for case in json.loads(file.read_text()):
        found = train(Case(**case), file.parent)
        if os.environ["RANK"] == "0":
            torch.save(asdict(found), file.parent / f"{case['name']}.pt")
