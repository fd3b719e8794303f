"""`sample.py`: a run's student through the stock pipeline, bit for bit the sampler used in training."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderTiny
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from swd.commands import sample, train
from swd.config import build
from swd.export import student_folder
from swd.io.files import file_hash
from swd.io.pictures import to_pil
from swd.modules.adapters import check_model, load, locate, save_adapter, save_student
from swd.modules.drawing import build_pipeline
from swd.modules.pretrained import Pretrained
from swd.modules.sampling import initial_latents, sample_latents
from swd.modules.saved_student import FullStudent
from swd.types import UserError

PROMPTS = ["a red star above a blue ring", "a green circle"]


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A model, networks with a non-zero student, and the student's adapter folder."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model, networks = tiny.save_trained_student(tiny_model, folder)
    return model, networks, folder


def config(model: Pretrained, adapter: Path, folder: Path, **more: object):
    arguments = tiny.drawing(model.folder, folder, model__max_text_tokens=12, adapter=adapter, **more)
    cfg = tiny.composed(arguments, "sample")
    cfg.prompts = PROMPTS
    return cfg


def test_equals_the_training_sampler_bit_for_bit(made) -> None:
    model, networks, folder = made
    scheduler = tiny.build_schedule().scheduler(2)
    scheduler.keep_x0 = True
    encoders = model.encoders()
    latents = initial_latents([3, 4], model.channels, scheduler.base_sizes[0])
    latents = sample_latents(networks, scheduler, latents, encoders.encode_prompts(PROMPTS))

    pipe = sample.build_pipeline(model, load(folder), tiny.build_schedule().scheduler(2))
    requests = [sample.Request(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)]
    final, sizes = sample.draw(pipe, model, requests)
    assert torch.equal(torch.stack(final), encoders.decode(latents))
    assert torch.equal(torch.stack(sizes[0]), encoders.decode(scheduler.x0_predictions[0]))
    assert torch.equal(pipe.scheduler.x0_predictions[-1], latents)


def test_the_first_size_as_height_and_width_gives_the_same(made) -> None:
    """The short recipe of the README: no `latents`, the pipeline draws the noise itself."""
    model, _, folder = made
    pipe = sample.build_pipeline(model, load(folder), tiny.build_schedule().scheduler(2))
    final, _ = sample.draw(pipe, model, [sample.Request(prompt, 3 + i) for i, prompt in enumerate(PROMPTS)])
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    side = 8 * tiny.SIZES[0]
    images = pipe(
        PROMPTS,
        height=side,
        width=side,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=12,
        generator=generators,
        output_type="pt",
    ).images
    torch.testing.assert_close(images * 2 - 1, torch.stack(final), rtol=0, atol=1e-6)  # it goes through [0, 1]


def test_run_writes_every_size_with_its_origin_and_never_overwrites(made, tmp_path: Path) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out", show_sizes="true", seed=3)
    sample.run(cfg)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert len(names) == 2 * (1 + len(tiny.SIZES))
    with Image.open(tmp_path / "out" / "a-red-star-above-a-blue-ring_seed3.png") as image:
        assert image.size == (64, 64)
        assert image.info["prompt"] == PROMPTS[0] and image.info["seed"] == "3"
    with Image.open(tmp_path / "out" / "a-green-circle_seed4_step1_32x32.png") as image:
        assert image.size == (32, 32)
    with pytest.raises(UserError, match="exists already"):
        sample.run(cfg)


def test_it_says_what_it_does_and_what_the_model_does_not_see(
    made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out", batch_size=1)
    cfg.prompts = ["a green circle", " and ".join(["a small red star"] * 4)]  # 19 words and T5's end, of 12
    with pytest.warns(
        UserWarning, match=r"^1 of 2 prompts are longer than model\.max_text_tokens=12, by up to 8 tokens"
    ):
        sample.run(cfg)
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0] == f"loading model {model.folder.name}, adapter {adapter}"
    assert lines[1] == f"drawing into {tmp_path / 'out'}: 2 pictures" and lines[-1].startswith("done: 2 pictures in")
    assert all(Path(line).is_file() for line in said.out.splitlines()[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "holds nothing to draw"),
        ({"prompts": ["  "]}, "holds nothing to draw"),
        ({"images_per_prompt": 0}, "images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"adapter": "nowhere"}, "does not exist"),
        ({"seed": "x"}, "expected an integer"),
    ],
)
def test_wrong_input_is_told_before_anything_is_written(made, tmp_path: Path, change, message: str) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out")
    cfg.update(change)
    with pytest.raises(UserError, match=message):
        sample.run(cfg)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_network_is_refused(made, tmp_path: Path) -> None:
    model, networks, _ = made
    state = {k: torch.cat([v, v], 1) if ".lora_A." in k else v for k, v in networks.adapter_state("student").items()}
    adapter = save_adapter(tmp_path / "a", state, 4, 4, tiny.build_schedule().scheduler(2), "wider", "transformer")
    with pytest.raises(UserError, match=r"made for wider\) does not fit model tiny-sd3"):
        check_model(load(adapter), model)


def test_without_an_adapter_the_teacher_draws(made) -> None:
    model = made[0]
    model.teacher_steps = 2
    pipe = sample.build_pipeline(model, None)
    images, sizes = sample.draw(pipe, model, [sample.Request("a red star", 0)])
    assert images[0].shape == (3, 64, 64) and sizes == []


# Students that were trained whole


def whole(model: Pretrained, folder: Path) -> FullStudent:
    network = model.network().network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 1.1
    return FullStudent(save_student(folder, network, tiny.build_schedule().scheduler(2)))


def test_a_run_with_a_whole_student_is_drawn(made, tmp_path: Path) -> None:
    """As the training sampler draws with its copy, with the model of the run and the weights' hash on record."""
    model, _, _ = made
    run = tmp_path / "outputs" / "tiny" / "time"
    student = whole(model, run / "student")
    cfg = config(model, run, tmp_path / "out")
    node = OmegaConf.to_container(cfg.model, resolve=True) | {"tuning": "full"}  # type: ignore[operator]
    OmegaConf.save({"model": node}, run / "config.yaml")
    sample.run(cfg)
    with Image.open(tmp_path / "out" / "a-red-star-above-a-blue-ring_seed0.png") as image:
        drawn, info = image.copy(), image.info
    assert info["adapter_hash"] == file_hash(student.weights[0])[:16] and info["adapter"] == str(student.folder)
    assert "'tuning': 'full'" in info["model"]

    networks = Pretrained(**{k: v for k, v in node.items() if k != "_target_"}).networks(["student"])
    networks.backbone_of("student").network.load_state_dict(student.network(model).state_dict())
    scheduler, encoders = tiny.build_schedule().scheduler(2), model.encoders()
    latents = initial_latents([0, 1], model.channels, scheduler.base_sizes[0])
    latents = sample_latents(networks, scheduler, latents, encoders.encode_prompts(PROMPTS))
    assert drawn.tobytes() == to_pil(encoders.decode(latents)[0]).tobytes()


