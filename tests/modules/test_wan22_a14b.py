"""Wan2.2 T2V-A14B: two experts divide the noise levels, and each is distilled on the steps and levels of its own."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer
from safetensors.torch import save_file
from tiny import composed
from torch import Tensor
from torch.testing import assert_close

from swd.callbacks import students as students_callback
from swd.callbacks.sample_sheets import Samples
from swd.commands import generate, sample
from swd.commands.plan import planned
from swd.data import identity
from swd.data.iterations import Iterations
from swd.data.webdataset import DueBatches
from swd.diffusion import RectifiedFlow
from swd.export import student_folder, verification
from swd.losses import DMD, GAN, MMD
from swd.modules.adapters import Adapter, load
from swd.modules.backbones import load_family
from swd.modules.checkpoint_files import NEEDED
from swd.modules.distiller import Distiller
from swd.modules.drawing import OtherExpert
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.saved_student import load_student
from swd.schedule import ScaleSchedule
from swd.types import PictureBatch, UserError

NAME = "wan22_a14b"
SIZES = families.SIZES[NAME]
SIGMAS = [1.0, 0.9, 0.6]
"""Two levels of the one expert, then one of the other."""
PROMPTS = ["a red star", "a large blue ring above a small heart"]
EXPERTS = ("wan_high_noise", "wan_low_noise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save(NAME, tmp_path_factory.mktemp(NAME) / "pipeline")


@pytest.fixture(scope="module")
def experts(folder: Path) -> dict[str, Pretrained]:
    return {family: families.pretrained(NAME, folder, family=family) for family in EXPERTS}


def scheduler() -> Any:
    return ScaleSchedule(SIGMAS, SIZES).scheduler(2)


def test_each_expert_draws_levels_of_its_own() -> None:
    """Indices of the table for the critic, for DMD and GAN, and for MMD; the pipeline gives 875 to the high expert."""
    found = {family: load_family(family).process for family in EXPERTS}
    assert {family: tuple(process.ranges) for family, process in found.items()} == {
        "wan_high_noise": ((0, 8), (1, 8), (1, 8)),
        "wan_low_noise": ((9, 27), (12, 27), (18, 27)),
    }
    for family, process in found.items():
        for low, high in process.ranges:
            levels = process.level(torch.arange(low, high + 1))
            assert bool((levels >= 0.875).all() if family == "wan_high_noise" else (levels < 0.875).all())
    assert [found[family].covers(0.875) for family in EXPERTS] == [True, False]
    plain = RectifiedFlow()
    assert tuple(plain.ranges) == ((0, 27), (12, 27), (18, 27)) and all(map(plain.covers, (0.0, 0.875, 1.0)))


def test_a_schedule_is_divided_between_them() -> None:
    schedule = ScaleSchedule(SIGMAS, SIZES)
    assert [schedule.steps_of(load_family(family).process) for family in (*EXPERTS, "wan")] == [(0, 1), (2,), (0, 1, 2)]
    sampler = DueBatches(None, 1, 0, 4, 0, 0, 1)
    sampler.per_iteration, sampler.steps = 2, (0, 2)
    assert [sampler.request(7, batch)[1] for batch in range(6)] == [0, 0, 2, 2, 0, 0]


def test_a_folder_is_taken_as_it_is_known(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    index = json.loads((copy / "model_index.json").read_text())
    cases = {
        "boundary_ratio=0.9, but .* is for 0.875": {"boundary_ratio": 0.9},
        "holds nothing as transformer_2, but .* one of several experts": {"transformer_2": [None, None]},
        "has expand_timesteps, which": {"expand_timesteps": True},
    }
    for message, changes in cases.items():
        (copy / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(UserError, match=message) as caught:
            families.pretrained(NAME, copy)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has boundary_ratio, which model\.family=wan does not know"):
        families.pretrained(NAME, folder, family="wan")


@pytest.mark.parametrize("family", EXPERTS)
def test_encoders_load_no_expert(experts: dict[str, Pretrained], family: str) -> None:
    pipe = experts[family].encoders().pipeline
    assert pipe.components["transformer"] is None and pipe.components["transformer_2"] is None


@pytest.mark.parametrize("family", EXPERTS)
def test_two_iterations_train_an_expert_at_its_own_levels(
    experts: dict[str, Pretrained], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses; every level that any role is run at is the expert's, and so is every step of the schedule."""
    model = experts[family]
    losses = {"dmd": DMD(guidance_scale=2.0), "mmd": MMD(blocks=[0]), "gan": GAN(blocks=[0])}
    task = Distiller(model, ScaleSchedule(SIGMAS, SIZES), losses, critic_updates=1, lr=1e-3)
    task.configure_model()
    levels: list[float] = []
    call = model.backbone_class.call

    def noted(self: Any, x_t: Tensor, sigma: Tensor, conditioning: Any) -> Tensor:
        levels.extend(sigma.expand(len(x_t)).tolist())
        return call(self, x_t, sigma, conditioning)

    monkeypatch.setattr(model.backbone_class, "call", noted)
    steps: list[int] = []
    task.observers.append(lambda inputs: steps.append(inputs.interval.index) or {})
    before = {key: p.detach().clone() for key, p in task.named_parameters()}
    shape = (2, 3, *model.pixel_size(model.size))
    pixels = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(4)]
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    sheets = Samples(PROMPTS)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[sheets],
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    with pytest.warns(UserWarning, match=f"no sample sheets: model.family={family} is an expert for . of the"):
        trainer.fit(task, Iterations([PictureBatch(each, prompts=PROMPTS) for each in pixels], 2))
    assert {"dmd", "mmd", "gan"} <= set(task.last_metrics)
    assert all(value.isfinite() for value in task.last_metrics.values())
    changed = {key for key, p in task.named_parameters() if not torch.equal(p, before[key])}
    assert all(any(part in key for key in changed) for part in ("student", "fake", "head"))
    assert steps == ([0, 1] if family == "wan_high_noise" else [2, 2])
    assert len(levels) > 20 and all(map(model.backbone_class.process.covers, levels))
    assert not task.draws_alone and not (tmp_path / "samples").exists() and sheets.missing(tmp_path, task, 2) is None


