"""Adapters of every layout, the hub's errors, export and its round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import random_state, scheduler
from huggingface_hub import errors
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from swd.commands import sample
from swd.export import student_folder, verification
from swd.modules import adapters, hub
from swd.modules.adapters import Adapter, check_model, load, locate, read_adapter, save_adapter
from swd.modules.pretrained import Pretrained
from swd.modules.saved_student import FullStudent, Student, load_student
from swd.types import UserError


@pytest.fixture(scope="module", params=families.FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained(name, families.save(name, tmp_path_factory.mktemp(name) / "pipeline"))


def test_export_round_trip(name: str, model: Pretrained, tmp_path: Path) -> None:
    state = random_state(model)
    made = student_folder.export(
        Adapter(state, tmp_path / "x", "base"), model, scheduler(name, model), tmp_path / "out"
    )
    again = load(made)
    assert again.state.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again.state[key], value)
    from_diffusers = load(made / adapters.DIFFUSERS_WEIGHTS)
    for key, value in state.items():
        assert torch.equal(from_diffusers.state[key], value)
    assert (made / student_folder.COMFY_WEIGHTS).exists() == (name in ("sdxl", "wan"))
    source = (made / student_folder.SCHEDULER_FILE).read_text()
    assert "import swd" not in source and "from swd" not in source
    snippet = (made / "README.md").read_text()
    assert model.backbone_class.pipeline_type in snippet and "ScaleWiseScheduler" in snippet


RUNNER = """
import json, sys
import numpy, torch
sys.modules["swd"] = None  # importing it fails from here on
torch.set_num_threads(1)
for folder, out in json.loads(sys.argv[1]):
    sys.path.insert(0, folder)
    names = {}
    exec(open(out + ".py").read(), names)
    drawn = numpy.asarray(names["frames"] if "frames" in names else names["image"], dtype="float32")
    numpy.save(out + ".npy", drawn if "frames" in names else drawn / 255)
    sys.path.remove(folder)
    del sys.modules["scale_wise_scheduler"]
"""


def trained_whole(name: str, model: Pretrained, folder: Path) -> FullStudent:
    """A student of another network than the base, as `model.tuning=full` leaves it."""
    network = model.network().network
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return FullStudent(adapters.save_student(folder, network, scheduler(name, model)))


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pictures of the code in the exported README, where this package cannot be imported, and of `swd sample`."""
    root, found, jobs = tmp_path_factory.mktemp("snippets"), {}, []
    for case in SNIPPETS:
        name = case.removesuffix("-full")
        base = families.pretrained(name, families.save(name, root / case / "base"))
        student: Student = Adapter(random_state(base), root / "x")
        if case.endswith("-full"):
            student = trained_whole(name, base, root / case / "student")
        folder = student_folder.export(student, base, scheduler(name, base), root / case / "made", verify=False)
        text = (folder / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        for old, new in {"FOLDER": folder, "BASE": base.folder, "cuda": "cpu", "bfloat16": "float32"}.items():
            code = code.replace(old, str(new))
        (root / f"{case}.py").write_text(code)
        jobs.append((str(folder), str(root / case)))
        pipe = sample.build_pipeline(base, student, scheduler(name, base))
        found[case] = text, root / f"{case}.npy", sample.draw(pipe, base, [sample.Request("a prompt", 0)])[0][0]
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", RUNNER, json.dumps(jobs)], check=True, timeout=300)
    return found


SNIPPETS = (*families.FAMILIES, "sd3-full", "sdxl-full")


@pytest.mark.parametrize("case", SNIPPETS)
def test_the_card_s_snippet_draws_the_same_without_this_package(case: str, snippets: dict[str, Any]) -> None:
    text, file, expected = snippets[case]
    drawn, ours = torch.from_numpy(np.load(file)), (expected + 1) / 2
    drawn = drawn.movedim(-1, 0)  # channels first, of videos too
    assert ours.std() > 0.02  # there is something to see
    assert_close(drawn, ours, rtol=0, atol=0.51 / 255 + 1e-3)
    assert "base_model" not in text and "/tmp" not in text and str(file.parent) not in text


def test_the_card_of_a_model_on_the_hub_and_of_an_embedded_one(tmp_path: Path, monkeypatch: Any) -> None:
    folder = families.save("sd3", tmp_path / "p")
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(folder))
    remote = families.pretrained("sd3", "owner/model", revision="v2")  # type: ignore[arg-type]
    adapter = Adapter(random_state(families.pretrained("sd3", folder)), tmp_path)
    text = student_folder.card(student_folder.AdapterContent(adapter, remote), remote, scheduler("sd3", remote))
    assert 'from_pretrained("owner/model", revision="v2", torch_dtype' in text and "base_model: owner/model\n" in text
    embedded = Pretrained("sd3", "swd://assets/shapes-sd3")
    text = student_folder.card(student_folder.AdapterContent(adapter, embedded), embedded, scheduler("sd3", embedded))
    assert 'from_pretrained("BASE", torch_dtype' in text and "`BASE` that of `assets/shapes-sd3` of swd" in text


