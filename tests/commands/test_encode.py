"""`swd encode`, and that training from its cache is training without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import lightning as L
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hydra.errors import InstantiationException
from shards import make_pictures
from tiny import composed

from swd.commands import encode
from swd.data.cache import TEXT
from swd.data.decoders import CacheDecoder
from swd.data.indexed import IndexedShards
from swd.data.manifest import read_manifest
from swd.data.shard_index import write_index, xxh3
from swd.data.shard_writer import write_manifest
from swd.data.shards import ShardSet
from swd.data.webdataset import ShardData
from swd.io.files import file_hash
from swd.losses import DMD, GAN, MMD
from swd.modules.distiller import Distiller
from swd.modules.encoders import Encoders
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.shapes.dataset import ShapesDataset
from swd.types import Conditioning, UserError, in_unit_range

pytestmark = pytest.mark.filterwarnings("ignore:DMD is known to fail")


@pytest.fixture(scope="module", params=families.FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained(name, families.save(name, tmp_path_factory.mktemp(name) / "pipeline"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("sd3", families.save("sd3", tmp_path_factory.mktemp("one") / "pipeline"))


def make_videos(folder: Path, count: int, pixels: tuple[int, ...]) -> Path:
    from swd.data.job import Job
    from swd.io import video

    def make(rows: range, advance: Any) -> Any:
        for row in rows:
            frames = torch.rand(3, *pixels, generator=torch.Generator().manual_seed(row)) * 2 - 1
            path = video.write(folder / f"{row}.mp4", frames, 8)
            yield f"{row:08d}", {"mp4": path.read_bytes(), "txt": f"a red star, {row}".encode()}, {}
            path.unlink()

    job = Job(folder, "videos", count, 4, {})
    job.claim()
    assert job.run(make)
    return folder


def make_data(name: str, model: Pretrained, folder: Path, count: int = 6) -> Path:
    pixels = model.pixel_size(model.size)
    if name == "wan":
        return make_videos(folder, count, pixels)
    return make_pictures(folder, count, [(pixels[1] + 5, pixels[0])])


def config(name: str, model: Pretrained, data: Path, out: Path, **more: Any) -> Any:
    sizes = str(families.SIZES[name]).replace(" ", "")
    pixels = str(list(model.pixel_size(model.size))).replace(" ", "")
    overrides = [
        f"out={out}",
        "data=webdataset",
        f"data.path={data}",
        f"data.size={pixels}",
        "data.workers=0",
        f"model.family={model.family}",
        f"model.path={model.folder}",
        f"model.size={str(families.SIZES[name][-1]).replace(' ', '')}",
        f"model.max_text_tokens={model.max_text_tokens}",
        f"model.targets=[{','.join(model.targets)}]",
        f"++model.embedded_guidance={model.embedded_guidance or 'null'}",
        f"model.precision={more.pop('model_precision', 'fp32')}",
        f"schedule.sigmas={families.SIGMAS}".replace(" ", ""),
        f"schedule.sizes={sizes}",
        "batch_size=3",
        "shard_size=4",
    ]
    return composed([*overrides, *(f"{key}={value}" for key, value in more.items())], "encode")


def terms() -> dict[str, Any]:
    return {"dmd": DMD(guidance_scale=2.0), "mmd": MMD(blocks=[0]), "gan": GAN(blocks=[0])}


def train(name: str, model: Pretrained, data: ShardData, folder: Path, steps: int = 3) -> list[dict[str, float]]:
    """Metrics of every iteration."""
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES[name])
    data.check(model, schedule)
    task = Distiller(model, schedule, terms(), critic_updates=1, lr=1e-3)
    rows: list[dict[str, float]] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if len(rows) < trainer.global_step:
                rows.append({key: float(value) for key, value in pl_module.last_metrics.items()})

    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[Note()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(task, datamodule=data)
    assert len(rows) == steps
    return rows


@pytest.fixture(scope="module")
def uncached(
    name: str, model: Pretrained, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, float]]]:
    """Data of a family, and the losses of a training that encodes them itself."""
    folder = make_data(name, model, tmp_path_factory.mktemp("uncached") / "data")
    data = ShardData(str(folder), size=model.pixel_size(model.size), batch_size=2, seed=1)
    return folder, train(name, model, data, folder.parent)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_cached_training_has_the_losses_of_uncached(
    name: str,
    model: Pretrained,
    uncached: tuple[Path, list[dict[str, float]]],
    tmp_path: Path,
    precision: str,
    tolerance: float,
) -> None:
    (folder, plain), out = uncached, tmp_path / "cache"
    encode.run(config(name, model, folder, out, precision=precision))
    cached = train(name, model, ShardData(str(out), batch_size=2, seed=1), tmp_path)
    for k, (a, b) in enumerate(zip(plain, cached, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=tolerance), (k, key)
    other = train(name, model, ShardData(str(out), batch_size=2, seed=2), tmp_path, steps=1)
    assert any(abs(other[0][key] - plain[0][key]) > 2e-4 for key in plain[0]), "the seed changes the losses"


PROPORTIONED = ("sd3", "flux", "sdxl", "z_image")
"""Families that treat proportions each in a way of its own: positions cut out, packed, told in pixels, in lists."""


@pytest.mark.parametrize(
    "name",
    [
        name if name in PROPORTIONED else pytest.param(name, marks=pytest.mark.slow)
        for name in families.FAMILIES
        if name != "wan"  # videos come in one size
    ],
    indirect=True,
    scope="module",
)
def test_buckets_train_the_same_cached_and_uncached(name: str, model: Pretrained, tmp_path: Path) -> None:
    height, width = model.pixel_size(model.size)
    unit = model.factor * model.limits.divisor
    wide = width + 2 * unit
    folder = make_pictures(tmp_path / "data", 12, [(width, height), (2 * wide, height * 2), (height, width)])
    options = {"buckets": ["1:1", "3:2"], "multiple": unit}
    written = {"data.buckets": "['1:1','3:2']", "data.multiple": unit, "data.size": height, "precision": "fp32"}
    encode.run(config(name, model, folder, tmp_path / "cache", **written))
    plain = ShardData(str(folder), size=height, batch_size=2, seed=1, **options)
    cached = ShardData(str(tmp_path / "cache"), batch_size=2, seed=1)
    # An iteration takes four of the twelve samples, so that the fourth is of a new epoch.
    a, b = (train(name, model, data, tmp_path, 4) for data in (plain, cached))
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=2e-4, abs=2e-4)
    assert len(read_manifest(str(tmp_path / "cache"))["buckets"]) == 2


def test_sdxls_zeros_are_made_of_what_a_cache_holds(tmp_path: Path) -> None:
    """Caches, earlier ones too, hold the encoded empty prompt; SDXL's pipeline guides by zeros."""
    model = families.pretrained("sdxl", families.save("sdxl", tmp_path / "sdxl"))
    folder, out = make_data("sdxl", model, tmp_path / "data"), tmp_path / "cache"
    encode.run(config("sdxl", model, folder, out, precision="fp32"))
    data = ShardData(str(out), batch_size=2)
    held = data.empty(None)
    assert held.embeds.any() and held.pooled is not None and held.pooled.any()

    task = Distiller(model, ScaleSchedule(families.SIGMAS, families.SIZES["sdxl"]), terms())
    task.inputs.cache = data
    for empty in (task.empty, task.inputs.empty(model.pixel_size(model.size), task.device)):
        assert not empty.embeds.any() and empty.pooled is not None and not empty.pooled.any()
        assert empty.embeds.shape == held.embeds.shape and empty.time_ids is not None
        assert empty.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]


