"""Adapters of every layout, the hub's errors, export and its round trip."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from swd import adapters, export, sample
from swd.adapters import Adapter, check_fits, load, locate, read_adapter, save_adapter
from swd.modules import hub
from swd.modules.pretrained import Pretrained
from swd.schedule import ScaleSchedule
from swd.types import UserError


@pytest.fixture(scope="module", params=families.FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained(name, families.save(name, tmp_path_factory.mktemp(name) / "pipeline"))


def random_state(model: Pretrained, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = model.networks(("student",)).adapter_state("student")  # type: ignore[attr-defined]
    return {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in state.items()}


def scheduler(name: str, model: Pretrained) -> Any:
    kind = model.backbone_class.process.prediction_type
    return ScaleSchedule(families.SIGMAS, families.SIZES[name]).scheduler(model.limits.divisor, kind)


def test_export_round_trip(name: str, model: Pretrained, tmp_path: Path) -> None:
    state = random_state(model)
    made = export.export(Adapter(state, tmp_path / "x", "base"), model, scheduler(name, model), tmp_path / "out")
    again = load(made)
    assert again.state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again.state[key], value)
    from_diffusers = load(made / adapters.DIFFUSERS_WEIGHTS)
    for key, value in state.items():
        assert torch.equal(from_diffusers.state[key], value)
    assert (made / export.COMFY_WEIGHTS).exists() == (name in ("sdxl", "wan"))
    source = (made / export.SCHEDULER_FILE).read_text()
    assert "import swd" not in source and "from swd" not in source
    snippet = (made / "README.md").read_text()
    assert model.backbone_class.pipeline_type in snippet and "ScaleWiseScheduler" in snippet


def test_the_card_s_snippet_samples_without_this_package(name: str, model: Pretrained, tmp_path: Path) -> None:
    """The scheduler file of the folder alone, with the stock pipeline, draws what `swd sample` draws."""
    state = random_state(model)
    made = export.export(Adapter(state, tmp_path / "x"), model, scheduler(name, model), tmp_path / "out", verify=False)
    spec = importlib.util.spec_from_file_location("standalone", made / export.SCHEDULER_FILE)
    assert spec is not None and spec.loader is not None
    standalone = importlib.util.module_from_spec(spec)
    sys.modules["standalone"] = standalone
    spec.loader.exec_module(standalone)

    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(made), weight_name=adapters.DIFFUSERS_WEIGHTS)
    sampler = standalone.ScaleWiseScheduler.from_pretrained(made)
    sampler.attach(pipe)
    latents = sampler.initial_latents(
        1, channels=model.channels, packed=model.backbone_class.packed, generator=torch.Generator().manual_seed(7)
    )
    pixels = model.pixel_size(model.size)
    arguments: dict[str, Any] = {"height": pixels[-2], "width": pixels[-1]}
    if model.backbone_class.video:
        arguments["num_frames"] = pixels[0]
    drawn = pipe(
        "a red star",
        latents=latents,
        num_inference_steps=len(families.SIGMAS),
        output_type="pt",
        **model.backbone_class.sampling_arguments(model.max_text_tokens, model.embedded_guidance),
        **arguments,
    )[0][0]

    ours = sample.build_pipeline(model, load(made), scheduler(name, model))
    expected = sample.draw(ours, model, [sample.Request("a red star", 7)])[0][0]
    drawn = drawn.transpose(0, 1) if drawn.ndim == 4 else drawn  # diffusers puts frames first
    assert_close(drawn * 2 - 1, expected, rtol=1e-3, atol=1e-3)


def test_the_exporter_refuses_a_folder_that_differs(
    name: str, model: Pretrained, tmp_path: Path, monkeypatch: Any
) -> None:
    write = adapters.write_layouts

    def broken(folder: Path, state: dict[str, Tensor], base: str, part: str) -> None:
        write(folder, state, base, part)
        file = folder / adapters.DIFFUSERS_WEIGHTS
        save_file({k: v * (1.1 if ".lora_B." in k else 1) for k, v in load_file(file).items()}, file)

    monkeypatch.setattr(export, "write_layouts", broken)
    with pytest.raises(UserError, match="loaded by diffusers differs"):
        export.export(Adapter(random_state(model), tmp_path), model, scheduler(name, model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alpha", [4, 12])
def test_published_layouts_mean_the_same(name: str, model: Pretrained, alpha: float, tmp_path: Path) -> None:
    """A PEFT folder with alpha in its configuration, a diffusers file with alpha in its metadata or as tensors."""
    state, part = random_state(model), model.backbone_class.subfolder
    peft = tmp_path / "peft"
    peft.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, peft / adapters.PEFT_WEIGHTS)
    (peft / adapters.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": alpha}))
    metadata = {"lora_adapter_metadata": json.dumps({f"{part}.r": 4, f"{part}.lora_alpha": alpha})}
    save_file({f"{part}.{k}": v for k, v in state.items()}, tmp_path / "meta.safetensors", metadata)
    kohya = {f"{part}.{k.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}": v for k, v in state.items()}
    alphas = {
        f"{part}.{k.removesuffix('.lora_A.weight')}.alpha": torch.tensor(float(alpha)) for k in state if "lora_A" in k
    }
    save_file(kohya | alphas, tmp_path / "kohya.safetensors")
    for path in (peft, tmp_path / "meta.safetensors", tmp_path / "kohya.safetensors"):
        adapter = load(locate(str(path), tmp_path))
        check_fits(adapter, model)
        for key, value in state.items():
            expected = value * (alpha / 4 if ".lora_B." in key else 1)
            assert_close(adapter.state[key], expected, rtol=0, atol=0)


def test_warm_start(name: str, model: Pretrained, tmp_path: Path) -> None:
    """A student with another alpha starts from exactly the update that the adapter stands for."""
    state = random_state(model)
    folder = save_adapter(tmp_path / "a", state, 4, 12, scheduler(name, model), "base", model.backbone_class.subfolder)
    warm = families.pretrained(name, model.folder, alpha=2, init_adapter=str(folder))
    networks = warm.networks(("student",))
    networks.load_adapter("student", read_adapter(warm))  # type: ignore[attr-defined]
    ours = networks.adapter_state("student")  # type: ignore[attr-defined]
    for key in state:
        if key.endswith("lora_B.weight"):
            a = key.replace("lora_B", "lora_A")
            assert_close(ours[key] @ ours[a] * (2 / 4), state[key] @ state[a] * (12 / 4), rtol=1e-5, atol=1e-6)


def test_wrong_adapters_are_refused_with_both_names(name: str, model: Pretrained, tmp_path: Path) -> None:
    other = "flux" if name != "flux" else "sdxl"
    stranger = families.pretrained(other, families.save(other, tmp_path / "other"))
    part = stranger.backbone_class.subfolder
    folder = save_adapter(tmp_path / "a", random_state(stranger), 4, 4, scheduler(other, stranger), "that-base", part)
    with pytest.raises(UserError, match=r"made for that-base\) does not fit model pipeline"):
        check_fits(load(folder), model)
    own = save_adapter(tmp_path / "b", random_state(model), 4, 4, scheduler(name, model), "b", "transformer")
    with pytest.raises(UserError, match=r"has rank 4, but model\.rank=8; set model\.rank=4"):
        read_adapter(families.pretrained(name, model.folder, rank=8, init_adapter=str(own)))


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    save_file({"q.weight": torch.ones(1)}, tmp_path / "c.safetensors")
    save_file({"q.lora_A.weight": torch.ones(1, 1)}, tmp_path / "d.safetensors")
    with pytest.raises(UserError, match="other formats can run code"):
        locate(str(tmp_path / "a.bin"), tmp_path)
    for file, message in (("b", "cannot be read"), ("c", "holds no LoRA"), ("d", "only one of lora_A and lora_B")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / f"{file}.safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "is gated: accept its licence at https://huggingface.co/some/model"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a repository"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
    ],
)
def test_the_hub_answers_in_one_line(error: Any, message: str, monkeypatch: Any) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message) as caught:
        Pretrained("sd3", "some/model", revision="v9")
    assert "\n" not in str(caught.value)


def test_configuration_comes_first_and_weights_when_needed(
    name: str, model: Pretrained, monkeypatch: Any, tmp_path: Path
) -> None:
    """Settings are checked on JSON files alone; only safetensors of the pipeline's own parts are fetched."""
    asked: list[dict[str, Any]] = []

    def snapshot(repository: str, **kwargs: Any) -> str:
        asked.append(kwargs)
        return str(model.folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    remote = families.pretrained(name, "owner/model")  # type: ignore[arg-type]
    assert len(asked) == 1 and not any("safetensors" in pattern for pattern in asked[0]["allow_patterns"])
    remote.network()
    parts = [p for p in asked[-1]["allow_patterns"] if p.endswith(".safetensors")]
    assert f"{model.backbone_class.subfolder}/*.safetensors" in parts and "*.safetensors" not in parts
    assert "*.py" in asked[-1]["ignore_patterns"] and "*.bin" in asked[-1]["ignore_patterns"]
