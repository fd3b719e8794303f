"""Updates that are not finite, or whose gradient explodes, are skipped on every process and counted."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from processes import train_on_two
from tiny import composed, overrides
from torch import Tensor

from swd.commands.train import fit
from swd.losses.base import CriticStep, GeneratorStep
from swd.losses.dmd import DMD
from swd.losses.mmd import MMD
from swd.modules.bad_steps import BadStepRule, BadSteps
from swd.modules.checkpoint_files import damage, read_checkpoint
from swd.modules.distiller import Distiller
from swd.types import UserError

NAN = float("nan")


def train(model: Path, folder: Path, *arguments: str, **more: Any) -> tuple[Distiller, Trainer]:
    task, trainer = fit(composed([*overrides(model, folder, **more), *arguments]))
    assert isinstance(task, Distiller)
    return task, trainer


def spoil(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, iterations: set[int], factor: float) -> None:
    """Multiply what a term returns in some iterations, from 0; a resumed run is spoilt in the same ones."""
    original = getattr(owner, method)

    def changed(self: Any, step: GeneratorStep | CriticStep) -> Any:
        loss, metrics = original(self, step)
        here = step.draws.iteration in iterations  # type: ignore[attr-defined]
        return (loss * factor if here else loss), metrics

    monkeypatch.setattr(owner, method, changed)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def filled(folder: Path) -> list[dict[str, str]]:
    """Rows without their empty cells."""
    return [{name: value for name, value in row.items() if value} for row in rows(folder)]


def state(folder: Path, iteration: int) -> dict[str, Any]:
    found: dict[str, Any] = read_checkpoint(folder / "checkpoints" / f"iteration-{iteration}.ckpt")
    return found


def tensors(folder: Path, iteration: int, role: str) -> list[Tensor]:
    """A role's weights and moments in a checkpoint."""
    stored = state(folder, iteration)
    weights = [value for key, value in stored["state_dict"].items() if f".{role}." in key]
    moments = stored["optimizer_states"][("student", "fake").index(role)]["state"].values()
    assert weights and moments
    return [*weights, *(moment[name] for moment in moments for name in sorted(moment))]


EVERY = ["callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=9"]


@pytest.mark.parametrize(
    ("owner", "method", "role", "other"),
    [(MMD, "generator", "student", "fake"), (DMD, "critic", "fake", "student")],
)
def test_a_skipped_update_changes_nothing_and_is_counted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, role: str, other: str
) -> None:
    spoil(monkeypatch, owner, method, {1}, NAN)
    with pytest.warns(UserWarning, match=r"iteration 2, step 2 of 3 .* was skipped: not finite: .*; no weight was"):
        task, trainer = train(tiny_model, tmp_path, *EVERY, loss="dmd_mmd", trainer__max_steps=3)
    assert trainer.global_step == 3 and task.updates == 9
    assert task.bad_steps.total == (1 if role == "student" else 2)
    equal = {
        name: [
            all(
                torch.equal(a, b)
                for a, b in zip(tensors(tmp_path, i, name), tensors(tmp_path, i + 1, name), strict=True)
            )
            for i in (1, 2)
        ]
        for name in (role, other)
    }
    assert equal == {role: [True, False], other: [False, False]}


def test_rows_hold_the_count_and_only_numbers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, MMD, "generator", {1}, NAN)
    with pytest.warns(UserWarning, match="skipped"):
        _, trainer = train(tiny_model, tmp_path, loss="dmd_mmd", trainer__max_steps=3)
    found = rows(tmp_path)
    assert [int(float(row["step"])) for row in found] == [1, 2, 3]
    assert [float(row["monitor/skipped"]) for row in found] == [0, 1, 1]
    assert found[1]["loss/mmd"] == "" and float(found[1]["loss/fake_score"]) > 0
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert "nan" not in (tmp_path / "metrics.csv").read_text()


