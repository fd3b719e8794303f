"""Unusual, damaged and hostile model folders: loaded exactly, or one line before anything is built."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from swd.commands import sample
from swd.commands.train import build_task_and_data
from swd.modules import hub, model_folders, pipeline_folder
from swd.modules.model_folders import class_of, weight_files
from swd.modules.pretrained import Pretrained
from swd.types import UserError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: families.save(name, tmp_path_factory.mktemp(name) / name) for name in ("sd3", "flux", "sdxl", "wan")}


def edit(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def refused(family: str, folder: Path, **more: Any) -> str:
    """The one line that a folder ends in, before any weight is read, quickly."""
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        families.pretrained(family, folder, **more).meta_network  # noqa: B018 - building it is what fails
    message = str(caught.value)
    assert "\n" not in message and "trust_remote_code" not in message and len(message) < 600
    assert time.process_time() - begin < 5
    return message


# Variants


def to_variant(folder: Path, part: str, variant: str, dtype: torch.dtype | None = None) -> None:
    for file in (folder / part).glob("*.safetensors"):
        state = load_file(file)
        if dtype is not None:
            state = {key: value.to(dtype) for key, value in state.items()}
        save_file(state, file.with_name(f"{file.stem}.{variant}.safetensors"), {"format": "pt"})
        file.unlink()


WEIGHTED = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.parametrize("variant", ["fp16", "bf16", "pruned"])
def test_folders_with_a_variant_alone_load_the_same(variant: str, stored: dict[str, Path], tmp_path: Path) -> None:
    plain = families.pretrained("sd3", stored["sd3"])
    folder = shutil.copytree(stored["sd3"], tmp_path / "m")
    for part in WEIGHTED:
        to_variant(folder, part, variant)
    model = families.pretrained("sd3", folder)
    prompts = ["a red star"]
    assert torch.equal(model.encoders().encode_prompts(prompts).embeds, plain.encoders().encode_prompts(prompts).embeds)
    ours, theirs = model.network().network.state_dict(), plain.network().network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    requests = [sample.Request("a red star", 0)]
    drawn, expected = (sample.draw(sample.build_pipeline(m), m, requests)[0][0] for m in (model, plain))
    assert torch.equal(drawn, expected)


def test_half_precision_variants_are_cast_as_usual(stored: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stored["sd3"], tmp_path / "m")
    for part in WEIGHTED:
        to_variant(folder, part, "fp16", torch.float16)
    model = families.pretrained("sd3", folder)
    pipe = model.pipeline()
    for part in WEIGHTED:
        assert getattr(pipe, part).dtype == torch.float32, part
    assert pipe.vae.encoder.conv_in.weight.isfinite().all()


def test_plain_weights_come_before_a_variant_beside_them(stored: dict[str, Path], tmp_path: Path) -> None:
    """And one part's variant does not decide for the others."""
    folder = shutil.copytree(stored["sd3"], tmp_path / "m")
    to_variant(folder, "text_encoder", "fp16")
    for part in ("vae", "transformer", "text_encoder_3"):
        for file in (folder / part).glob("*.safetensors"):
            wrong = {key: torch.zeros_like(value) for key, value in load_file(file).items()}
            save_file(wrong, file.with_name(f"{file.stem}.fp16.safetensors"), {"format": "pt"})
    model, plain = families.pretrained("sd3", folder), families.pretrained("sd3", stored["sd3"])
    requests = [sample.Request("a red star", 0)]
    drawn, expected = (sample.draw(sample.build_pipeline(m), m, requests)[0][0] for m in (model, plain))
    assert torch.equal(drawn, expected)


def test_names_of_weight_files(tmp_path: Path) -> None:
    def found(*names: str) -> tuple[str | None, list[str]]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name in names:
            (folder / name).touch()
        variant, files = weight_files(folder)
        return variant, [file.name for file in files]

    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert found(*shards, "model.fp16.safetensors") == (None, shards)
    half = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    assert found(*half, "model.non_ema.safetensors") == ("fp16", half)
    old = ["diffusion_pytorch_model-00001-of-00001.bf16.safetensors"]
    assert found(*old) == ("bf16", old)
    assert found("a.txt") == (None, [])


