"""`swd spectra`: its numbers are those of the cache's latents, and wrong input is one line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from shards import make_pictures
from tiny import composed, exporting
from torch.testing import assert_close

from swd.commands import encode, spectra
from swd.commands.numbers import check_numbers
from swd.data.decoders import CacheDecoder
from swd.data.indexed import IndexedShards
from swd.data.shards import ShardSet
from swd.metrics.spectrum import power_in_space, power_in_time
from swd.modules.encoders import draw_latents
from swd.types import SeededDraws, UserError


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures, encoded."""
    out = tmp_path_factory.mktemp("spectra") / "cache"
    data = ["data=shapes", "data.dataset.resolution=64", "limit=7", "precision=fp32", "batch_size=4", f"out={out}"]
    encode.run(composed([*exporting(tiny_model), *data], "encode"))
    return out


def configured(model: Path, *arguments: str) -> DictConfig:
    return composed([*exporting(model), *arguments], "spectra")


def test_numbers_are_those_of_the_latents(
    cache: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    arguments = [f"cache={cache}", f"folder={folder}", "levels=[0.8,0.3]", "seed=5", "batch_size=3", "n=6"]
    spectra.run(configured(tiny_model, *arguments))

    # The same by hand.
    shards = ShardSet(str(cache))
    dataset = IndexedShards(shards, CacheDecoder(shards.manifest, shards.root))
    mean, std = dataset.batch_of([(row, 2) for row in range(6)]).cached.posteriors[(8, 8)]
    power = power_in_space(draw_latents(mean, std, SeededDraws(5)))

    with (folder / "spectra.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3 * 5 and {row["axis"] for row in rows} == {"space"}
    for level, signal, noise in ((0.0, 1.0, 0.0), (0.3, 0.49, 0.09), (0.8, 0.04, 0.64)):
        own = [row for row in rows if float(row["level"]) == level]
        assert [int(row["grid"]) for row in own] == [1, 2, 4, 6, 8]
        assert_close(torch.tensor([float(row["signal"]) for row in own]).double(), signal * power, rtol=1e-4, atol=0)
        assert {float(row["noise"]) for row in own} == {noise}
    summary = json.loads((folder / "spectra.json").read_text())
    expected = [max([1, *(2 * k for k in range(5) if ratio * power[k] >= 1)]) for ratio in (0.49 / 0.09, 0.04 / 0.64)]
    assert [each["side"] for each in summary["enough"]] == expected
    assert summary["samples"] == 6 and summary["size"] == [8, 8]
    assert (folder / "space.svg").is_file() and not (folder / "time.svg").exists()
    assert re.search(rf"0\.8 │ +{expected[1]} ", capsys.readouterr().out)
    with pytest.raises(UserError, match="already holds a run"):
        spectra.run(configured(tiny_model, *arguments))


def test_videos_have_a_spectrum_in_time() -> None:
    mean = torch.randn(5, 4, 6, 8, 8, generator=torch.Generator().manual_seed(0))

    def batch_of(requests: Sequence[tuple[int, int]]) -> Any:
        part = mean[[row for row, _ in requests]]
        cached = SimpleNamespace(posteriors={(6, 8, 8): (part, torch.zeros_like(part))})
        return SimpleNamespace(cached=cached, skipped=())

    dataset: Any = SimpleNamespace(batch_of=batch_of)
    plan = spectra.SpectraPlan(model=None, dataset=dataset, rows=[4, 3, 2, 1, 0], size=(6, 8, 8), step=0, levels=[0.5])  # type: ignore[arg-type]
    powers = spectra.mean_powers(plan, 0, 2, lambda count: None)
    assert_close(powers, {"space": power_in_space(mean), "time": power_in_time(mean)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cache is missing; encode pictures or videos first"),
        (["cache=CACHE", "levels=[0.5,1]"], r"levels=\[0\.5, 1\]; use numbers between 0 \(clean\) and 1"),
        (["cache=CACHE", "levels=[]"], r"levels=\[\]; use numbers"),
        (["cache=CACHE", "n=8"], "n=8, but cache=.* has 7 samples of one size; use at most that many"),
        (["cache=PICTURES"], "cache=.* holds pictures, not latents; encode them: swd encode"),
        (
            ["cache=CACHE", "schedule.sizes=[4,6,10]", "model.size=10"],
            "was not encoded for this training: schedule.sizes",
        ),
    ],
)
def test_wrong_input_is_one_line(
    cache: Path, tiny_model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    make_pictures(tmp_path / "pictures", 1)
    given = [a.replace("CACHE", str(cache)).replace("PICTURES", str(tmp_path / "pictures")) for a in arguments]
    with pytest.raises(UserError, match=message) as caught:
        spectra.prepare(configured(tiny_model, "folder=x", *given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [[], [0.5, float("nan"), 0.6], [0.5, 1.0], [0.0, 0.5]])
def test_levels_lie_between_clean_and_pure_noise(levels: list[float]) -> None:
    cfg = OmegaConf.create({"n": None, "batch_size": 1, "levels": levels})
    with pytest.raises(UserError, match="levels="):
        check_numbers(cfg, "spectra")
