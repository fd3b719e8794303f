"""Files from somebody else are data: nothing they name is built, imported or resolved. Credentials stay here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image

from swd import config
from swd.callbacks.checkpoint import config_difference
from swd.commands import cli, export, sample, train
from swd.data.job import Job
from swd.export import student_folder
from swd.io.masking import is_secret, mask, mask_text
from swd.modules.adapters import save_adapter
from swd.modules.backbones import load_family
from swd.modules.pretrained import Pretrained
from swd.types import UserError


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWD_COMMAND", raising=False)
    GlobalHydra.instance().clear()
    yield
    HydraConfig.instance().cfg = None


class Mine:
    """A class of the user's own."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight


# Classes that may be built

HOSTILE = [
    "webdataset.gopen",
    "torch.load",
    "torch.hub.load",
    "numpy.load",
    "pathlib.Path.unlink",
    "os.system",
    "subprocess.Popen",
    "builtins.dict",
    "builtins.eval",
    "setuptools._distutils.spawn.spawn",
    "transformers.AutoModel.from_pretrained",
    "swd.io.files.write_text",
    "swd.io.files.write_aside",
    "swd.config.build_node",
    "swd.config.importlib.import_module",
    "swd.modules.pretrained.importlib.import_module",
    "swd.modules.pretrained.Pretrained.fetch",
    "swd.callbacks.checkpoint.torch.load",
    "lightning.pytorch.callbacks.LambdaCallback",
    "lightning.Trainer.fit",
    "lightning.pytorch.cli.LightningCLI",
    "hydra.utils.instantiate",
    "functools.partial",
    "Trainer",
    ".Trainer",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "place",
    [
        lambda node: node,
        lambda node: {"_target_": "swd.losses.MMD", "blocks": [node]},
        lambda node: {"a": [{"b": node}]},
        lambda node: {"_target_": "swd.losses.MMD", "blocks": node},
        lambda node: {"_target_": "lightning.Trainer", "profiler": node | {"_partial_": True}},
    ],
    ids=["top", "list", "deep", "argument", "partial"],
)
def test_only_listed_classes_are_built(name: str, place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"_target_=.* is not among the classes that a configuration may build"):
        config.build_node(place({"_target_": name, "url": "pipe:touch OWNED"}), "data")
    assert not {module for module in set(sys.modules) - before if name.startswith(module)}
    assert not Path("OWNED").exists()


@pytest.mark.parametrize(
    "name", ["lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.callbacks.early_stopping.EarlyStopping"]
)
def test_lightning_s_callbacks_go_on_working(name: str) -> None:
    assert config.build_node({"_target_": name, "monitor": "loss/loss"}, "callbacks.stop").monitor == "loss/loss"
    for other in ("LearningRateMonitor", "DeviceStatsMonitor"):
        assert config.build_node({"_target_": f"lightning.pytorch.callbacks.{other}"}, "callbacks.more") is not None
    profiler = config.build_node({"_target_": "lightning.pytorch.profilers.SimpleProfiler"}, "trainer.profiler")
    assert type(profiler).__name__ == "SimpleProfiler"


def test_a_class_is_listed_under_its_package_and_its_own_module_alone() -> None:
    assert config.target_of("swd.losses.MMD", "x") is config.target_of("swd.losses.mmd.MMD", "x")
    for name in ("swd.losses.update.MMD", "swd.losses.dmd.MMD", "swd.callbacks.fixed_losses.MMD"):
        with pytest.raises(UserError):
            config.target_of(name, "x")


def test_what_is_checked_is_what_is_built() -> None:
    """No text becomes a reference on the way, and lists stay lists."""
    node = {"_target_": "swd.callbacks.Samples", "prompts": ["costs ${oc.env:HOME}", "b"]}
    built = config.build_node(node, "callbacks.samples")
    assert built.prompts == ["costs ${oc.env:HOME}", "b"]


def launched(command: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.launch(command)
    return caught.value.code


def test_the_command_line_allows_more(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    seen: list[Any] = []

    def fit(cfg: Any, *more: Any) -> None:
        seen.append(config.build(cfg, "callbacks")["mine"])

    monkeypatch.setattr(train, "fit", fit)
    arguments = [
        *tiny.overrides(tiny_model, Path("run")),
        f"+callbacks.mine._target_={__name__}.Mine",
        "+callbacks.mine.weight=3",
    ]
    assert launched("train", *arguments, monkeypatch=monkeypatch) == 2
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"allow=[{__name__}.Mine]"])
    cli.launch("train")
    assert isinstance(seen[0], Mine) and seen[0].weight == 3


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("# @package _global_\nallow: [os.system]\n", ["experiment=x"]),
        ("# @package _global_\nhydra:\n  sweeper:\n    params:\n      allow: '[os.system]'\n", ["-m", "experiment=x"]),
    ],
)
def test_a_file_allows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tiny_model: Path, text: str, options: list[str]
) -> None:
    file = Path("conf/experiment/x.yaml")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    flags = [option for option in options if option.startswith("-")]
    rest = [option for option in options if not option.startswith("-")]
    arguments = [*flags, f"--config-dir={Path('conf').absolute()}", *tiny.overrides(tiny_model, Path("run")), *rest]
    assert launched("train", *arguments, monkeypatch=monkeypatch) == 2
    assert "only the command line may" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["[nope.x]", "[os.nope]", "5", "null", "['']", "[1]", "nope", "[builtins.True]"])
