"""Kills commands of this project at random moments, gives each again until it is through, and compares all bytes.

A program: `killing.py MODEL FOLDER SEED KIND=COUNT ...`, which prints a JSON object for every case. Its processes are
forked after the imports, so that a case costs what the command itself costs. A moment is a random share of the CPU time
that the undisturbed command takes, so that a busy machine moves none beyond the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from shards import make_pictures, picture
from tiny import composed, overrides

from swd.commands import encode, generate, import_pictures, train

ITERATIONS = 4


@dataclass(frozen=True)
class Case:
    """A command that was killed and given again.

    Attributes:
        kind: the command; "student" is a training that is killed while a student or a checkpoint is written.
        moments: share of its CPU time after which each kill came.
        inside: whether a kill left a half-written file.
        same: whether it ended with the bytes of an undisturbed one, and left nothing else.
        why: what differs.
    """

    kind: str
    moments: list[float]
    inside: bool
    same: bool
    why: str = ""


Command = Callable[[Path, int], None]
"""Runs in a folder; the number says how often it was given before."""


def training(model: Path) -> Command:
    def run(folder: Path, attempt: int) -> None:
        options = {"loss": "swd", "task__ema": 0.9, "trainer__max_steps": ITERATIONS, "resume": "auto"}
        options["task__critic_updates"] = 1
        more = ["callbacks=[checkpoint,adapter,students]", "callbacks.checkpoint.every=1", "callbacks.students.every=1"]
        train.fit(composed([*overrides(model, folder / f"attempt-{attempt}", **options), *more]))

    return run


def drawing(model: Path) -> Command:
    plain = [f"model.path={model}", "model=sd35_large", "model.size=8", "model.precision=fp32", "steps=3", "seed=11"]
    plain += ["model.feature_blocks=[0]", "model.max_text_tokens=24", "batch_size=2", "shard_size=5"]

    def run(folder: Path, attempt: int) -> None:
        prompts = folder.parent / "prompts.txt"
        prompts.write_text("".join(f"a red star {i}\n" for i in range(12)))
        generate.run(composed([*plain, f"prompts={prompts}", f"out={folder}"], "generate"))

    return run


def encoding(model: Path, pictures: Path) -> Command:
    asked = [a for a in overrides(model, Path()) if a.startswith(("model", "schedule"))]
    asked += ["data=webdataset", f"data.path={pictures}", "data.size=64", "data.workers=0", "batch_size=2"]

    def run(folder: Path, attempt: int) -> None:
        encode.run(composed([*asked, "shard_size=3", f"out={folder}"], "encode"))

    return run


def importing(source: Path) -> Command:
    def run(folder: Path, attempt: int) -> None:
        import_pictures.run(composed([f"source={source}", f"out={folder}", "workers=2", "shard_size=6"], "import"))

    return run


# Processes


def start(command: Command, folder: Path, attempt: int, log: Path) -> int:
    """Fork a process that runs a command; its number."""
    process = os.fork()
    os.setpgid(process, process)  # a group of its own, whichever of both is first
    if process:
        return process
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        command(folder, attempt)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def cpu_seconds(process: int) -> float:
    """CPU time of a process that runs or has ended and was not waited for."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill_when(process: int, moment: Moment) -> bool:
    """Kill a process and those that it started when the moment comes; False if it ended before."""
    while not ended(process):
        if moment.come(process):
            time.sleep(moment.pause)
            break
        time.sleep(0.001)
    early = not ended(process)
    os.killpg(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    return early and os.WIFSIGNALED(status)


def finish(command: Command, folder: Path, attempt: int, log: Path) -> float:
    """Run a command to its end; its CPU seconds."""
    process = start(command, folder, attempt, log)
    status, usage = os.wait4(process, 0)[1:]
    if status:
        raise SystemExit(f"attempt {attempt} in {folder} failed: {log.read_text()}")
    return usage.ru_utime + usage.ru_stime


# Comparing


def leftovers(folder: Path) -> list[str]:
    """Hidden names: whatever is written aside has one."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name != ".partial"]


def result(kind: str, folder: Path) -> dict[str, str]:
    """Hashes of what a command leaves: of trainings, what its last checkpoint and its student hold."""
    if kind in ("train", "student"):
        (last,) = folder.glob(f"*/checkpoints/iteration-{ITERATIONS}.ckpt")
        files = [last, *(last.parents[1] / "adapter").rglob("*")]
        folder = last.parents[1]
    else:
        files = list(folder.rglob("*"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


class Moment:
    """A random moment of a command: a share of its CPU time, or the writing of some file.

    Args:
        kind: of the command.
        seconds: CPU time that the undisturbed command takes.
        folder: that it writes to.
        draw: where random numbers come from.
    """

    def __init__(self, kind: str, seconds: float, folder: Path, draw: random.Random) -> None:
        self.writing = kind == "student"
        self.folder = folder
        self.share = draw.random() * 0.97
        self.seconds = self.share * seconds
        self.number = draw.randrange(1, ITERATIONS + 2)
        self.pause = draw.random() * 0.01
        self.begun: set[str] = set()

    def come(self, process: int) -> bool:
        if not self.writing:
            return cpu_seconds(process) >= self.seconds
        names = [name for _, folders, _ in os.walk(self.folder) for name in folders]  # some vanish meanwhile
        now = {name.rpartition(".")[0] for name in names if fnmatchcase(name, ".*.????????")}
        self.begun |= now
        return bool(now) and len(self.begun) >= self.number


def killed(kind: str, command: Command, folder: Path, seconds: float, draw: random.Random) -> tuple[list[float], bool]:
    """Kill a command once or twice, then run it to its end; the share of each kill, and whether it cut off a write."""
    log, moments, inside = folder.parent / f"{folder.name}.log", [], False
    wanted = 1 + (draw.random() < 0.25)
    for attempt in range(20):
        if not moments:  # an attempt that was through before its kill leaves nothing to kill
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        moment = Moment(kind, seconds, folder, draw)
        if kill_when(start(command, folder, attempt, log), moment):
            moments.append(round(moment.share, 3))
            inside = inside or bool(leftovers(folder))
        elif moments:
            break
        if len(moments) == wanted:
            break
    finish(command, folder, 20, log)
    return moments, inside


@dataclass(frozen=True)
class Whole:
    """What an undisturbed command leaves, and the CPU seconds that it takes."""

    files: dict[str, str]
    seconds: float


def undisturbed(kind: str, command: Command, folder: Path) -> Whole:
    folder.mkdir(parents=True)
    seconds = finish(command, folder, 0, folder.parent / "whole.log")
    return Whole(result(kind, folder), seconds)


def case(kind: str, command: Command, whole: Whole, folder: Path, draw: random.Random) -> Case:
    moments, inside = killed(kind, command, folder, whole.seconds, draw)
    found = result(kind, folder)
    wrong = [name for name in {*whole.files, *found} if whole.files.get(name) != found.get(name)]
    wrong += leftovers(folder) + [str(path) for path in Path(os.environ["TMPDIR"]).rglob("*")]
    return Case(kind, moments, inside, not wrong, " ".join(sorted(wrong)))


def main(model: Path, folder: Path, seed: int, counts: dict[str, int]) -> None:
    os.environ["TMPDIR"] = str(folder / "tmp")
    (folder / "tmp").mkdir(parents=True)
    source = folder / "source"
    source.mkdir()
    for i in range(20):
        picture(i, 48, 48).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"a red star, {i}")
    pictures = make_pictures(folder / "pictures", 8)
    commands = {
        "train": training(model),
        "generate": drawing(model),
        "encode": encoding(model, pictures),
        "import": importing(source),
    }
    wholes: dict[str, Whole] = {}
    for kind, count in counts.items():
        name = "train" if kind == "student" else kind
        if name not in wholes:
            wholes[name] = undisturbed(kind, commands[name], folder / name / "whole")
        draw = random.Random(f"{seed}/{kind}")
        for number in range(count):
            found = case(kind, commands[name], wholes[name], folder / kind / str(number), draw)
            print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    model, folder, seed, *given = sys.argv[1:]
    main(
        Path(model), Path(folder), int(seed), {kind: int(count) for kind, _, count in (g.partition("=") for g in given)}
    )
