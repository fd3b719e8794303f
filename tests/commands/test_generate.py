"""`swd generate`: stock pictures, exact resume, any number of processes, the same bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline, UNet2DConditionModel
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from PIL import Image
from processes import Fork
from tiny import composed

from swd.commands import cli, generate
from swd.data.job import PARTIAL
from swd.data.shard_writer import shard_name
from swd.data.shards import ShardSet
from swd.io import video
from swd.modules.pretrained import Pretrained
from swd.types import UserError

PROMPTS = ["a red star above a blue ring", "a green circle", "a small cross", "a heart, left of a ring", "two rings"]
STEPS, SEEDS = 3, (11, 3, 13, 14, 15)
MODELS = {
    "sd3": "sd35_large",
    "flux": "flux_dev",
    "wan": "wan21_1_3b",
    "sana": "sana_1600m",
    "flux2_klein": "flux2_klein_4b",
    "chroma": "chroma1",
}
"""Shipped configurations of the tiny pipelines' families."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a family's tiny pipeline, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else families.save(name, root / name)

    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A list whose second row has its own seed."""
    file = tmp_path / "prompts.csv"
    rows = [f'"{prompt}",{3 if i == 1 else ""}' for i, prompt in enumerate(PROMPTS)]
    file.write_text("\n".join(["prompt,seed", *rows]) + "\n")
    return file


def arguments(name: str, model: Path, prompts: Path, out: Path, **more: Any) -> list[str]:
    values: dict[str, Any] = {
        "model": MODELS.get(name, name),
        "model.path": model,
        "model.size": families.SIZES[name][-1],
        "model.precision": "fp32",
        "model.feature_blocks": "[0]",
        "model.max_text_tokens": 24,
        "prompts": prompts,
        "out": out,
        "seed": 11,
        "steps": STEPS,
        "batch_size": 2,
        "shard_size": 3,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={'null' if value is None else value}".replace(" ", "") for key, value in values.items()]


def config(*args: Any, **more: Any) -> Any:
    return composed(arguments(*args, **more), "generate")


def hashes(out: Path) -> list[str]:
    return [entry["sha256"] for entry in json.loads((out / "manifest.json").read_text())["shards"]]


def pixels(shards: ShardSet, row: int, ending: str = "png") -> np.ndarray:
    with Image.open(io.BytesIO(shards.read(row, [ending])[ending].tobytes())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def stock(name: str, folder: Path, rows: range, **more: Any) -> list[Any]:
    """The picture of the diffusers pipeline when called by hand, with what the family mends of it."""
    pipe = getattr(__import__("diffusers"), families.build(name).__class__.__name__).from_pretrained(folder)
    families.load_family(families.FAMILY[name]).mend(pipe)
    pipe.set_progress_bar_config(disable=True)
    size = families.SIZES[name][-1]
    side = (size if isinstance(size, int) else size[-1]) * (32 if name == "sana" else 8)
    options: dict[str, Any] = {
        "sd3": {"guidance_scale": 4.5, "max_sequence_length": 24},
        "sd35_medium": {"guidance_scale": 4.5, "max_sequence_length": 24},
        "flux": {"guidance_scale": 4.5, "max_sequence_length": 24},
        "sdxl": {"guidance_scale": 7.5},
        "wan": {"guidance_scale": 5.0, "max_sequence_length": 24, "num_frames": 9},
        "qwen_image": {"true_cfg_scale": 4.0, "max_sequence_length": 24, "negative_prompt": [" "] * len(rows)},
        "z_image": {"guidance_scale": 4.0, "max_sequence_length": 24},
        "chroma": {"guidance_scale": 3.0, "max_sequence_length": 24},
        "sana": {
            "guidance_scale": 4.5,
            "max_sequence_length": 24,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
        "flux2_klein": {"guidance_scale": 4.0, "max_sequence_length": 24},
    }[name]
    result = pipe(
        prompt=[PROMPTS[row] for row in rows],
        height=side,
        width=side,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(SEEDS[row]) for row in rows],
        **options | more,
    )
    return list(result[0])


def is_picture_of(levels: np.ndarray, values: np.ndarray) -> bool:
    """Whether values in [0, 1] were rounded to the nearest of 256 levels; the middle of two may go either way."""
    return bool(np.abs(levels - 255 * values.astype(float)).max() <= 0.5 + 1e-3)


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name != "wan"])
def test_pictures_are_those_of_the_stock_pipeline(saved: Any, prompts: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    generate.run(config(name, saved(name), prompts, out))
    shards = ShardSet(str(out))
    for rows in (range(2), range(2, 3), range(3, 5)):  # batches of 2 in shards of 3
        for row, expected in zip(rows, stock(name, saved(name), rows, output_type="np"), strict=True):
            assert is_picture_of(pixels(shards, row), expected)
    assert len({pixels(shards, row).tobytes() for row in range(5)}) == 5
    told = json.loads(shards.read(1, ["json"])["json"].tobytes())
    side = shards.columns["width"][1]
    assert told == {"index": 1, "prompt": PROMPTS[1], "seed": 3, "width": side, "height": side}
    assert shards.read(3, ["txt"])["txt"].tobytes().decode() == PROMPTS[3]


def test_videos_are_those_of_the_stock_pipeline(saved: Any, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate.run(config("wan", saved("wan"), prompts, out, batch_size=3))
    shards = ShardSet(str(out))
    assert shards.manifest["kind"] == "videos" and shards.columns["frames"].tolist() == [9] * 5
    expected = stock("wan", saved("wan"), range(3), output_type="np")
    for row, frames in enumerate(expected):  # [F, H, W, 3] in [0, 1]
        told = video.write(tmp_path / "a.mp4", torch.from_numpy(frames).permute(3, 0, 1, 2) * 2 - 1, 16).read_bytes()
        assert shards.read(row, ["mp4"])["mp4"].tobytes() == told
    (tmp_path / "b.mp4").write_bytes(shards.read(4, ["mp4"])["mp4"].tobytes())
    assert video.read(tmp_path / "b.mp4").shape == (3, 9, 64, 64)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("sd3", {"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ("sd35_medium", {"guidance_scale": 7.0}, {"guidance_scale": 7.0}),
        ("sd35_medium", {"model__dmd_guidance_scale": 2.0}, {"guidance_scale": 4.5}),
        ("sd3", {"model__drawing_guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ("sd3", {"guidance_scale": 2.5, "steps": 2}, {"guidance_scale": 2.5, "num_inference_steps": 2}),
        ("flux", {"guidance_scale": 2.0}, {"guidance_scale": 2.0}),
        ("flux", {"model__drawing_guidance_scale": 3.0}, {"true_cfg_scale": 3.0, "negative_prompt": ""}),
        ("z_image", {"guidance_scale": 2.5}, {"guidance_scale": 1.5}),
        ("z_image", {"guidance_scale": 1.0}, {"guidance_scale": 0.0}),
    ],
)
def test_guidance_and_steps_reach_the_pipeline(
    saved: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: Any, expected: Any
) -> None:
    generate.run(config(name, saved(name), prompts, tmp_path / "out", **more))
    monkeypatch.setitem(globals(), "STEPS", expected.pop("num_inference_steps", STEPS))
    drawn = pixels(ShardSet(str(tmp_path / "out")), 1)
    assert is_picture_of(drawn, stock(name, saved(name), range(2), output_type="np", **expected)[1])
    own = {"guidance_scale": 4.5}  # what these models draw at anyway
    other = stock(name, saved(name), range(2), output_type="np")[1]
    assert STEPS == 2 or is_picture_of(drawn, other) == (expected == own)


DRAWN_AT = {
    "sd35_medium": 4.5,
    "sd35_large": 4.5,
    "flux_dev": 1.0,
    "sdxl": 7.5,
    "wan21_1_3b": 5.0,
    "sana_1600m": 4.5,
    "qwen_image": 4.0,
    "flux2_klein_4b": 4.0,
    "z_image": 5.0,
    "chroma1": 3.0,
}


@pytest.mark.parametrize("model", DRAWN_AT)
def test_the_manifest_says_what_it_was_drawn_at_and_nothing_of_dmd(
    saved: Any, prompts: Path, tmp_path: Path, model: str
) -> None:
    name = {shipped: tiny for tiny, shipped in MODELS.items()}.get(model, model)
    jobs = [
        generate.prepare(config(name, saved(name), prompts, tmp_path / "out", **more)).job.settings
        for more in ({}, {"model__dmd_guidance_scale": 2.0})
    ]
    assert jobs[0] == jobs[1] and jobs[0]["guidance_scale"] == DRAWN_AT[model]
    assert jobs[0]["embedded_guidance"] == (4.5 if model == "flux_dev" else None)
    assert not [key for key in jobs[0]["model"] if "guidance" in key]


@pytest.mark.parametrize("scale", [0.5, 0, -1, "nan", "inf"])
def test_a_guidance_that_pipelines_ignore_is_refused(saved: Any, prompts: Path, tmp_path: Path, scale: Any) -> None:
    with pytest.raises(UserError, match=r"^guidance_scale=.*(use 1 to 100, 1 for none|not a finite number)"):
        generate.prepare(config("sd3", saved("sd3"), prompts, tmp_path / "out", guidance_scale=scale))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "wan",
            {"guidance_scale": 1, "model__negative_prompt": "dull"},
            r"negative_prompt has no effect where model\.drawing_guidance_scale is 1",
        ),
        ("wan", {"format": "jpg"}, "format=jpg is of pictures, and wan draws videos"),
        ("wan", {"quality": 50}, "quality=50 is of jpg and webp, and these videos are mp4"),
        ("sd3", {"quality": 50}, "quality=50 is of jpg and webp, and these pictures are png"),
        ("sd3", {"fps": 8}, "fps=8, but sd3 draws pictures"),
        ("sd3", {"refiner_start": 0.5}, "refiner_start=0.5, but there is no refiner"),
        (
            "sd3",
            {"model__embedded_guidance": 3.5},
            "embedded_guidance=3.5 has no effect: this network is fed no guidance",
        ),
    ],
)
def test_a_value_without_effect_is_refused(
    saved: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, more: Any, message: str
) -> None:
    cfg = config(name, saved(name), prompts, tmp_path / "out", **more)
    monkeypatch.setattr(generate, "given_keys", lambda: list(more))
    with pytest.raises(UserError, match=message) as caught:
        generate.prepare(cfg)
    assert "\n" not in str(caught.value)


def build_refiner(base: Any) -> StableDiffusionXLImg2ImgPipeline:
    torch.manual_seed(7)
    unet = UNet2DConditionModel(
        **dict(base.unet.config) | {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": 56}
    )
    return StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=unet,
        scheduler=DDIMScheduler.from_config(base.scheduler.config),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def test_a_refiner_takes_over_where_it_is_told_to(saved: Any, prompts: Path, tmp_path: Path) -> None:
    base, out = families.build("sdxl"), tmp_path / "out"
    refiner = build_refiner(base)
    refiner.save_pretrained(tmp_path / "refiner")
    base = type(base).from_pretrained(saved("sdxl"))
    refiner = type(refiner).from_pretrained(tmp_path / "refiner")
    more = {"refiner": tmp_path / "refiner", "refiner_start": 0.5, "steps": 4}
    generate.run(config("sdxl", saved("sdxl"), prompts, out, **more))
    common = {
        "prompt": PROMPTS[:2],
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "generator": [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]],
    }
    for pipe in (base, refiner):
        pipe.set_progress_bar_config(disable=True)
    latents = base(height=64, width=64, denoising_end=0.5, output_type="latent", **common).images
    for row, picture in enumerate(refiner(image=latents, denoising_start=0.5, **common).images):
        error = np.abs(pixels(ShardSet(str(out)), row) - np.asarray(picture).astype(int))
        assert error.max() <= 1 and error.mean() < 1e-3  # a value in the middle of two levels
    assert json.loads((out / "manifest.json").read_text())["refiner"]["start"] == 0.5
    generate.run(config("sdxl", saved("sdxl"), prompts, tmp_path / "alone", steps=4))
    assert hashes(out) != hashes(tmp_path / "alone")


def test_a_base_is_no_refiner(saved: Any, prompts: Path, tmp_path: Path) -> None:
    message = "refiner=.* is for StableDiffusionXLPipeline, but a refiner is for StableDiffusionXLImg2ImgPipeline"
    with pytest.raises(UserError, match=message):
        generate.prepare(config("sdxl", saved("sdxl"), prompts, tmp_path / "out", refiner=saved("sdxl")))


# The same bytes, whoever draws them


def test_a_picture_depends_on_its_prompt_and_seed_alone(saved: Any, prompts: Path, tmp_path: Path) -> None:
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "together", batch_size=5, shard_size=5))
    file = tmp_path / "one.csv"
    file.write_text(f'prompt,seed\n"{PROMPTS[3]}",14\n')
    generate.run(config("sd3", saved("sd3"), file, tmp_path / "alone", seed=99))
    together, alone = (ShardSet(str(tmp_path / name)) for name in ("together", "alone"))
    assert np.abs(pixels(together, 3) - pixels(alone, 0)).max() <= 1
    assert np.abs(pixels(together, 2) - pixels(alone, 0)).max() > 1


def test_several_processes_make_what_one_makes(
    saved: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "one", images_per_prompt=2))
    cfg = config("sd3", saved("sd3"), prompts, tmp_path / "many", images_per_prompt=2)
    srun = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")
    for rank, names in enumerate((("RANK", "WORLD_SIZE"), srun, ("RANK", "WORLD_SIZE"))):
        with monkeypatch.context() as patch:
            for name, value in zip(names, (str(rank), "3", "0"), strict=False):
                patch.setenv(name, value)
            generate.run(cfg)
        assert (tmp_path / "many" / "manifest.json").exists() == (rank == 2)
    assert "process 2 of 3 is through; 3 of 4 shards are there" in capsys.readouterr().out
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many") and len(hashes(tmp_path / "one")) == 4
    shards = ShardSet(str(tmp_path / "many"))
    told = [json.loads(shards.read(row, ["json"])["json"].tobytes()) for row in range(len(shards))]
    assert [t["index"] for t in told] == list(range(10))
    assert [t["seed"] for t in told] == [11, 12, 3, 4, 15, 16, 17, 18, 19, 20]
    assert not list((tmp_path / "many").glob(".*"))


def test_killed_and_continued_it_ends_with_the_same_bytes(saved: Any, tmp_path: Path) -> None:
    file = tmp_path / "many.txt"
    file.write_text("".join(f"a red star {i}\n" for i in range(60)))
    more = {"batch_size": 4, "shard_size": 20, "steps": 8}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    generate.run(config("sd3", saved("sd3"), file, whole, **more))

    command = [sys.executable, "-c", "from swd.commands.cli import main; main()", "generate"]
    environment = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"}
    command += arguments("sd3", saved("sd3"), file, killed, **more)
    process = Fork(command, environment, tmp_path, tmp_path / "out.txt", tmp_path / "err.txt")
    kept = killed / PARTIAL / shard_name(1)
    while process.poll() is None and len(list(kept.glob("[0-9]*"))) < 6:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was through before the kill"
    assert not (killed / "manifest.json").exists() and not (killed / "00001.tar").exists()

    before = list(kept.glob("[0-9]*"))
    assert len(before) >= 6

    def draw(self: generate.Painter, rows: range, original: Any = generate.Painter.draw) -> Any:
        assert rows.start >= 20 + len(before) // 4 * 4  # finished batches are not drawn again
        return original(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Painter, "draw", draw)
        generate.run(config("sd3", saved("sd3"), file, killed, **more))
    assert hashes(killed) == hashes(whole)
    shards = ShardSet(str(killed))
    assert [shards.read(row, ["txt"])["txt"].tobytes() for row in range(len(shards))] == [
        line.encode() for line in file.read_text().splitlines()
    ]
    assert not list(killed.glob(".*"))


def test_a_batch_that_was_kept_in_part_is_completed_without_touching_what_is_there(
    saved: Any, prompts: Path, tmp_path: Path
) -> None:
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "whole"))
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "part"))
    shards = ShardSet(str(tmp_path / "whole"))
    for name in ("manifest.json", "00000.tar"):
        (tmp_path / "part" / name).unlink()
    kept = tmp_path / "part" / PARTIAL / "00000"
    kept.mkdir(parents=True)
    (kept / "00000001.png").write_bytes(shards.read(1, ["png"])["png"].tobytes())
    shutil.copytree(kept, kept.with_name("00001"))  # of a shard that is complete: nobody needs it
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "part"))
    assert hashes(tmp_path / "part") == hashes(tmp_path / "whole")


def test_a_complete_job_is_left_as_it_is(
    saved: Any, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sd3", saved("sd3"), prompts, tmp_path / "out")
    generate.run(cfg)
    monkeypatch.setattr(Pretrained, "pipeline", None)
    generate.run(cfg)
    assert "is complete already: 5 samples" in capsys.readouterr().out


@pytest.mark.parametrize(("ending", "error"), [("jpg", 3), ("webp", 12)])
def test_other_formats(saved: Any, prompts: Path, tmp_path: Path, ending: str, error: float) -> None:
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "png"))
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "out", format=ending, quality=98))
    ours, exact = ShardSet(str(tmp_path / "out")), ShardSet(str(tmp_path / "png"))
    assert ours.endings == [ending, "txt", "json"] and ours.manifest["files"] == {"format": ending, "quality": 98}
    errors = [np.abs(pixels(ours, 2, ending) - pixels(exact, row)).mean() for row in range(5)]
    assert 0 < errors[2] < error  # noise has much colour, of which webp keeps a quarter
    assert min(errors) == errors[2]


def test_size_and_aspect(saved: Any, prompts: Path, tmp_path: Path) -> None:
    generate.run(config("sdxl", saved("sdxl"), prompts, tmp_path / "out", aspect="9:4"))
    shards = ShardSet(str(tmp_path / "out"))
    assert pixels(shards, 0).shape == (48, 96, 3) and shards.manifest["size"] == [48, 96]
    assert set(shards.columns["width"]) == {96} and set(shards.columns["height"]) == {48}


# Told: what is cut, what is damaged, how far it is


def test_prompts_beyond_the_limit_are_told_and_counted(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two prompts that differ behind the limit alone are one to the model."""
    start = " ".join(["a red star above a blue ring and then"] * 4)
    file = tmp_path / "prompts.csv"
    file.write_text(f'prompt,seed\n"{start} a green heart",5\n"{start} a pink diamond",5\na star,5\n')
    message = r"^2 of 3 prompts are longer than model\.max_text_tokens=24, by up to 32 tokens"
    with pytest.warns(UserWarning, match=message):
        generate.run(config("sd3", saved("sd3"), file, tmp_path / "out", images_per_prompt=2))
    shards = ShardSet(str(tmp_path / "out"))
    assert shards.manifest["beyond_token_limit"] == {"limit": 24, "samples": 4, "most": 32}
    assert (
        np.abs(pixels(shards, 0) - pixels(shards, 2)).max() <= 1 < np.abs(pixels(shards, 0) - pixels(shards, 4)).max()
    )
    said = capsys.readouterr().err.splitlines()
    assert f"loading {Path(saved('sd3')).name}" in said
    assert f"drawing with sd3 into {tmp_path / 'out'}: 6 pictures" in said and said[-1].startswith("done: 6 pictures")