def test_a_cache_serves_both_experts(experts: dict[str, Pretrained]) -> None:
    schedule = ScaleSchedule(SIGMAS, SIZES)
    for first, second in (EXPERTS, EXPERTS[::-1]):
        stored = identity.identity(experts[first], schedule)
        assert identity.difference(stored, experts[second], schedule) is None
        assert "family" in str(identity.difference(stored | {"family": "wan"}, experts[second], schedule))


def test_what_an_expert_cannot_do_is_one_line(experts: dict[str, Pretrained]) -> None:
    high, low = (experts[family] for family in EXPERTS)
    schedule = ScaleSchedule(SIGMAS, SIZES)
    cases: list[tuple[Pretrained, ScaleSchedule, dict[str, Any], str]] = [
        (high, schedule, {"dmd": DMD(indices=(12, 27))}, r"indices=\[12, 27\]; use .* 0 <= low <= high <= 8"),
        (low, schedule, {"dmd": DMD(critic_indices=(0, 27))}, r"indices=\[0, 27\]; use .* 9 <= low <= high <= 27"),
        (high, schedule, {"mmd": MMD(blocks=[0], noise="none")}, "noise=none compares clean latents"),
        (low, ScaleSchedule([1.0], [SIZES[-1]]), {"mmd": MMD(blocks=[0])}, "has no level that model.family=wan_low"),
    ]
    for model, levels, losses, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            Distiller(model, levels, losses)
        assert "\n" not in str(caught.value)
    Distiller(low, schedule, {"mmd": MMD(blocks=[0], noise="none")})


def students(experts: dict[str, Pretrained], root: Path) -> dict[str, Adapter]:
    return {
        family: Adapter(families.random_state(model, seed), root / family)
        for seed, (family, model) in enumerate(experts.items())
    }