def test_what_cannot_be_allowed_is_told(given: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert launched("train", "folder=run", f"allow={given}", monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.startswith("error: allow=")


@pytest.mark.parametrize("name", ["this", "antigravity", "email.mime.text", "os.path", "nope.nope", ""])
def test_a_family_is_never_imported_by_name(name: str) -> None:
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"model\.family="):
        load_family(name)
    assert set(sys.modules) == before


# A run of somebody else


@pytest.fixture(scope="module")
def model_node(tiny_model: Path) -> dict[str, Any]:
    arguments = tiny.overrides(tiny_model, Path("x"), model__max_text_tokens=12)
    node: dict[str, Any] = config.to_plain(tiny.composed(arguments).model)
    return node


@pytest.fixture
def received(tiny_model: Path, tmp_path: Path, model_node: dict[str, Any]) -> Path:
    model = config.build_node(model_node, "model")
    state = model.networks(["student"]).adapter_state("student")
    save_adapter(tmp_path / "run" / "adapter", state, 4, 4, tiny.build_schedule().scheduler(2), "tiny", "transformer")
    return tmp_path / "run"


def prepared(run: Path, *more: str) -> sample.SamplingPlan:
    return sample.prepare(tiny.composed([f"adapter={run}", "folder=out", *more], "sample"))


BAD_NODES: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"_target_": "webdataset.gopen", "url": "pipe:touch OWNED", "mode": "rb"}, "_target_=webdataset.gopen"),
    "another class of ours": ({"_target_": "swd.losses.MMD"}, "_target_=swd.losses.MMD"),
    "nested": ({"size": {"_target_": "os.system", "command": "touch OWNED"}}, r"model\.size\._target_"),
    "in a list": ({"targets": [{"_target_": "os.mkdir", "path": "OWNED"}]}, r"model\.targets\[0\]\._target_"),
    "args": ({"_args_": ["x"]}, r"model\._args_"),
    "partial": ({"_partial_": True}, r"model\._partial_"),
    "environment": ({"revision": "${oc.env:HOME}"}, r"model\.revision="),
    "environment in a path": ({"path": "someone/x${oc.env:HOME}"}, r"model\.path="),
    "own reference": ({"rank": "${seed}"}, r"model\.rank="),
    "family": ({"family": "antigravity"}, r"model\.family=antigravity is not known"),
    "dotted family": ({"family": "email.mime.audio"}, r"model\.family=email\.mime\.audio is not known"),
    "unknown argument": ({"trust_remote_code": True}, "trust_remote_code"),
    "wrong type": ({"rank": "many"}, r"model\.rank='many'"),
    "not finite": ({"guidance_scale": float("inf")}, r"model\.guidance_scale=inf"),
}


@pytest.mark.parametrize("case", list(BAD_NODES))
def test_a_received_run_is_plain_data(received: Path, model_node: dict[str, Any], case: str) -> None:
    change, message = BAD_NODES[case]
    node = change if "url" in change else model_node | change
    allow = ["webdataset.gopen", "os.system", "os.mkdir", "swd.losses.MMD"]
    (received / "config.yaml").write_text(config.to_yaml({"allow": allow, "model": node}))
    before = set(sys.modules)
    with pytest.raises(UserError, match=message) as caught:
        prepared(received)
    assert "\n" not in str(caught.value) and not Path("OWNED").exists()
    assert not {"antigravity", "email.mime.audio"} & (set(sys.modules) - before)
    with pytest.raises(UserError, match=message):
        export.run(tiny.composed([f"run={received}", "to=out"], "export"))
    assert not Path("out").exists()


def test_adapter_latest_is_read_the_same_way(received: Path, model_node: dict[str, Any]) -> None:
    node = {"_target_": "pathlib.Path.touch", "self": "OWNED"}
    (received / "config.yaml").write_text(config.to_yaml({"model": node}))
    with pytest.raises(UserError, match=r"_target_=pathlib\.Path\.touch"):
        sample.prepare(tiny.composed(["adapter=latest", f"output={received.parent}", "folder=out"], "sample"))