def test_shards_of_a_variant_are_counted(stored: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stored["sd3"], tmp_path / "m")
    to_variant(folder, "transformer", "fp16")
    name = "diffusion_pytorch_model.fp16.safetensors"
    index = {"weight_map": {"a": name, "b": "diffusion_pytorch_model.fp16-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert "has no diffusion_pytorch_model.fp16-00002-of-00002" in refused("sd3", folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text('{"weight_map": [1]}')
    assert "damaged diffusion_pytorch_model.safetensors.index.fp16.json" in refused("sd3", folder)


def test_the_hub_is_asked_for_a_variant_only_where_plain_weights_are_missing(
    stored: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    remote = shutil.copytree(stored["sd3"], tmp_path / "remote")
    to_variant(remote, "text_encoder", "fp16")
    for file in list(remote.glob("*/*.safetensors")):
        if "fp16" not in file.name:
            shutil.copy(file, file.with_name(f"{file.stem}.fp16.safetensors"))
    cache = tmp_path / "cache"

    def snapshot(repository: str, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in remote.glob("**/*"):
            name = str(file.relative_to(remote))
            taken = any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns)
            if file.is_file() and taken:
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model = families.pretrained("sd3", "owner/model")  # type: ignore[arg-type]
    assert not list(cache.glob("*/*.safetensors"))
    model.network()
    assert sorted(str(file.relative_to(cache)) for file in cache.glob("*/*.fp16.safetensors")) == [
        "text_encoder/model.fp16.safetensors"
    ]
    assert len(list(cache.glob("*/*.safetensors"))) == len(WEIGHTED)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"vae": []}'[:-1]])
def test_a_damaged_index_on_the_hub_ends_in_one_line(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_bytes(content)
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(UserError, match=r"model_index\.json is damaged.*download it again"):
        hub.weights("owner/model")


def test_odd_entries_of_an_index_are_no_parts() -> None:
    index = {"_ignored": ["a", "b"], "x": [], "y": ["a"], "z": [None, None], "n": 1, "vae": ["diffusers", "VAE"]}
    assert model_folders.parts_of(index) == {"vae": ("diffusers", "VAE")}


def test_the_index_and_configurations_are_read_once(stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(file: Path) -> dict[str, Any]:
        read.append(file)
        return model_folders.read_json(file)

    monkeypatch.setattr(pipeline_folder, "read_json", counted)
    model = families.pretrained("sdxl", stored["sdxl"])
    model.fetch()
    assert model.limits and model.vae_config and model.parts and model.meta_network and model.network_class
    assert read.count(model.folder / "model_index.json") == 1
    assert len(read) == len(set(read))


@pytest.mark.parametrize("setting", [{"rank": 0}, {"max_text_tokens": 0}, {"dmd_guidance_scale": -1.0}])
def test_the_hub_is_not_asked_for_the_sake_of_a_wrong_setting(
    setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=f"model.{next(iter(setting))}="):
        families.pretrained("sd3", "owner/model", **setting)  # type: ignore[arg-type]


# Missing parts


def without(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.rmtree(folder / name)
    return edit(folder, "model_index.json", **{name: [None, None] for name in names})


def test_sd3_without_t5_has_zeros_for_its_text_everywhere(
    stored: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without(shutil.copytree(stored["sd3"], tmp_path / "m"), "text_encoder_3", "tokenizer_3")
    model, whole = families.pretrained("sd3", folder), families.pretrained("sd3", stored["sd3"])
    text, full = (m.encoders().encode_prompts(["a red star"]) for m in (model, whole))
    clip = full.embeds.shape[1] - whole.max_text_tokens
    assert text.embeds.shape == full.embeds.shape and torch.equal(text.pooled, full.pooled)
    assert torch.equal(text.embeds[:, :clip], full.embeds[:, :clip]) and not text.embeds[:, clip:].any()
    # The stock pipeline draws with the same text.
    pipe = sample.build_pipeline(model)
    stock = pipe.encode_prompt("a red star", None, None, max_sequence_length=model.max_text_tokens)[0]
    assert torch.equal(stock, text.embeds)
    drawn = sample.draw(pipe, model, [sample.Request("a red star", 0)])[0][0]
    assert drawn.isfinite().all() and drawn.std() > 0


@pytest.mark.parametrize("names", [["text_encoder_3", "tokenizer_3"], ["text_encoder_3"]])
def test_sd3_whose_index_does_not_mention_t5_loads(names: list[str], stored: dict[str, Path], tmp_path: Path) -> None:
    folder = without(shutil.copytree(stored["sd3"], tmp_path / "m"), *names)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k not in names}))
    model = families.pretrained("sd3", folder)
    assert not model.encoders().encode_prompts(["a red star"]).embeds[:, -model.max_text_tokens :].any()
    assert sample.draw(sample.build_pipeline(model), model, [sample.Request("a red star", 0)])[0][0].isfinite().all()


def test_sd3_without_t5_trains(tmp_path: Path, tiny_model: Path) -> None:
    from swd.commands.train import fit

    folder = without(shutil.copytree(tiny_model, tmp_path / "m"), "text_encoder_3", "tokenizer_3")
    task, trainer = fit(tiny.composed(tiny.overrides(folder, tmp_path / "run", trainer__max_steps=1)))
    assert trainer.global_step == 1
    assert task.last_metrics["loss"].isfinite() and task.last_metrics["x0_mse"].isfinite()  # type: ignore[operator,index]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("sd3", ["text_encoder_3"]),  # its tokenizer alone does no harm
        ("sd3", ["tokenizer_3"]),
        ("sd3", ["text_encoder_2", "tokenizer_2"]),
        ("sd3", ["text_encoder"]),
        ("sd3", ["vae"]),
        ("sd3", ["scheduler"]),
        ("sdxl", ["text_encoder_2", "tokenizer_2"]),
        ("sdxl", ["tokenizer_2"]),
        ("flux", ["text_encoder_2", "tokenizer_2"]),
        ("wan", ["tokenizer"]),
    ],
)
@pytest.mark.parametrize("how", ["null", "not there"])
def test_parts_that_a_family_needs(
    family: str, names: list[str], how: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    folder = without(shutil.copytree(stored[family], tmp_path / "m"), *names)
    if how == "not there":
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k not in names}))
    if names == ["text_encoder_3"]:
        if how == "null":
            families.pretrained(family, folder).encoders()
        return
    with pytest.raises(UserError) as caught:
        model = families.pretrained(family, folder)
        assert how == "not there"
        model.fetch()
    message = str(caught.value)
    if names == ["vae"] and how == "not there":  # its configuration is the first thing that is read
        assert "vae/config.json cannot be read" in message and message.count("download it again") == 1
        return
    assert f"names no {min(names)}" in message and f"model.family={family}" in message and "\n" not in message