def test_8_bits_are_of_both_networks(experts: dict[str, Pretrained], tmp_path: Path) -> None:
    """Of the two students' models, and of the base's other expert where only one student is given."""
    adapters = students(experts, tmp_path)
    high, low = (
        families.pretrained(NAME, model.folder, family=family, quantization="int8") for family, model in experts.items()
    )
    for other in (None, OtherExpert(low, adapters[low.family])):
        pipe = sample.build_pipeline(high, adapters[high.family], scheduler(), other=other)
        layers = [network.blocks[0].ffn.net[2] for network in (pipe.transformer, pipe.transformer_2)]
        assert [getattr(layer, "base_layer", layer).weight.dtype for layer in layers] == [torch.int8] * 2


def drawn_by_hand(experts: dict[str, Pretrained], adapters: dict[str, Adapter]) -> Tensor:
    """Both students in a plain loop, each at its own levels."""
    networks: dict[str, SharedBase] = {}
    for family, model in experts.items():
        own = model.networks(("student",))
        assert isinstance(own, SharedBase)
        own.load_adapter("student", adapters[family].state)
        networks[family] = own
    model, sampler = experts[EXPERTS[0]], scheduler()
    encoders = model.encoders()
    x = sampler.initial_latents(2, 16, 8, 8, 3, [torch.Generator().manual_seed(seed) for seed in range(2)])
    text = encoders.encode_prompts(PROMPTS)
    sampler.set_timesteps(3)
    for sigma, family in zip(SIGMAS, ("wan_high_noise", "wan_high_noise", "wan_low_noise"), strict=True):
        with torch.no_grad(), networks[family].role("student"):
            prediction, _ = networks[family].backbone_of("student").predict(x, torch.full((2,), sigma), text)
        x = sampler.step(prediction, 1000 * sigma, x).prev_sample
    return encoders.decode(x)


