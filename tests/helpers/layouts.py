"""Small distillations on every layout of weights, in one process and in a group of gloo processes.

As a program it is one process of such a group: it trains the cases that it is given, and the first process writes what
comes out, so that many comparisons cost one start.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.modules.distiller import Distiller
from swd.modules.layouts import gathered
from swd.modules.pretrained import Pretrained
from swd.modules.sharding import DDP, Sharded
from swd.schedule import ScaleSchedule
from swd.types import Cached, CachedBatch, Conditioning

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
SIGMAS = [1.0, 0.8, 0.6]
TERMS = {"dmd": DMD, "mmd": MMD, "gan": GAN}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        name: of its results.
        loss: one of `LOSSES`.
        layout: one, ddp, fsdp or hsdp (groups of two).
        iterations: how many.
        model: arguments of `Pretrained`.
        sizes: of the schedule; its sigmas are `SIGMAS`.
        task: options of `Distiller`.
        terms: options of the loss terms, by name.
    """

    name: str
    loss: str = "swd"
    layout: str = "one"
    iterations: int = 3
    model: dict[str, Any] = field(default_factory=dict)
    sizes: list[Any] = field(default_factory=lambda: [4, 6, 8])
    task: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came out of a training.

    Attributes:
        weights: all that is trained, by name, at the end.
        metrics: of every iteration, by name.
    """

    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]


class Encoded(LightningDataModule):
    """Encoded batches of random numbers: each process has its own rows of the same global ones."""

    is_cache = True

    def __init__(self, task: Distiller, batch: int = BATCH) -> None:
        super().__init__()
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
        means = {size: torch.randn(self.batch, channels, *size, generator=generator)[rows] for size in self.sizes}
        posteriors = {size: (mean, torch.full_like(mean, 0.1)) for size, mean in means.items()}
        conditioning = self.conditioning(self.batch, number).rows(rows)
        return CachedBatch(Cached(conditioning, posteriors), prompts=["a star"] * self.count)

    def empty(self, bucket: Any) -> Conditioning:
        return self.conditioning(1, 99)

    def train_dataloader(self) -> Any:
        return Iterations([self[number] for number in range(24)], self.task.batches_per_iteration)


class Record(Callback):
    """Keeps the metrics of every iteration."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, Distiller)
        self.rows.append({name: float(value) for name, value in pl_module.last_metrics.items()})


def a_task(case: Case) -> Distiller:
    terms = {}
    for name in LOSSES[case.loss]:
        blocks = {} if name == "dmd" else {"blocks": (0,)}
        terms[name] = TERMS[name](**blocks | case.terms.get(name, {}))
    options = {"critic_updates": 2, "lr": 1e-4} | case.task
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
    several = case.layout != "one"
    return Trainer(
        max_steps=case.iterations,
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]) if several else 1,
        strategy=strategy_of(case.layout),
        plugins=[TorchElasticEnvironment()] if several else [],
        callbacks=list(callbacks),
        default_root_dir=folder,
        use_distributed_sampler=False,
        **quiet,
    )


def train(case: Case, folder: Path) -> Result:
    """Train a case; all processes of a group call it, and the first one has the result."""
    torch.manual_seed(0)
    record = Record()
    task = a_task(case)
    a_trainer(case, folder, record).fit(task, datamodule=Encoded(task))
    weights = {key: value.detach().float().clone() for key, value in gathered(task.kept_state()).items()}
    return Result(weights, record.rows)


def launch(world: int, program: Path, *arguments: str, timeout: int = 900) -> None:
    """Run a program on so many gloo processes, as `torchrun` starts them.

    Raises:
        AssertionError: with its standard error, if one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(program), *arguments]
        processes.append(subprocess.Popen(command, env=os.environ | common | own, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(error[-4000:] for error in errors)


def train_all(cases: list[Case], world: int, folder: Path) -> None:
    """Train cases on so many processes at once; `result` reads what comes out."""
    file = folder / f"cases-{world}.json"
    file.write_text(json.dumps([asdict(case) for case in cases]))
    launch(world, Path(__file__), str(file))


def result(folder: Path, name: str) -> Result:
    """The result of a case that was trained before."""
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    return Result(found["weights"], found["metrics"])


def main(file: Path) -> None:
    torch.set_num_threads(1)
    for case in json.loads(file.read_text()):
        found = train(Case(**case), file.parent)
        if os.environ["RANK"] == "0":
            torch.save(asdict(found), file.parent / f"{case['name']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