def test_a_cache_of_one_other_proportion_trains(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "data", 4, [(96, 64)])
    more = {"data.buckets": "['3:2']", "data.multiple": 16, "data.size": 64}
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", **more))
    assert read_manifest(str(tmp_path / "cache"))["buckets"][0]["sizes"][-1] == [6, 10]
    train("sd3", sd3, ShardData(str(tmp_path / "cache"), batch_size=2), tmp_path, 3)


def test_a_cached_training_never_loads_the_encoders(
    sd3: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    monkeypatch.setattr(Pretrained, "encoders", lambda *args: pytest.fail("encoders were loaded"))
    train("sd3", sd3, ShardData(str(tmp_path / "cache"), batch_size=2), tmp_path, 1)


def test_only_the_sizes_that_are_due_are_read(sd3: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    asked: list[set[str]] = []
    read = ShardSet.read

    def noted(self: ShardSet, index: int, endings: Any, *rest: Any) -> Any:
        asked.append({ending for ending in endings if ending[0].isdigit()})
        return read(self, index, endings, *rest)

    monkeypatch.setattr(ShardSet, "read", noted)
    train("sd3", sd3, ShardData(str(tmp_path / "cache"), batch_size=1), tmp_path, 3)
    wanted = [{"4x4.safetensors"}, {"4x4.safetensors", "6x6.safetensors"}, {"6x6.safetensors", "8x8.safetensors"}]
    assert [sizes for sizes in asked if sizes] == [sizes for sizes in wanted for _ in range(2)]


@pytest.mark.parametrize("posterior", ["keep", "draw", "mean"])
def test_what_is_kept_of_the_posterior(sd3: Pretrained, tmp_path: Path, posterior: str) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 5)
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", posterior=posterior, precision="fp32"))
    data = ShardData(str(tmp_path / "cache"), batch_size=5)
    data.check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
    batch = data.source.collate([data.source[i, 2] for i in range(5)])  # type: ignore[index]
    pictures = ShardData(str(folder), size=64, batch_size=5).source
    pixels = in_unit_range(torch.stack([pictures[i].pixels for i in range(5)]))  # type: ignore[index]
    mean, std = sd3.encoders().distribution(pixels)
    assert batch.cached is not None
    kept_mean, kept_std = batch.cached.posteriors[(8, 8)]
    if posterior == "draw":
        off = (kept_mean - mean) / std
        assert 0.8 < off.std().item() < 1.2 and not kept_std.any()
    else:
        torch.testing.assert_close(kept_mean, mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(kept_std, std, rtol=1e-4) if posterior == "keep" else not kept_std.any()


def test_identical_prompts_are_stored_once(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "data", 10, [(64, 64)], captions=lambda row: ["a red star", "a heart"][row % 2])
    for deduplicate, texts in ((True, 2), (False, 10)):
        out = tmp_path / f"cache{deduplicate}"
        encode.run(config("sd3", sd3, folder, out, deduplicate=deduplicate))
        shards = ShardSet(str(out))
        assert sum(shards.has(i, "text.safetensors") for i in range(10)) == texts
        data = ShardData(str(out))
        data.check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
        batch = data.source.collate([data.source[i, 0] for i in (7, 4)])  # type: ignore[index]
        assert batch.prompts == ["a heart", "a red star"] and batch.cached is not None
        expected = sd3.encoders().encode_prompts(["a heart", "a red star"])
        error = (batch.cached.conditioning.embeds.float() - expected.embeds).norm() / expected.embeds.norm()
        assert error < 4e-3


def test_errors_of_storing_are_measured(sd3: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    found = {}
    for precision in ("fp32", "bf16", "int8"):
        encode.run(config("sd3", sd3, folder, tmp_path / precision, precision=precision))
        found[precision] = read_manifest(str(tmp_path / precision))["relative_error"]
    assert set(found["bf16"]) == {"latents 4x4", "latents 6x6", "latents 8x8", "text"}
    for key in found["bf16"]:
        assert found["fp32"][key] == 0 and 5e-4 < found["bf16"][key] < 4e-3 < found["int8"][key] < 2e-2
    assert "relative error of storing: latents 4x4 0" in capsys.readouterr().out


def test_a_stopped_encoding_continues_to_the_same_bytes(
    sd3: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 10)
    encode.run(config("sd3", sd3, folder, tmp_path / "whole"))
    pack, count = encode.Encoder._encode_pixels, [0]

    def stops(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return pack(self, *args)

    monkeypatch.setattr(encode.Encoder, "_encode_pixels", stops)
    with pytest.raises(KeyboardInterrupt):
        encode.run(config("sd3", sd3, folder, tmp_path / "again"))
    encode.run(config("sd3", sd3, folder, tmp_path / "again"))
    a, b = (read_manifest(str(tmp_path / name)) for name in ("whole", "again"))
    assert a["shards"] == b["shards"] and a["relative_error"] == b["relative_error"]


def test_unreadable_pictures_are_counted_and_left_out(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 6)
    place = ShardSet(str(folder)).place(2, "png")
    with open(folder / "00000.tar", "r+b") as stream:
        stream.seek(place.offset)
        stream.write(b"nothing")
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    manifest = read_manifest(str(tmp_path / "cache"))
    assert manifest["unusable"] == 1 and "sample 2: .png is damaged" in manifest["problems"][0]
    data = ShardData(str(tmp_path / "cache"), batch_size=2)
    assert data.source.members[0].tolist() == [0, 1, 3, 4, 5]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="1 of 6 samples cannot be used"):
        encode.run(config("sd3", sd3, folder, tmp_path / "strict", max_bad=0))


def test_other_data_are_another_job(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "data", 4, [(128, 128)])
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data\.size was .*64.*now .*128.*choose another folder"):
        encode.run(config("sd3", sd3, folder, tmp_path / "cache", **{"data.size": 128}))
    told = [encode.source_of(ShapesDataset(split=split, seed=0, length=4)) for split in ("train", "val")]
    assert told[0] != told[1]


def test_the_limit_of_unusable_pictures_counts_earlier_runs_too(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 6)
    for row in (1, 5):
        place = ShardSet(str(folder)).place(row, "png")
        with open(folder / f"{place.shard:05d}.tar", "r+b") as stream:
            stream.seek(place.offset)
            stream.write(b"nothing")
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of \d+ samples cannot be used"):
            encode.run(config("sd3", sd3, folder, tmp_path / "cache", shard_size=2))
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", shard_size=2, max_bad=0.02))
    assert read_manifest(str(tmp_path / "cache"))["unusable"] == 2


def test_a_cache_that_does_not_match_is_refused_with_the_difference(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    data, schedule = ShardData(str(tmp_path / "cache")), ScaleSchedule(families.SIGMAS, families.SIZES["sd3"])
    data.check(sd3, schedule)
    data.check(sd3, ScaleSchedule([1.0, 0.5], [6, 8]))  # fewer of its sizes are fine
    with pytest.raises(UserError, match=r"schedule\.sizes was 4x4, 6x6, 8x8, now 4x4, 8x8, 10x10"):
        data.check(sd3, ScaleSchedule(families.SIGMAS, [4, 8, 10]))
    with pytest.raises(UserError, match="max_text_tokens was 24, now 16"):
        data.check(families.pretrained("sd3", sd3.folder, max_text_tokens=16), schedule)
    other = shutil.copytree(sd3.folder, tmp_path / "other")
    data.check(families.pretrained("sd3", other), schedule)  # the same model elsewhere
    file = next((other / "vae").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"vae is not the one of .* \(weights differ\)"):
        data.check(families.pretrained("sd3", other), schedule)
    (other / "text_encoder_3" / "config.json").write_text("{}")
    shutil.copy(next((sd3.folder / "vae").glob("*.safetensors")), other / "vae")
    with pytest.raises(UserError, match=r"text_encoder_3 is not the one of .* \(settings differ\)"):
        data.check(families.pretrained("sd3", other), schedule)


def test_a_cache_of_another_family_is_refused(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    encode.run(config("sd3", sd3, folder, tmp_path / "cache"))
    flux = families.pretrained("flux", families.save("flux", tmp_path / "flux"))
    with pytest.raises(UserError, match=r"it has the encoders vae, .*text_encoder_3.*now vae, text_encoder"):
        ShardData(str(tmp_path / "cache")).check(flux, ScaleSchedule(families.SIGMAS, families.SIZES["flux"]))


def test_a_cache_streams_through_a_pipe(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 8)
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", deduplicate=False, precision="fp32"))
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES["sd3"])
    url = f"pipe:cat {tmp_path / 'cache'}/{{00000..00001}}.tar"
    rows = train("sd3", sd3, ShardData(url, batch_size=2, manifest=str(tmp_path / "cache")), tmp_path)
    assert all(value == value for row in rows for value in row.values())
    indexed = ShardData(str(tmp_path / "cache"))
    indexed.check(sd3, schedule)
    by_prompt = {indexed.source[i, 1].prompt: i for i in range(8)}  # type: ignore[index]
    data = ShardData(url, batch_size=2, manifest=str(tmp_path / "cache"))
    data.check(sd3, schedule)
    assert data.stream is not None
    batch = next(iter(data.stream.plan(1, 2, 0, 1, 1, 1, range(3))))
    same = indexed.source.collate([indexed.source[by_prompt[p], 1] for p in batch.prompts])  # type: ignore[index]
    assert batch.cached is not None and same.cached is not None
    assert torch.equal(batch.cached.conditioning.embeds, same.cached.conditioning.embeds)
    assert torch.equal(batch.cached.posteriors[(6, 6)][0], same.cached.posteriors[(6, 6)][0])
    encode.run(config("sd3", sd3, folder, tmp_path / "once"))
    with pytest.raises(UserError, match="deduplicate=false"):
        ShardData(url, manifest=str(tmp_path / "once"))


def test_without_a_size_pictures_end_where_the_schedule_does(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    cfg = config("sd3", sd3, folder, tmp_path / "cache", **{"data.size": "null"})
    assert encode.prepare(cfg).buckets == [(64, 64)]
    train("sd3", sd3, ShardData(str(folder), batch_size=2), tmp_path, 1)
    with pytest.raises(UserError, match=r"data\.size=None beside data\.buckets; give one side"):
        ShardData(str(folder), buckets=["1:1"])


# Values that are not finite, texts that are too long, damaged parts


def spoil(out: Path, row: int, ending: str, value: float) -> None:
    """Put a value into a stored tensor, with checksums and hashes that fit: as a faulty encoder would have."""
    shards = ShardSet(str(out))
    found = {e: shards.read(row, [e])[e].tobytes() for e in shards.endings if shards.has(row, e)}
    tensors = safetensors.torch.load(found[ending])
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[7 % tensors[name].numel()] = value
    place = shards.place(row, ending)
    data = safetensors.torch.save(tensors)
    assert len(data) == place.size
    with open(out / "00000.tar", "r+b") as stream:
        stream.seek(place.offset)
        stream.write(data)
    index = safetensors.numpy.load((out / "00000.idx").read_bytes())
    index["checksum"][row, shards.endings.index(ending)] = xxh3(data)
    rows = [
        {e: tuple(int(index[k][i, j]) for k in ("offset", "size", "checksum")) for j, e in enumerate(shards.endings)}
        for i in range(len(index["offset"]))
    ]
    rows = [{e: place for e, place in row.items() if place[0] >= 0} for row in rows]
    columns = {key.removeprefix("column/"): index[key] for key in index if key.startswith("column/")}
    told = {"sha256": file_hash(out / "00000.tar"), "bytes": (out / "00000.tar").stat().st_size}
    write_index(out / "00000.idx", rows, columns, told)
    manifest = read_manifest_as_it_is(out)
    settings = {
        k: v for k, v in manifest.items() if k not in ("format", "kind", "samples", "bytes", "shards", "sha256")
    }
    write_manifest(out, "cache", len(manifest["shards"]), settings)


def read_manifest_as_it_is(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "manifest.json").read_text()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("precision", "ending"),
    [("fp32", "6x6.safetensors"), ("bf16", "6x6.safetensors"), ("int8", "6x6.safetensors"), ("bf16", TEXT)],
)
def test_a_stored_value_that_is_not_finite_is_a_damaged_sample(
    sd3: Pretrained, tmp_path: Path, precision: str, ending: str, value: float
) -> None:
    """In int8 it is the scale."""
    folder = make_data("sd3", sd3, tmp_path / "data", 4)
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", precision=precision))
    spoil(tmp_path / "cache", 2, ending, value)
    data = ShardData(str(tmp_path / "cache"), batch_size=2, max_bad=0.0)
    data.check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
    source: Any = data.source
    batch = source.batch_of([(1, 1), (2, 1)])
    assert len(batch.skipped) == 1 and "not finite" in batch.skipped[0]
    for mean, std in batch.cached.posteriors.values():
        assert mean.isfinite().all() and std.isfinite().all()
    assert batch.cached.conditioning.embeds.isfinite().all()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="not finite"):
        data.on_before_batch_transfer(batch, 0)


def test_what_is_not_finite_is_not_stored(sd3: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data", 6)
    distribution = Encoders.distribution

    def overflows(self: Encoders, pixels: torch.Tensor) -> Any:
        mean, std = distribution(self, pixels)
        if mean.shape[2:] == (6, 6) and len(mean) == 3:
            mean[1, 0, 2, 3] = float("inf")
        return mean, std

    monkeypatch.setattr(Encoders, "distribution", overflows)
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", batch_size=3, shard_size=6, max_bad=0.02))
    manifest = read_manifest(str(tmp_path / "cache"))
    assert manifest["unusable"] == 2  # of two batches
    assert manifest["problems"][0] == "sample 1: latents of 6x6: mean has values that are not finite"
    data = ShardData(str(tmp_path / "cache"), batch_size=2)
    assert data.source.members[0].tolist() == [0, 2, 3, 5]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"[12] of 6 samples cannot be used.*not finite"):
        encode.run(config("sd3", sd3, folder, tmp_path / "strict", batch_size=3, max_bad=0))
    monkeypatch.undo()
    monkeypatch.setattr(Encoders, "encode_prompts", lambda self, p, size=None: families_text(len(p), float("nan")))
    with pytest.raises(
        UserError, match=r"the text encoders fail on '.*' \(text: embeds0 has values that are not finite"
    ):
        encode.run(config("sd3", sd3, folder, tmp_path / "texts"))


def families_text(rows: int, value: float) -> Conditioning:
    return Conditioning(torch.full((rows, 8, 32), value), torch.ones(rows, 32))


def test_captions_beyond_the_limit_are_counted(
    sd3: Pretrained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = " and ".join(["a red star above a blue ring"] * 5)  # 39 words
    captions = lambda row: long if row % 3 == 0 else f"a star {row}"  # noqa: E731
    folder = make_pictures(tmp_path / "data", 10, [(64, 64)], captions=captions)
    for deduplicate in (True, False):
        with pytest.warns(UserWarning, match=r"^4 of 10 captions are longer than model\.max_text_tokens=24.*16 tokens"):
            encode.run(config("sd3", sd3, folder, tmp_path / f"cache{deduplicate}", deduplicate=deduplicate))
        manifest = read_manifest(str(tmp_path / f"cache{deduplicate}"))
        assert manifest["beyond_token_limit"] == {"limit": 24, "samples": 4, "most": 16}
    said = capsys.readouterr().err
    assert f"loading the encoders of {sd3.name}" in said
    assert f"encoding {folder} with {sd3.name} into {tmp_path / 'cacheTrue'}: 10 pictures" in said


def test_a_changed_empty_prompt_is_noticed(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    out = tmp_path / "cache"
    encode.run(config("sd3", sd3, folder, out))
    file = out / "empty-0.safetensors"
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[-9] ^= 1  # the lowest bit of a value
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"empty-0\.safetensors cannot be read \(its hash is not the manifest's\)"):
        ShardData(str(out)).check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
    (out / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="an empty prompt has changed; it is encoded again"):
        encode.run(config("sd3", sd3, folder, out))
    assert file.read_bytes() == whole
    assert ShardData(str(out)).empty(None).embeds.isfinite().all()


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("bucket", 3, 7, "bucket is 7, which is not from 0 to 0"),
        ("bucket", 3, -1, "bucket is -1"),
        ("text", 2, 10**12, "text is 1000000000000, which is not from 0 to 5"),
        ("text", 2, -1, "text is -1"),
        ("usable", 0, 2, "usable is 2"),
        ("text", 1, 2, "its text lies with a sample that holds none"),
    ],
)
def test_columns_out_of_range_are_refused(
    sd3: Pretrained, tmp_path: Path, column: str, row: int, value: int, message: str
) -> None:
    folder = make_pictures(tmp_path / "data", 6, [(64, 64)], captions=lambda row: ["a red star", "a heart"][row % 2])
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", shard_size=6))
    shards = ShardSet(str(tmp_path / "cache"))
    shards.columns[column][row] = value
    with pytest.raises(UserError, match=message) as caught:
        IndexedShards(shards, CacheDecoder(shards.manifest, shards.root))
    assert "\n" not in str(caught.value)


def test_a_text_of_another_prompt_is_a_damaged_sample(sd3: Pretrained, tmp_path: Path) -> None:
    """Within the range, but the holder's prompt is another: an index of the first format has no hash that says so."""
    folder = make_pictures(tmp_path / "data", 6, [(64, 64)], captions=lambda row: ["a red star", "a heart"][row % 2])
    encode.run(config("sd3", sd3, folder, tmp_path / "cache", shard_size=6))
    shards = ShardSet(str(tmp_path / "cache"))
    source = IndexedShards(shards, CacheDecoder(shards.manifest, shards.root))
    source.decoder.check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
    assert source[4, 0].skipped == ()
    shards.columns["text"][4] = 1
    assert source[4, 0].skipped[0].endswith("sample 1, another prompt's")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("buckets"),
        lambda m: m.update(buckets=[]),
        lambda m: m["buckets"][0].update(pixels=[64, -64]),
        lambda m: m["buckets"][0].update(sizes="8x8"),
        lambda m: m.update(identity=3),
        lambda m: m["identity"].pop("parts"),
        lambda m: m.update(deduplicate="yes"),
        lambda m: m.update(empty_sha256=[]),
    ],
)
def test_a_cache_whose_manifest_makes_no_sense_is_refused(sd3: Pretrained, tmp_path: Path, change: Any) -> None:
    encode.run(config("sd3", sd3, make_data("sd3", sd3, tmp_path / "data", 2), tmp_path / "cache"))
    manifest = read_manifest_as_it_is(tmp_path / "cache")
    manifest.pop("sha256")
    change(manifest)
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        ShardData(str(tmp_path / "cache")).check(sd3, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]))
    assert "\n" not in str(caught.value) and "manifest.json is damaged" in str(caught.value)