def test_a_run_of_an_earlier_version_loads(received: Path, tiny_model: Path) -> None:
    """Written by OmegaConf, with everything resolved."""
    cfg = tiny.composed(tiny.overrides(tiny_model, Path("x"), model__max_text_tokens=12))
    (received / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    assert prepared(received).model.folder == tiny_model
    assert config_difference(received / "checkpoints" / "a.ckpt", cfg) is None


def test_the_command_line_replaces_what_a_run_refers_to(
    received: Path, model_node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (received / "config.yaml").write_text(config.to_yaml({"model": model_node | {"path": "${oc.env:MODELS}/x"}}))
    with pytest.raises(UserError, match=r"give \+\+model\.path=VALUE"):
        prepared(received)
    monkeypatch.setattr(student_folder, "overrides", lambda: [f"model.path={model_node['path']}"])
    assert prepared(received, f"model.path={model_node['path']}").model.folder == Path(model_node["path"])


BAD_FILES: dict[str, str | bytes] = {
    "not UTF-8": b"model: \xff\xfe",
    "a list": "- model\n",
    "text": "model\n",
    "nothing": "",
    "a tab": "model:\n\tpath: x\n",
    "a tag": "model: !!python/object/apply:os.mkdir [OWNED]\n",
    "an unknown tag": "model: !mine x\n",
    "a set": "model: !!set {a}\n",
    "bytes": "model: !!binary aGk=\n",
    "twice": "model: 1\nmodel: 2\n",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n",
    "an anchor": "model: &m {path: x}\n",
    "two documents": "model: 1\n---\nmodel: 2\n",
    "deep": "model: " + "[" * 5000,
    "a number as key": "1: x\n",
    "a list as key": "? [a]\n: x\n",
    "unclosed": "model: {path: x\n",
    "too long a number": f"model: {'1' * 5000}\n",
    "too large": "model: x\n" + "#" * 2**20 + "\n",
    "a null byte": "model: a\0b\n",
}


@pytest.mark.parametrize("case", list(BAD_FILES))
def test_a_damaged_recorded_configuration_is_one_line(received: Path, case: str) -> None:
    content = BAD_FILES[case]
    file = received / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        config.read_recorded(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        prepared(received)
    assert not Path("OWNED").exists()


def test_what_is_written_is_read_back() -> None:
    values = {
        "a": "1e-05",
        "b": 1e-05,
        "c": "2026-11-25",
        "d": [1, [2.5, None, True]],
        "e": "yes",
        "f": "",
        "g": "é: x",
    }
    Path("c.yaml").write_text(config.to_yaml(values))
    assert config.read_recorded(Path("c.yaml")) == values
    assert OmegaConf.to_container(OmegaConf.load("c.yaml")) == values


# Credentials


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *[
            (name, True)
            for name in ("api_key", "apikey", "hfToken", "HF_TOKEN", "logger.settings.api_key", "db_passwd")
        ],
        *[(name, True) for name in ("client-secret", "password", "AWS_SECRET_ACCESS_KEY", "auth", "api_keys", "pwd")],
        *[(name, False) for name in ("tokenizer", "tokenizer_2", "max_text_tokens", "keys", "keep", "keyword")],
        *[(name, False) for name in ("author", "tokens", "seed", "weight", "path", "monkey", "compass", "opinion")],
    ],
)
def test_which_keys_are_credentials(name: str, secret: bool) -> None:
    assert is_secret(name) is secret


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+logger.settings.api_key=abc123 seed=1", "+logger.settings.api_key=*** seed=1"),
        ("logger.settings={api_key: abc, mode: x}", "logger.settings={api_key: ***, mode: x}"),
        ("data.path=https://user:pw@host/x.tar cannot", "data.path=https://***@host/x.tar cannot"),
        ("s3://id:se/cret@bucket/x", "s3://***@bucket/x"),
        ("https://ghp_abc@github.com/x", "https://***@github.com/x"),
        ("https://h/x?X-Amz-Signature=abc&part=1", "https://h/x?X-Amz-Signature=***&part=1"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("headers={Authorization: 'Bearer abc'}", "headers={Authorization: ***}"),
        ("unknown key task.lrr; did you mean 'lr'?", "unknown key task.lrr; did you mean 'lr'?"),
        ("model.max_text_tokens=77 api_key=null", "model.max_text_tokens=77 api_key=null"),
        ("is damaged (KeyError: 'sigmas'); copy it again", "is damaged (KeyError: 'sigmas'); copy it again"),
        ("has trainable_token_indices=[1], which", "has trainable_token_indices=[1], which"),
    ],
)
def test_credentials_in_texts_are_masked(text: str, shown: str) -> None:
    assert mask_text(text) == shown


