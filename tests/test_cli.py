"""Wrong input ends with status 2 and one line on standard error, before any model is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from tiny import overrides

from swd import cli
from swd.modules.pretrained import Pretrained

ROOT = Path(__file__).parents[1]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing may load weights here, and Hydra starts afresh."""

    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("networks", "encoders", "pipeline"):
        monkeypatch.setattr(Pretrained, name, loaded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SWD_COMMAND", raising=False)
    GlobalHydra.instance().clear()
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused; gives the message."""

    def run(*arguments: str, command: str = "train") -> str:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [f"{command}.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.launch(command)
        output = capfd.readouterr()
        assert caught.value.code == 2, output.err
        assert output.err.startswith("error: ") and output.err.count("\n") == 1, output.err
        assert output.out == ""
        return output.err

    return run


WRONG: dict[str, tuple[list[str], list[str]]] = {
    # unknown keys and options
    "key": (["nokey=1"], ["unknown key nokey"]),
    "key of a group": (["task.lrr=1"], ["unknown key task.lrr"]),
    "added key of a group": (["+task.lrr=1"], ["unknown key task.lrr", "did you mean 'lr'"]),
    "added key": (["+newkey=1"], ["unknown key newkey"]),
    "group": (["los=swd"], ["unknown key los"]),
    "option": (["loss=nope"], ["there is no loss/nope", "dmd_mmd, gan, mmd"]),
    "experiment": (["experiment=nope"], ["there is no experiment/nope"]),
    "flag": (["--nope"], ["--nope", "--help"]),
    "flag behind keys": (["seed=1", "-m", "seed=2"], ["come before key=value"]),
    "no value": (["seed"], ["seed"]),
    "syntax": (["schedule.sizes=[6,8"], ["[6,8"]),
    # types
    "text for a number": (["task.lr=fast"], ["task.lr='fast'", "a number"]),
    "fraction for an integer": (["seed=1.5"], ["seed=1.5", "an integer"]),
    "truth for an integer": (["seed=true"], ["seed=True", "an integer"]),
    "choice": (["loss.mmd.kernel=cubic"], ["loss.mmd.kernel='cubic'", "linear | rbf"]),
    "short list": (["task.betas=[0.9]"], ["task.betas=[0.9]", "2 values"]),
    "trainer": (["trainer.max_steps=many"], ["trainer.max_steps='many'", "an integer"]),
    "reference": (["seed=${nope}"], ["nope"]),
    # schedule
    "sigmas rise": (["schedule.sigmas=[1.0,0.5,0.7]"], ["strictly decreasing", "0.7 follows 0.5"]),
    "sigmas repeat": (["schedule.sigmas=[1.0,0.5,0.5]"], ["strictly decreasing"]),
    "sigma above 1": (["schedule.sigmas=[1.5,0.5,0.3]"], ["1.5", "(0, 1]"]),
    "sigma of 0": (["schedule.sigmas=[1.0,0.5,0]"], ["0.0", "(0, 1]"]),
    "lengths": (["schedule.sigmas=[1.0,0.5]"], ["2 sigmas but 3 sizes"]),
    "one guidance": (["model.guidance_scale=3.0"], ["two keys now", "dmd_guidance_scale", "drawing_guidance_scale"]),
    "guidance below 1": (["model.drawing_guidance_scale=0.5"], ["drawing_guidance_scale=0.5", "use 1 for none"]),
    "nothing": (["schedule.sigmas=[]", "schedule.sizes=[]"], ["schedule.sigmas is empty"]),
    "sizes shrink": (["schedule.sizes=[6,4,8]"], ["must not shrink", "(4, 4) follows (6, 6)"]),
    "size not divisible": (["schedule.sizes=[4,7,8]"], ["7 is not divisible by 2", "use 6 or 8"]),
    "size beyond the limit": (["schedule.sizes=[4,6,14]"], ["14", "positional limit 12"]),
    "size of 0": (["schedule.sizes=[0,4,8]"], ["(0, 0)"]),
    "video size": (["schedule.sizes=[[1,4,4],[1,6,6],[1,8,8]]"], ["3 axes", "(H, W)"]),
    # losses
    "block": (["loss.mmd.blocks=[77]"], ["loss.mmd.blocks", "block 77", "0 to 2"]),
    "block below 0": (["loss.gan.blocks=[-1]"], ["loss.gan.blocks", "block -1"]),
    "block of the model": (["model.feature_blocks=[3]"], ["block 3", "0 to 2"]),
    "no block": (["loss.mmd.blocks=[]"], ["loss.mmd.blocks is empty"]),
    "indices beyond the table": (["loss.dmd.indices=[0,99]"], ["loss.dmd.indices=[0, 99]", "<= 27"]),
    "indices reversed": (["loss.mmd.indices=[9,3]"], ["loss.mmd.indices=[9, 3]"]),
    "no terms": (["~loss.dmd", "~loss.mmd", "~loss.gan"], ["loss is empty", "loss=mmd"]),
    "no loss": (["~loss"], ["loss"]),
    "loss=none": (["loss=none"], ["there is no loss/none"]),
    "nobody trains the fake": (["loss=mmd", "loss.mmd.features=fake"], ["loss.mmd.features=fake", "add dmd or gan"]),
    # model
    "missing model": (["model.path=nowhere"], ["model.path=nowhere does not exist"]),
    "no model": (["model.path=."], ["has no model_index.json"]),
    "missing asset": (["model.path=swd://assets/nope"], ["does not ship"]),
    "rank": (["model.rank=0"], ["model.rank=0"]),
    "alpha": (["model.alpha=0"], ["model.alpha=0"]),
    "targets": (["model.targets=[to_q,to_x]"], ["model.targets", "to_x"]),
    # data, optimizers, trainer
    "batch size": (["data.batch_size=0"], ["data.batch_size=0"]),
    "batch does not divide": (["trainer.devices=2", "data.batch_size=5"], ["data.batch_size=5", "2 processes"]),
    "data": (["data.dataset.resolution=0"], ["resolution"]),
    "seed": (["seed=-1"], ["seed=-1", "0 or more"]),
    "steps": (["trainer.max_steps=0"], ["trainer.max_steps=0"]),
    "learning rate": (["task.lr=-1"], ["task.lr=-1", "above 0"]),
    "not a number": (["task.lr=nan"], ["task.lr=nan"]),
    "betas": (["task.betas=[0.9,1.0]"], ["task.betas"]),
    "critic updates": (["task.critic_updates=0"], ["task.critic_updates=0"]),
    "accelerator": (["trainer.accelerator=nope"], ["trainer", "nope"]),
    "strategy": (["trainer.strategy=nope"], ["trainer", "nope"]),
    "devices": (["trainer.devices=0"], ["trainer", "devices=0"]),
    "checkpoints": (["callbacks.checkpoint.every=0"], ["every=0"]),
    # files
    "resume": (["resume=nowhere"], ["resume=nowhere holds no valid checkpoint"]),
    "configuration folder": (["--config-dir=nowhere"], ["nowhere", "not found"]),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(refused: Refused, tiny_model: Path, case: str) -> None:
    arguments, words = WRONG[case]
    flags = [a for a in arguments if a.startswith("-") and "flag" not in case]
    base = [] if "flag" in case else [*flags, *overrides(tiny_model, Path("run"))]
    message = refused(*base, *(a for a in arguments if a not in flags))
    for word in words:
        assert word in message


SWEEPS: dict[str, tuple[list[str], str]] = {
    "option": (["loss=mmd,nope"], "there is no loss/nope"),
    "key": (["loss=mmd,dmd", "task.lrr=1"], "unknown key task.lrr"),
    "type": (["seed=1,x"], "seed='x'"),
    "schedule of the last job": (["schedule.sizes=[4,6,8],[4,4,8],[4,6,14]"], "positional limit 12"),
    "block": (["loss=mmd,dmd_mmd", "loss.mmd.blocks=[9]"], "block 9"),
    "model": (["seed=1,2", "model.path=nowhere"], "model.path=nowhere"),
    "features": (["loss=dmd_mmd,mmd", "loss.mmd.features=fake"], "features=fake"),
}


@pytest.mark.parametrize("case", list(SWEEPS))
def test_wrong_input_in_a_sweep_is_told_before_the_first_job(refused: Refused, tiny_model: Path, case: str) -> None:
    arguments, words = SWEEPS[case]
    assert words in refused("-m", f"output={Path.cwd()}", *overrides(tiny_model, Path("run")), *arguments)
    assert not Path("run").exists()


FILES = {
    "loss/mine": ("mmd:\n  _target_: swd.losses.MMD\n  wieght: 2.0\n", "loss=mine", "loss.mmd.wieght"),
    "experiment/key": ("# @package _global_\nsed: 3\n", "experiment=key", "unknown key sed; did you mean 'seed'"),
    "experiment/group": ("# @package _global_\ntrainr:\n  max_steps: 3\n", "experiment=group", "unknown key trainr"),
    "experiment/inner": ("# @package _global_\ntask:\n  critic_update: 3\n", "experiment=inner", "task.critic_update"),
    "experiment/name": (
        "# @package _global_\ncallbacks:\n  chekpoint:\n    every: 3\n",
        "experiment=name",
        "did you mean 'checkpoint'",
    ),
    "experiment/term": ("# @package _global_\nloss:\n  mdm:\n    weight: 3\n", "experiment=term", "loss.mdm"),
    "experiment/broken": ("# @package _global_\nloss: [\n", "experiment=broken", "broken.yaml"),
    "loss/empty": ("{}\n", "loss=empty", "loss is empty"),
}


@pytest.mark.parametrize("name", list(FILES))
def test_mistakes_inside_a_yaml_file(refused: Refused, tiny_model: Path, tmp_path: Path, name: str) -> None:
    text, argument, words = FILES[name]
    file = tmp_path / "conf" / f"{name}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert words in refused(f"--config-dir={tmp_path / 'conf'}", *overrides(tiny_model, Path("run")), argument)


@pytest.mark.parametrize("flag", [[], ["-m"]])
@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_an_output_that_cannot_be_written(refused: Refused, tiny_model: Path, folder: str, flag: list[str]) -> None:
    Path("file").write_text("")
    arguments = [a for a in overrides(tiny_model, Path("run")) if not a.startswith("folder=")]
    assert "cannot be written" in refused(*flag, f"output={folder}", *arguments)
    assert Path("file").read_text() == ""


def test_a_folder_that_cannot_be_written(refused: Refused, tiny_model: Path) -> None:
    Path("file").write_text("")
    assert "cannot be written" in refused(*overrides(tiny_model, Path("file/below")))


def test_an_incomplete_model(refused: Refused, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, "model")
    next(Path("model/transformer").glob("*.safetensors")).unlink()
    assert "is incomplete" in refused(*overrides(Path("model"), Path("run")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["adapter=nowhere"], "adapter=nowhere does not exist"),
        (["adapter=."], "holds no adapter"),
        (["adapter=latest"], "adapter=latest"),
        (["adapter=null", "prompts=[]"], "prompts="),
        (["adapter=null", "seed=x"], "seed='x'"),
        (["nokey=1"], "unknown key nokey"),
    ],
)
def test_wrong_input_to_sample(refused: Refused, arguments: list[str], words: str) -> None:
    assert words in refused(f"output={Path.cwd() / 'out'}", *arguments, command="sample")


def test_wrong_input_to_a_sweep_of_samples(refused: Refused) -> None:
    assert "seed='x'" in refused("-m", f"output={Path.cwd() / 'out'}", "adapter=null", "seed=1,x", command="sample")


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["swd", "trian"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'trian'; commands are train, ")


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides(tiny_model, Path("run"))])
    with pytest.raises(AssertionError, match="a model was loaded"):
        cli.launch("train")


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "SWD_COMMAND")}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arguments", [["schedule.sizes=[6,8,12,99]"], ["-m", "loss=mmd,dmd", "task.lr=fast"]])
def test_in_a_process_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    result = shell(sys.executable, str(ROOT / "train.py"), *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