def test_a_run_that_skips_resumes_bit_for_bit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, MMD, "generator", {0, 2, 4}, NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        straight = train(tiny_model, tmp_path / "straight", loss="dmd_mmd", trainer__max_steps=6)
        for half in (1, 3):  # in the first the student has no moments yet
            folder = tmp_path / f"half-{half}"
            train(tiny_model, folder, loss="dmd_mmd", trainer__max_steps=half)
            assert damage(folder / "checkpoints" / f"iteration-{half}.ckpt", straight[0]) is None
            rest = tmp_path / f"rest-{half}"
            task, _ = train(tiny_model, rest, loss="dmd_mmd", trainer__max_steps=6, resume=folder)
            assert task.bad_steps.total == 3
            for role in ("student", "fake"):
                pairs = zip(tensors(rest, 6, role), tensors(tmp_path / "straight", 6, role), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
            assert filled(folder) + filled(rest) == filled(tmp_path / "straight")
            ours, theirs = (t.bad_steps.state_dict()["roles"] for t in (task, straight[0]))
            for role in ("student", "fake"):
                assert torch.equal(ours[role].pop("norms").nan_to_num(), theirs[role]["norms"].nan_to_num())
                assert ours[role] == {name: value for name, value in theirs[role].items() if name != "norms"}


@pytest.mark.parametrize(
    ("bad", "options", "message"),
    [
        ({1, 2, 3, 4}, ["task.skips_in_a_row=3"], r"stopped at iteration 4, .*\(task.skips_in_a_row=3\)"),
        ({0, 2, 4}, ["task.skips_in_all=3"], r"stopped at iteration 5, .*\(task.skips_in_all=3\)"),
        ({2}, ["task.on_bad_step=stop"], r"stopped at iteration 3, .*: not finite: mmd,"),
    ],
)
def test_limits_end_the_run_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: set[int], options: list[str], message: str
) -> None:
    spoil(monkeypatch, MMD, "generator", bad, NAN)
    with warnings.catch_warnings(), pytest.raises(UserError, match=message) as error:
        warnings.simplefilter("ignore")
        train(tiny_model, tmp_path, *options, loss="mmd", trainer__max_steps=8)
    assert "\n" not in str(error.value) and not (tmp_path / "adapter").exists()


def test_an_exploding_gradient_is_skipped(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clipped gradient is finite, and the loss too."""
    spoil(monkeypatch, MMD, "generator", {18}, 1e6)
    with pytest.warns(UserWarning, match="iteration 19, .*: exploding: gradient norm of the student over 100 times"):
        task, _ = train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=20)
    assert task.bad_steps.total == 1
    task, _ = train(tiny_model, tmp_path / "off", "task.exploding=null", loss="mmd", trainer__max_steps=20)
    assert task.bad_steps.total == 0


# The rule alone


class OneProcess:
    """A trainer as far as the rule looks at it."""

    strategy: Any = SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda value, reduce_op: value)
    is_global_zero = True
    default_root_dir = "nowhere"
    ckpt_path = None


def test_the_median_is_of_the_last_good_norms_alone() -> None:
    steps, trainer = BadSteps(BadStepRule(exploding=10.0)), OneProcess()
    fine = {"loss": torch.tensor(True)}

    def good(norm: float) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return steps.good(trainer, "student", torch.tensor(norm), fine, "here")  # type: ignore[arg-type]

    assert all(good(norm) for norm in [1.0] * 15 + [1e6])  # too few to judge by
    assert not good(10.1) and good(9.9) and not good(1e30)
    assert all(good(norm) for norm in [5.0] * 64)
    assert good(49.0) and not good(51.0) and steps.total == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "wait"}, "task.on_bad_step=wait; use skip or stop"),
        ({"in_a_row": 0}, "task.skips_in_a_row=0; use a finite number of 1 or more"),
        ({"in_all": 0}, "task.skips_in_all=0; use a finite number of 1 or more"),
        ({"exploding": 1.0}, "task.exploding=1.0; use a finite number above 1"),
    ],
)
def test_rules_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        BadStepRule(**options)
    assert str(error.value) == message


# Several processes

SECOND_HAS_BROKEN_DATA = """
import os
from swd.modules.inputs import InputBuilder
from swd.commands.cli import launch

original = InputBuilder.latents

def latents(self, batch, interval, draws):
    source, target = original(self, batch, interval, draws)
    broken = os.environ.get("LOCAL_RANK") == "1" and (draws.iteration, draws.update) in ((1, 0), (2, 2))
    return (source * float("nan"), target) if broken else (source, target)

InputBuilder.latents = latents
launch("train")
"""


def test_a_broken_batch_of_one_process_is_skipped_on_both(tiny_model: Path, tmp_path: Path) -> None:
    """A critic update of the second iteration and the generator update of the third."""
    arguments = overrides(tiny_model, tmp_path / "run", loss="dmd_mmd", trainer="ddp_cpu", trainer__max_steps=4)
    errors = train_on_two([*arguments, *EVERY], tmp_path, SECOND_HAS_BROKEN_DATA)
    for place in ("iteration 2, step 2 of 3 of the schedule, critic update 1 of 2", "iteration 3, step 3 of 3"):
        assert errors.count(f"{place}") == 1, errors
    run = tmp_path / "run"
    assert [float(row["monitor/skipped"]) for row in rows(run)] == [0, 1, 2, 2]
    assert state(run, 4)["swd"]["bad_steps"]["total"] == 2
    # DDP keeps the processes' weights equal only if both skipped: their gradients are exchanged at every update.
    kept = zip(tensors(run, 2, "student"), tensors(run, 3, "student"), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    assert all(value.isfinite().all() for value in tensors(run, 4, "student"))
