"""Adapters that are added to a base before it is used: weights, records, and who notices another one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from swd.callbacks import students
from swd.commands import train
from swd.data.identity import identity, whole_fingerprint
from swd.export import student_folder
from swd.losses import MMD
from swd.modules.adapters import BASE, PEFT_CONFIG, Adapter, load, save_adapter, write_layouts
from swd.modules.base_adapters import content_hash, read_entries
from swd.modules.distiller import Distiller
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.quantize import quantize
from swd.schedule import ScaleSchedule
from swd.types import UserError


@pytest.fixture(scope="module", params=["sd3", "sdxl", "qwen_image"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained(name, families.save(name, tmp_path_factory.mktemp(name) / "pipeline"))


@pytest.fixture(scope="module")
def styles(plain: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters in diffusers' layout, the second of another rank."""
    root = tmp_path_factory.mktemp("styles")
    folders = [root / "first", root / "second"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        state = families.random_state(plain, seed)
        if seed:
            state = {key: value[:2] if ".lora_A." in key else value[:, :2] for key, value in state.items()}
        write_layouts(folder, state, "base", plain.backbone_class.subfolder)
    return folders


def given(styles: list[Path]) -> list[Any]:
    return [str(styles[0]), {"path": str(styles[1]), "weight": -0.5}]


def with_styles(name: str, plain: Pretrained, styles: list[Path], **more: Any) -> Pretrained:
    return families.pretrained(name, plain.folder, adapters=given(styles), **more)


def predicted(network: Any, model: Pretrained) -> Tensor:
    size = model.size
    x = torch.randn(1, model.channels, *size, generator=torch.Generator().manual_seed(0))
    text = model.backbone_class.random_conditioning(model.network_config, 1, 7)
    with torch.no_grad():
        return model.backbone_class(network, model.embedded_guidance).predict(x, torch.tensor([0.7]), text)[0]


def test_the_base_predicts_what_the_stock_pipeline_does_with_the_adapters_loaded(
    name: str, plain: Pretrained, styles: list[Path]
) -> None:
    pipe = plain.pipeline(**{plain.backbone_class.subfolder: plain.network().network})
    for number, folder in enumerate(styles):
        pipe.load_lora_weights(str(folder), adapter_name=f"style{number}")
    pipe.set_adapters(["style0", "style1"], [1.0, -0.5])
    theirs = predicted(getattr(pipe, plain.backbone_class.subfolder), plain)
    styled = with_styles(name, plain, styles)
    ours = predicted(styled.network().network, styled)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - predicted(plain.network().network, plain)).abs().max() > 0.01
    # Teacher and fresh student start from it.
    networks = styled.networks(("student",))
    assert isinstance(networks, SharedBase)
    for role in ("teacher", "student"):
        with networks.role(role):  # type: ignore[arg-type]
            assert_close(predicted(networks.backbone.network, styled), ours, rtol=1e-5, atol=1e-6)


def added(network: Any, styles: list[Path]) -> Any:
    """The network in float64 with the updates of both adapters."""
    network = network.double()
    for folder, weight in zip(styles, (1.0, -0.5), strict=True):
        adapter = load(folder)
        for module in adapter.modules:
            down, up = (adapter.state[f"{module}.lora_{kind}.weight"].double().flatten(1) for kind in "AB")
            layer: Any = network.get_submodule(module)
            layer.weight.data += weight * (up @ down).view_as(layer.weight)
    return network


def test_updates_are_added_in_float32_before_weights_are_rounded_or_quantized(
    name: str, plain: Pretrained, styles: list[Path]
) -> None:
    exact = added(plain.network().network, styles)
    base = families.pretrained(name, plain.folder, precision="bf16").network().network
    half: Any = with_styles(name, plain, styles, precision="bf16").network().network
    stored = dict(added(base, styles).named_parameters())
    for key, value in half.named_parameters():
        rounding = {"rtol": 2**-7, "atol": 1e-6} if value.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        assert_close(value, stored[key].to(value.dtype), **rounding)
    # In 8 bits: the changed weights, not the changed rounding of the base's.
    small = with_styles(name, plain, styles, quantization="int8")
    network = copy.deepcopy(exact).float()
    quantize(network, small.targets, "int8", small.backbone_class(network).repeated_blocks)
    networks = small.networks(("student",))
    with networks.role("teacher"):
        assert_close(predicted(networks.backbone.network, small), predicted(network, small), rtol=1e-3, atol=1e-3)
    # Whole copies.
    whole = with_styles(name, plain, styles, tuning="full").networks(("student",))
    assert_close(predicted(whole.backbone_of("student").network, plain), predicted(exact.float(), plain))