def test_a_shard_that_was_cut_is_drawn_again(saved: Any, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate.run(config("sd3", saved("sd3"), prompts, out))
    before = hashes(out)
    for manifest in (True, False):
        os.truncate(out / "00000.tar", 700)
        if not manifest:
            (out / "manifest.json").unlink()
        with pytest.warns(UserWarning, match=r"00000\.tar has 700 bytes, its index says \d+; it is made again"):
            generate.run(config("sd3", saved("sd3"), prompts, out))
        assert hashes(out) == before


def test_a_disk_that_fills_ends_the_command_and_the_same_command_goes_on(
    saved: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "whole"))
    out, write, room = tmp_path / "out", Path.write_bytes, [3]

    def full(self: Path, data: bytes) -> int:
        room[0] -= 1
        if room[0] < 0:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            generate.run(config("sd3", saved("sd3"), prompts, out))
        kept = list((out / PARTIAL).rglob("*"))
        assert all(file.stat().st_size > 100 for file in kept if file.is_file())
        assert not [file for file in kept if file.name.startswith(".")] and not (out / "manifest.json").exists()
        room[0] = 1
    room[0] = 100
    generate.run(config("sd3", saved("sd3"), prompts, out))
    assert hashes(out) == hashes(tmp_path / "whole")