def test_both_students_draw_together_in_the_stock_pipeline(experts: dict[str, Pretrained], tmp_path: Path) -> None:
    """Sizes grow across the switch from one network to the other; either of the two may be named first."""
    adapters = students(experts, tmp_path)
    expected = drawn_by_hand(experts, adapters)
    requests = [sample.Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    for first, second in (EXPERTS, EXPERTS[::-1]):
        other = OtherExpert(experts[second], adapters[second])
        pipe = sample.build_pipeline(experts[first], adapters[first], scheduler(), other=other)
        final, steps = sample.draw(pipe, experts[first], requests)
        assert_close(torch.stack(final), expected, rtol=1e-3, atol=1e-3)
        assert len(steps) == 3
    alone = sample.build_pipeline(experts[first], adapters[first], scheduler())
    assert not torch.allclose(torch.stack(sample.draw(alone, experts[first], requests)[0]), expected, atol=1e-2)


def test_exports_belong_together(
    experts: dict[str, Pretrained], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each folder loads with diffusers, peft and as ComfyUI; the card of either draws with both."""
    adapters = students(experts, tmp_path)
    made = {
        family: student_folder.export(adapters[family], model, scheduler(), tmp_path / f"made-{family}")
        for family, model in experts.items()
    }
    other = OtherExpert(experts[EXPERTS[1]], load(made[EXPERTS[1]]))
    pipe = sample.build_pipeline(experts[EXPERTS[0]], load(made[EXPERTS[0]]), scheduler(), other=other)
    ours = sample.draw(pipe, experts[EXPERTS[0]], [sample.Request("a prompt", 0)])[0][0]
    for family, beside in (EXPERTS, EXPERTS[::-1]):
        assert (made[family] / verification.COMFY_WEIGHTS).is_file()
        text = (made[family] / "README.md").read_text()
        assert re.findall("load_into_transformer_2=True.*", text) and "both belong together" in text
        code = text.split("```python\n")[1].split("```")[0]
        values = {"FOLDER": made[family], "OTHER": made[beside], "BASE": folder, "cuda": "cpu", "bfloat16": "float32"}
        for old, new in values.items():
            code = code.replace(old, str(new))
        names: dict[str, Any] = {}
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(made[family]))
            exec(code, names)
        assert_close(torch.from_numpy(names["frames"]).movedim(-1, 0), (ours + 1) / 2, rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", EXPERTS)
def test_dmds_guided_prediction_is_the_stock_pipelines(experts: dict[str, Pretrained], family: str) -> None:
    """At the steps of the stock pipeline's own sampler that are the expert's, with the guidance of that expert."""
    teacher = families.pretrained(
        NAME, experts[family].folder, family=family, drawing_guidance_scale=4.0, teacher_steps=4
    )
    pipe = sample.build_pipeline(teacher)
    seen: list[tuple[Tensor, float, Tensor]] = []
    original = pipe.scheduler.step

    def watched(prediction: Tensor, timestep: Any, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((prediction.clone(), float(timestep), x_t.clone()))
        return original(prediction, timestep, x_t, *args, **kwargs)

    pipe.scheduler.step = watched
    sample.draw(pipe, teacher, [sample.Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)])
    task = Distiller(teacher, ScaleSchedule(SIGMAS, SIZES), {"mmd": MMD(blocks=[0])})
    task.configure_model()
    text, process = task.encode_prompts(PROMPTS), teacher.backbone_class.process
    own = [row for row in seen if process.covers(row[1] / 1000)]
    assert 0 < len(own) < len(seen) == 4
    for prediction, timestep, x_t in own:
        sigma = torch.full((2,), timestep / 1000)
        with torch.no_grad():
            ours = task.networks.guided_x0(x_t, sigma, text, task.empty, 4.0 if family == "wan_high_noise" else 3.0)
        assert_close(ours, process.to_x0(x_t, prediction, sigma), rtol=1e-3, atol=1e-3)


def test_a_plan_counts_the_steps_that_an_expert_trains(folder: Path) -> None:
    given = [
        f"model.path={folder}",
        "model.size=[3,8,8]",
        "model.feature_blocks=[0]",
        "model.max_text_tokens=24",
        "loss=mmd",
    ]
    given += [f"schedule.sizes={[list(size) for size in SIZES]}", f"schedule.sigmas={SIGMAS}"]
    found = {name: planned(composed([f"model=wan22_a14b_{name}", *given], "plan")) for name in ("high", "low")}
    sizes = [tuple(size) for size in SIZES]
    assert [list(found[name].sizes) for name in ("high", "low")] == [sizes[:2], sizes[2:]]
    assert found["high"].plain[-1].flop < found["low"].plain[0].flop
    assert found["high"].cached == found["low"].cached, "a cache holds every size"


def test_commands_take_the_models_as_they_ship(
    experts: dict[str, Pretrained], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,seed\na red star,3\n")
    common = [f"model.path={folder}", "model.size=[3,8,8]", "model.feature_blocks=[0]", "model.max_text_tokens=24"]
    given = [f"prompts={tmp_path / 'prompts.csv'}", f"out={tmp_path / 'drawn'}", *common]
    for name in ("high", "low"):
        plan = generate.prepare(composed([f"model=wan22_a14b_{name}", *given], "generate"))
        told = plan.job.settings
        assert (told["steps"], told["guidance_scale"], told["files"]["fps"]) == (40, 4.0, 16)
        assert plan.model.backbone_class.guidance_arguments(4.0) == {"guidance_scale": 4.0, "guidance_scale_2": 3.0}

    adapters = students(experts, tmp_path)
    made = {
        family: student_folder.export(adapters[family], model, scheduler(), tmp_path / family, verify=False)
        for family, model in experts.items()
    }
    drawing = ["model=wan22_a14b_high", *common, f"folder={tmp_path / 'out'}", "name=x", "output=nowhere"]
    drawing.append(f"adapter={made['wan_high_noise']}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = sample.prepare(composed([*drawing, f"other_adapter={made['wan_low_noise']}"], "sample"))
    assert job.other is not None and job.other.model.family == "wan_low_noise"
    student = job.other.student
    assert isinstance(student, Adapter) and student.source.parent == made["wan_low_noise"]
    other_experts = [*drawing[:-1], f"adapter={made['wan_low_noise']}"]
    for given, wrong in ((drawing, made["wan_high_noise"]), (other_experts, made["wan_high_noise"])):
        with pytest.raises(UserError, match=r"is of the expert transformer(_2)?, but model\.family=wan_\w+ is transf"):
            sample.prepare(composed([*given, f"other_adapter={wrong}"], "sample"))
    with pytest.raises(UserError, match=r"is of the expert transformer_2, but model\.family=wan_high"):
        families.pretrained(NAME, folder, family="wan_high_noise", adapters=[str(made["wan_low_noise"])])
    with pytest.warns(UserWarning, match="give other_adapter="):
        assert sample.prepare(composed(drawing, "sample")).other is None
    with pytest.raises(UserError, match="other_adapter=x is of a second expert, but adapter is null"):
        sample.prepare(composed([*drawing[:-1], "adapter=null", "other_adapter=x"], "sample"))
    run = tmp_path / "run"
    shutil.copytree(made["wan_high_noise"], run / "adapter")
    (run / "config.yaml").write_text("model: {family: wan_high_noise}")
    with pytest.raises(
        UserError, match=r"is a student of model\.family=wan_high_noise, and the other expert is wan_low"
    ):
        sample.prepare(composed([*drawing, f"other_adapter={run}"], "sample"))
    ScaleSchedule([1.0, 0.5], SIZES[1:]).scheduler(2).save_pretrained(made["wan_low_noise"])
    (made["wan_low_noise"] / "checksums.json").unlink()
    with pytest.raises(UserError, match="was trained for another schedule than the adapter"):
        sample.prepare(composed([*drawing, f"other_adapter={made['wan_low_noise']}"], "sample"))


# LoRAs of the base, and students that say which expert they are of


def style(folder: Path, model: Pretrained, seed: int, original: bool) -> str:
    """A LoRA file as it is published: with the vendor's names, or with those of diffusers; without a record."""
    state = families.random_state(model, seed)
    name = model.backbone_class.comfy_key if original else lambda module: f"transformer.{module}"
    tensors = {}
    for key, value in state.items():
        module, _, kind = key.partition(".lora_")
        tensors[f"{name(module)}.lora_{kind}"] = value
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / f"style{seed}.safetensors")
    return str(folder / f"style{seed}.safetensors")


@pytest.mark.parametrize("family", EXPERTS)
def test_each_expert_gets_the_adapters_that_name_it(
    experts: dict[str, Pretrained], folder: Path, family: str, tmp_path: Path
) -> None:
    """In training its own ones, in drawing both, whichever of the two models is asked."""
    files = [style(tmp_path, experts["wan_high_noise"], seed, original=bool(seed)) for seed in range(2)]
    entries = [
        {"path": files[0], "expert": "transformer"},
        {"path": files[1], "weight": 0.5, "expert": "transformer_2"},
    ]
    model = families.pretrained(NAME, folder, family=family, adapters=entries)
    plain, key = sample.build_pipeline(experts[family]), "blocks.1.attn2.to_out.0"
    pipe = sample.build_pipeline(model)
    for part, file, weight in (("transformer", files[0], 1.0), ("transformer_2", files[1], 0.5)):
        before, after = (getattr(each, part).get_submodule(key).weight for each in (plain, pipe))
        update = load(Path(file)).fitted(experts[family]).update(key)
        assert_close(after, before + weight * update, rtol=1e-5, atol=1e-6)
    own = model.network().network.get_submodule(key).weight
    assert torch.equal(own, getattr(pipe, model.backbone_class.subfolder).get_submodule(key).weight)
    # Records.
    assert [entry.record["expert"] for entry in model.adapters] == ["transformer", "transformer_2"]
    swapped = [entries[0] | {"expert": "transformer_2"}, entries[1] | {"expert": "transformer"}]
    others = [
        families.pretrained(NAME, folder, family=family, adapters=each) for each in (entries, entries[:1], swapped)
    ]
    assert len({identity.whole_fingerprint(each) for each in others}) == 3
    student = Adapter(families.random_state(model, 7), tmp_path / "student")
    made = student_folder.export(student, model, scheduler(), tmp_path / "made", verify=False)
    own_file = files[EXPERTS.index(family)]
    assert [entry.name for entry in load(made).baked] == [Path(own_file).name]
    assert load(made).fitted(model).state.keys() == student.state.keys()
    text = (made / "README.md").read_text()
    assert "for `transformer_2`" in text and "\n".join(student_folder.adding(model)) in text
    code = "\n".join(student_folder.adding(model)).replace("ADAPTER_1", files[0]).replace("ADAPTER_2", files[1])
    exec(code, {"pipe": plain})
    for part in ("transformer", "transformer_2"):
        theirs, ours = (getattr(each, part).get_submodule(key).weight for each in (plain, pipe))
        assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_an_adapter_for_an_expert_that_is_not_clear_is_one_line(
    experts: dict[str, Pretrained], folder: Path, tmp_path: Path
) -> None:
    file = style(tmp_path, experts["wan_high_noise"], 0, original=True)
    made = student_folder.export(
        Adapter(families.random_state(experts["wan_low_noise"], 1), tmp_path / "x"),
        experts["wan_low_noise"],
        scheduler(),
        tmp_path / "low",
        verify=False,
    )
    for entry, message in (
        (file, "does not say which of transformer and transformer_2 it is for; give {path: .*, expert: transformer}"),
        ({"path": file, "expert": "high"}, "expert=high, but pipeline has transformer and transformer_2"),
        ({"path": file, "expert": 2}, "give the network's name as a text"),
        ({"path": str(made), "expert": "transformer"}, "expert=transformer, but is of the expert transformer_2"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            families.pretrained(NAME, folder, adapters=[entry])
        assert "\n" not in str(caught.value)
    # One that says it itself needs no more.
    low = families.pretrained(NAME, folder, family="wan_low_noise", adapters=[str(made)])
    assert low.adapters[0].expert == "transformer_2"
    both = families.pretrained(NAME, folder, adapters=[{"path": str(made), "expert": "transformer_2"}])
    assert not both.own_adapters and len(both.adapters_of("transformer_2")) == 1


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_students_and_checkpoints_say_their_expert_and_are_refused_for_the_other(
    folder: Path, tuning: str, tmp_path: Path
) -> None:
    for family, other in (EXPERTS, EXPERTS[::-1]):
        run = tmp_path / family
        model = families.pretrained(NAME, folder, family=family, tuning=tuning)
        task = Distiller(model, ScaleSchedule(SIGMAS, SIZES), {"mmd": MMD(blocks=[0])})
        task.configure_model()
        written = students_callback.save(run / "student", task)
        (run / "checkpoints").mkdir()
        content = dict.fromkeys(NEEDED, 0) | {"state_dict": task.state_dict(), "optimizer_states": []}
        torch.save(content, run / "checkpoints" / "last.ckpt")
        (run / "config.yaml").write_text(f"model: {{family: {family}, alpha: null, adapters: null}}")
        checkpoint = load_student(run / "checkpoints" / "last.ckpt")
        exported = student_folder.export(checkpoint.fitted(model), model, scheduler(), run / "made", verify=False)
        for path in (written, run / "checkpoints" / "last.ckpt", exported):
            load_student(path).fitted(model)
            wrong = families.pretrained(NAME, folder, family=other)
            expected = f"is of the expert {model.backbone_class.subfolder}, but model.family={other} is"
            with pytest.raises(UserError, match=expected) as caught:
                load_student(path).fitted(wrong)
            assert "\n" not in str(caught.value)
