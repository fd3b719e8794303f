"""The adapter folder: both layouts, alpha folded in, and the errors."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel
from safetensors import SafetensorError
from torch.testing import assert_close

from swd.commands import export
from swd.export import student_folder
from swd.modules import adapters
from swd.modules.adapters import PEFT_CONFIG, PEFT_WEIGHTS, Adapter, load, locate, save_adapter
from swd.modules.pretrained import Pretrained
from swd.modules.saved_student import load_student
from swd.scheduler import ScaleWiseScheduler
from swd.types import UserError


def saved(folder: Path, networks, alpha: float = 4) -> Path:
    scheduler = tiny.build_schedule().scheduler(2)
    return save_adapter(folder, networks.adapter_state("student"), 4, alpha, scheduler, "tiny", "transformer")


@pytest.mark.parametrize("alpha", [4, 12])
def test_peft_loads_the_folder_and_predicts_the_same(tmp_path: Path, alpha: float) -> None:
    networks = tiny.build_networks(rank=4, alpha=alpha)
    folder = saved(tmp_path / "adapter", networks, alpha)
    x, conditioning, sigma = tiny.build_latents(), tiny.build_conditioning(), torch.tensor([0.9, 0.3])
    expected = networks.x0("student", x, sigma, conditioning)[0]

    loaded: SD3Transformer2DModel = PeftModel.from_pretrained(tiny.build_transformer(), folder)
    velocity = loaded(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=conditioning.embeds,
        pooled_projections=conditioning.pooled,
        return_dict=False,
    )[0]
    assert_close(networks.process.to_x0(x, velocity, sigma), expected, rtol=1e-5, atol=1e-5)


def test_state_and_schedule_survive_the_folder(tmp_path: Path) -> None:
    networks = tiny.build_networks()
    folder = saved(tmp_path / "adapter", networks)
    state, config = load(folder).state, json.loads((folder / PEFT_CONFIG).read_text())
    own = networks.adapter_state("student")
    assert state.keys() == own.keys() and all(torch.equal(state[k], own[k]) for k in own)
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    scheduler = ScaleWiseScheduler.from_pretrained(folder)
    assert list(scheduler.config.sigmas) == list(tiny.SIGMAS)
    assert [size[0] for size in scheduler.base_sizes] == list(tiny.SIZES)
    assert scheduler.config.interpolation == "bicubic"


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", tiny.build_networks())
    (folder / "stale.txt").write_text("old")
    saved(folder, tiny.build_networks(seed=1))
    assert not (folder / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_find_adapter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train first"):
        locate("latest", tmp_path)
    folder = saved(tmp_path / "run" / "time" / "adapter", tiny.build_networks())
    for name in ("latest", str(folder), str(folder.parent)):
        assert locate(name, tmp_path) == folder
    with pytest.raises(UserError, match="does not exist"):
        locate(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(UserError, match="holds no adapter"):
        locate(str(tmp_path), tmp_path)
    (folder / PEFT_WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{PEFT_WEIGHTS} is missing"):
        load(folder)


def test_the_command_exports_the_run_that_it_is_given(tiny_model: Path, tmp_path: Path, capsys) -> None:
    networks = tiny.build_networks()
    run = saved(tmp_path / "run" / "adapter", networks).parent
    arguments = tiny.exporting(tiny_model, model__max_text_tokens=12)
    export.run(tiny.composed([*arguments, f"run={run}", f"to={tmp_path / 'made'}"], "export"))
    said = capsys.readouterr()
    assert said.out.split() == [str(tmp_path / "made")]
    assert f"to {tmp_path / 'made'}, and loading it back: 1 student" in said.err and "done: 1 student in" in said.err
    state, own = load(tmp_path / "made").state, networks.adapter_state("student")
    assert all(torch.equal(state[key], value) for key, value in own.items())
    with pytest.raises(UserError, match=r"^to=.* exists already"):
        export.run(tiny.composed([*arguments, f"run={run}", f"to={tmp_path / 'made'}"], "export"))
    with pytest.raises(UserError, match=r"^run=nowhere does not exist"):
        export.run(tiny.composed([*arguments, "run=nowhere", f"to={tmp_path / 'other'}"], "export"))


def test_one_network_at_a_time_is_loaded_to_check_and_no_encoder(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1])
    alive: list[weakref.ref[Any]] = []
    load_network, load_pipeline = Pretrained.network, Pretrained.pipeline

    def network(self: Pretrained, *args: Any) -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        backbone = load_network(self, *args)
        alive.append(weakref.ref(backbone.network))
        return backbone

    def pipeline(self: Pretrained, *args: Any, **kwargs: Any) -> Any:
        pipe = load_pipeline(self, *args, **kwargs)
        assert [n for n, c in pipe.components.items() if c is not None] == ["transformer", "scheduler"]
        return pipe

    monkeypatch.setattr(Pretrained, "network", network)
    monkeypatch.setattr(Pretrained, "pipeline", pipeline)
    adapter = Adapter(tiny.build_networks().adapter_state("student"), tmp_path)
    student_folder.export(adapter, model, tiny.build_schedule().scheduler(2), tmp_path / "made")
    assert len(alive) == 3  # the student, and as peft and diffusers load it


# Where it goes, and what it says


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> tuple[Adapter, Pretrained, ScaleWiseScheduler]:
    model = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1])
    adapter = Adapter(tiny.build_networks().adapter_state("student"), Path("nowhere"))
    return adapter, model, tiny.build_schedule().scheduler(2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: full\nat 3")])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    error: Exception, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise error

    adapter, model, schedule = small
    monkeypatch.setattr(student_folder, "write_layouts", full)
    with pytest.raises(UserError, match=r"to=.* cannot be written .*free space, or choose another") as caught:
        student_folder.export(adapter, model, schedule, tmp_path / "a" / "b" / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused_before_anything_loads(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", Path("/proc/nowhere/x"), Path("")):
        with pytest.raises(UserError, match=r"^to") as caught:
            student_folder.check_target(target)
        assert "\n" not in str(caught.value)
    student_folder.check_target(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_leaves_no_folder_under_output(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    with initialize_config_dir(str(tiny.CONF), version_base="1.3"):
        cfg = compose("export", ["to=x"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        assert cfg.hydra.run.dir == "." and cfg.hydra.output_subdir is None
    HydraConfig.instance().cfg = None


def test_comfyui_is_promised_where_it_has_the_family(tmp_path: Path) -> None:
    for name, file in {
        "sd3": "pytorch_lora_weights.safetensors` for ComfyUI",
        "flux": "pytorch_lora_weights.safetensors` for ComfyUI",
        "sdxl": "comfyui.safetensors` for ComfyUI",
        "wan": "comfyui.safetensors` for ComfyUI",
        "sana": None,
        "qwen_image": "pytorch_lora_weights.safetensors` for ComfyUI",
        "flux2_klein": "pytorch_lora_weights.safetensors` for ComfyUI",
        "chroma": "pytorch_lora_weights.safetensors` for ComfyUI",
        "z_image": "pytorch_lora_weights.safetensors` for ComfyUI",
    }.items():
        model = families.pretrained(name, families.save(name, tmp_path / name))
        state = model.networks(("student",)).adapter_state("student")  # type: ignore[attr-defined]
        adapter = Adapter(state, tmp_path)
        text = student_folder.card(
            student_folder.AdapterContent(adapter, model), model, tiny.build_schedule().scheduler(2)
        )
        assert (file in text) if file else ("ComfyUI" not in text), name
        assert ("those of the first step" in text) == (name == "z_image")


SCHEDULES: list[dict[str, Any]] = [
    {"divisor": 0},
    {"divisor": -2},
    {"divisor": "x"},
    {"divisor": 2.5},
    {"divisor": True},
    {"divisor": None},
    {"num_train_timesteps": 0},
    {"num_train_timesteps": "x"},
    {"num_train_timesteps": 10**30},
    {"num_train_timesteps": 500},
    {"shift": 3.0},
    {"sizes": [4, 6, 10**12]},
    {"sizes": [4.5, 6, 8]},
    {"sizes": "x"},
    {"sizes": [[4, 4], [6, 6], ["x", 8]]},
    {"sizes": [0, 6, 8]},
    {"sizes": None},
    {"sigmas": [1.0, float("nan"), 0.2]},
    {"sigmas": [1.0, None, 0.2]},
    {"sigmas": {}},
    {"sigmas": 3},
    {"sigmas": [1.0 / n for n in range(1, 5000)], "sizes": [4] * 4999},
    {"prediction_type": 3},
    {"interpolation": ["bicubic"]},
]


@pytest.mark.parametrize("values", SCHEDULES, ids=lambda values: str(values)[:40])
def test_a_damaged_schedule_is_one_line(values: dict[str, Any], small: Any, tmp_path: Path) -> None:
    small[2].save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    student_folder.read_schedule(file)
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=r"scheduler_config\.json is damaged") as caught:
        student_folder.read_schedule(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_changed_schedule_is_noticed(small: Any, tiny_model: Path, tmp_path: Path) -> None:
    adapter, _, schedule = small
    folder = save_adapter(tmp_path / "run" / "adapter", adapter.state, 4, 4, schedule, "tiny", "transformer")
    arguments = [*tiny.exporting(tiny_model), f"run={folder}", f"to={tmp_path / 'out'}", "verify=false"]
    file = folder / "scheduler_config.json"
    before = file.read_text()
    file.write_text(before.replace("0.8", "0.7"))
    with pytest.raises(UserError, match=r"scheduler_config\.json is not the file that was written"):
        export.run(tiny.composed(arguments, "export"))
    file.write_text(before)
    export.run(tiny.composed(arguments, "export"))


def test_a_flipped_byte_of_a_whole_student_is_noticed(small: Any, tmp_path: Path) -> None:
    _, model, schedule = small
    folder = adapters.save_student(tmp_path / "student", model.network().network, schedule)
    student = load_student(folder)
    student.check_model(model)
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{file.name} is not the file that was written"):
        load_student(folder).check_model(model)
