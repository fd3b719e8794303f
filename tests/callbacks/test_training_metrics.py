"""Metrics while training: the numbers of pictures drawn by hand, real pictures read once, nothing kept."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from counted import Cache, Counted
from extractors import TinyExtractor
from PIL import Image, ImageChops
from processes import train_on_two

from swd.callbacks.training_metrics import Metrics, size_name, to_bytes
from swd.commands import train
from swd.metrics.base import Drawn, Reference
from swd.metrics.fid import Frechet
from swd.metrics.kid import Kid
from swd.modules.distiller import Distiller
from swd.schedule import downscale
from swd.types import UserError

COUNT = 10


def metrics(extractor: TinyExtractor, **more: Any) -> Metrics:
    same = TinyExtractor()  # as configurations have it: one for each metric
    return Metrics({"kid": Kid(same)}, {"fid": Frechet(extractor)}, pictures=COUNT, batch_size=4, seed=5, **more)


def run(model: Path, folder: Path, callback: Metrics, *options: str) -> tuple[Distiller, Any]:
    arguments = tiny.overrides(model, folder, loss="mmd", task__lr=0.1, callbacks="checkpoint")
    task, trainer = train.fit(tiny.composed([*arguments, "data.validation.resolution=64", *options]), callback)
    assert isinstance(task, Distiller)
    return task, trainer


def by_hand(task: Distiller, data: Any) -> dict[str, float]:
    """The same metrics of the same pictures, each drawn alone."""
    extractor = TinyExtractor()
    held = data.held_out()
    drawn = [task.sample([held.captions(COUNT)[i]], [5 + i], keep_x0=True)[1] for i in range(COUNT)]
    real = held.batch(range(COUNT), 0).pixels
    found = {}
    for step, size in enumerate((32, 48, 64)):
        mine = Drawn({"tiny": extractor(torch.cat([to_bytes(each[step]) for each in drawn]))})
        reference = Reference({"tiny": extractor(to_bytes(downscale(real, (size, size))))})
        found[f"metrics/kid/{size}"] = Kid(extractor).score(mine, reference).values["kid"]
        if size == 64:
            found["metrics/fid/64"] = Frechet(extractor).score(mine, reference).values["fid"]
    return found


def test_the_numbers_are_those_of_pictures_drawn_by_hand(tiny_model: Path, tmp_path: Path) -> None:
    extractor = TinyExtractor()
    callback = metrics(extractor, every=1)
    task, trainer = run(tiny_model, tmp_path, callback, "logger=csv")
    expected = by_hand(task, trainer.datamodule)
    assert set(expected) == {"metrics/kid/32", "metrics/kid/48", "metrics/kid/64", "metrics/fid/64"}
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metrics/kid/32"]]
    assert [int(row["step"]) for row in rows] == [1, 2]
    for name, value in expected.items():
        assert float(rows[1][name]) == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(rows[1][name]), rel=1e-6)
        assert float(rows[0][name]) != pytest.approx(value, rel=1e-3), name
    # Its network was freed after each of two scorings, and real pictures were read in the first alone.
    same = callback.sizes[0].extractors[0]
    assert isinstance(same, TinyExtractor) and not same._loaded and not extractor._loaded
    assert extractor.builds + same.builds == 4  # at 32 and 48 pixels the one, at 64 pixels the other
    assert len(list((tmp_path / "metrics").iterdir())) == 3  # three sizes, one extractor


def test_with_cached_data_encoders_are_there_only_while_they_are_used(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, trainer = run(tiny_model, tmp_path, metrics(TinyExtractor()))
    expected = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("metrics/")}
    task.inputs._encoders = None  # those of training with pictures
    task.inputs.cache = Cache()
    counted = Counted(monkeypatch)
    callback = metrics(TinyExtractor())
    callback.on_train_start(trainer, task)
    assert counted.text == [True] and not counted.alive
    for _ in range(2):
        assert callback.measure(trainer, task) == pytest.approx(expected, rel=1e-6) and not counted.alive
    assert counted.text == [True, False, False]


def test_real_pictures_are_read_once_for_all_runs_with_one_store(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("trainer.max_steps=1",)
    first, second = (metrics(TinyExtractor(), store=str(tmp_path / "store")) for _ in range(2))
    _, one = run(tiny_model, tmp_path / "a", first, *options)
    monkeypatch.setattr(Metrics, "_extract", lambda *args: pytest.fail("real pictures were scored again"))
    _, two = run(tiny_model, tmp_path / "b", second, *options)
    assert float(two.callback_metrics["metrics/fid/64"]) == float(one.callback_metrics["metrics/fid/64"])
    # Other pictures are not taken for these.
    monkeypatch.undo()
    before = len(list((tmp_path / "store").iterdir()))
    run(tiny_model, tmp_path / "c", metrics(TinyExtractor(), store=str(tmp_path / "store")), *options, "seed=4")
    assert len(list((tmp_path / "store").iterdir())) == 2 * before


def test_scoring_changes_no_training_and_what_goes_wrong_is_a_warning(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, _ = run(tiny_model, tmp_path / "a", metrics(TinyExtractor(), every=1))
    monkeypatch.setattr(Distiller, "draw_latents", lambda self, *args, **kwargs: 1 / 0)
    with pytest.warns(UserWarning, match="^no metrics of iteration 2: division by zero$"):
        plain, trainer = run(tiny_model, tmp_path / "b", metrics(TinyExtractor(), every=1))
    assert not any(name.startswith("metrics/") for name in trainer.callback_metrics)
    ours, theirs = (task.networks.adapter_state("student") for task in (scored, plain))  # type: ignore[union-attr,operator]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.validation=null"], ["captions of data.validation", "callbacks.metrics.prompts"]),
        (["data.validation.length=9"], ["callbacks.metrics.pictures=256", "9 samples"]),
        (["callbacks.metrics.prompts=[a red dog]"], ["shapes_accuracy", "a red dog"]),
        (["callbacks.metrics.reference=nowhere"], ["nowhere"]),
        (["callbacks.metrics.sizes.judge_kid.extractor.path=nowhere"], ["nowhere"]),
        (["+metric@callbacks.metrics.full.fid=fid"], ["Inception", "docs/metrics.md"]),
        (["+metric@callbacks.metrics.full.hpsv3=hpsv3"], ["hpsv3", "outside"]),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_loads(
    tiny_model: Path, tmp_path: Path, options: Sequence[str], words: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distiller, "configure_model", lambda self: pytest.fail("a model was loaded"))
    arguments = [*tiny.overrides(tiny_model, tmp_path, callbacks="default"), "callbacks/metrics=shapes"]
    with pytest.raises(UserError) as raised:
        train.fit(tiny.composed([*arguments, *options]))
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_too_few_pictures_for_a_metric_are_refused_before_the_first_iteration(tiny_model: Path, tmp_path: Path) -> None:
    few = ["callbacks/metrics=shapes", "data.validation.resolution=64", "callbacks.metrics.pictures=7"]
    few += ["+metric@callbacks.metrics.sizes.judge_mmd=judge_mmd"]
    with pytest.raises(UserError, match="judge_mmd needs 128 real pictures, got 7"):
        train.fit(tiny.composed([*tiny.overrides(tiny_model, tmp_path, callbacks="default"), *few]))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("option", ["shapes", "pictures"])
def test_every_configuration_of_metrics_builds(tiny_model: Path, tmp_path: Path, option: str) -> None:
    arguments = [*tiny.overrides(tiny_model, tmp_path, callbacks="default"), f"callbacks/metrics={option}"]
    trainer = train.build_trainer(tiny.composed(arguments), tmp_path)
    built = [each for each in trainer.callbacks if isinstance(each, Metrics)]  # type: ignore[attr-defined]
    assert len(built) == 1 and built[0].sizes and built[0].full


def test_sizes_have_names() -> None:
    assert [size_name(size) for size in ((128, 128), (480, 832), (81, 480, 832))] == ["128", "480x832", "81x480x832"]


def logged(folder: Path) -> dict[str, list[float]]:
    """Values of the metrics and of the validation by name, in order of the iterations."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith(("metrics/", "monitor/x0_error", "monitor/fake_"))]
    return {name: [float(row[name]) for row in rows if row[name]] for name in names}


