"""Students while a run trains, at its end, and when it ends before its time; the average of their weights."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loading
import numpy as np
import pytest
import torch
from lightning import Callback
from PIL import Image
from safetensors.torch import load_file
from tiny import composed, drawing, exporting, overrides
from torch import Tensor

from swd.callbacks.students import SaveAdapter, Students
from swd.commands import export, sample
from swd.commands.train import fit
from swd.export.student_folder import SCHEDULE, recorded_schedule
from swd.modules.adapters import locate
from swd.modules.checkpoint_student import from_checkpoint
from swd.modules.distiller import Distiller
from swd.types import UserError

ALL = "callbacks=[checkpoint,adapter,students]"


def train(model: Path, folder: Path, *arguments: str, more: Callback | None = None, **options: Any) -> Distiller:
    callbacks = [] if more is None else [more]
    task, _ = fit(composed([*overrides(model, folder, **{"loss": "mmd"} | options), ALL, *arguments]), *callbacks)
    assert isinstance(task, Distiller)
    return task


@dataclass(frozen=True)
class Trained:
    """A training of two iterations with all settings as they are; whoever changes its files takes a copy."""

    folder: Path
    task: Distiller

    def copied(self, to: Path) -> Path:
        return shutil.copytree(self.folder, to / "run")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return Trained(folder, train(tiny_model, folder))


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a student, whichever kind it is, under peft's or diffusers' names."""
    files = [file for file in folder.glob("*.safetensors") if "lora" not in file.name]
    return {key: value for file in files for key, value in load_file(file).items()}


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((value - b[key]).abs().max().item() for key, value in a.items())


def picture(model: Path, folder: Path, **options: Any) -> np.ndarray:
    sample.run(composed([*drawing(model, folder, **options), "prompts=[a red star]", "seed=3"], "sample"))
    (file,) = folder.glob("*.png")
    return np.asarray(Image.open(file)).astype(float)