def test_latest_is_the_newest_of_both_kinds(made, tmp_path: Path) -> None:
    model, _, adapter = made
    old, new = tmp_path / "a" / "1" / "adapter", tmp_path / "b" / "2" / "student"
    shutil.copytree(adapter, old)
    whole(model, new)
    os.utime(old / "adapter_config.json", (1, 1))
    assert locate("latest", tmp_path) == new
    os.utime(new / "config.json", (0, 0))
    assert locate("latest", tmp_path) == old


def test_a_whole_student_of_other_shapes_is_refused(made, tmp_path: Path) -> None:
    model, _, _ = made
    student = whole(model, tmp_path / "student")
    weights = load_file(student.weights[0])
    save_file(weights | {"proj_out.weight": torch.ones(3, 3)}, student.weights[0])
    with pytest.raises(UserError, match=r"does not fit model tiny-sd3: proj_out.weight, \(3, 3\) against"):
        sample.prepare(config(model, student.folder, tmp_path / "out"))


# The machine and the decoder


def test_folding_changes_rounding_alone_and_can_be_switched_off(made, tmp_path: Path, monkeypatch: Any) -> None:
    model, _, adapter = made
    requests = [sample.Request(PROMPTS[0], 3)]
    pipes = []

    def build(*arguments: Any) -> Any:
        pipes.append(build_pipeline(*arguments))
        raise UserError("built")

    monkeypatch.setattr(sample, "build_pipeline", build)
    for fold in ("true", "false"):
        with pytest.raises(UserError, match=r"^built$"):
            sample.run(config(model, adapter, tmp_path / fold, fold=fold))
    lora = [sum("lora" in key for key, _ in pipe.transformer.named_parameters()) for pipe in pipes]
    assert lora[0] == 0 and lora[1] > 0
    drawn = [sample.draw(pipe, model, requests)[0][0] for pipe in pipes]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)
    assert not torch.equal(drawn[0], drawn[1]), "the second one keeps the LoRA apart"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantized_base_draws_as_it_was_trained(made, kind: Any) -> None:
    """The 8-bit base with the adapter in full precision, as training samples; not the base in full precision."""
    model, networks, folder = made
    small = Pretrained("sd3", str(model.folder), rank=4, precision="fp32", max_text_tokens=12, quantization=kind)
    trained = small.networks(["student"])
    trained.load_adapter("student", networks.adapter_state("student"))  # type: ignore[attr-defined]
    scheduler, requests = tiny.build_schedule().scheduler(2), [sample.Request(PROMPTS[0], 3)]
    latents = initial_latents([3], model.channels, scheduler.base_sizes[0])
    encoders = model.encoders()
    latents = sample_latents(trained, scheduler, latents, encoders.encode_prompts(PROMPTS[:1]))

    pipe = sample.build_pipeline(small, load(folder), tiny.build_schedule().scheduler(2))
    drawn = sample.draw(pipe, small, requests)[0][0]
    torch.testing.assert_close(drawn, encoders.decode(latents)[0], rtol=0, atol=1e-4)
    plain = sample.build_pipeline(model, load(folder), tiny.build_schedule().scheduler(2))
    assert (sample.draw(plain, model, requests)[0][0] - drawn).abs().max() > 1e-3


