"""A lock on a folder that a program works in, which says who holds it and shows whether that program still lives."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from swd.io.job_log import print_line
from swd.types import UserError

LOCK = ".running.json"
"""Name of the lock of a folder that one program owns."""
BEAT = 30.0
"""Seconds between two heartbeats: changes of the lock's time."""
SILENT = 600.0
"""Seconds without a heartbeat after which a holder on another machine counts as gone: network disks may hang for
minutes, and the programs on them with them."""


@dataclass(frozen=True)
class Holder:
    """The program that holds a lock.

    Attributes:
        host: name of its machine.
        machine: host, boot and process namespace; process numbers mean the same only where all three agree.
        pid: number of its process.
        birth: moment at which the process was started, in ticks since the boot; empty where the system has no /proc.
        since: moment at which it took the lock, for people.
    """

    host: str
    machine: str
    pid: int
    birth: str
    since: str

    @staticmethod
    def here() -> Holder:
        """This process."""
        pid = os.getpid()
        return Holder(platform.node(), _machine(), pid, _birth(pid), time.strftime("%Y-%m-%d %H:%M:%S"))

    def lives(self, lock: Path) -> bool:
        """Whether the program may still work: its process is there, or on another machine, has shown itself lately."""
        if self.machine != _machine():
            return _age(lock) < SILENT
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            pass
        return self.birth == _birth(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


def _machine() -> str:
    """Name of this machine, with its boot and the namespace of its process numbers where the system tells them."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _birth(pid: int) -> str:
    """Moment at which a process was started; a number may be given to another process later."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _age(file: Path) -> float:
    """Seconds since a file was changed, by the clock of this machine; 0 if it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def holder_of(lock: Path) -> Holder | None:
    """The program that holds a lock now; None if there is no lock or its holder is gone."""
    try:
        found = Holder(**json.loads(lock.read_text(encoding="utf-8")))
    except OSError:
        return None
    except (ValueError, TypeError):  # cut off, as on a full disk, or being written at this moment
        return Holder("an unknown machine", "", 0, "", "a short while ago") if _age(lock) < BEAT else None
    return found if found.lives(lock) else None


def refuse_living(folder: Path, fix: str, names: Sequence[str] = (LOCK,)) -> None:
    """Raise UserError if a program works in a folder; clear the locks of those that are gone, with a line.

    Args:
        folder: where the locks lie.
        fix: end of the message, beside waiting for the program and stopping it.
        names: of the locks.
    """
    for lock in [folder / name for name in names]:
        holder = holder_of(lock)
        if holder is not None:
            raise UserError(
                f"{folder} is being worked in by {holder}; wait for it, stop it (kill {holder.pid} there), or {fix}"
            )
        _clear(lock)


def clear_abandoned(folder: Path) -> None:
    """Remove the locks of killed programs from the folders in `folder`; those of living ones stay."""
    for lock in folder.glob(f"*/{LOCK}"):
        if holder_of(lock) is None:
            _remove(lock)


def _clear(lock: Path) -> None:
    """Remove a lock whose holder is gone, and say so."""
    if _remove(lock):
        print_line(
            f"{lock.parent}: the program that worked here ended without taking back its lock; going on in its place"
        )


def _remove(lock: Path) -> bool:
    """Remove a lock; whether this program did, of several that try."""
    stale = lock.with_name(f"{lock.name}.{os.getpid()}")
    try:
        os.rename(lock, stale)
        stale.unlink()
    except OSError:  # there is none, or another program was faster
        return False
    return True


@contextmanager
def held(folder: Path, fix: str, name: str = LOCK, others: Sequence[str] = ()) -> Iterator[None]:
    """Hold the lock on a folder that exists; a thread keeps showing that this program lives.

    Args:
        folder: to be locked.
        fix: see `refuse_living`.
        name: of the lock.
        others: names of locks of other programs that must not be held either.

    Raises:
        UserError: if another program holds one.
    """
    refuse_living(folder, fix, [name, *others])
    lock = folder / name
    own = json.dumps(asdict(Holder.here()))
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        raise UserError(f"{folder}: another program has begun to work here at this moment; {fix}") from None
    with open(handle, "w", encoding="utf-8") as stream:
        stream.write(own)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(lock, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if lock.read_text(encoding="utf-8") == own:
                lock.unlink()


@contextmanager
def held_share(folder: Path, rank: int, world: int) -> Iterator[None]:
    """Hold the lock on a share of the work in a folder, beside the processes that have the other shares.

    A process that has the share already goes on: the lock is between processes.

    Args:
        folder: that exists.
        rank: number of the share.
        world: number of shares.

    Raises:
        UserError: if another process has this share, or the work is divided in another way.
    """
    ending = f"-of-{world}.json"
    others = [file.name for file in folder.glob(".running-*.json") if not file.name.endswith(ending)]
    fix = "start all processes that are to share the work together (torchrun, srun)"
    name = f".running-{rank}{ending}"
    holder = holder_of(folder / name)
    if holder is not None and (holder.machine, holder.pid) == (_machine(), os.getpid()):
        yield
        return
    with held(folder, fix, name, others):
        yield


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(lock)