def test_the_exporter_refuses_a_folder_that_differs(
    name: str, model: Pretrained, tmp_path: Path, monkeypatch: Any
) -> None:
    write = adapters.write_layouts

    def broken(folder: Path, state: dict[str, Tensor], base: str, part: str) -> None:
        write(folder, state, base, part)
        file = folder / adapters.DIFFUSERS_WEIGHTS
        save_file({k: v * (1.1 if ".lora_B." in k else 1) for k, v in load_file(file).items()}, file)

    monkeypatch.setattr(student_folder, "write_layouts", broken)
    with pytest.raises(UserError, match="loaded by diffusers differs"):
        student_folder.export(Adapter(random_state(model), tmp_path), model, scheduler(name, model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-9])
def test_a_loader_that_loads_nothing_is_refused_however_small_the_adapter(
    scale: float, tmp_path: Path, monkeypatch: Any
) -> None:
    """peft's keys in diffusers' file: `load_lora_weights` says nothing, and the pipeline is the teacher."""
    base = families.pretrained("sd3", families.save("sd3", tmp_path / "p"))
    small = {k: v * (scale if ".lora_B." in k else 1) for k, v in random_state(base).items()}
    student_folder.export(Adapter(small, tmp_path), base, scheduler("sd3", base), tmp_path / "right")
    write = adapters.write_layouts

    def broken(folder: Path, state: dict[str, Tensor], *more: Any) -> None:
        write(folder, state, *more)
        save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / adapters.DIFFUSERS_WEIGHTS)

    monkeypatch.setattr(student_folder, "write_layouts", broken)
    with pytest.raises(UserError, match="loaded by diffusers differs"):
        student_folder.export(Adapter(small, tmp_path), base, scheduler("sd3", base), tmp_path / "wrong")


def test_an_adapter_without_effect_is_exported_and_told(name: str, model: Pretrained, tmp_path: Path) -> None:
    state = {k: v * (0 if ".lora_B." in k else 1) for k, v in random_state(model).items()}
    with pytest.warns(UserWarning, match="update is zero: the student is the teacher"):
        student_folder.export(Adapter(state, tmp_path), model, scheduler(name, model), tmp_path / "out")