def test_the_tiny_vae_decodes(made, tmp_path: Path) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out", tiny_vae=tiny.save_tiny_vae(tmp_path / "vae"))
    job = sample.prepare(cfg)
    requests = job.requests[:1]
    full = sample.draw(sample.build_pipeline(model, job.student, job.schedule), model, requests)[0][0]
    pipe = sample.build_pipeline(model, job.student, tiny.build_schedule().scheduler(2), cfg)
    drawn = sample.draw(pipe, model, requests)[0][0]
    with torch.no_grad():  # distilled decoders take the network's own latents: no scale, no shift
        by_hand = AutoencoderTiny.from_pretrained(tmp_path / "vae").decode(pipe.scheduler.x0_predictions[-1]).sample[0]
    torch.testing.assert_close(drawn, by_hand.clamp(-1, 1), rtol=0, atol=1e-6)
    assert (drawn - full).abs().max() > 0.1


def test_a_tiny_vae_that_does_not_fit_is_refused_before_anything_loads(made, tmp_path: Path, monkeypatch: Any) -> None:
    model, _, adapter = made
    for part in ("pipeline", "network"):
        monkeypatch.setattr(Pretrained, part, lambda *args, **kwargs: pytest.fail("weights were loaded"))
    (tmp_path / "empty").mkdir()
    whole_vae = model.folder / "vae"
    short = tiny.save_tiny_vae(tmp_path / "short")
    (short / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    for folder, message in {
        tmp_path / "nowhere": "does not exist",
        tmp_path / "empty": "has no config.json",
        whole_vae: "is a AutoencoderKL; give an AutoencoderTiny",
        short: "has a damaged",
        tiny.save_tiny_vae(tmp_path / "wide", channels=16): "decodes 16 channels, this model's latents have 4",
        tiny.save_tiny_vae(tmp_path / "deep", blocks=5): "enlarges 16 times, this model's decoder 8 times",
    }.items():
        with pytest.raises(UserError, match=f"^tiny_vae={folder} .*{message}"):
            sample.prepare(config(model, adapter, tmp_path / "out", tiny_vae=folder))


def test_a_published_tiny_vae_of_another_family_is_refused_by_its_name(made) -> None:
    """Those of SD3 and FLUX have as many channels, and would draw wrong colours without an error."""
    for given in ("madebyollin/taef1", "somewhere/TAESDXL"):
        with pytest.raises(UserError, match=f"^tiny_vae={given} decodes other latents .* e.g. madebyollin/taesd3$"):
            sample.check_tiny_vae(given, made[0])


def test_a_file_is_no_tiny_vae_of_pictures(made, tmp_path: Path) -> None:
    """The small decoders of Wan's latents are files, and Stable Diffusion's are folders."""
    given = tmp_path / "taew2_1.safetensors"
    for exists in (False, True):
        if exists:
            given.write_bytes(b"")
        with pytest.raises(UserError, match=f"^tiny_vae={given} is a file, .*; sd3 takes a folder or hub id"):
            sample.check_tiny_vae(str(given), made[0])


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offload_needs_a_gpu(made, tmp_path: Path, how: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"offload={how} moves weights to a GPU and back, and this machine has none"):
        sample.prepare(config(made[0], made[2], tmp_path / "out", offload=how))


def test_compiling_needs_a_compiler_and_weights_in_place(made, tmp_path: Path, monkeypatch: Any) -> None:
    cfg = config(made[0], made[2], tmp_path / "out", compile="true")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="compile=true needs a C compiler"):
        sample.prepare(cfg)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"and this machine has no (g|clang)\+\+; install"):  # gcc alone compiles no C++
        sample.prepare(cfg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg.offload = "sequential"
    with pytest.raises(UserError, match="compile=true with offload=sequential"):
        sample.prepare(cfg)
    with pytest.raises(UserError, match=r"^compile_coders=true compiles more than the network; give compile=blocks"):
        sample.prepare(config(made[0], made[2], tmp_path / "out", compile_coders="true"))


@pytest.mark.parametrize("coders", [False, True])
@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_what_is_compiled_is_what_runs(made, tmp_path: Path, monkeypatch: Any, how: str, coders: bool) -> None:
    """The compiler is replaced by one that counts calls: what it was given draws the picture, and draws the same."""
    model, _, adapter = made
    calls: Counter[str] = Counter()

    def counting(function: Any, **options: Any) -> Any:
        owner = type(function.__self__).__name__

        def run(*args: Any, **kwargs: Any) -> Any:
            calls[owner] += 1
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", counting)
    cfg = config(model, adapter, tmp_path / "out", compile=how, compile_coders=str(coders).lower())
    requests = [sample.Request(PROMPTS[0], 3)]
    plain, pipe = (
        sample.build_pipeline(model, load(adapter), tiny.build_schedule().scheduler(2), settings)
        for settings in (None, cfg)
    )
    expected = sample.draw(plain, model, requests, show_sizes=False)[0][0]
    assert not calls
    assert torch.equal(sample.draw(pipe, model, requests, show_sizes=False)[0][0], expected)
    steps, blocks = len(tiny.SIZES), tiny.BLOCKS
    network = {"SD3Transformer2DModel": steps} if how == "whole" else {"JointTransformerBlock": steps * blocks}
    encoders = {"CLIPTextModelWithProjection": 2, "T5EncoderModel": 1, "AutoencoderKL": 1} if coders else {}
    assert calls == network | encoders


def test_half_precision_draws_and_does_not_train(made, tmp_path: Path) -> None:
    model, _, adapter = made
    half = Pretrained("sd3", str(model.folder), rank=4, precision="fp16", max_text_tokens=12)
    requests = [sample.Request(PROMPTS[0], 3)]
    drawn, expected = (
        sample.draw(build_pipeline(m, load(adapter), tiny.build_schedule().scheduler(2), fold=True), m, requests)[0][0]
        for m in (half, model)
    )
    assert half.network().dtype == torch.float16 and not torch.equal(drawn, expected)
    assert (drawn - expected).norm() < 0.02 * expected.norm()  # fp16 rounds by up to 2^-11 = 0.0005
    cfg = tiny.composed(tiny.overrides(model.folder, tmp_path / "run", model__precision="fp16"))
    with pytest.raises(UserError, match=r"^model\.precision=fp16 is for drawing"):
        train.build_task_and_data(cfg)


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(made, tmp_path: Path) -> None:
    model, _, adapter = made
    cfg = config(model, adapter, tmp_path / "out", compile="true")
    requests = [sample.Request(PROMPTS[0], 3)]
    drawn = []
    for settings in (None, cfg):
        counters.clear()
        pipe = sample.build_pipeline(model, load(adapter), tiny.build_schedule().scheduler(2), settings)
        drawn.append(sample.draw(pipe, model, requests)[0][0])
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(drawn[1], drawn[0], rtol=0, atol=1e-4)


# The schedule


def test_a_student_without_a_schedule_gets_the_model_s_and_is_told(made, tmp_path: Path) -> None:
    model, _, adapter = made
    shutil.copytree(adapter, tmp_path / "bare")
    (tmp_path / "bare" / "scheduler_config.json").unlink()
    with pytest.warns(UserWarning, match=r"taking the model's default schedule, sizes \[4, 6, 8\]"):
        job = sample.prepare(config(model, tmp_path / "bare", tmp_path / "out"))
    assert job.schedule is not None and [size[0] for size in job.schedule.base_sizes] == [4, 6, 8]


def test_a_named_schedule_comes_before_the_student_s_own(made, tmp_path: Path, monkeypatch: Any) -> None:
    cfg = config(made[0], made[2], tmp_path / "out")
    cfg.schedule = {"_target_": "swd.schedule.ScaleSchedule", "sigmas": [1.0, 0.5], "sizes": [4, 8]}
    own = sample.prepare(cfg).schedule
    monkeypatch.setattr(student_folder, "overrides", lambda: ["schedule=other"])
    named = sample.prepare(cfg).schedule
    assert own is not None and list(own.config.sigmas) == list(tiny.SIGMAS)
    assert named is not None and list(named.config.sigmas) == [1.0, 0.5]
    cfg.schedule = {**cfg.schedule, "process": "epsilon"}
    with pytest.raises(UserError, match=r"^schedule\.process=epsilon.*, or use schedule=image_4step"):
        sample.prepare(cfg)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no JSON object"),
        ('{"_class_name": "UniPCMultistepScheduler"}', "is for UniPCMultistepScheduler, not for ScaleWiseScheduler"),
        ("{}", "is for no class"),
        ('{"_class_name": "ScaleWiseScheduler", "sigmas": [1.0]}', "is damaged .*sizes"),
        ('{"_class_name": "ScaleWiseScheduler", "sigmas": [0.5, 1.0], "sizes": [4, 8]}', "is damaged .*decreasing"),
        ('{"_class_name": "ScaleWiseScheduler", "sigmas": ["x"], "sizes": [4]}', "is damaged"),
        (
            '{"_class_name": "ScaleWiseScheduler", "sigmas": [1.0], "sizes": [8], "prediction_type": "epsilon"}',
            "is for prediction_type=epsilon, but sd3 predicts flow",
        ),
        ('{"_class_name": "ScaleWiseScheduler", "sigmas": [1.0], "sizes": [7]}', "7 is not divisible by 2"),
        ('{"_class_name": "ScaleWiseScheduler", "sigmas": [1.0], "sizes": [[1, 8, 8]]}', "this model takes"),
    ],
)
def test_a_wrong_schedule_beside_a_student_is_refused(made, tmp_path: Path, text: str, message: str) -> None:
    model, _, adapter = made
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "scheduler_config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        sample.prepare(config(model, tmp_path / "a", tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_the_command_line_changes_the_model_of_a_run(made, tmp_path: Path, monkeypatch: Any) -> None:
    model, _, adapter = made
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    cfg = config(model, run, tmp_path / "out", model__precision="bf16")
    OmegaConf.save({"model": {"path": "the run's", "precision": "fp32", "guidance_scale": 2.5}}, run / "config.yaml")
    monkeypatch.setattr(student_folder, "overrides", lambda: ["model.precision=bf16"])
    assert student_folder.recorded_model(run / "adapter", cfg) == {
        "path": "the run's",
        "precision": "bf16",
        "guidance_scale": 2.5,
    }
    monkeypatch.setattr(student_folder, "overrides", lambda: ["model=shapes"])
    assert student_folder.recorded_model(run / "adapter", cfg) == cfg.model


