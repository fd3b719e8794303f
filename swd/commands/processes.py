"""Training on several processes: how many there are, what all of them do together, and how they end together."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment

from swd.io import peers
from swd.io.files import write_text
from swd.io.ranks import Ranks, meeting_point, ranks
from swd.modules import sharding
from swd.types import UserError

TIMEOUT = 600.0
"""Seconds after which a stalled process ends all; NCCL's own default."""
SPARE = 60.0
"""Seconds by which an exchange of tensors outlives that, so that the stall is reported in one line and not by it."""
START = "SWD_START"
"""Environment variable by which the processes that Lightning starts learn where the run lies."""


# How many


def settle_devices(options: dict[str, Any], here: Ranks | None = None) -> None:
    """Fill in the Trainer's `devices` and `num_nodes` from the launcher, and refuse numbers that contradict it.

    Args:
        options: of the Trainer; changed in place.
        here: the place of this process; None: read from the environment.

    Raises:
        UserError: if devices times nodes are not the processes that were started.
    """
    here = ranks() if here is None else here
    timeout = options.get("timeout", TIMEOUT)
    if timeout <= 0:
        raise UserError(f"trainer.timeout={timeout}; give the seconds after which a stalled process ends all")
    nodes = options.pop("num_nodes", "auto")
    if not here.launched:
        if nodes not in ("auto", 1):
            raise UserError(
                f"trainer.num_nodes={nodes}, but no launcher started this process; start it on every node with "
                f"torchrun --nnodes {nodes} --nproc-per-node GPUS, or with srun"
            )
        return
    devices = options.get("devices", "auto")
    devices = here.local_world if devices in ("auto", -1) else devices
    local = len(str(devices).split(",")) if isinstance(devices, str) else devices
    local = len(local) if isinstance(local, list) else int(local)
    nodes = here.nodes if nodes == "auto" else nodes
    if local != here.local_world or nodes != here.nodes:
        raise UserError(
            f"trainer.devices={options.get('devices', 'auto')} on {nodes} node{'s' * (nodes != 1)}, but "
            f"{here.launcher} started {here.world} processes, {here.local_world} on each of {here.nodes} "
            f"node{'s' * (here.nodes != 1)}; leave out trainer.devices and trainer.num_nodes, or start as many"
        )
    _check_gpus(options, here)
    options |= {"devices": devices, "num_nodes": nodes}


def _check_gpus(options: dict[str, Any], here: Ranks) -> None:
    """Raise UserError if a machine has fewer GPUs than processes that are to use one each."""
    kind = str(options.get("accelerator", "auto"))
    gpus = torch.cuda.device_count() if kind in ("auto", "gpu", "cuda") else 0
    if not 0 < gpus < here.local_world:
        return
    advice = f"start {gpus} on each machine"
    if here.launcher == "srun" and gpus == 1:
        advice = "let every task see all GPUs of its node: --gpus-per-node in the place of --gpus-per-task"
    raise UserError(
        f"{here.launcher} started {here.local_world} processes on this machine, and each sees {gpus} "
        f"GPU{'s' * (gpus != 1)}; {advice}"
    )


def count(options: dict[str, Any]) -> int:
    """Number of processes that a training of these settled options has."""
    devices = options.get("devices", 1)
    if isinstance(devices, str) and devices != "auto":
        devices = int(devices) if devices.lstrip("-").isdigit() else devices.split(",")
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if options.get("accelerator") != "cpu" else 1
    return max(devices if isinstance(devices, int) else len(devices), 1) * int(options.get("num_nodes", 1))


def distribute(options: dict[str, Any], timeout: float = TIMEOUT) -> None:
    """Choose the strategy that "auto" and "ddp" mean, and tell Lightning who is who.

    Args:
        options: of the Trainer, settled; changed in place.
        timeout: seconds after which a stalled process ends all.
    """
    options["strategy"] = sharding.strategy_for(options.get("strategy", "auto"), count(options))

    # An exchange of tensors outlives a stall, so that this is reported in one line.
    strategy = options["strategy"]
    if hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=timeout + SPARE)

    # Who is who.
    given = options.get("plugins") or []
    plugins = list(given) if isinstance(given, list | tuple) else [given]
    if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        options["plugins"] = [*plugins, Launched() if ranks().launched else LightningEnvironment()]