def test_credentials_in_values_are_masked() -> None:
    assert mask({"a": [{"token": "x"}], "eos_token_id": 3, "password": 5, "key": None, "u": "ftp://a:b@c"}) == {
        "a": [{"token": "***"}],
        "eos_token_id": 3,
        "password": "***",
        "key": None,
        "u": "ftp://***@c",
    }


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PLACE", "a-place-of-mine")
    monkeypatch.setenv("SOME_TOKEN", "hf_0123456789abcdef")
    monkeypatch.setattr(sys, "argv", ["train.py", "+logger.settings.api_key=abc123", "data=https://u:pass@h/x"])


def test_a_run_holds_no_value_of_the_environment(environment: None, tiny_model: Path, tmp_path: Path) -> None:
    own = ["++model.revision=v-${oc.env:MY_PLACE}", "name=run-${oc.env:MY_PLACE}", "output=o", "folder=o/${name}/1"]
    own += ["logger=wandb", "logger.offline=true", "+logger.settings.api_key=abc123"]
    arguments = [*tiny.overrides(tiny_model, Path("x")), *own]
    cfg = tiny.composed(arguments)
    cfg.folder = "o/run-a-place-of-mine/1"  # as Hydra resolves it before a run begins
    train.record(cfg, tmp_path, None)
    written = "".join(file.read_text() for file in (tmp_path / "run.json", tmp_path / "config.yaml"))
    assert not [secret for secret in ("a-place-of-mine", "hf_0123", "abc123", "pass") if secret in written]
    stored = config.read_recorded(tmp_path / "config.yaml")
    assert stored["model"]["revision"] == "v-${oc.env:MY_PLACE}"
    assert stored["folder"] == "o/run-${oc.env:MY_PLACE}/1" and stored["logger"]["settings"]["api_key"] == "***"
    # Resuming compares what is written down.
    assert config_difference(tmp_path / "checkpoints" / "a.ckpt", cfg) is None
    other = tiny.composed([*arguments, "model.revision=v-another"])
    assert "model.revision was" in str(config_difference(tmp_path / "checkpoints" / "a.ckpt", other))


def test_a_picture_holds_no_value_of_the_environment(
    environment: None, received: Path, model_node: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(received, "a-place-of-mine/run")
    (Path("a-place-of-mine") / "run" / "config.yaml").write_text(config.to_yaml({"model": model_node}))
    monkeypatch.setattr(student_folder, "overrides", lambda: ["++model.revision=x"])
    arguments = ["adapter=${oc.env:MY_PLACE}/run", "++model.revision=r-${oc.env:MY_PLACE}", "prompts=[a key is here]"]
    arguments += ["folder=out", "schedule.sizes=[4,6,8]", "schedule.sigmas=[1.0,0.8,0.6]"]
    cfg = tiny.composed(arguments, "sample")
    sample.run(cfg)
    info = Image.open(next(Path("out").glob("*.png"))).info
    assert "a-place-of-mine" not in json.dumps(info)
    assert info["adapter"] == "${oc.env:MY_PLACE}/run" and "r-${oc.env:MY_PLACE}" in info["model"]
    assert info["prompt"] == "a key is here"


@pytest.mark.parametrize("key", ["name", "model.path", "++model.revision", "output"])
def test_a_credential_of_the_environment_in_an_ordinary_value_is_refused(key: str, environment: None) -> None:
    cfg = tiny.composed(["folder=x", *(["name=y"] if key != "name" else []), f"{key}=x-${{oc.env:SOME_TOKEN}}"])
    with pytest.raises(UserError, match="holds the value of the environment variable SOME_TOKEN") as caught:
        train.build_task_and_data(cfg)
    assert "hf_0123" not in str(caught.value)


def test_manifests_of_jobs_hold_no_credentials(tmp_path: Path) -> None:
    settings = {"source": "https://user:word@host/a.tar?sig=abc", "options": {"token": "abc"}}
    job = Job(tmp_path / "out", "pictures", 1, 1, settings)
    job.claim()
    job.claim()  # the same job goes on
    manifest = job.run(lambda rows, done: iter([("0", {"txt": b"a"}, {})]))
    assert manifest is not None
    for file in ("job.json", "manifest.json"):
        text = (tmp_path / "out" / file).read_text()
        assert "word" not in text and "abc" not in text and "https://***@host" in text


def test_messages_hold_no_credentials(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for argument in ("+loger.api_key=abc123", "logger.name=https://u:abc123@h/[", "+data.token=abc123"):
        assert launched("train", "folder=run", argument, monkeypatch=monkeypatch) == 2
        assert "abc123" not in capsys.readouterr().err


def test_pretrained_is_what_recorded_nodes_build() -> None:
    assert config.target_of(config.PRETRAINED, "model") is Pretrained


@pytest.mark.parametrize("family", ["swd.modules.backbones.base", "swd.modules.pretrained"])
def test_a_family_is_a_backbone_that_can_be_built(family: str) -> None:
    with pytest.raises(UserError, match="defines 0 backbones"):
        load_family(family)
