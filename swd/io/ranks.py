"""Who a process is among those that a launcher started: torchrun, SLURM's srun, or Lightning itself.

Nothing else in the package reads the launchers' environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from swd.types import UserError

Launcher = Literal["torchrun", "srun", "lightning"]

SPECIAL_STEP = 4294967280
"""SLURM numbers its own steps (batch, extern, interactive, pending) from the end of 32 bits; srun counts from 0."""
PORT = 15000
"""First port for processes of srun to meet at, as Lightning chooses it; the last four digits of the job are added."""


@dataclass(frozen=True)
class Ranks:
    """The place of a process among all processes of a program.

    Attributes:
        rank: number of this process, below `world`.
        world: number of processes on all machines together.
        local_rank: number of this process on its machine, below `local_world`.
        local_world: number of processes on each machine.
        node: number of the machine, below `nodes`.
        launcher: program that started the processes; None: this process was started alone.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    launcher: Launcher | None = None

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.world // self.local_world

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether all processes were started from outside, so that this program starts none."""
        return self.launcher in ("torchrun", "srun")

    @property
    def name(self) -> str:
        """This process in messages, counted from 0 as launchers do."""
        return f"process {self.rank} of {self.world}"


def ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The place of this process, from the environment.

    torchrun is recognized by `RANK` and `WORLD_SIZE`, a task of srun by `SLURM_PROCID` in a step of its own, a process
    that Lightning started by `LOCAL_RANK` alone. What SLURM leaves in a batch script or an interactive shell, where
    srun did not start the program, describes one process.

    Args:
        environment: variables by name; None: those of this process.

    Raises:
        UserError: if a variable is no number, or they contradict each other.
    """
    variables = os.environ if environment is None else environment
    if "RANK" in variables:
        return _checked(_torchrun(variables), "RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE")
    if _is_task(variables):
        return _checked(_srun(variables), "SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID and SLURM_NNODES")
    if "LOCAL_RANK" in variables or "NODE_RANK" in variables:
        return _checked(_lightning(variables), "LOCAL_RANK and WORLD_SIZE")
    return Ranks()


def share() -> tuple[int, int]:
    """Number of this process and number of processes, for work that torchrun or srun divides; else (0, 1)."""
    here = ranks()
    return (here.rank, here.world) if here.launched else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that prints messages."""
    return ranks().first


def _torchrun(variables: Mapping[str, str]) -> Ranks:
    if "WORLD_SIZE" not in variables:
        raise UserError(
            f"RANK={variables['RANK']} without WORLD_SIZE; torchrun sets both: start with it, or unset RANK"
        )
    world = _number(variables, "WORLD_SIZE")
    local_rank = _number(variables, "LOCAL_RANK", 0)
    # Without LOCAL_RANK each machine has one process, as in a cluster of containers.
    local_world = _number(variables, "LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in variables else 1)
    rank = _number(variables, "RANK")
    node = _number(variables, "GROUP_RANK", rank // max(local_world, 1))
    return Ranks(rank, world, local_rank, local_world, node, "torchrun")


def _is_task(variables: Mapping[str, str]) -> bool:
    """Whether srun started this process as one of the tasks of a step.

    A batch script has `SLURM_PROCID=0` but no step. A shell that `salloc` or `srun --pty` opened has one, which is a
    special step or has a terminal, and the name of the shell as the job's.
    """
    if "SLURM_PROCID" not in variables:
        return False
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID", ""))
    shell = "SLURM_PTY_PORT" in variables or variables.get("SLURM_JOB_NAME") in ("bash", "interactive")
    own_step = step.isdigit() and int(step) < SPECIAL_STEP
    rank = _number(variables, "SLURM_PROCID")
    terminal = shell and ("SLURM_PTY_PORT" in variables or not own_step)
    if own_step and not terminal:
        return True
    if rank > 0:  # no shell and no batch script has another number
        missing = "SLURM_PTY_PORT is set" if own_step else "SLURM_STEP_ID is missing"
        raise UserError(
            f"SLURM_PROCID={rank}, but {missing}, so srun's tasks cannot be told from a shell; start with srun"
        )
    return False


def _srun(variables: Mapping[str, str]) -> Ranks:
    rank = _number(variables, "SLURM_PROCID")
    world = _number(variables, "SLURM_STEP_NUM_TASKS", _number(variables, "SLURM_NTASKS", 1))
    per_node = variables.get("SLURM_NTASKS_PER_NODE", "")
    guess = -(-world // int(per_node)) if per_node.isdigit() and int(per_node) else 1
    nodes = _number(variables, "SLURM_STEP_NUM_NODES", _number(variables, "SLURM_NNODES", guess))
    if nodes < 1 or world % nodes:
        raise UserError(f"srun started {world} tasks on {nodes} nodes; give each node equally many: --ntasks-per-node")
    local_world = world // nodes
    local_rank = _number(variables, "SLURM_LOCALID", rank % local_world)
    return Ranks(rank, world, local_rank, local_world, _number(variables, "SLURM_NODEID", rank // local_world), "srun")


def _lightning(variables: Mapping[str, str]) -> Ranks:
    local_rank = _number(variables, "LOCAL_RANK", 0)
    node = _number(variables, "NODE_RANK", 0)
    world = max(_number(variables, "WORLD_SIZE", 1), local_rank + node + 1)
    local_world = world // (node + 1)
    return Ranks(node * local_world + local_rank, local_world * (node + 1), local_rank, local_world, node, "lightning")


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text.strip()):
        raise UserError(f"{name}={text} is no number of processes; a launcher sets it: start with one, or unset {name}")
    return int(text)


def _checked(found: Ranks, names: str) -> Ranks:
    fits = (
        0 <= found.rank < found.world
        and 0 <= found.local_rank < found.local_world
        and found.world % found.local_world == 0
        and found.node < found.nodes
    )
    if not fits:
        raise UserError(
            f"{names} contradict each other: rank {found.rank} of {found.world}, and on its machine rank "
            f"{found.local_rank} of {found.local_world}; start with torchrun or srun, or unset them"
        )
    return found


def meeting_point(here: Ranks, environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port at which the processes of a launcher meet.

    Raises:
        UserError: if they are not known, or the port is none.
    """
    variables = os.environ if environment is None else environment
    address = variables.get("MASTER_ADDR")
    port = variables.get("MASTER_PORT")
    if here.launcher == "srun":
        listed = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        job = re.sub(r"\D", "", variables.get("SLURM_JOB_ID", "0"))[-4:] or "0"
        address = address or first_host(listed)
        port = port or str(PORT + int(job))
    if not address or not port:
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(f"RANK and WORLD_SIZE are set, but {missing} is not; start with torchrun, or unset them")
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port; use a number from 1024 to 65535")
    return address, int(port)


def first_host(listed: str) -> str:
    """The first name of a list of hosts as SLURM writes it: `gpu[03-05,9],login` gives `gpu03`."""
    found = re.match(r"([^\[,\s]+)(?:\[(\w+)[^\]]*\]([^,\s]*))?", listed)
    return "127.0.0.1" if found is None else "".join(part or "" for part in found.groups())
