"""Checkpoint files that are damaged, missing, half-written or done; runs whose disk is full."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from tiny import composed, overrides

from swd.callbacks import checkpoint as callback
from swd.callbacks.fixed_losses import FixedLosses
from swd.callbacks.sample_sheets import Samples
from swd.commands.train import build_task_and_data, fit
from swd.io import sealed
from swd.io.files import clear_leftovers, in_use, write_aside
from swd.modules import checkpoint_files
from swd.modules.checkpoint_files import CheckpointFiles, damage, progress_in_iterations, read_checkpoint
from swd.modules.distiller import Distiller
from swd.shapes.train_judge import JudgeTask
from swd.types import UserError

OLD = Path(__file__).parents[1] / "data" / "version_0_1" / "run" / "checkpoints" / "iteration-2.ckpt"


def train(model: Path, folder: Path, *arguments: str, **more: Any) -> Any:
    return fit(composed([*overrides(model, folder, **more), *arguments]))


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations with both checkpoints; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_model, folder, loss="dmd", callbacks__checkpoint__every=1)
    return folder


def copied(finished: Path, to: Path) -> Path:
    """A copy whose checkpoints keep their order in time."""
    shutil.copytree(finished, to / "runs" / "run")
    return to / "runs" / "run" / "checkpoints" / "iteration-2.ckpt"


@pytest.mark.parametrize(("completed", "expected"), [(5, 1), (6, 2)])  # saved at the end of a batch, or of the run
def test_progress_counted_in_batches_becomes_progress_in_iterations(completed: int, expected: int) -> None:
    checkpoint = torch.load(OLD, weights_only=True)
    loop = checkpoint["loops"]["fit_loop"]
    for counts in ("total", "current"):
        loop["epoch_loop.batch_progress"][counts]["completed"] = completed
    for _ in range(2):  # the second time there is nothing left to do
        progress_in_iterations(checkpoint, 3)
        for counts in ("total", "current"):
            progress = loop["epoch_loop.batch_progress"][counts]
            assert progress == {"ready": 2, "started": 2, "processed": 2, "completed": expected}
        assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 1


def test_a_checkpoint_has_the_progress_that_an_old_one_gets(finished: Path) -> None:
    for iteration in (1, 2):
        checkpoint = read_checkpoint(finished / "checkpoints" / f"iteration-{iteration}.ckpt")
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert progress == dict.fromkeys(("ready", "started", "processed"), iteration) | {"completed": iteration - 1}


# Damage


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        checkpoint = read_checkpoint(file)
        change(checkpoint)
        CheckpointFiles().save_checkpoint(checkpoint, file)

    return write


def flipped(place: float) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[int(place * (len(data) - 1))] ^= 4
        file.write_bytes(data)

    return write


def spoiled_weight(checkpoint: dict[str, Any]) -> None:
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] = float("nan")


def other_shape(checkpoint: dict[str, Any]) -> None:
    key = list(checkpoint["state_dict"])[3]
    checkpoint["state_dict"][key] = checkpoint["state_dict"][key][:1].clone()


def moment(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(checkpoint: dict[str, Any]) -> None:
        state = next(iter(checkpoint["optimizer_states"][1]["state"].values()))
        state.pop(name) if value is None else state.update({name: value(state[name])})

    return change


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"a bit at {place}": flipped(place) for place in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0)},
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-5]) and None,
    "empty": lambda file: file.write_bytes(b"") and None,
    "text": lambda file: file.write_bytes(b"no checkpoint\n" * 100) and None,
    "a number": edited(lambda c: [c.pop(key) for key in list(c)]),
    "no critic's optimizer": edited(lambda c: c["optimizer_states"].pop()),
    "no moments": edited(lambda c: c["optimizer_states"][0]["state"].clear()),
    "no second moment": edited(moment("exp_avg_sq", None)),
    "a moment of another shape": edited(moment("exp_avg", lambda t: t[:1].clone())),
    "an infinite moment": edited(moment("exp_avg_sq", lambda t: t + float("inf"))),
    "a weight of another shape": edited(other_shape),
    "a weight that is NaN": edited(spoiled_weight),
    "no loops": edited(lambda c: c.pop("loops")),
    "no position of the data": edited(lambda c: c.pop("swd")),
    "another position of the data": edited(lambda c: c["swd"].update(updates=1)),
    "no learning rate": edited(lambda c: c["optimizer_states"][0]["param_groups"][0].pop("lr")),
    "no betas of the critic's": edited(lambda c: c["optimizer_states"][1]["param_groups"][0].pop("betas")),
    "a text for the iteration": edited(lambda c: c.update(global_step="2")),
    "a weight missing": edited(lambda c: c["state_dict"].popitem()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    finished: Path, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    newest = copied(finished, tmp_path)
    DAMAGE[kind](newest)
    damaged = newest.read_bytes()
    cfg = composed(overrides(tiny_model, tmp_path / "runs" / "next", loss="dmd", resume="auto"))
    task: Any = build_task_and_data(cfg)[0]
    with pytest.raises(UserError, match=r"resume=.*iteration-2\.ckpt holds no valid checkpoint \(.+\)") as caught:
        callback.find_checkpoint(str(newest), tmp_path, cfg, task)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=r"iteration-2\.ckpt is damaged \(.+\) and was passed over"):
        found = callback.find_checkpoint("auto", tmp_path / "runs", cfg, task)
    assert found == str(newest.with_name("iteration-1.ckpt"))
    # It is set aside, as it is, and not looked at again.
    assert not newest.exists() and newest.with_name("iteration-2.ckpt.damaged").read_bytes() == damaged
    assert callback.find_checkpoint("auto", tmp_path / "runs", cfg, task) == found


def test_only_what_is_damaged_and_mine_is_set_aside(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = copied(finished, tmp_path)
    cfg = composed(overrides(tiny_model, tmp_path / "runs" / "next", loss="dmd", resume="auto"))
    flipped(0.5)(newest)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="was passed over$"):
        for key, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            patch.setenv(key, value)
        callback.find_checkpoint("auto", tmp_path / "runs", cfg)
    assert newest.is_file()
    newest.with_name("iteration-2.ckpt.damaged").write_text("an earlier one")
    with pytest.warns(UserWarning, match=r"was passed over; it is iteration-2\.ckpt\.damaged\.2 now"):
        callback.find_checkpoint("auto", tmp_path / "runs", cfg)
    assert newest.with_name("iteration-2.ckpt.damaged").read_text() == "an earlier one"
    older = newest.with_name("iteration-1.ckpt")
    CheckpointFiles().save_checkpoint(read_checkpoint(older), newest)
    monkeypatch.setattr(checkpoint_files, "VERSION", 0)
    with pytest.raises(UserError, match=r"has format 1, and this version of swd reads up to 0; update swd"):
        callback.find_checkpoint("auto", tmp_path / "runs", cfg)
    assert newest.is_file() and older.is_file()


def test_no_flipped_bit_goes_unnoticed(finished: Path, tmp_path: Path) -> None:
    file = copied(finished, tmp_path)
    data = file.read_bytes()
    assert damage(file) is None
    draw = random.Random(0)
    ends = [*range(200), *range(len(data) - 200, len(data))]
    for place in [*ends, *(draw.randrange(len(data)) for _ in range(100))]:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        assert damage(file) is not None, place


def test_a_checkpoint_of_version_0_1_has_no_hash_and_loads(tmp_path: Path) -> None:
    assert damage(OLD) is None
    file = tmp_path / "old.ckpt"
    data = bytearray(OLD.read_bytes())
    at = data.index(b"PK\x03\x04", len(data) // 2) + 200  # inside a stored tensor
    data[at] ^= 1
    file.write_bytes(data)
    assert damage(file) is not None


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    CheckpointFiles().save_checkpoint({"a": torch.arange(3), "b": [1, "c"]}, file)
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("a"), torch.arange(3))
        plain = {"version": 1, "content": {"a": {"$tensor": "a"}, "b": [1, "c"]}}
        assert json.loads(opened.metadata()["swd_checkpoint"]) == plain
    loaded = read_checkpoint(file)
    assert torch.equal(loaded["a"], torch.arange(3)) and loaded["b"] == [1, "c"]


# The configuration beside it


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00", b"- a\n- b\n", b"seed:\t1", b"seed: [1", b"", b"model: {a: 1}}"], ids=repr
)
def test_a_bad_config_does_not_keep_others_from_being_resumed(
    finished: Path, tiny_model: Path, tmp_path: Path, text: bytes
) -> None:
    good = copied(finished, tmp_path)
    bad = tmp_path / "runs" / "bad"
    shutil.copytree(finished, bad)
    (bad / "config.yaml").write_bytes(text)
    for file in (bad / "checkpoints").iterdir():
        os.utime(file)  # the newest of all
    cfg = composed(overrides(tiny_model, tmp_path / "runs" / "next", loss="dmd"))
    with pytest.warns(UserWarning, match=f"{bad} was passed over"):
        assert callback.find_checkpoint("auto", tmp_path / "runs", cfg) == str(good)
    with pytest.raises(UserError, match=r"config\.yaml is damaged") as caught:
        callback.find_checkpoint(str(bad), tmp_path, cfg)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_no_agreement(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    newest = copied(finished, tmp_path)
    (newest.parent.parent / "config.yaml").unlink()
    with pytest.warns(UserWarning, match=r"config\.yaml is missing"):
        train(tiny_model, tmp_path / "runs" / "next", loss="dmd", seed=99, trainer__max_steps=1, resume="auto")
    assert '"resumed_from": null' in (tmp_path / "runs" / "next" / "run.json").read_text()
    with pytest.raises(UserError, match=r"config\.yaml is missing, .*put it back"):
        train(tiny_model, tmp_path / "runs" / "other", loss="dmd", resume=newest)
    assert not (tmp_path / "runs" / "other").exists()


def test_resuming_from_nothing_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume= is empty"):
        train(tiny_model, tmp_path, resume="''")


# Nothing left to train

FULL = ("callbacks=[checkpoint,adapter,samples]", "callbacks.samples.prompts=[a red star]")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_done_run_gets_what_it_lacks_and_no_other_folder_appears(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tuning: str
) -> None:
    run, options = tmp_path / "runs" / "one", {"loss": "mmd", "model__tuning": tuning}
    train(tiny_model, run, *FULL, **options)
    whole = contents(run)
    student = run / ("adapter" if tuning == "lora" else "student")
    for taken in ([], [student], [run / "samples"], [student, run / "samples"]):
        for folder in taken:
            shutil.rmtree(folder)
        # What a kill in the middle of writing the student leaves behind.
        (run / f".{student.name}.abc_1234" / student.name).mkdir(parents=True)
        for repeated in range(2):
            (tmp_path / "runs" / "next").mkdir()  # as Hydra does
            capsys.readouterr()
            train(tiny_model, tmp_path / "runs" / "next", *FULL, **options, resume="auto" if taken else run)
            (line,) = (text for text in capsys.readouterr().err.splitlines() if "all done" in text)
            assert "nothing else is left to do" in line and str(run) in line
            assert ("wrote" in line) == (bool(taken) and not repeated)
            assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["one"]
            assert contents(run) == whole and not list(run.glob(".*"))


def test_who_goes_on_with_a_done_run_gets_its_networks(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    """As the demo does, which measures and reports after training."""
    run = copied(finished, tmp_path).parent.parent
    fixed = FixedLosses(pictures=2)
    cfg = composed(overrides(tiny_model, tmp_path / "runs" / "next", loss="dmd", resume="auto"))
    task, trainer = fit(cfg, fixed)
    assert isinstance(task, Distiller) and cfg.folder == str(run) and trainer.global_step == 2
    stored = read_checkpoint(run / "checkpoints" / "iteration-2.ckpt")["state_dict"]
    state = task.state_dict()
    assert stored and all(torch.equal(state[key], value) for key, value in stored.items())


def test_a_done_run_of_the_judge_is_written_from_its_checkpoint(tmp_path: Path) -> None:
    arguments = ["task=judge", "data=judge", "data.batch_size=4", f"task.out={tmp_path / 'judge'}", "name=judge"]
    arguments += ["trainer.max_steps=2", "callbacks=checkpoint", "task.widths=[4,4,4]", "task.features=4"]
    task, _ = fit(composed([*arguments, f"folder={tmp_path / 'run'}"]))
    assert isinstance(task, JudgeTask)
    before = contents(tmp_path / "judge")
    shutil.rmtree(tmp_path / "judge")
    for _ in range(2):
        fit(composed([*arguments, f"folder={tmp_path / 'next'}", f"resume={tmp_path / 'run'}"]))
        assert contents(tmp_path / "judge") == before and not (tmp_path / "next").exists()


def test_the_student_is_written_before_anything_that_may_fail(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distiller, "sample", lambda self, *args, **kwargs: 1 / 0)
    late = ["callbacks=[samples,progress,adapter,checkpoint]", "callbacks.samples.prompts=[a red star]"]
    with pytest.warns(UserWarning, match="no samples of iteration 2: division by zero"):
        train(tiny_model, tmp_path / "a", *late, loss="mmd")
    assert (tmp_path / "a" / "adapter" / "adapter_model.safetensors").is_file()

    monkeypatch.setattr(Samples, "on_train_end", lambda self, trainer, task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_model, tmp_path / "b", *late, loss="mmd")
    assert (tmp_path / "b" / "adapter" / "adapter_model.safetensors").is_file()
    assert damage(tmp_path / "b" / "checkpoints" / "iteration-2.ckpt") is None


def test_a_run_that_is_refused_leaves_no_folder(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no valid checkpoint"):
        train(tiny_model, tmp_path / "run", loss="mmd", resume=tmp_path / "nothing")
    assert not (tmp_path / "run").exists()


# Writing


@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_run_whose_record_does_not_fit_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def write(path: Path, value: Any) -> Path:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        path.write_text("written")
        return path

    monkeypatch.setattr("swd.commands.train.write_json", write)
    monkeypatch.setattr("swd.commands.train.write_text", write)
    (tmp_path / "run").mkdir()
    with pytest.raises(OSError, match="No space left"):
        train(tiny_model, tmp_path / "run", loss="mmd")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = sealed.save_file

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        saved(tensors, path, metadata)
        if json.loads(metadata["swd_checkpoint"])["content"]["global_step"] == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sealed, "save_file", save)
    with pytest.raises(UserError, match=r"iteration-3\.ckpt cannot be written \(No space left on device\)") as caught:
        train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=4, callbacks__checkpoint__every=1)
    assert "\n" not in str(caught.value)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert [file.name for file in files] == ["iteration-1.ckpt", "iteration-2.ckpt"]
    assert all(damage(file) is None for file in files)


def test_checkpoints_that_will_not_fit_are_refused_when_training_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    options: dict[str, Any] = {"loss": "mmd", "trainer__max_steps": 9, "callbacks__checkpoint__every": 2}
    task, _ = train(tiny_model, tmp_path / "a", **options)
    weights = sum(p.numel() * 4 for p in task.parameters() if p.requires_grad)
    assert callback.checkpoint_bytes(task) == 3 * weights
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9 * weights - 1))
    with pytest.raises(UserError, match=r"3 checkpoints of .* GB lie beside each other"):
        train(tiny_model, tmp_path / "b", **options)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9 * weights))
    train(tiny_model, tmp_path / "c", **options)


def test_a_checkpoint_never_goes_through_another_folder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    train(tiny_model, tmp_path / "run", loss="mmd", trainer__max_steps=1)
    assert damage(tmp_path / "run" / "checkpoints" / "iteration-1.ckpt") is None


def test_the_new_checkpoint_is_whole_before_the_old_one_goes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[list[str]] = []

    def remove(self: Any, path: Any) -> None:
        removed.append(sorted(f.name for f in Path(path).parent.iterdir() if damage(f) is None))
        Path(path).unlink()

    monkeypatch.setattr(CheckpointFiles, "remove_checkpoint", remove)
    options = {"callbacks__checkpoint__every": 1, "callbacks__checkpoint__keep": 1, "trainer__max_steps": 3}
    train(tiny_model, tmp_path, loss="mmd", **options)
    assert removed == [[f"iteration-{n}.ckpt", f"iteration-{n + 1}.ckpt"] for n in (1, 2)]


def test_leftovers_of_killed_writes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead, alive, own = tmp_path / ".x.ckpt.abcdefgh", tmp_path / ".y.ckpt.abcdefgh", tmp_path / ".cache"
    for folder in (dead, alive, own, tmp_path / ".student.12345678" / "old"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    with in_use(alive):
        clear_leftovers(tmp_path)
    # Killed between taking the old student away and putting the new one there: the old one is back.
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cache", ".y.ckpt.abcdefgh", "student"]
    assert (tmp_path / "student" / "file").read_text() == "x"

    def nested(new: Path) -> None:
        clear_leftovers(tmp_path)
        new.write_text("whole")

    assert write_aside(tmp_path / "z", nested).read_text() == "whole"


def test_resuming_removes_what_a_killed_checkpoint_left(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    newest = copied(finished, tmp_path)
    half = newest.parent / ".iteration-3.ckpt.a1b2c3d4" / "iteration-3.ckpt"
    half.parent.mkdir()
    half.write_bytes(newest.read_bytes()[:1000])
    begun = tmp_path / "runs" / "begun"  # killed as it wrote down how it was started
    (begun / ".run.json.a1b2c3d4").mkdir(parents=True)
    (begun / "config.yaml").touch()
    train(tiny_model, tmp_path / "runs" / "next", loss="dmd", trainer__max_steps=3, resume="auto")
    assert sorted(f.name for f in newest.parent.iterdir()) == ["iteration-1.ckpt", "iteration-2.ckpt"]
    assert [f.name for f in begun.iterdir()] == ["config.yaml"]