@pytest.mark.parametrize("key", ["adapter", "run", "model.init_adapter"])
def test_messages_name_the_key_that_was_typed(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    for path in (tmp_path / "none", tmp_path / "a.bin", tmp_path):
        with pytest.raises(UserError, match=f"^{key}={path} "):
            locate(str(path), tmp_path, key)
    with pytest.raises(UserError, match=f"^{key}=latest, but no run under"):
        locate("latest", tmp_path, key)
    with pytest.raises(UserError, match=f"^{key}=nobody/nothing is not on this machine"):
        locate("nobody/nothing", tmp_path, key)


def test_embedded_teacher_is_configured() -> None:
    model: Pretrained = build(tiny.composed([], "sample"), "model")
    assert (model.size, model.channels, model.limits.blocks) == ((16, 16), 16, 6)


# Requests


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "a red star\n\n a ring \n", [("a red star", 5), ("a ring", 6)]),
        ("a.csv", 'seed,prompt\n3,"a star, red"\n,a ring\n', [("a star, red", 3), ("a ring", 6)]),
        ("a.csv", 'prompt\r\n"a star\non red"\r\na ring\r\n', [("a star\non red", 5), ("a ring", 6)]),
    ],
)
def test_prompts_from_a_file(made, tmp_path: Path, name: str, text: str, expected: list) -> None:
    (tmp_path / name).write_text(text)
    cfg = config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / name, seed=5)
    assert [(r.prompt, r.seed) for r in sample.plan(cfg)] == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "caption\na star\n", "one must be called prompt"),
        ("a.csv", "prompt,seed\na star,x\n", "line 2: seed 'x'"),
        ("a.csv", "prompt,seed\na star,²\n", "line 2: seed '²'"),
        ("a.csv", f"prompt,seed\na star,1\na ring,{2**63}\n", "line 3: seed '9223372036854775808' is not .* below 2"),
        ("a.txt", "\n", "holds no prompt"),
    ],
)
def test_wrong_prompt_files_are_named(made, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        sample.plan(config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / name))
    with pytest.raises(UserError, match="does not exist"):
        sample.plan(config(made[0], made[2], tmp_path / "out", prompts_file=tmp_path / "none.txt"))