# Wrong input


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(Pretrained, "pipeline", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWD_COMMAND", raising=False)
    GlobalHydra.instance().clear()
    yield
    HydraConfig.instance().cfg = None


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing prompts": ("sd3", {"prompts": "nowhere.csv"}, "prompts=nowhere.csv does not exist"),
    "size": ("sd3", {"height": 50}, "height=50 is not a multiple of 16 pixels"),
    "frames of a picture": ("sd3", {"frames": 5}, "draws pictures"),
    "refiner of another family": ("sd3", {"refiner": "r"}, "refiner=r, but only sdxl has refiners"),
    "refiner is missing": ("sdxl", {"refiner": "no/where/at/all"}, "refiner=no/where/at/all does not exist"),
    "start of the refiner": ("sdxl", {"refiner": "r", "refiner_start": 1.0}, "refiner_start=1.0"),
    "format": ("sd3", {"format": "gif"}, "format='gif' is not valid; expected png | jpg | webp"),
    "quality": ("sd3", {"quality": 101}, "quality=101; use 1 to 100"),
    "batch": ("sd3", {"batch_size": 0}, "batch_size=0; use at least 1"),
    "shard": ("sd3", {"shard_size": 0}, "shard_size=0; use at least 1"),
    "steps": ("sd3", {"steps": 0}, "steps=0; use at least 1"),
    "copies": ("sd3", {"images_per_prompt": 0}, "images_per_prompt=0; use at least 1"),
    "seed": ("sd3", {"seed": -1}, "seed=-1; use 0 or more"),
    "model": ("sd3", {"model__path": "nowhere"}, "model.path=nowhere does not exist"),
    "key": ("sd3", {"+promts": "a"}, "unknown key promts"),
    "no out": ("sd3", {"out": "???"}, "out is missing; give out=folder"),
    "no prompts": ("sd3", {"prompts": "???"}, "prompts is missing; give prompts=prompts.csv"),
    "stranger": ("sd3", {"out": "taken"}, "out=taken is not empty (it holds notes.txt)"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_ends_in_one_line_before_weights_are_loaded(
    saved: Any, prompts: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name, more, message = WRONG[case]
    Path("taken").mkdir()
    Path("taken/notes.txt").write_text("mine")
    base = {"prompts": prompts, "out": Path("out")}
    line = arguments(
        name,
        saved(name),
        **base | {k: more[k] for k in base if k in more},
        **{k: v for k, v in more.items() if k not in base},
    )
    monkeypatch.setattr(sys, "argv", ["swd", *line])
    with pytest.raises(SystemExit) as caught:
        cli.launch("generate")
    output = capfd.readouterr()
    assert caught.value.code == 2 and output.err.count("\n") == 1, output.err
    assert message in output.err and not Path("out").exists() and sorted(os.listdir()) == ["prompts.csv", "taken"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"steps": 2}, "steps was 3, now 2"),
        ({"seed": 12}, "prompts.sha256 was"),
        ({"format": "jpg"}, "files.format was png, now jpg"),
        ({"guidance_scale": 2.0}, "guidance_scale was 4.5, now 2.0"),
        ({"height": 48}, r"size was \[64, 64\], now \[48, 64\]"),
        ({"shard_size": 4}, "shard_size was 3, now 4"),
    ],
)
def test_a_folder_of_another_job_is_refused(
    saved: Any, prompts: Path, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    generate.prepare(config("sd3", saved("sd3"), prompts, tmp_path / "out")).job.claim()
    with pytest.raises(UserError, match=f"holds a job of other settings: {message}"):
        generate.run(config("sd3", saved("sd3"), prompts, tmp_path / "out", **more))


def test_other_weights_are_another_job_another_rank_is_not(saved: Any, prompts: Path, tmp_path: Path) -> None:
    model = shutil.copytree(saved("sd3"), tmp_path / "sd3")
    generate.prepare(config("sd3", model, prompts, tmp_path / "out")).job.claim()
    generate.prepare(config("sd3", model, prompts, tmp_path / "out", model__rank=8, batch_size=3)).job.claim()
    file = next((model / "transformer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.fingerprint was"):
        generate.prepare(config("sd3", model, prompts, tmp_path / "out")).job.claim()


def test_too_little_space_and_memory_are_told(
    saved: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config("sd3", saved("sd3"), prompts, tmp_path / "out")
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"5 pictures of 64x64 take about 3\.28e-05 GB, but"),
    ):
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 30_000))
        generate.run(cfg)

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(UserError, match="batch_size=2 does not fit"):
        patch.setattr(generate, "draw", full)
        generate.run(cfg)
