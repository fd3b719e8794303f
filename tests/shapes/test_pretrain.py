"""Training of the embedded models, on tiny ones; and the embedded VAE itself."""

import copy
from pathlib import Path
from typing import Any

import families
import lightning as L
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import nn

from swd.callbacks.checkpoint import Checkpoint, written
from swd.data.datamodule import PairData
from swd.modules.flow_matching import FlowMatching, draw_sigma
from swd.modules.muon import MuonAdamW, hidden_matrices
from swd.modules.pretrained import Pretrained
from swd.modules.training_task import averaged, replace_files, warmup_cosine
from swd.shapes.dataset import WORDS, ShapesDataset
from swd.shapes.judge import Judge
from swd.shapes.pipeline import (
    TEXT_TOKENS,
    build_clip_tokenizer,
    build_shapes_pipeline,
    build_t5_tokenizer,
    build_transformer,
    save_pipeline,
)
from swd.shapes.train_judge import IGNORE, JudgeData, JudgeTask, degrade, targets
from swd.shapes.train_vae import VAETask
from swd.types import UserError

VAE = Path(__file__).parents[2] / "assets" / "shapes-sd3" / "vae"


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skeleton") / "sd3"
    save_pipeline(build_shapes_pipeline(), folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The skeleton with a transformer of two narrow layers, which trains ten times as fast."""
    folder = tmp_path_factory.mktemp("small") / "sd3"
    pipeline = build_shapes_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=build_transformer(layers=2, heads=2))
    save_pipeline(pipeline, folder)
    return folder


def fit(task: L.LightningModule, data: L.LightningDataModule, steps: int) -> None:
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)


def shapes(batch: int) -> PairData:
    return PairData(ShapesDataset("train", 0, 1000), batch, endless=True)


# --- the skeleton


def test_every_word_is_one_token() -> None:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    for word in WORDS:
        assert len(clip(word).input_ids) == 3, word  # start, word, end
        assert len(t5(word).input_ids) == 2, word  # word, end
    for text in ("Zürich, 7 o'clock!", "日本"):
        assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ", "") == text.lower().replace(
            " ", ""
        )
        assert t5(text).input_ids


def test_the_longest_caption_fits() -> None:
    clip, t5 = build_clip_tokenizer(), build_t5_tokenizer()
    caption = "a small red star left of a large blue ring and right of a small green heart on a gray background"
    assert len(clip(caption).input_ids) == 23 <= TEXT_TOKENS
    assert len(t5(caption).input_ids) == 22 <= TEXT_TOKENS


def test_the_folder_loads_offline_as_float32_and_draws(skeleton: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(skeleton, local_files_only=True)
    parts = ("vae", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    assert {getattr(pipeline, part).dtype for part in parts} == {torch.float32}
    assert sum(path.stat().st_size for path in skeleton.rglob("*")) < 12_000_000
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a star", num_inference_steps=2, height=48, width=48, max_sequence_length=TEXT_TOKENS, output_type="pt"
    ).images
    assert picture.shape == (1, 3, 48, 48)
    assert picture.isfinite().all()


def test_embeddings_tell_words_and_their_order_apart(skeleton: Path) -> None:
    pipeline = build_shapes_pipeline()
    texts = ["a red star above a ring", "a blue star above a ring", "a ring above a red star"]
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    assert embeds.shape == (3, 2 * TEXT_TOKENS, 128)
    assert 0.5 < embeds.std() < 2.0
    assert 0.5 < pooled.std() < 2.0
    # T5's token of "star" (third word, after CLIP's tokens) holds the colour before it.
    star = embeds[:, TEXT_TOKENS + 2]
    assert (star[0] - star[1]).norm() > 0.15 * star[0].norm()
    assert (embeds[0] - embeds[2]).square().mean() > 0.1


# --- what the tasks share


def test_the_average_forgets_its_start_then_decays() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = averaged(model, decay=0.9)
    expected = None
    for n in range(200):
        model.weight.data.fill_(float(n))
        average.update_parameters(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = float(n) if expected is None else decay * expected + (1 - decay) * n
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert expected == pytest.approx(199 - 0.9 / 0.1, rel=1e-3)


def test_the_learning_rate_rises_then_falls() -> None:
    factor = warmup_cosine(10, 110, floor=0.1)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_a_failed_write_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_files(tmp_path, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


# --- the tasks


def test_noise_levels_follow_the_shifted_logit_normal() -> None:
    sigma = draw_sigma(200_000, shift=3.0, spread=1.0, generator=torch.Generator().manual_seed(0))
    assert sigma.median().item() == pytest.approx(0.75, abs=0.005)  # 3 * 0.5 / (1 + 2 * 0.5)
    logit = torch.logit(sigma / (3 - 2 * sigma))
    assert logit.std().item() == pytest.approx(1.0, abs=0.01)
    few = draw_sigma(8, shift=1.0, spread=1.0, generator=torch.Generator().manual_seed(1))
    octaves = torch.special.ndtr(torch.logit(few)).mul(8).floor()  # one in each eighth, shuffled
    assert sorted(octaves.tolist()) == list(range(8)) != octaves.tolist()


def test_flow_matching_lowers_the_loss_and_writes_the_network(skeleton: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = Pretrained("sd3", str(skeleton), max_text_tokens=TEXT_TOKENS, precision="fp32")
    task = FlowMatching(
        model, sizes=[6, 8], out=str(out), from_scratch=True, lr=2e-3, warmup=5, reuse=2, ema=0.5, save_dtype="fp16"
    )
    losses: list[float] = []
    task.on_before_optimizer_step = lambda optimizer: losses.append(task.last_metrics["loss"].item())  # type: ignore
    fit(task, shapes(4), 150)
    # A fresh network predicts zero: the loss is that of eps - x0, two unit variances.
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    written = SD3Transformer2DModel.from_pretrained(out / "transformer")
    for name, value in task.average.module.state_dict().items():
        assert torch.allclose(value, written.state_dict()[name], atol=1e-3), name
    assert StableDiffusion3Pipeline.from_pretrained(out, local_files_only=True).vae is not None


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    network = build_transformer(layers=2)
    matrices = hidden_matrices(network.transformer_blocks)
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = MuonAdamW(network, matrices, lr=1e-3, muon_lr=1e-2, weight_decay=0.0)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizer.step()
    chosen = {id(parameter) for parameter in matrices}
    for name, parameter in network.named_parameters():
        change = parameter.detach() - before[name]
        hidden = name.startswith("transformer_blocks") and name.endswith("weight") and "norm" not in name
        assert hidden == (id(parameter) in chosen), name
        if hidden:  # orthogonal up to the iteration's error, scaled to 0.2 of AdamW's step
            values = torch.linalg.svdvals(change)
            assert values.quantile(0.05) > 0.5 * values.max(), name  # about 0.05 before
            assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2), name
        else:
            assert change.abs().mean().item() == pytest.approx(1e-3, rel=0.01), name


def test_muon_continues_from_its_state() -> None:
    def trained(steps: int, resumed: dict[str, Any] | None = None) -> tuple[nn.Module, MuonAdamW]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        optimizer = MuonAdamW(network, [network[0].weight], lr=1e-2, muon_lr=1e-2)
        if resumed:
            network.load_state_dict(resumed["network"])
            optimizer.load_state_dict(resumed["optimizer"])
        for _ in range(steps):
            optimizer.zero_grad()
            network(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
        return network, optimizer

    half, optimizer = trained(3)
    state = copy.deepcopy({"network": half.state_dict(), "optimizer": optimizer.state_dict()})
    whole, resumed = trained(6)[0].state_dict(), trained(3, state)[0].state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_flow_matching_goes_on_bit_for_bit(lora: bool, small: Path, tmp_path: Path) -> None:
    """From a checkpoint that was written while it trained: weights, their average and how often it was updated."""

    def trained(name: str, checkpoint: Path | None = None, stop: int | None = None) -> dict[str, torch.Tensor]:
        class Stop(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                trainer.should_stop = trainer.global_step == stop

        model = Pretrained("sd3", str(small), max_text_tokens=TEXT_TOKENS, precision="fp32", rank=2)
        task = FlowMatching(model, [4, 6], out=str(tmp_path / "out"), lora=lora, lr=1e-2, warmup=1, save_every=100)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        (tmp_path / name).mkdir()
        where: dict[str, Any] = {"default_root_dir": tmp_path / name, "callbacks": [Checkpoint(every=2), Stop()]}
        trainer = L.Trainer(max_steps=4, max_epochs=-1, accelerator="cpu", **where, **quiet)
        trainer.fit(task, datamodule=shapes(2), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return {key: value.clone() for key, value in task.state_dict().items()}

    torch.manual_seed(0)
    straight = trained("straight")
    trained("half", stop=2)
    resumed = trained("resumed", *written(tmp_path / "half"))
    assert straight["average.n_averaged"] == 4
    assert {key for key in straight if not torch.equal(straight[key], resumed[key])} == set()


def test_flow_matching_checks_its_sizes(skeleton: Path) -> None:
    model = Pretrained("sd3", str(skeleton))
    with pytest.raises(UserError, match="positional limit 24"):
        FlowMatching(model, sizes=[6, 40])
    with pytest.raises(UserError, match="one per size"):
        FlowMatching(model, sizes=[6, 8], size_weights=[1.0])


def test_half_of_the_captions_can_be_dropped(skeleton: Path) -> None:
    model = Pretrained("sd3", str(skeleton), max_text_tokens=TEXT_TOKENS, precision="fp32")
    task = FlowMatching(model, sizes=[6], caption_dropout=0.5)
    conditioning = task.encoders.encode_prompts(["a star"] * 400)
    mixed = task.drop_captions(conditioning, torch.Generator().manual_seed(0))
    empty = task.encoders.encode_prompts([""])
    blank = (mixed.embeds == empty.embeds).all(-1).all(-1)
    assert 150 < blank.sum() < 250
    assert torch.equal(blank, (mixed.pooled == empty.pooled).all(-1))
    assert torch.equal(mixed.embeds[~blank], conditioning.embeds[~blank])


def test_the_vae_learns_and_its_latents_are_normalised(skeleton: Path, tmp_path: Path) -> None:
    out = tmp_path / "vae-only"
    task = VAETask(str(out), sizes=(16, 32), crop=16, lr=2e-3, warmup=5, ema=0.5, save_every=1000)
    losses: list[float] = []
    task.on_before_optimizer_step = lambda optimizer: losses.append(task.last_metrics["loss"].item())  # type: ignore
    fit(task, shapes(4), 30)
    assert losses[-1] < 0.6 * losses[0]
    vae = AutoencoderKL.from_pretrained(out / "vae")
    pixels = F.interpolate(torch.cat(list(task.recent)), size=(32, 32), mode="area")
    latents = (vae.encode(pixels).latent_dist.sample() - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.2)
    with pytest.raises(ValueError, match="multiples of 8"):
        VAETask(str(out), sizes=(50,))


def test_the_judge_learns(tmp_path: Path) -> None:
    task = JudgeTask(str(tmp_path), widths=(8, 8, 16), features=16, lr=3e-3, warmup=5)
    losses: list[float] = []
    task.on_before_optimizer_step = lambda optimizer: losses.append(task.last_metrics["loss"].item())  # type: ignore
    fit(task, JudgeData("all", 16), 30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    weights = load_file(tmp_path / "model.safetensors")
    assert set(weights) == set(Judge(widths=(8, 8, 16), features=16).state_dict())


def test_a_resumed_judge_sees_the_pictures_that_were_due(tmp_path: Path) -> None:
    seen: list[float] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch["pixels"].double().sum().item())

    def run(steps: int, checkpoint: Path | None = None) -> list[float]:
        seen.clear()
        task = JudgeTask(str(tmp_path), widths=(8, 8, 16), features=16)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = L.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", callbacks=[Note()], **quiet)
        trainer.fit(
            task, datamodule=JudgeData("all", 2), ckpt_path=checkpoint, weights_only=True if checkpoint else None
        )
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return list(seen)

    straight = run(7)
    assert len(set(straight)) == 7
    assert run(3) == straight[:3] and run(7, tmp_path / "last.ckpt") == straight[3:]


def test_targets_mark_empty_cells() -> None:
    scene, _ = ShapesDataset("all", 0, 10).draw(4)
    wanted = targets(scene)
    occupied = wanted["colour"] != IGNORE
    assert occupied.sum() == len(scene.objects)
    assert torch.equal(occupied, wanted["shape"] != 8)
    assert torch.equal(occupied, wanted["size"] != IGNORE)


def test_degraded_pictures_stay_recognisable() -> None:
    pixels = torch.stack([ShapesDataset("all", 0, 8)[i]["pixels"] for i in range(8)])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert (degrade(pixels, generator) - pixels).abs().mean() < 0.2


@pytest.mark.parametrize(("side", "psnr"), [(128, 27.0), (64, 25.0), (48, 24.0)])
def test_the_embedded_vae_keeps_pictures(side: int, psnr: float) -> None:
    vae = AutoencoderKL.from_pretrained(VAE)
    dataset = ShapesDataset("heldout", 99, 16)
    pixels = torch.stack([dataset[i]["pixels"] for i in range(16)])
    pixels = F.interpolate(pixels, size=(side, side), mode="area")
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        output = vae.decode(posterior.mode()).sample
        latents = (posterior.sample() - vae.config.shift_factor) * vae.config.scaling_factor
    assert 10 * (4 / (output - pixels).square().mean()).log10() > psnr
    assert latents.std().item() == pytest.approx(1, abs=0.2)  # one scale for all sizes
    assert abs(latents.mean().item()) < 0.15


def test_dropped_captions_and_sizes_are_those_of_drawing(tmp_path: Path) -> None:
    """SDXL: zeros in place of a caption, as its pipeline guides; the size in pixels is the last one's."""
    model = families.pretrained("sdxl", families.save("sdxl", tmp_path / "sdxl"))
    task = FlowMatching(model, [4, 6], caption_dropout=1.0, out=str(tmp_path / "out"))
    text = task.encoders.encode_prompts(["a red star"])
    dropped = task.drop_captions(text, torch.Generator().manual_seed(0))
    assert text.embeds.any() and not dropped.embeds.any()
    assert dropped.pooled is not None and not dropped.pooled.any()
    assert dropped.time_ids is not None and dropped.time_ids.tolist() == [[48, 48, 0, 0, 48, 48]]