class Launched(TorchElasticEnvironment):
    """Processes that torchrun or srun started, as Lightning asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.here = ranks()
        address, port = meeting_point(self.here)
        os.environ["MASTER_ADDR"] = address
        os.environ["MASTER_PORT"] = str(port)

    def world_size(self) -> int:
        return self.here.world

    def global_rank(self) -> int:
        return self.here.rank

    def local_rank(self) -> int:
        return self.here.local_rank

    def node_rank(self) -> int:
        return self.here.node


# What all do together


@dataclass(frozen=True)
class Start:
    """Where a run lies and what it goes on from, as the first process decides it.

    Attributes:
        folder: of the run.
        checkpoint: file, or None for a fresh run.
        again: the folder is there already, since SLURM queued the job again.
    """

    folder: str
    checkpoint: str | None
    again: bool = False


def begin(decide: Callable[[], Start]) -> Start:
    """What the first process decides, on all processes.

    Raises:
        UserError: if another process failed, or a process cannot see the checkpoint.
    """
    here = ranks()
    if here.launcher == "lightning":
        return _inherited(here)
    together = peers.connect() if here.launched else None
    if together is None:
        return decide()
    start = Start(**together.agree(lambda: asdict(decide())))
    if start.checkpoint and not Path(start.checkpoint).is_file():
        raise UserError(f"{here.name} cannot see {start.checkpoint}; output= must be on a disk that all machines share")
    return start


def _inherited(here: Ranks) -> Start:
    if START not in os.environ:
        raise UserError(
            "LOCAL_RANK or NODE_RANK is set, but no launcher is known by it; start several processes with torchrun or "
            "srun, or one after: unset LOCAL_RANK NODE_RANK"
        )
    return Start(**json.loads(os.environ[START]))


def on_first(act: Callable[[], object]) -> None:
    """Call `act` on the first process, after all processes have come so far; if it fails, all end.

    Raises:
        UserError: if another process failed.
    """
    together = peers.connected()
    if together is None:
        if ranks().first:
            act()
        return

    def acted() -> None:
        act()

    together.agree(acted)


@contextmanager
def own_processes(start: Start) -> Iterator[None]:
    """While a training runs, hand its start to the processes that Lightning starts for it.

    They run the command line again. In a sweep they are given that of the job, since they would run the whole sweep.
    Afterwards the environment is as before, so that the next training of this process can start its own.
    """
    if ranks().launcher is not None:
        yield
        return
    before, arguments = dict(os.environ), sys.argv
    os.environ[START] = json.dumps(asdict(start))
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sys.argv = [arguments[0], *HydraConfig.get().overrides.task]
    try:
        yield
    finally:
        sys.argv = arguments
        for name in (START, "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


# How all end


class Watch(Callback):
    """Ends all processes of a training when one of them fails, is gone or stalls, with one line that says which.

    Args:
        timeout: seconds without progress after which a process counts as stalled.
        message: returns the line for an error of the user or the machine, None for a defect of the program.
        tidy: called with the trainer on a process that ends because of another one.
    """

    def __init__(
        self, timeout: float, message: Callable[[BaseException], str | None], tidy: Callable[[Trainer], object]
    ) -> None:
        self.timeout = timeout
        self.message = message
        self.tidy = tidy
        self._peers: peers.Peers | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and self._peers is None:
            self._peers = peers.connect()
        if self._peers is not None:
            self._peers.folder = trainer.default_root_dir
            _dismiss_observer()
            self._peers.watch(self.timeout, partial(self.tidy, trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others at once: they may wait for this process, and what follows may wait for them."""
        if self._peers is None or not isinstance(exception, Exception) or isinstance(exception, peers.PeerFailure):
            return
        line = self.message(exception)
        if isinstance(exception, UserError) and line is not None:
            self._peers.post(line)
        elif line is None and not peers.is_exchange(exception):  # a failure of the machine gets a line of its own later
            write_traceback(self._peers, exception)
            self._peers.after_error(exception, place_of(exception))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._peers is not None:
            self._peers.part()
            if not ranks().launched:
                peers.forget()
            self._peers = None


def _dismiss_observer() -> None:
    """Keep Lightning from killing this process as soon as one that it started has ended; `Watch` ends all instead."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            cast(Any, thread)._run = lambda: True


def raise_failure_of_others() -> None:
    """Raise PeerFailure if another process has failed, since an error of this one then comes from that."""
    together = peers.connected()
    failure = None if together is None else together.known()
    if together is not None and failure is not None and failure.rank != together.here.rank:
        raise peers.PeerFailure(failure) from None


def end_together(together: peers.Peers, error: Exception) -> int:
    """End because of a defect, or of another process, on all processes alike.

    Args:
        together: the other processes.
        error: raised on this one.

    Returns:
        The exit status.
    """
    failure = together.after_error(error, place_of(error))
    if failure.rank == together.here.rank and failure.line.startswith(together.here.name):
        write_traceback(together, error)
    return together.end(failure.line, failure.code)


def write_traceback(together: peers.Peers, error: BaseException) -> None:
    """Write the traceback of a defect into the run's folder, once; where that cannot be, print it."""
    if together.traced:
        return
    together.traced = True
    text = "".join(traceback.format_exception(error))
    folder = Path(together.folder or os.devnull)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(folder)
        write_text(folder / f"traceback-{together.here.rank}.txt", text)
    except OSError:
        print(text, file=sys.stderr)


def place_of(error: BaseException) -> str:
    """File and line that raised an error, the innermost outside of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or list(frames)
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else "an unknown place"