def test_the_same_weights_have_one_hash_in_all_layouts(plain: Pretrained, styles: list[Path], tmp_path: Path) -> None:
    state = load(styles[0]).state
    kohya = {}
    for key, value in state.items():
        module, _, kind = key.removesuffix(".weight").rpartition(".lora_")
        kohya[f"diffusion_model.{module}.lora_{'down' if kind == 'A' else 'up'}.weight"] = value
        kohya[f"diffusion_model.{module}.alpha"] = torch.tensor(2.0 * len(state[f"{module}.lora_A.weight"]))
    # Alpha is twice the rank, so that the file's weights are half of them.
    save_file(
        {k: v / 2 if k.endswith("up.weight") else v.contiguous() for k, v in kohya.items()},
        tmp_path / "kohya.safetensors",
    )
    found = {content_hash(load(path)) for path in (styles[0], tmp_path / "kohya.safetensors")}
    assert len(found) == 1 and content_hash(load(styles[1])) not in found


# Records


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    root = tmp_path_factory.mktemp("sd3")
    plain = families.pretrained("sd3", families.save("sd3", root / "pipeline"))
    for seed in range(2):
        (root / f"style{seed}").mkdir()
        write_layouts(root / f"style{seed}", families.random_state(plain, seed), "base", "transformer")
    return root / "pipeline", [root / "style0", root / "style1"]


def model_with(sd3: tuple[Path, list[Path]], *adapters: Any) -> Pretrained:
    return families.pretrained("sd3", sd3[0], adapters=list(adapters) or None)


def test_a_student_says_what_its_base_was_and_is_used_on_no_other(sd3: tuple[Path, list[Path]], tmp_path: Path) -> None:
    style, other = map(str, sd3[1])
    model = model_with(sd3, {"path": style, "weight": 0.5})
    task = Distiller(model, ScaleSchedule(families.SIGMAS, [4, 6, 8]), {"mmd": MMD(blocks=[0])})
    task.configure_model()
    assert isinstance(task.networks, SharedBase)
    task.networks.load_adapter("student", families.random_state(model, 7))
    folder = students.save(tmp_path / "adapter", task)
    digest = content_hash(load(sd3[1][0]))
    record = json.loads((folder / BASE).read_text())
    assert record == {"base": "pipeline", "adapters": [{"name": "style0", "weight": 0.5, "hash": digest}]}
    student = load(folder)
    student.check_model(model)
    for wrong in ([], [style], [{"path": other, "weight": 0.5}], [{"path": style, "weight": 0.5}, other]):
        with pytest.raises(UserError, match=rf"trained on pipeline with model.adapters=\[.*style0.*{digest}") as caught:
            student.check_model(model_with(sd3, *wrong))
        assert "\n" not in str(caught.value)
    # Exported, it says so too, and the card's lines make the same network.
    made = student_folder.export(student, model, task.scheduler(), tmp_path / "out")
    assert load(made).baked == student.baked and json.loads((made / BASE).read_text()) == record
    text = (made / "README.md").read_text()
    assert f"`ADAPTER_1` is `style0` at weight 0.5 (hash {digest})" in text and str(tmp_path) not in text
    pipe = model_with(sd3).pipeline(transformer=model_with(sd3).network().network)
    lines = "\n".join(student_folder.adding(model))
    assert lines in text
    exec(lines.replace("ADAPTER_1", style), {"pipe": pipe})
    assert_close(predicted(pipe.transformer, model), predicted(model.network().network, model), rtol=1e-4, atol=1e-5)
    # A student of a plain base writes no record, and fits a changed one.
    save_adapter(tmp_path / "plain", student.state, 4, 4, task.scheduler(), "pipeline", "transformer")
    assert not (tmp_path / "plain" / BASE).exists()
    load(tmp_path / "plain").check_model(model)


