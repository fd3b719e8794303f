"""A signal ends a training after its iteration, with everything saved, and a second one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import Launch, start
from lightning import Callback
from processes import Fork, environment, torchrun
from tiny import composed, overrides

from swd.commands.train import fit
from swd.io import signals
from swd.io.signals import Stopped
from swd.modules.checkpoint_files import read_checkpoint

ROOT = Path(__file__).parents[2]
CALLBACKS = "callbacks=[checkpoint,adapter]"


class Signal(Callback):
    """Sends a signal to this process while an iteration runs."""

    def __init__(self, number: int, at: int, then: Any = None) -> None:
        self.number = number
        self.at = at
        self.then = then

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)
            if self.then:
                self.then()


def train(model: Path, folder: Path, *more: Callback, **options: Any) -> Any:
    return fit(composed([*overrides(model, folder, **{"loss": "mmd", **options}), CALLBACKS]), *more)


def checkpoint(folder: Path, iteration: int) -> dict[str, Any]:
    loaded: dict[str, Any] = read_checkpoint(folder / "checkpoints" / f"iteration-{iteration}.ckpt")
    return loaded


CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.mark.parametrize("number", list(CODES), ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_the_iteration_with_everything_saved(
    tiny_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = {each: signal.getsignal(each) for each in CODES}
    with pytest.raises(Stopped, match=rf"stopped by {number.name} after iteration 3 of 9; .*iteration-3\.ckpt") as stop:
        train(tiny_model, tmp_path / "run", Signal(number, at=2), trainer__max_steps=9)
    assert stop.value.code == CODES[number] and "\n" not in str(stop.value)
    assert {each: signal.getsignal(each) for each in CODES} == before
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-3.ckpt"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 4


def test_a_stopped_run_goes_on_to_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(tiny_model, tmp_path / "a" / "run", Signal(signal.SIGTERM, at=0), trainer__max_steps=3)
    train(tiny_model, tmp_path / "a" / "rest", trainer__max_steps=3, resume="auto")
    train(tiny_model, tmp_path / "b", trainer__max_steps=3)
    ours, theirs = (checkpoint(folder, 3)["state_dict"] for folder in (tmp_path / "a" / "rest", tmp_path / "b"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert "iteration-1.ckpt" in (tmp_path / "a" / "rest" / "run.json").read_text()


def test_a_signal_in_the_last_iteration_is_obeyed_when_the_run_is_whole(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stop:
        train(tiny_model, tmp_path / "run", Signal(signal.SIGTERM, at=1), trainer__max_steps=2)
    assert stop.value.code == 143
    assert checkpoint(tmp_path / "run", 2)["global_step"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_signal_before_the_first_iteration_ends_at_once_and_leaves_no_folder(
    tiny_model: Path, tmp_path: Path
) -> None:
    class Early(Callback):
        def setup(self, *args: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        train(tiny_model, tmp_path / "run", Early(), trainer__max_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_says_so(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [*overrides(tiny_model, tmp_path / "run", loss="mmd", trainer__max_steps=9), "callbacks=none"]
    with pytest.raises(Stopped, match=r"after iteration 1 of 9; nothing was saved"):
        fit(composed(arguments), Signal(signal.SIGTERM, at=0))


def test_the_same_signal_twice_within_a_moment_is_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launchers pass on to their processes what these got themselves."""
    monkeypatch.setattr(signals, "SAME", 1000.0)
    again = Signal(signal.SIGTERM, 0, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 1"):
        train(tiny_model, tmp_path / "run", again, trainer__max_steps=9)


def test_what_a_program_was_started_to_ignore_stays_ignored() -> None:
    """`nohup` starts a program with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            signals.postpone()
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signals.requested() is None
            signals.obey()
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = """
import os, sys, time
from pathlib import Path
import signal
from swd.io import signals

def outcome(work):
    child = os.fork()
    if not child:
        os.close(2)
        try:
            with signals.listening():
                work()
            os._exit(0)
        except signals.Stopped as stop:
            os._exit(stop.code)
        except KeyboardInterrupt:
            os._exit(130)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)