def test_wrong_requests_end_in_one_line(sd3: Pretrained, tmp_path: Path) -> None:
    folder = make_data("sd3", sd3, tmp_path / "data")
    for more, message in (
        ({"limit": 7}, "limit=7, but data has 6 samples"),
        ({"batch_size": 0}, "batch_size=0; use at least 1"),
        ({"max_bad": -1}, "max_bad=-1; use 0 to 1"),
        ({"max_bad": "nan"}, "max_bad=nan is not a finite number"),
        ({"max_bad": 5}, "max_bad=5; use 0 to 1"),
        ({"limit": -4}, "limit=-4; use at least 1"),
        ({"shard_size": 10**9}, "shard_size=1000000000; use at most 1000000"),
        ({"batch_size": 10**9}, "batch_size=1000000000; use at most 4096"),
        ({"data.workers": 100000}, r"data\.workers=100000; use at most \d+, each is a process .* this machine has"),
        ({"data.prefetch": 10**9}, r"data\.prefetch=1000000000; use at most 100"),
        ({"data.max_bad": "nan"}, r"data\.max_bad=nan is not a finite number"),
        ({"data.seed": -1}, r"data\.seed=-1; use 0 or more"),
        ({"precision": "fp8"}, "precision='fp8' is not valid"),
        ({"data.size": 32}, r"data\.size=\[32, 32\], but the schedule ends at \[64, 64\] pixels"),
        ({"data.size": "[64,96]"}, r"neither enlarged nor squashed; set 'data\.size=\[64,64\]'"),
        ({"schedule.sizes": "[4,7,8]"}, "7 is not divisible by 2"),
    ):
        with pytest.raises((UserError, InstantiationException), match=message):
            encode.run(config("sd3", sd3, folder, tmp_path / "cache", **more))
    with pytest.raises(UserError, match="out is missing"):
        encode.run(composed([], "encode"))
    with pytest.raises(UserError, match="1000000000 samples, drawn as they are asked for; give limit="):
        encode.run(composed([f"out={tmp_path / 'cache'}"], "encode"))
    assert not (tmp_path / "cache" / "00000.tar").exists()