@pytest.mark.parametrize("family", ["sdxl", "wan"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("alpha", "loaded by ComfyUI differs"),
        ("up and down", "as .* times .*, which is no"),
        ("missing", "ComfyUI finds no"),
        ("left over", "ComfyUI does not know"),
        ("mixed up", "loaded by ComfyUI differs"),
    ],
)
def test_a_wrong_file_for_comfyui_is_refused(
    family: str, fault: str, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    base = families.pretrained(family, families.save(family, tmp_path / "p"))
    right = student_folder.comfy_state

    def wrong(backbone: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = right(backbone, state)
        ups = [k for k in tensors if k.endswith(("lora_up.weight", "lora_B.weight"))]
        down = ups[0].replace("lora_up", "lora_down").replace("lora_B", "lora_A")
        if fault == "alpha":
            tensors[ups[0].rpartition(".lora_")[0] + ".alpha"] = torch.tensor(8.0)
        elif fault == "up and down":
            tensors[ups[0]], tensors[down] = tensors[down], tensors[ups[0]]
        elif fault == "missing":
            del tensors[ups[0]]
        elif fault == "left over":
            tensors["lora_te_x.alpha"] = torch.ones(())
        else:
            same = [k for k in ups if tensors[k].shape == tensors[ups[0]].shape]
            tensors[same[0]], tensors[same[1]] = tensors[same[1]].clone(), tensors[same[0]].clone()
        return {k: v.contiguous() for k, v in tensors.items()}

    monkeypatch.setattr(student_folder, "comfy_state", wrong)
    with pytest.raises(UserError, match=message):
        student_folder.export(Adapter(random_state(base), tmp_path), base, scheduler(family, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mixed_ranks_and_alphas_mean_what_peft_makes_of_them(name: str, model: Pretrained, tmp_path: Path) -> None:
    """Sampled, exported, and as peft itself loads the folder: three times the same network."""
    state, folder = random_state(model), tmp_path / "peft"
    modules = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    ranks = {modules[0]: 2, modules[3]: 6}
    generator = torch.Generator().manual_seed(2)
    for module, rank in ranks.items():
        for kind, axis in (("A", 0), ("B", 1)):
            shape = list(state[f"{module}.lora_{kind}.weight"].shape)
            shape[axis] = rank
            state[f"{module}.lora_{kind}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    folder.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in state.items()}, folder / adapters.PEFT_WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 7, "target_modules": modules, "rank_pattern": ranks}
    config["alpha_pattern"] = {modules[0]: 5, modules[1]: 1}
    (folder / adapters.PEFT_CONFIG).write_text(json.dumps(config))
    size = families.SIZES[name][0]
    size = (size, size) if isinstance(size, int) else size

    with torch.no_grad():
        expected = verification.predict(PeftModel.from_pretrained(model.network().network, folder).eval(), model, size)
        adapter = load(folder)
        check_model(adapter, model)
        made = student_folder.export(adapter, model, scheduler(name, model), tmp_path / "out")
        for source in (folder, made, made / adapters.DIFFUSERS_WEIGHTS):
            pipe = sample.build_pipeline(model, load(source), scheduler(name, model))
            network = getattr(pipe, model.backbone_class.subfolder).eval()
            assert_close(verification.predict(network, model, size), expected, rtol=1e-4, atol=1e-4)
        folded = sample.build_pipeline(model, load(folder), scheduler(name, model), fold=True)
        network = getattr(folded, model.backbone_class.subfolder).eval()
        assert not [key for key, _ in network.named_parameters() if "lora" in key]
        assert_close(verification.predict(network, model, size), expected, rtol=1e-4, atol=1e-4)
    assert adapter.ranks == {2, 4, 6} and "A LoRA of rank 2 to 6 that" in (made / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folding_is_the_sum_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(2, 2)).to(dtype)
    before = [layer.weight.detach().double() for layer in network]  # type: ignore[operator, union-attr]
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    conv_down, conv_up = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    state = {"0.lora_A.weight": down, "0.lora_B.weight": up, "1.lora_A.weight": conv_down, "1.lora_B.weight": conv_up}
    Adapter(state, tmp_path).fold_into(network)
    expected = [
        before[0] + up.double() @ down.double(),
        before[1] + torch.einsum("or,rikl->oikl", conv_up[..., 0, 0].double(), conv_down.double()),
        before[2],
    ]
    for layer, value in zip(network, expected, strict=True):
        assert layer.weight.dtype == dtype
        assert_close(layer.weight.double(), value, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_student_that_was_trained_whole_is_exported_and_checked(name: str, model: Pretrained, tmp_path: Path) -> None:
    student = trained_whole(name, model, tmp_path / "run" / "student")
    assert locate(str(tmp_path / "run"), tmp_path) == student.folder
    made = locate(str(student_folder.export(student, model, scheduler(name, model), tmp_path / "out")), tmp_path)
    again = load_student(made)
    again.check_model(model)
    assert isinstance(again, FullStudent) and again.hash == student.hash
    before, after = student.network(model).state_dict(), again.network(model).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert "_name_or_path" not in json.loads((made / "config.json").read_text())
    assert (
        student_folder.read_schedule(made / adapters.SCHEDULER_CONFIG).base_sizes == scheduler(name, model).base_sizes
    )
    stranger = "flux" if name != "flux" else "wan"
    other = families.pretrained(stranger, families.save(stranger, tmp_path / "other"))
    with pytest.raises(UserError, match=r"does not fit model other: it is a \w+, that takes a"):
        student.check_model(other)


def test_a_whole_student_that_comes_back_otherwise_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    base = families.pretrained("sd3", families.save("sd3", tmp_path / "p"))
    student = trained_whole("sd3", base, tmp_path / "student")
    right = student_folder.NetworkContent.write

    def wrong(self: Any, folder: Path) -> None:
        right(self, folder)
        state = load_file(next(folder.glob("*.safetensors")))
        key = "transformer_blocks.0.attn.to_q.weight"
        save_file(state | {key: state[key] + 1e-3}, next(folder.glob("*.safetensors")))

    monkeypatch.setattr(student_folder.NetworkContent, "write", wrong)
    with pytest.raises(UserError, match="loaded by diffusers differs"):
        student_folder.export(student, base, scheduler("sd3", base), tmp_path / "out")
    file = student.weights[0]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"student .* has a damaged diffusion_pytorch_model"):
        load_student(student.folder)
    with pytest.raises(UserError, match="trained whole, no adapter"):
        load(student.folder)


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
        check_model(adapter, model)
        for key, value in state.items():
            expected = value * (alpha / 4 if ".lora_B." in key else 1)
            assert_close(adapter.state[key], expected, rtol=0, atol=0)


@pytest.mark.parametrize("agrees", [True, False])
def test_an_alpha_in_the_weights_of_a_peft_folder_must_agree(
    agrees: bool, name: str, model: Pretrained, tmp_path: Path
) -> None:
    state = random_state(model)
    module = min(state).removesuffix(".lora_A.weight")
    weights = {f"base_model.model.{k}": v for k, v in state.items()}
    save_file(weights | {f"{module}.alpha": torch.tensor(12.0 if agrees else 6.0)}, tmp_path / adapters.PEFT_WEIGHTS)
    (tmp_path / adapters.PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 12}))
    if agrees:
        up = f"{module}.lora_B.weight"
        assert_close(load(tmp_path).state[up], state[up] * 3)
        return
    with pytest.raises(UserError, match=rf"has {module}.alpha=6, but by adapter_config.json .* multiplied by 3"):
        load(tmp_path)


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
    other = "sdxl" if name in ("flux", "chroma") else "flux"  # Chroma's layers have the names and shapes of FLUX.1's
    stranger = families.pretrained(other, families.save(other, tmp_path / "other"))
    part = stranger.backbone_class.subfolder
    folder = save_adapter(tmp_path / "a", random_state(stranger), 4, 4, scheduler(other, stranger), "that-base", part)
    with pytest.raises(UserError, match=r"made for that-base\) does not fit model pipeline"):
        check_model(load(folder), model)
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