def run_arguments(sd3: tuple[Path, list[Path]], folder: Path, adapters: str) -> list[str]:
    return [
        f"folder={folder}",
        "name=test",
        "model=sd35_large",
        f"model.path={sd3[0]}",
        "model.size=8",
        "model.rank=4",
        "model.precision=fp32",
        "model.feature_blocks=[0]",
        "model.max_text_tokens=24",
        "schedule.sizes=[4,6,6,8]",
        "loss=mmd",
        "data=shapes",
        "data.batch_size=2",
        "data.dataset.resolution=64",
        "trainer.accelerator=cpu",
        f"model.adapters={adapters}",
    ]


def test_a_run_records_hashes_which_resuming_and_sampling_compare(sd3: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from swd.callbacks.resume_rules import config_difference

    style, other = sd3[1]
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    entry = f"[{{path:{style},weight:0.5}}]"
    cfg = tiny.composed(run_arguments(sd3, run, entry))
    train.build_task_and_data(cfg)
    digest = content_hash(load(style))
    assert dict(cfg.model.adapters[0]) == {"path": str(style), "weight": 0.5, "hash": digest}
    train.record(cfg, run, None)
    checkpoint = run / "checkpoints" / "last.ckpt"

    def difference(adapters: str) -> str | None:
        now = tiny.composed(run_arguments(sd3, run, adapters))
        train.build_task_and_data(now)
        return config_difference(checkpoint, now)

    assert difference(entry) is None
    for wrong in ("null", f"[{style}]", f"[{{path:{other},weight:0.5}}]"):
        found = difference(wrong)
        assert found is not None and "model.adapters" in found, wrong
    # The recorded model is built again, unless the file is another one now.
    (run / "adapter").mkdir()
    node = student_folder.recorded_model(run / "adapter", tiny.composed([f"run={run}", "to=x"], "export"))
    assert Pretrained(**{k: v for k, v in node.items() if k != "_target_"}).adapters[0].hash == digest
    changed = tmp_path / "changed"
    changed.mkdir()
    write_layouts(changed, load(other).state, "base", "transformer")
    node["adapters"][0]["path"] = str(changed)
    with pytest.raises(UserError, match=rf"other weights than those that were recorded \(hash .*, not {digest}\)"):
        Pretrained(**{k: v for k, v in node.items() if k != "_target_"})


def test_drawn_sets_are_told_apart_and_caches_are_not(sd3: tuple[Path, list[Path]]) -> None:
    style, other = map(str, sd3[1])
    models = [model_with(sd3, *each) for each in ((), (style,), (other,), ({"path": style, "weight": 0.5},))]
    assert len({whole_fingerprint(model) for model in models}) == 4
    schedule = ScaleSchedule(families.SIGMAS, [4, 6, 8])
    assert len({json.dumps(identity(model, schedule)) for model in models}) == 1  # encoders are the same


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "give a path, or a path and its weight"),
        ({"weight": 1.0}, "give a path, or a path and its weight"),
        ({"path": "x", "scale": 1.0}, "give a path, or a path and its weight"),
        ("", "give a path, or a path and its weight"),
        ({"path": "x", "weight": 0}, "number other than 0"),
        ({"path": "x", "weight": True}, "number other than 0"),
        ({"path": "x", "weight": "1"}, "number other than 0"),
        ({"path": "x", "weight": float("nan")}, "use -10 to 10"),
        ({"path": "x", "weight": 11}, "use -10 to 10"),
    ],
)
def test_entries_that_are_none(entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_entries([entry])
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_missing_or_of_another_network_is_one_line(
    sd3: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^model\.adapters=nowhere does not exist"):
        model_with(sd3, "nowhere")
    state = load_file(sd3[1][0] / "pytorch_lora_weights.safetensors")
    save_file({key.replace("transformer_blocks", "blocks"): v for key, v in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not fit model pipeline") as caught:
        model_with(sd3, str(tmp_path / "x.safetensors"))
    assert "\n" not in str(caught.value)
    assert (sd3[1][0] / PEFT_CONFIG).is_file() and isinstance(load(sd3[1][0]), Adapter)