def test_prompts_of_the_command_line_are_texts_of_one_line_each(made, tmp_path: Path) -> None:
    cfg = config(made[0], made[2], tmp_path / "out", seed=5)
    cfg.prompts = ["a star\u2028on red", "a\x0bring\x85x", "two\r\nlines"]
    assert [request.prompt for request in sample.plan(cfg)] == ["a star on red", "a ring x", "two\nlines"]
    for prompts, seed, message in (
        (["fine", "\udcff"], 5, "a prompt of prompts is no valid Unicode"),
        (["x" * 131_073], 5, "has 131,073 characters, more than 131,072"),
        (["\u200b"], 5, "is empty"),
        (["a", "b"], 2**63 - 1, "seed=9223372036854775808; use 0 or more, below 2\\^63"),
    ):
        cfg.prompts, cfg.seed = prompts, seed
        with pytest.raises(UserError, match=message):
            sample.plan(cfg)


@pytest.mark.parametrize(
    ("asked", "size"),
    [({}, (8, 8)), ({"height": 96}, (12, 8)), ({"height": 96, "width": 48}, (12, 6)), ({"aspect": "9:4"}, (6, 12))],
)
def test_final_size(made, tmp_path: Path, asked: dict, size: tuple[int, int]) -> None:
    assert sample.final_size(config(made[0], made[2], tmp_path, **asked), made[0]) == size


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"height": 0}, "height=0; use at least 1"),
        ({"height": 100}, "height=100 is not a multiple of 16 pixels; use 96"),
        ({"aspect": "wide"}, "give WIDTH:HEIGHT"),
        ({"aspect": "1:1", "width": 64}, "one or the other"),
        ({"height": 1600}, "beyond the positional limit 12"),
        ({"frames": 5}, "draws pictures"),
    ],
)
def test_wrong_sizes_are_refused(made, tmp_path: Path, asked: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample.final_size(config(made[0], made[2], tmp_path, **asked), made[0])


def test_two_pictures_never_share_a_name(made, tmp_path: Path) -> None:
    cfg = config(made[0], made[2], tmp_path / "out")
    cfg.prompts = ["a star", "A star!"]
    (tmp_path / "p.csv").write_text("prompt,seed\na star,1\nA star!,1\n")
    cfg.prompts_file = str(tmp_path / "p.csv")
    with pytest.raises(UserError, match="two requests would be called a-star_seed1"):
        sample.run(cfg)


def test_a_picture_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        drawn = torch.zeros(3, 8, 8)
        drawn[1, 2, 3] = value
        with pytest.raises(UserError, match=r"a\.png would hold values that are not finite"):
            sample.save_drawn(drawn, tmp_path / "a.png", {})
    assert not (tmp_path / "a.png").exists()