# While it trains


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_students_are_drawn_exported_and_equal_what_a_run_of_that_length_leaves(
    tiny_model: Path, tmp_path: Path, tuning: str
) -> None:
    options = {"model__tuning": tuning, "task__lr": 1e-3}
    run = tmp_path / "run"
    train(tiny_model, run, "callbacks.students.every=1", trainer__max_steps=2, **options)
    train(tiny_model, tmp_path / "short", trainer__max_steps=1, **options)
    last = "adapter" if tuning == "lora" else "student"
    students = sorted((run / "students").iterdir())
    assert [folder.name for folder in students] == ["iteration-000001", "iteration-000002"]
    assert differ(weights(students[0]), weights(tmp_path / "short" / last)) == 0
    assert differ(weights(students[1]), weights(run / last)) == 0
    assert differ(weights(students[0]), weights(students[1])) > 0

    drawn = {name: picture(tiny_model, tmp_path / f"drawn-{i}", adapter=name) for i, name in enumerate(students)}
    drawn[run] = picture(tiny_model, tmp_path / "drawn-run", adapter=run)
    np.testing.assert_array_equal(drawn[students[1]], drawn[run])
    assert np.abs(drawn[students[0]] - drawn[run]).max() > 0
    export.run(composed(exporting(tiny_model, run=students[0], to=tmp_path / "exported"), "export"))
    assert differ(weights(students[0]), weights(tmp_path / "exported")) == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_checkpoint_is_drawn_and_exported_like_the_student_of_its_iteration(
    tiny_model: Path, tmp_path: Path, tuning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Copies lie elsewhere in memory than weights in files, and kernels may round by that.
    monkeypatch.setattr(loading, "LARGEST", 0)
    run = tmp_path / "run"
    options = {"model__tuning": tuning, "task__lr": 1e-3} | ({"model__alpha": 2} if tuning == "lora" else {})
    train(tiny_model, run, "callbacks.checkpoint.every=1", **options)
    checkpoint = run / "checkpoints" / "iteration-2.ckpt"
    np.testing.assert_array_equal(
        picture(tiny_model, tmp_path / "a", adapter=checkpoint), picture(tiny_model, tmp_path / "b", adapter=run)
    )
    export.run(composed(exporting(tiny_model, run=checkpoint, to=tmp_path / "exported"), "export"))
    last = "adapter" if tuning == "lora" else "student"
    assert differ(weights(run / last), weights(tmp_path / "exported")) == 0


def test_a_checkpoint_that_is_damaged_or_of_nothing_is_one_line(whole: Trained, tmp_path: Path) -> None:
    run = whole.copied(tmp_path)
    checkpoint = run / "checkpoints" / "iteration-2.ckpt"
    with pytest.raises(UserError, match=r"no average: task\.ema was off"):
        from_checkpoint(checkpoint, ema=True)
    recorded = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(recorded.replace("alpha: null", "alpha: .nan"))
    with pytest.raises(UserError, match=r"model\.alpha=nan is no LoRA alpha"):
        from_checkpoint(checkpoint)
    (run / "config.yaml").write_text(recorded.replace(SCHEDULE, "os.system"))
    with pytest.raises(UserError, match=r"schedule\._target_=os\.system is not taken from a file"):
        recorded_schedule(run / "config.yaml", whole.task.model)
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(UserError, match=r"iteration-2\.ckpt is damaged \(its hash differs\)"):
        from_checkpoint(checkpoint)


def test_as_many_students_are_kept_as_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    names = {}
    for keep in ("null", "2"):
        run = tmp_path / keep
        train(tiny_model, run, "callbacks.students.every=1", f"callbacks.students.keep={keep}", trainer__max_steps=3)
        names[keep] = sorted(folder.name for folder in (run / "students").iterdir())
    assert names["null"] == [f"iteration-{n:06d}" for n in (1, 2, 3)]
    assert names["2"] == [f"iteration-{n:06d}" for n in (2, 3)]


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}])
def test_counts_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"callbacks\.students: every=\d+, keep=\w+; use at least 1 of each"):
        Students(**options)


# A run that ends before its time


class Stop(Callback):
    """Ends a run after an iteration, in the way that it is given."""

    def __init__(self, after: int, how: Callable[[Any], object]) -> None:
        self.after = after
        self.how = how

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.after:
            self.how(trainer)


def raising(error: BaseException) -> Callable[[Any], None]:
    def stop(trainer: Any) -> None:
        raise error

    return stop