def test_two_processes_give_the_numbers_and_the_sheet_of_one(tiny_model: Path, tmp_path: Path) -> None:
    # Seven pictures and three prompts: the processes have unequal shares.
    options = [
        "callbacks=[default,validation]",
        "callbacks/metrics=shapes",
        "logger=csv",
        "data.validation.resolution=64",
    ]
    options += ["callbacks.validation.pictures=7", "callbacks.validation.batch_size=3", "callbacks.samples.every=1"]
    options += ["callbacks.metrics.pictures=7", "callbacks.metrics.batch_size=3", "callbacks.metrics.every=1"]
    options += ["sample_prompts=[a red star,a blue ring,a green heart]", "callbacks.validation.every=1"]
    arguments = {name: tiny.overrides(tiny_model, tmp_path / name, loss="dmd", task__lr=1e-4) for name in ("1", "2")}
    arguments = {name: [each for each in found if each != "callbacks=checkpoint"] for name, found in arguments.items()}
    train.fit(tiny.composed([*arguments["1"], *options]))
    train_on_two([*arguments["2"], *options, "trainer=ddp_cpu"], tmp_path)

    one, two = logged(tmp_path / "1"), logged(tmp_path / "2")
    assert one.keys() == two.keys() and {"metrics/judge_kid/32", "monitor/fake_lag/64_step3"} <= one.keys()
    for name, values in one.items():
        assert two[name] == pytest.approx(values, rel=2e-3, abs=2e-3), name
    for iteration in (1, 2):
        name = f"samples/iteration-{iteration:06d}.png"
        assert difference(tmp_path / "1" / name, tmp_path / "2" / name) <= 1
    assert len(list((tmp_path / "2" / "samples").iterdir())) == 2


def difference(a: Path, b: Path) -> int:
    """Largest difference of two pictures in levels of 255."""
    with Image.open(a) as first, Image.open(b) as second:
        assert first.size == second.size
        return int(max(high for _, high in ImageChops.difference(first, second).getextrema()))
