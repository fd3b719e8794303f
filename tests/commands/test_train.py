"""Whole runs through `swd.commands.train.fit` on the tiny pipeline."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from shards import make_pictures
from tiny import SIZES, composed, overrides
from torch import Tensor

from swd.callbacks.checkpoint import readable
from swd.callbacks.resume_rules import config_difference
from swd.commands import encode
from swd.commands.cli import launch
from swd.commands.train import fit
from swd.modules.checkpoint_files import read_checkpoint
from swd.modules.distiller import Distiller
from swd.modules.inputs import InputBuilder
from swd.schedule import downscale
from swd.types import Batch, PictureBatch, SeededDraws, UserError


def train(model: Path, folder: Path, *arguments: str, **more: Any) -> tuple[Distiller, Trainer]:
    task, trainer = fit(composed([*overrides(model, folder, **more), *arguments]))
    assert isinstance(task, Distiller)
    return task, trainer


def trained(task: Distiller) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in task.named_parameters() if p.requires_grad}


def optimizer_tensors(trainer: Trainer) -> list[Tensor]:
    states = [state for optimizer in trainer.optimizers for state in optimizer.state_dict()["state"].values()]
    return [state[name] for state in states for name in sorted(state)]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def assert_same_state(a: tuple[Distiller, Trainer], b: tuple[Distiller, Trainer]) -> None:
    ours, theirs = trained(a[0]), trained(b[0])
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(theirs[key], value), key
    for x, y in zip(optimizer_tensors(a[1]), optimizer_tensors(b[1]), strict=True):
        assert torch.equal(x, y)
    assert a[0].updates == b[0].updates and a[1].global_step == b[1].global_step


@pytest.mark.parametrize("loss", ["swd", "mmd", "dmd", "gan", "dmd_mmd", "dmd_gan", "mmd_gan"])
def test_two_iterations_of_every_loss(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    task, trainer = train(tiny_model, tmp_path, loss=loss)
    per_iteration = 1 if loss == "mmd" else 3
    assert trainer.global_step == 2 and task.updates == 2 * per_iteration
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 2
    names = {"swd": ("dmd", "mmd", "gan")}.get(loss, tuple(loss.split("_")))
    metrics = rows(tmp_path)
    assert [int(float(row["step"])) for row in metrics] == [1, 2]
    for row in metrics:
        for name in (*names, "loss", "x0_mse"):
            assert torch.tensor(float(row[f"loss/{name}"])).isfinite(), name
    fresh = Distiller(task.model, task.schedule, dict(task.terms), seed=0, critic_updates=2)
    fresh.configure_model()
    for role in task.roles:
        before, after = (d.networks.adapter_state(role) for d in (fresh, task))
        assert any(not torch.equal(before[key], after[key]) for key in before), role
    assert ("fake" in task.networks.roles) == (loss != "mmd")
    base = {k: v for k, v in fresh.networks.state_dict().items() if "lora_" not in k}
    state = task.networks.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.items())


def test_critic_updates_come_first_each_on_a_fresh_batch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    prompts: list[str] = []
    latents = InputBuilder.latents

    def spy(self: InputBuilder, batch: Batch, *args: Any) -> tuple[Tensor, Tensor]:
        prompts.extend(batch.prompts)
        return latents(self, batch, *args)

    monkeypatch.setattr(InputBuilder, "latents", spy)
    for kind in ("critic", "generator"):
        update = getattr(Distiller, f"_{kind}_update")

        def noted(self: Distiller, inputs: Any, kind: str = kind, update: Any = update) -> Any:
            seen.append((kind, inputs.interval.index))
            return update(self, inputs)

        monkeypatch.setattr(Distiller, f"_{kind}_update", noted)
    cfg = composed(overrides(tiny_model, tmp_path, loss="dmd", trainer__max_steps=4))
    _, trainer = fit(cfg)
    updates = ["critic", "critic", "generator"]
    assert seen == [(kind, interval) for interval in (0, 1, 2, 0) for kind in updates]
    dataset = trainer.datamodule.dataset
    assert prompts == [dataset[i]["prompt"] for i in range(4 * 3 * 4)]


def test_values_logged_and_phases_timed_are_there_for_callbacks(tiny_model: Path, tmp_path: Path) -> None:
    _, trainer = train(tiny_model, tmp_path, "+trainer.profiler=simple", loss="dmd", trainer__max_steps=2)
    row = rows(tmp_path)[-1]
    names = {name for name in row if name != "step"}
    assert names and names == set(trainer.callback_metrics)
    for name in names:
        assert float(row[name]) == trainer.callback_metrics[name].item(), name
    times: dict[str, list[float]] = trainer.profiler.recorded_durations
    counts = {name: len(times[f"[Distiller]{name}"]) for name in ("data", "inputs", "critic", "generator")}
    assert counts == {"data": 6, "inputs": 6, "critic": 4, "generator": 2}


def test_an_item_without_enough_batches_is_one_line_and_no_short_iteration(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distiller, "batches_per_iteration", 2)
    with pytest.raises(
        UserError, match=r"iteration 1, step 1 of 3 .*, generator update: the data have no batch"
    ) as error:
        train(tiny_model, tmp_path, loss="dmd")
    assert "\n" not in str(error.value) and not (tmp_path / "metrics.csv").exists()


class NormSpy(Callback):
    """Notes the gradient norm that each optimizer step sees."""

    norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())


@pytest.mark.parametrize(("clip", "clipped"), [(1e-4, True), (1e4, False)])
def test_gradients_of_both_optimizers_are_clipped(tiny_model: Path, tmp_path: Path, clip: float, clipped: bool) -> None:
    NormSpy.norms = []
    spy = [f"+callbacks.spy._target_={__name__}.NormSpy", f"allow=[{__name__}.NormSpy]"]
    train(tiny_model, tmp_path, *spy, loss="dmd", task__clip=clip)
    assert len(NormSpy.norms) == 6
    for norm in NormSpy.norms:
        assert norm == pytest.approx(clip, rel=1e-3) if clipped else norm < clip


def test_both_sizes_are_encoded_from_full_resolution(tiny_model: Path, tmp_path: Path) -> None:
    task, _ = train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=1)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    draws = SeededDraws(0)
    for i, (small, large) in enumerate(zip((SIZES[0], *SIZES), SIZES, strict=False)):
        source, target = task.inputs.latents(PictureBatch(pixels, prompts=["a", "b"]), task.schedule.interval(i), draws)
        for latent, side in ((source, small), (target, large)):
            expected = task.encoders.encode(downscale(pixels, (8 * side, 8 * side)), draws)
            assert latent.shape[-1] == side and torch.equal(latent, expected)


@pytest.mark.parametrize(
    ("loss", "workers", "more"),
    [
        ("swd", 0, {}),
        ("mmd", 0, {}),
        ("swd", 0, {"model__tuning": "full"}),
        ("dmd_mmd", 2, {"data__endless": "false", "data__dataset__length": 20}),
    ],
)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(
    tiny_model: Path, tmp_path: Path, loss: str, workers: int, more: dict[str, str]
) -> None:
    """The second half runs in another folder, with another history of prompts seen."""
    options: dict[str, Any] = {"loss": loss, "data__workers": workers, **more}
    straight = train(tiny_model, tmp_path / "straight", **options, trainer__max_steps=4)
    train(tiny_model, tmp_path / "half", **options, trainer__max_steps=2)
    rest = train(tiny_model, tmp_path / "rest", **options, trainer__max_steps=4, resume=tmp_path / "half")
    assert straight[1].global_step == 4
    assert_same_state(rest, straight)
    assert rows(tmp_path / "half") + rows(tmp_path / "rest") == rows(tmp_path / "straight")


@pytest.mark.parametrize(("kind", "workers"), [("pictures", 2), ("cache", 0), ("cache", 2)])
def test_training_from_shards_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path, kind: str, workers: int) -> None:
    """Stopped after every iteration in turn, across epochs of ten samples and two aspect ratios."""
    pictures = make_pictures(tmp_path / "pictures", 10, [(64, 64), (96, 64)])
    data = {"data": "webdataset", "data.path": pictures, "data.size": 64, "data.buckets": "['1:1','3:2']"}
    data |= {"data.multiple": 16, "data.workers": 0}
    if kind == "cache":
        shared = [a for a in overrides(tiny_model, tmp_path) if a.startswith(("model", "schedule"))]
        asked = [*shared, *(f"{key}={value}" for key, value in data.items()), f"out={tmp_path / 'cache'}"]
        encode.run(composed(asked, "encode"))
        data = {"data": "webdataset", "data.path": tmp_path / "cache"}
    given = [*(f"{key}={value}" for key, value in data.items()), f"data.workers={workers}", "data.batch_size=4"]

    def run(name: str, steps: int, **more: Any) -> tuple[Distiller, Trainer]:
        arguments = overrides(tiny_model, tmp_path / name, loss="swd", trainer__max_steps=steps, **more)
        plain = [a for a in arguments if not a.startswith("data.")]
        task, trainer = fit(composed([*plain, *given]))
        assert isinstance(task, Distiller)
        return task, trainer

    straight = run("straight", 4)
    run("part", 1)
    for steps in (2, 3):
        run(f"part{steps}", steps, resume=tmp_path / ("part" if steps == 2 else "part2"))
    rest = run("rest", 4, resume=tmp_path / "part3")
    assert_same_state(rest, straight)
    parts = [row for name in ("part", "part2", "part3", "rest") for row in rows(tmp_path / name)]
    assert parts == rows(tmp_path / "straight")


def test_checkpoints_hold_only_what_is_trained(tiny_model: Path, tmp_path: Path) -> None:
    task, _ = train(tiny_model, tmp_path, loss="swd")
    files = list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [file.name for file in files] == ["iteration-2.ckpt"]
    checkpoint = read_checkpoint(files[0])
    assert checkpoint["state_dict"].keys() == trained(task).keys()
    assert all("lora_" in key or "head" in key for key in checkpoint["state_dict"])
    assert len(checkpoint["optimizer_states"]) == 2
    elements = sum(v.numel() for v in checkpoint["state_dict"].values())
    assert files[0].stat().st_size < 4 * 3 * elements + 200_000  # weights and two moments


def test_checkpoints_are_kept_at_whole_iterations(tiny_model: Path, tmp_path: Path) -> None:
    options = {"loss": "dmd", "trainer__max_steps": 5, "callbacks__checkpoint__every": 2}
    train(tiny_model, tmp_path / "a", **options)
    names = sorted(file.name for file in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == ["iteration-4.ckpt", "iteration-5.ckpt"]
    train(tiny_model, tmp_path / "b", **options | {"trainer__max_steps": 7}, resume=tmp_path / "a")
    for file in (tmp_path / "b" / "checkpoints").iterdir():
        checkpoint = read_checkpoint(file)
        assert checkpoint["swd"]["updates"] == 3 * checkpoint["global_step"]


def damage(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"loss": "dmd", "callbacks__checkpoint__every": 1, "trainer__max_steps": 2}
    straight = train(tiny_model, tmp_path / "a" / "straight", **options)
    newest = tmp_path / "a" / "straight" / "checkpoints" / "iteration-2.ckpt"
    assert newest.is_file()
    damage(newest)
    with pytest.warns(UserWarning, match=r"iteration-2\.ckpt is damaged"):
        rest = train(tiny_model, tmp_path / "a" / "rest", **options, resume="auto")
    assert_same_state(rest, straight)


def test_resume_auto_starts_afresh_where_there_is_nothing(tiny_model: Path, tmp_path: Path) -> None:
    a = train(tiny_model, tmp_path / "a" / "run", loss="mmd", trainer__max_steps=1, resume="auto")
    b = train(tiny_model, tmp_path / "b" / "run", loss="mmd", trainer__max_steps=1)
    assert_same_state(a, b)


def test_resume_auto_takes_the_newest_run_of_the_same_configuration(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path / "one", loss="mmd", trainer__max_steps=1)
    train(tiny_model, tmp_path / "two", loss="mmd", trainer__max_steps=1, task__lr=0.5)
    task, _ = train(tiny_model, tmp_path / "three", loss="mmd", trainer__max_steps=2, resume="auto")
    record = (tmp_path / "three" / "run.json").read_text()
    assert str(tmp_path / "one" / "checkpoints") in record
    assert task.updates == 2


@pytest.fixture(scope="module")
def one_iteration(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that others are to go on from."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(tiny_model, folder, loss="mmd", task__lr=0.001, trainer__max_steps=1)
    return folder


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"task__lr": 0.5}, r": task\.lr was 0\.001, now 0\.5"),
        ({"loss": "dmd"}, r": loss\.dmd was None, now {"),
        ({"loss__mmd__c": 0.1}, r": loss\.mmd\.c was 0\.001, now 0\.1"),
        ({"schedule__sizes": "[4,4,8]"}, r": schedule\.sizes was \[4, 6, 8\], now \[4, 4, 8\]"),
        ({"seed": 1}, ": seed was 0, now 1"),
        ({"data__batch_size": 2}, r": data\.batch_size was 4, now 2"),
    ],
)
def test_resuming_another_configuration_is_refused_with_the_difference(
    tiny_model: Path, one_iteration: Path, tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    options: dict[str, Any] = {"loss": "mmd", "task__lr": 0.001}
    with pytest.raises(UserError, match=difference) as caught:
        train(tiny_model, tmp_path / "b", **options | change, resume=one_iteration)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b" / "config.yaml").exists()


def test_what_changes_no_sample_may_change_when_a_run_continues(tmp_path: Path) -> None:
    """A run that stopped for too many unreadable samples must be able to go on with a higher limit."""
    old = {"data": {"path": "a", "workers": 4, "prefetch": 2, "max_bad": 0.01}}
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    checkpoint = tmp_path / "checkpoints" / "iteration-2.ckpt"
    changed = OmegaConf.create({"data": {"path": "a", "workers": 0, "prefetch": 8, "max_bad": 0.2}})
    assert config_difference(checkpoint, changed) is None
    changed.data.path = "b"
    assert config_difference(checkpoint, changed) == "data.path was a, now b"


def test_a_run_with_one_guidance_scale_for_both_can_go_on(tmp_path: Path) -> None:
    """Runs of earlier versions have `model.guidance_scale`; what DMD takes is compared with the loss."""
    checkpoint = tmp_path / "checkpoints" / "iteration-2.ckpt"

    def config(dmd: float, **model: float) -> Any:
        return OmegaConf.create(
            {
                "model": {"rank": 4} | model,
                "task": {"model": {"rank": 4} | model},
                "loss": {"dmd": {"guidance_scale": dmd}},
            }
        )

    OmegaConf.save(config(7.0, guidance_scale=7.0), tmp_path / "config.yaml")
    two = {"dmd_guidance_scale": 7.0, "drawing_guidance_scale": 4.5}
    assert config_difference(checkpoint, config(7.0, **two)) is None
    difference = config_difference(checkpoint, config(4.5, **two | {"dmd_guidance_scale": 4.5}))
    assert difference == "loss.dmd.guidance_scale was 7.0, now 4.5"


@pytest.mark.parametrize("resume", ["missing.ckpt", "."])
def test_resuming_what_is_not_there_is_refused(tiny_model: Path, tmp_path: Path, resume: str) -> None:
    with pytest.raises(UserError, match="resume="):
        train(tiny_model, tmp_path / "run", loss="mmd", resume=tmp_path / resume)


@pytest.mark.filterwarnings("error:Callback .* raised")  # Hydra only warns of a callback that breaks
def test_a_sweep_leaves_one_folder_a_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ("folder=", "name=")
    arguments = [a for a in overrides(tiny_model, tmp_path, trainer__max_steps=1) if not a.startswith(own)]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", f"output={tmp_path}", *arguments, "loss=mmd,dmd_gan"])
    GlobalHydra.instance().clear()
    try:
        launch("train")
    finally:
        HydraConfig.instance().cfg = None
    (sweep,) = (tmp_path / "sweep").iterdir()
    runs = sorted(file for file in sweep.iterdir() if file.is_dir())
    assert [run.name for run in runs] == ["0_shapes-mmd", "1_shapes-dmd_gan"]
    for run, term in zip(runs, ("mmd", "dmd"), strict=True):
        assert f"loss/{term}" in rows(run)[0]
        assert (run / "checkpoints" / "iteration-1.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(tiny_model: Path, tmp_path: Path, kill: signal.Signals) -> None:
    options: dict[str, Any] = {"loss": "swd", "callbacks__checkpoint__every": 1}
    arguments = overrides(tiny_model, tmp_path / "a" / "killed", **options, trainer__max_steps=10_000)
    program = Path(__file__).parents[2] / "train.py"
    with subprocess.Popen([sys.executable, str(program), *arguments], cwd=tmp_path) as process:
        checkpoints = tmp_path / "a" / "killed" / "checkpoints"
        while not (checkpoints / "iteration-3.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(kill)
        assert process.wait(60) == {signal.SIGKILL: -9, signal.SIGINT: 130}[kill]
    last = max(int(file.stem.split("-")[1]) for file in checkpoints.iterdir() if readable(file))
    rest = train(tiny_model, tmp_path / "a" / "rest", **options, resume="auto", trainer__max_steps=last + 1)
    straight = train(tiny_model, tmp_path / "b" / "straight", **options, trainer__max_steps=last + 1)
    assert rest[0].updates == 3 * (last + 1)
    assert_same_state(rest, straight)


def test_sizes_may_repeat(tiny_model: Path, tmp_path: Path) -> None:
    task, trainer = train(tiny_model, tmp_path, loss="mmd", schedule__sizes="[4,4,8]", trainer__max_steps=3)
    assert trainer.global_step == 3
    assert [row["monitor/interval"] for row in rows(tmp_path)] == ["0.0", "1.0", "2.0"]
    pictures, steps = task.sample(["a red star"], [0], keep_x0=True)
    assert pictures.shape == (1, 3, 64, 64) and [s.shape[-1] for s in steps] == [32, 32, 64]


@pytest.mark.parametrize("loss", ["swd", "mmd"])
def test_a_bf16_base_trains_float32_adapters(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    task, trainer = train(tiny_model, tmp_path, loss=loss, model__precision="bf16")
    for key, parameter in task.networks.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in key else torch.bfloat16), key
    assert all(t.dtype == torch.float32 for t in optimizer_tensors(trainer))
    assert torch.tensor(float(rows(tmp_path)[-1]["loss/loss"])).isfinite()


def test_checkpointing_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    a = train(tiny_model, tmp_path / "a", loss="swd")
    b = train(tiny_model, tmp_path / "b", loss="swd", task__checkpointing="true")
    assert_same_state(a, b)


def test_drawing_samples_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    a = train(tiny_model, tmp_path / "a", loss="dmd")
    sampling = ["callbacks=[checkpoint,samples]", "callbacks.samples.every=1", "callbacks.samples.prompts=[a red star]"]
    b = train(tiny_model, tmp_path / "b", *sampling, loss="dmd")
    assert_same_state(a, b)
    pictures = sorted(file.name for file in (tmp_path / "b" / "samples").iterdir())
    assert pictures == ["iteration-000001.png", "iteration-000002.png"]


def test_a_used_folder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=1)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_the_run_folder_says_how_it_was_made(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_model, tmp_path, loss="mmd", trainer__max_steps=1)
    config = (tmp_path / "config.yaml").read_text()
    assert "${" not in config and f"path: {tiny_model}" in config
    assert '"torch"' in (tmp_path / "run.json").read_text()