def postponed(*numbers, same=0.0):
    signals.SAME = same
    signals.postpone()
    send(*numbers)
    signals.obey()

print([outcome(lambda: send(n)) for n in (15, 2, 1, 10)])
print(outcome(lambda: postponed(15)), outcome(lambda: postponed(15, 15)), outcome(lambda: postponed(15, 2)))
print(outcome(lambda: postponed(15, 2, same=100)))

def closing(number):
    signals.SAME = 0.0
    signals.postpone()
    send(15)
    signals.close()
    send(number)
    signals.obey()

print(outcome(lambda: closing(15)), outcome(lambda: closing(2)))

def worker():
    signals.outlive()
    signals.WORKER_SECONDS = 1
    send(2, 1, 10)
    start = time.time()
    send(15)
    time.sleep(10)

print(outcome(worker))
"""


def test_exit_codes_at_once_postponed_twice_and_of_a_loader_process() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, check=True)
    at_once, twice, same, closing, worker = result.stdout.splitlines()
    assert at_once == "[143, 130, 129, 138]"
    assert twice == "143 -15 -2"
    assert same == "143"
    assert closing == "0 -2"
    assert worker == str(-signal.SIGALRM)


def test_a_whole_group_is_signalled_and_the_command_ends_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """As a terminal does on Ctrl-C and SLURM at the end of a job: loader processes get the signal too."""
    run = tmp_path / "run"
    arguments = overrides(tiny_model, run, loss="mmd", trainer__max_steps=10_000, data__workers=2)
    program = "import os\nos.setsid()\nfrom swd.commands.cli import launch\nlaunch('train')"
    command = [sys.executable, "-c", program, *arguments, CALLBACKS]
    process = Fork(command, environment(), tmp_path, tmp_path / "out.txt", tmp_path / "err.txt")
    while not (run / "metrics.csv").is_file() or len((run / "metrics.csv").read_text().splitlines()) < 3:
        assert process.poll() is None, process.err.read_text()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    told = process.err.read_text().splitlines()
    (file,) = (run / "checkpoints").iterdir()
    iteration = int(file.stem.split("-")[1])
    assert told[-1] == (
        f"stopped by SIGTERM after iteration {iteration} of 10000; "
        f"the same command with resume=auto goes on from {file}"
    )
    assert not any("Traceback" in line or "rror" in line for line in told), told


SECOND = """
import os, signal
from swd.modules.distiller import Distiller

step = Distiller.training_step

def stopped(self, batches, number):
    if self.global_rank == 1 and self.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(self, batches, number)

Distiller.training_step = stopped
"""


def arguments_of_two(model: Path, run: Path) -> list[str]:
    given = overrides(model, run, loss="mmd", trainer__max_steps=50, trainer="ddp_cpu", output=run.parent)
    return [*given, CALLBACKS]


def check_stopped(errors: str, run: Path) -> None:
    """Both processes stopped after the second iteration, and one of them says so and has saved everything."""
    told = [line for line in errors.splitlines() if line.startswith("stopped by")]
    assert told == [
        "stopped by SIGTERM after iteration 2 of 50; the same command with resume=auto goes on from "
        f"{run / 'checkpoints' / 'iteration-2.ckpt'}"
    ]
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["iteration-2.ckpt"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file() and not (run / ".running.json").exists()
    assert "Traceback" not in errors


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_iteration(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = Launch("stopped", arguments_of_two(tiny_model, run), torchrun(2), SECOND)
    outcome = start([launch], tmp_path)["stopped"]
    assert outcome.codes == [143, 143], outcome.errors
    check_stopped("".join(outcome.errors), run)


@pytest.mark.slow
def test_a_signal_to_a_process_that_the_command_started_stops_both(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    program = tmp_path / "program.py"
    program.write_text(f'{SECOND}\nfrom swd.commands import cli\ncli.launch("train")\n')
    result = subprocess.run(
        [sys.executable, str(program), *arguments_of_two(tiny_model, run)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 143, result.stderr
    check_stopped(result.stderr, run)