@pytest.mark.parametrize("error", [RuntimeError("the GPU is gone"), KeyboardInterrupt(), UserError("NaN")], ids=repr)
def test_a_run_that_an_exception_ends_leaves_its_student(
    tiny_model: Path, whole: Trained, tmp_path: Path, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(type(error)):
            train(tiny_model, tmp_path / "run", more=Stop(2, raising(error)), trainer__max_steps=9)
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"the student of iteration 2 is in {tmp_path / 'run' / 'adapter'}" in capsys.readouterr().err
    assert differ(weights(tmp_path / "run" / "adapter"), weights(whole.folder / "adapter")) == 0


def test_an_exception_leaves_no_student_that_is_not_finite_or_not_of_this_run(
    tiny_model: Path, whole: Trained, tmp_path: Path
) -> None:
    def spoil(trainer: Any) -> None:
        next(iter(trainer.lightning_module.networks.role_parameters("student"))).data.fill_(float("nan"))
        raise RuntimeError("spoilt")

    for name, after, how in (("nan", 2, spoil), ("fresh", 0, raising(RuntimeError("early")))):
        with pytest.raises(RuntimeError):
            train(tiny_model, tmp_path / name, more=Stop(after, how), trainer__max_steps=9)
        assert not (tmp_path / name / "adapter").exists()
    with pytest.raises(RuntimeError):
        how = raising(RuntimeError("before its first iteration"))
        train(tiny_model, tmp_path / "two", f"resume={whole.folder}", more=Stop(2, how), trainer__max_steps=3)
    assert not (tmp_path / "two" / "adapter").exists()


def test_a_disk_without_room_is_told_but_does_not_hide_what_ended_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("swd.callbacks.students.save", full)
    with (
        pytest.warns(UserWarning, match="no student of iteration 1 was written: .*No space left"),
        pytest.raises(RuntimeError, match="first"),
    ):
        train(tiny_model, tmp_path / "run", more=Stop(1, raising(RuntimeError("first"))))
    with pytest.raises(UserError, match=r"the student cannot be written to .*No space left"):
        train(tiny_model, tmp_path / "other", "callbacks.students.every=1")


def test_a_run_that_lightning_ends_early_leaves_its_student(tiny_model: Path, whole: Trained, tmp_path: Path) -> None:
    def end(trainer: Any) -> None:
        trainer.should_stop = True

    train(tiny_model, tmp_path / "run", more=Stop(1, end), trainer__max_steps=50)
    # The iteration that was begun is ended.
    assert differ(weights(tmp_path / "run" / "adapter"), weights(whole.folder / "adapter")) == 0


@pytest.mark.slow
def test_a_terminated_run_leaves_its_student(tiny_model: Path, tmp_path: Path) -> None:
    """Schedulers of clusters send SIGTERM when a job's time is over, some time before they kill it."""
    run = tmp_path / "run"
    arguments = [*overrides(tiny_model, run, loss="mmd", trainer__max_steps=10_000), ALL, "callbacks.students.every=2"]
    program = Path(__file__).parents[2] / "train.py"
    with subprocess.Popen([sys.executable, str(program), *arguments], cwd=tmp_path) as process:
        while not (run / "students" / "iteration-000002").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        process.wait(60)
    assert weights(run / "adapter")


def test_the_newest_student_of_a_killed_run_is_taken(tmp_path: Path) -> None:
    for name in ("000500", "001000"):
        folder = tmp_path / "runs" / "killed" / "students" / f"iteration-{name}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    for path in (str(tmp_path / "runs" / "killed"), "latest"):
        assert locate(path, tmp_path / "runs") == folder


# The average


def student(task: Distiller) -> list[Tensor]:
    return [p.detach().clone() for p in task.networks.role_parameters("student")]


def averages(task: Distiller) -> list[Tensor]:
    with task.averaged_student():
        return student(task)


class Record(Callback):
    """Keeps the student's weights after every iteration."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(student(pl_module))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_average_is_the_recurrence_and_changes_no_training(tiny_model: Path, tmp_path: Path, tuning: str) -> None:
    record = Record()
    options: dict[str, Any] = {"model__tuning": tuning, "task__lr": 1e-3, "trainer__max_steps": 4}
    task = train(tiny_model, tmp_path / "with", "task.ema=0.3", more=record, **options)
    plain = train(tiny_model, tmp_path / "without", **options)
    assert all(torch.equal(a, b) for a, b in zip(student(task), student(plain), strict=True))
    for i, value in enumerate(averages(task)):
        expected = record.weights[0][i].double()
        for n, later in enumerate(record.weights[1:], 1):
            decay = min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * later[i].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-8)
    moved = max((a - b).abs().max().item() for a, b in zip(averages(task), student(task), strict=True))
    assert moved > 1e-5
    assert task.average is not None
    sizes = [sum(p.numel() for p in parameters) for parameters in (task.average.parameters(), student(task))]
    assert sizes[0] == sizes[1]  # only what is trained


def test_a_resumed_average_equals_a_straight_one_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    straight = train(tiny_model, tmp_path / "straight", "task.ema=0.9", trainer__max_steps=4)
    train(tiny_model, tmp_path / "first", "task.ema=0.9", trainer__max_steps=2)
    resume = f"resume={tmp_path / 'first'}"
    rest = train(tiny_model, tmp_path / "rest", "task.ema=0.9", resume, trainer__max_steps=4)
    assert all(torch.equal(a, b) for a, b in zip(averages(straight), averages(rest), strict=True))
    for value in ("0.5", "null"):
        with pytest.raises(UserError, match=r"resume=.* was made with another configuration: task\.ema was 0\.9, now"):
            train(tiny_model, tmp_path / "other", f"task.ema={value}", resume, trainer__max_steps=4)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_either_is_exported_and_drawn(tiny_model: Path, tmp_path: Path, tuning: str) -> None:
    run = tmp_path / "run"
    options = {"model__tuning": tuning, "task__lr": 1e-2, "trainer__max_steps": 3}
    train(tiny_model, run, "task.ema=0.9", "callbacks.students.every=3", **options)
    last = run / ("adapter" if tuning == "lora" else "student")
    assert differ(weights(last), weights(last / "ema")) > 1e-4
    places = (run, last, run / "students" / "iteration-000003", run / "checkpoints" / "iteration-3.ckpt")
    for number, place in enumerate(places):
        drawn = []
        for ema, expected in (("true", last / "ema"), ("false", last), ("null", last / "ema")):
            target = tmp_path / f"{number}-{ema}"
            arguments = exporting(tiny_model, run=place, to=target, ema=ema, verify="false")
            export.run(composed(arguments, "export"))
            assert differ(weights(target), weights(expected)) == 0, (place, ema)
            if number in (0, 3):
                drawn.append(picture(tiny_model, tmp_path / f"drawn-{number}-{ema}", adapter=place, ema=ema))
        if drawn:
            np.testing.assert_array_equal(drawn[0], drawn[2])
            assert np.abs(drawn[0] - drawn[1]).max() > 0


def test_pictures_while_training_are_those_of_the_average(tiny_model: Path, tmp_path: Path) -> None:
    task = train(tiny_model, tmp_path / "run", "task.ema=0.9", task__lr=1e-2, trainer__max_steps=3)
    before = student(task)
    ours, _ = task.sample(["a red star"], [0])
    assert all(torch.equal(a, b) for a, b in zip(before, student(task), strict=True))
    with task.averaged_student():
        again, _ = task.sample(["a red star"], [0])  # once is enough
    assert torch.equal(ours, again)
    task.average = None
    assert not torch.equal(ours, task.sample(["a red star"], [0])[0])


def test_a_done_run_without_its_average_gets_it(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    train(tiny_model, run, "task.ema=0.9")
    expected = weights(run / "adapter" / "ema")
    (run / "adapter" / "ema" / "adapter_model.safetensors").unlink()
    train(tiny_model, tmp_path / "runs" / "next", "task.ema=0.9", f"resume={run}")
    assert differ(weights(run / "adapter" / "ema"), expected) == 0


@pytest.mark.parametrize("ema", [1.0, -0.1])
def test_a_decay_that_is_none_is_refused(tiny_model: Path, tmp_path: Path, ema: float) -> None:
    with pytest.raises(UserError, match=r"task\.ema=.*; use"):
        train(tiny_model, tmp_path, f"task.ema={ema}")


def test_a_student_without_an_average_says_so(whole: Trained, tmp_path: Path) -> None:
    whole.copied(tmp_path)
    with pytest.raises(UserError, match=r"holds no average of its weights: task\.ema was off"):
        locate(str(tmp_path / "run"), tmp_path, ema=True)
    with pytest.raises(UserError, match="is one file, so there is no average"):
        locate(str(tmp_path / "run" / "adapter" / "adapter_model.safetensors"), tmp_path, ema=True)
    (tmp_path / "run" / "adapter" / "ema").mkdir()
    (tmp_path / "run" / "adapter" / "ema" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an average; for the trained weights give"):
        locate(str(tmp_path / "run" / "adapter" / "ema"), tmp_path, ema=False)
    assert SaveAdapter().missing(tmp_path / "run", whole.task, 2) is None