# Code and classes


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (["my_pipeline", "MyVAE"], "my_pipeline, which is code of its own"),
        (["os", "path"], "code of its own"),
        (["diffusers.models", "AutoencoderKL"], "code of its own"),
        (["builtins", "dict"], "code of its own"),
        (["diffusers", "NoSuchAutoencoder"], "NoSuchAutoencoder"),
        (["diffusers", "utils"], "utils"),
        (["transformers", "__path__"], "__path__"),
        (["diffusers"], "damaged"),
        ([], "damaged"),
        (["diffusers", 3], "damaged"),
        ([None, "AutoencoderKL"], "damaged"),
        ([["diffusers"], ["AutoencoderKL"]], "damaged"),
    ],
)
@pytest.mark.parametrize("part", ["vae", "tokenizer_2", "transformer", "scheduler"])
def test_parts_with_code_or_of_unknown_classes(
    part: str, entry: Any, words: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    folder = edit(shutil.copytree(stored["sd3"], tmp_path / "m"), "model_index.json", **{part: entry})
    (folder / part / "my_pipeline.py").write_text("raise SystemExit('run')")
    message = refused("sd3", folder)
    assert words in message and part in message


def test_names_of_parts_stay_in_the_folder(stored: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(stored["sd3"], tmp_path / "m")
    edit(folder, "model_index.json", **{"../sd3/vae": ["diffusers", "AutoencoderKL"]})
    assert "damaged model_index.json" in refused("sd3", folder)


@pytest.mark.parametrize("file", ["text_encoder_3/config.json", "tokenizer_2/tokenizer_config.json", "vae/config.json"])
def test_auto_map_is_refused(file: str, stored: dict[str, Path], tmp_path: Path) -> None:
    folder = edit(shutil.copytree(stored["sd3"], tmp_path / "m"), file, auto_map={"AutoModel": "code.Evil"})
    assert file in refused("sd3", folder)


def test_only_classes_of_libraries_are_found() -> None:
    assert class_of("diffusers", "AutoencoderKL").__name__ == "AutoencoderKL"
    assert [class_of("diffusers", name) for name in ("utils", "nothing", "__file__")] == [None] * 3


# Numbers


NETWORK: dict[str, list[Any]] = {
    "sample_size": ["x", None, 0, -8, 10**9, 2.5, [8], {}, True],
    "patch_size": ["x", None, 0, -2, 10**12],
    "num_layers": [1_000_000, "x", None, 0, -1, 2.5, 10**400],
    "num_attention_heads": ["x", 10**9, 10**5, None, -2],
    "attention_head_dim": [10**9, "x", [8]],
    "in_channels": ["x", 10**9, 0, None],
    "joint_attention_dim": ["x", 10**9],
    "caption_projection_dim": [10**12, "x"],
    "pos_embed_max_size": [10**9, "x", 0],
    "dual_attention_layers": [3, list(range(10**4))],
    "qk_norm": ["no such norm"],
}


@pytest.mark.parametrize("key", list(NETWORK))
def test_a_network_s_configuration_with_wrong_numbers_is_one_line(
    key: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    for number, value in enumerate(NETWORK[key]):
        folder = shutil.copytree(stored["sd3"], tmp_path / str(number))
        edit(folder, "transformer/config.json", **{key: value})
        message = refused("sd3", folder, size=None)
        assert "config.json" in message or "model" in message


@pytest.mark.parametrize(
    ("family", "file", "values"),
    [
        ("sdxl", "unet/config.json", {"layers_per_block": 10**6}),
        ("sdxl", "unet/config.json", {"transformer_layers_per_block": [400, 400]}),
        ("sdxl", "unet/config.json", {"layers_per_block": 500, "transformer_layers_per_block": [100, 100]}),
        ("sdxl", "unet/config.json", {"block_out_channels": []}),
        ("sdxl", "unet/config.json", {"block_out_channels": ["x", 8]}),
        ("sdxl", "unet/config.json", {"down_block_types": ["NoSuchBlock", "DownBlock2D"]}),
        ("flux", "transformer/config.json", {"num_single_layers": 10**7}),
        ("flux", "transformer/config.json", {"num_layers": 500, "num_single_layers": 500}),
        ("flux", "transformer/config.json", {"axes_dims_rope": "x", "num_layers": "x"}),
        ("wan", "transformer/config.json", {"patch_size": [2, 2, 2]}),
        ("wan", "transformer/config.json", {"patch_size": 2}),
        ("wan", "transformer/config.json", {"rope_max_seq_len": 10**9}),
        ("sd3", "text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("sd3", "text_encoder_3/config.json", {"num_layers": 10**6}),
        ("sd3", "text_encoder_3/config.json", {"vocab_size": 10**12}),
        ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 500}),
        ("sd3", "scheduler/scheduler_config.json", {"shift": -1}),
        ("sd3", "scheduler/scheduler_config.json", {"shift": "x"}),
        ("sd3", "vae/config.json", {"layers_per_block": 10**6}),
        ("sd3", "vae/config.json", {"block_out_channels": "x" * 99}),
        ("sd3", "vae/config.json", {"block_out_channels": None}),
        ("sd3", "vae/config.json", {"block_out_channels": [8] * 3000}),
        ("sd3", "vae/config.json", {"latent_channels": "x"}),
        ("sd3", "vae/config.json", {"scaling_factor": None, "shift_factor": "x"}),
        ("sd3", "vae/config.json", {"scaling_factor": 0}),
        ("sd3", "vae/config.json", {"scaling_factor": float("nan")}),
        ("wan", "vae/config.json", {"latents_mean": ["x"]}),
    ],
)
def test_absurd_or_damaged_parts_are_refused_before_they_are_built(
    family: str, file: str, values: dict[str, Any], stored: dict[str, Path], tmp_path: Path
) -> None:
    folder = edit(shutil.copytree(stored[family], tmp_path / "m"), file, **values)
    assert file.split("/")[0] in refused(family, folder).lower()


def test_configurations_of_real_models_are_far_below_the_limits(tmp_path: Path) -> None:
    """Numbers of SD3.5 Medium and Large, FLUX, SDXL, Wan 14B, SANA 4.8B and their encoders."""
    real: list[dict[str, Any]] = [
        {"num_layers": 24, "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384},
        {"num_layers": 38, "num_attention_heads": 38, "joint_attention_dim": 4096},
        {"num_layers": 19, "num_single_layers": 38, "axes_dims_rope": [16, 56, 56]},
        {"layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10], "block_out_channels": [320, 640, 1280]},
        {"num_layers": 40, "ffn_dim": 13824, "rope_max_seq_len": 1024},
        {"num_layers": 60, "sample_size": 32, "encoder_layers_per_block": [2, 2, 2, 3, 3, 3]},
        {"num_layers": 24, "num_decoder_layers": 24, "vocab_size": 256384},
        {"num_hidden_layers": 32, "hidden_size": 1280, "rope_theta": 1_000_000},
    ]
    for config in real:
        model_folders.check_part(config, tmp_path)


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("text_encoder/config.json", {"hidden_size": 48}, "its weights have other shapes than its config.json says"),
        ("text_encoder/config.json", {"num_attention_heads": 0}, "ZeroDivisionError"),
        ("vae/config.json", {"norm_num_groups": 0}, "ZeroDivisionError"),
        ("text_encoder_3/config.json", {"relative_attention_num_buckets": -1}, "RuntimeError"),
    ],
)
def test_what_diffusers_cannot_load_is_one_line(
    file: str, values: dict[str, Any], reason: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    folder = edit(shutil.copytree(stored["sd3"], tmp_path / "m"), file, **values)
    model = families.pretrained("sd3", folder)
    with pytest.raises(UserError, match=rf"cannot be loaded as StableDiffusion3Pipeline \({reason}") as caught:
        model.encoders()
    assert "\n" not in str(caught.value)


# Our own arguments


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 100_000},
        {"rank": 257},
        {"rank": 0},
        {"teacher_steps": 0},
        {"teacher_steps": -3},
        {"teacher_steps": 10**9},
        {"guidance_scale": float("inf")},
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1.0},
        {"embedded_guidance": float("inf")},
        {"embedded_guidance": -2.0},
        {"alpha": float("inf")},
        {"alpha": 1e-300},
        {"revision": ""},
        {"init_adapter": ""},
        {"init_adapter": "  "},
        {"max_text_tokens": 10**9},
    ],
)
def test_senseless_arguments_are_refused(values: dict[str, Any], stored: dict[str, Path]) -> None:
    assert f"model.{next(iter(values))}" in refused("sd3", stored["sd3"], **values)


def test_absurd_ranks_and_heads_are_refused_on_the_command_line(tmp_path: Path, tiny_model: Path) -> None:
    for override in (
        "model.rank=100000",
        "loss.gan.layers=100000",
        "model.init_adapter=''",
        "model.drawing_guidance_scale=inf",
        "model.path=''",
    ):
        with pytest.raises(Exception) as caught:
            build_task_and_data(tiny.composed([*tiny.overrides(tiny_model, tmp_path), override]))
        cause: BaseException | None = caught.value
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        assert cause is not None and override.partition("=")[0] in str(cause), override


def test_a_rank_as_wide_as_the_network_is_taken(tiny_model: Path) -> None:
    assert Pretrained("sd3", str(tiny_model), rank=64, feature_blocks=(1,)).rank == 64
