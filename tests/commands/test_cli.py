"""Wrong input ends with status 2 and one line on standard error, before any model is loaded."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from processes import Fork
from safetensors import SafetensorError
from tiny import composed, overrides

from swd.commands import cli, train
from swd.io.files import write_aside
from swd.modules.pretrained import Pretrained
from swd.types import UserError

ROOT = Path(__file__).parents[2]
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
    "key of other programs": (["steps=4"], ["here it is trainer.max_steps=ITERATIONS"]),
    "added key of other programs": (["+prompt=x"], ["here it is sample_prompts='[TEXT]'"]),
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
    "guidance below 1": (["model.drawing_guidance_scale=0.5"], ["drawing_guidance_scale=0.5", "1 for none"]),
    "guidance of DMD below 1": (["model.dmd_guidance_scale=0.5"], ["dmd.guidance_scale=0.5", "use 1 for no guidance"]),
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
    "no trainer, and a key of it": (["~trainer"], ["trainer.max_steps was taken out by another argument"]),
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
    "no memory": (["trainer.memory_gb=0"], ["trainer.memory_gb=0", "number above 0"]),
    "devices": (["trainer.devices=0"], ["trainer", "devices=0"]),
    "checkpoints": (["callbacks.checkpoint.every=0"], ["every=0"]),
    "no number": (["loss.mmd.weight=inf"], ["loss.mmd.weight=inf", "finite"]),
    "beyond the machine": (["loss.gan.weight=99999999999999999999"], ["loss.gan.weight=", "too large"]),
    "beyond float32": (["task.critic_lr=1e300"], ["task.critic_lr=1e+300", "finite"]),
    "negative weight": (["loss.dmd.weight=-1"], ["loss.dmd.weight=-1", "0 or more"]),
    "weight decay": (["task.weight_decay=1e30"], ["task.weight_decay=1e+30", "at most"]),
    "seed of the data": (["data.seed=-1"], ["data.seed=-1", "0 or more"]),
    "seed of the task": (["task.seed=-5"], ["task.seed=-5", "0 or more"]),
    "workers": (["data.workers=100000"], ["data.workers=100000", "at most"]),
    "layers": (["loss.gan.layers=100000"], ["loss.gan.layers=100000", "at most"]),
    "lines": (["callbacks=default", "+callbacks.progress.lines=0"], ["unknown key callbacks.progress.lines"]),
    "no batch": (["+trainer.limit_train_batches=0"], ["trainer.limit_train_batches=0", "one iteration"]),
    "half an iteration": (["+trainer.limit_train_batches=0.1"], ["trainer.limit_train_batches=0.1", "one iteration"]),
    "no epoch": (["+trainer.max_epochs=0"], ["trainer.max_epochs=0", "trainer.max_steps"]),
    "devices of a GPU": (["trainer.devices=[0]"], ["devices=[0]", "CPU"]),
    "all devices": (["trainer.devices=-1"], ["devices=-1", "CPU"]),
    "listed devices": (["trainer.devices='0,1'"], ["devices='0,1'", "CPU"]),
    "devices in letters": (["trainer.devices=abc"], ["devices='abc'", "how many"]),
    "tpu": (["trainer.accelerator=tpu"], ["trainer: "]),
    "double precision": (["+trainer.precision=64-true"], ["trainer.precision=64-true", "float32"]),
    "half precision": (["+trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "model.precision=bf16"]),
    "bf16": (["+trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "model.precision=bf16"]),
    "another folder": (["+trainer.default_root_dir=x"], ["trainer.default_root_dir=x", "folder=FOLDER"]),
    "a validation": (["+trainer.val_check_interval=5"], ["trainer.val_check_interval=5", "nothing is validated"]),
    "a seed below 0": (["seed=-1"], ["error: seed=-1; use 0 or more"]),
    "a scale that a group repeats": (["model.dmd_guidance_scale=inf"], ["error: model.dmd_guidance_scale=inf"]),
    "Lightning's bar": (["+trainer.enable_progress_bar=true"], ["trainer.enable_progress_bar=True", "progress"]),
    "clipping": (["+trainer.gradient_clip_val=1.0"], ["trainer.gradient_clip_val=1.0", "task.clip"]),
    "trial of a negative": (["+trainer.fast_dev_run=-1"], ["trainer.fast_dev_run=-1"]),
    "trial and resume": (["+trainer.fast_dev_run=1", "resume=auto"], ["leave out resume"]),
    "builtins": (["data._target_=builtins.dict"], ["data._target_=builtins.dict", "may build"]),
    "positional arguments": (["+task._args_=[1]"], ["task._args_", "by name"]),
    # groups
    "no data": (["data=null"], ["data=null", "leave it out"]),
    "no task": (["task=null"], ["task=null", "leave it out"]),
    "number for a group": (["loss=5"], ["loss=5", "loss=mmd"]),
    "nothing in a group": (["loss=[null]"], ["loss=[null]", "loss=mmd"]),
    "numbers for a group": (["callbacks=[1.0,2]"], ["callbacks=[1.0,2]", "names"]),
    "trainer taken out": (["~trainer"], ["trainer"]),
    "group with a plus": (["+experiment=shapes_vae"], ["experiment=shapes_vae without +"]),
    "Lightning's name": (["+ckpt_path=x"], ["ckpt_path", "resume=FILE"]),
    # what Hydra cannot read
    "equals sign": (["name=a=b"], ["""'name="a=b"'"""]),
    "equals sign in a path": (["output=runs/lr=0.1"], ["""'output="runs/lr=0.1"'"""]),
    "exclamation": (["name=a!"], ["""'name="a!"'"""]),
    "accents": (["name=été"], ["""'name="été"'"""]),
    "apostrophe": (["name=it's"], ["""name=\\"it's\\\""""]),
    "comma": (["name=a,b"], ["""'name="a,b"'""", "-m"]),
    # names
    "name above": (["name=../../up"], ["name=../../up", "output=FOLDER"]),
    "name elsewhere": (["name=/tmp/up"], ["name=/tmp/up", "output=FOLDER"]),
    "name around": (["name=a/../../up"], ["name=a/../../up", "output=FOLDER"]),
    "no name": (["name=''"], ["name=''"]),
    "name with a tab": (["name='a\tb'"], ["name="]),
    "long name": (["name=" + "x" * 300], ["300 bytes"]),
    "no folder": (["folder=''"], ["folder is empty"]),
    "no resume": (["resume=''"], ["resume is empty"]),
    "no output": (["output=''"], ["output=''"]),
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
        (["steps=4"], "unknown key steps; --help"),
        (["prompt=x"], "here it is prompts='[TEXT]'"),
        (["checkpoint=x.ckpt"], "here it is adapter=RUN"),
    ],
)
def test_wrong_input_to_sample(refused: Refused, arguments: list[str], words: str) -> None:
    assert words in refused(f"output={Path.cwd() / 'out'}", *arguments, command="sample")


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        (
            "encode",
            "task.lr=1",
            "unknown key task.lr; --help and --cfg job list what there is; this key belongs to swd ",
        ),
        ("sample", "steps=4", "this key belongs to swd generate\n"),
        ("sample", "trainer.max_steps=7", "this key belongs to swd train and swd demo\n"),
        ("train", "preset=ci", "unknown key preset; swd demo has experiment=demo_ci and experiment=demo_full in its"),
        ("train", "+preset=ci", "unknown key preset; swd demo has experiment=demo_ci and experiment=demo_full in its"),
        ("export", "zzz=1", "unknown key zzz; --help and --cfg job list what there is\n"),
        ("encode", "batch_size=null", "error: batch_size=None is not valid; expected an integer\n"),
    ],
)
def test_keys_of_other_commands(refused: Refused, command: str, argument: str, message: str) -> None:
    folder = ["out=cache"] if command == "encode" else []
    assert message in refused(*folder, argument, command=command)


def test_wrong_input_to_a_sweep_of_samples(refused: Refused) -> None:
    assert "seed='x'" in refused("-m", f"output={Path.cwd() / 'out'}", "adapter=null", "seed=1,x", command="sample")


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["swd", "trian"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(
        "error: unknown command 'trian'; did you mean train? commands are train, "
    )


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides(tiny_model, Path("run"))])
    with pytest.raises(AssertionError, match="a model was loaded"):
        cli.launch("train")


def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "SWD_COMMAND")}
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    """One run by a new interpreter, and a sweep by a fork of one that has imported everything."""
    command = [sys.executable, str(ROOT / "train.py")]
    sweep = [*command, "-m", "loss=mmd,dmd", "task.lr=fast"]
    environment = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "SWD_COMMAND")}
    fork = Fork(sweep, environment, tmp_path, tmp_path / "out.txt", tmp_path / "err.txt")
    result = shell(*command, "schedule.sizes=[6,8,12,99]")
    output, error = fork.communicate(120)
    for code, out, err in ((result.returncode, result.stdout, result.stderr), (fork.returncode, output, error)):
        assert code == 2 and out == ""
        assert err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("empty", [["experiment=null"], ["callbacks=null"], ["logger=null"], ["logger=none"]])
def test_groups_that_may_be_left_out(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, empty: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides(tiny_model, Path("run")), *empty])
    with pytest.raises(AssertionError, match="a model was loaded"):
        cli.launch("train")


@pytest.mark.parametrize("arguments", [["name=../up"], ["task.lr=-1"], ["trainer.accelerator=tpu"], ["data=null"]])
@pytest.mark.parametrize("flag", [[], ["-m"]])
def test_refused_input_leaves_no_folder(
    refused: Refused, tiny_model: Path, arguments: list[str], flag: list[str]
) -> None:
    refused(*flag, *overrides(tiny_model, Path("run")), *arguments)
    assert not Path("run").exists() and not Path("../up").exists() and not list(Path().rglob("*.json"))
    assert not [path for path in Path("outputs").rglob("*") if path.name not in ("sweep",)]


# Failing disks


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device"), "run cannot be written (No space left on device)"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "run/x"), "run/x cannot be written"),
    (OSError(errno.EROFS, "Read-only file system", "run/x"), "run/x cannot be written"),
    (OSError(errno.EACCES, "Permission denied", "run/x"), "run/x failed (Permission denied)"),
    (OSError(errno.EIO, "Input/output error", "run/x"), "run/x failed (Input/output error)"),
    (OSError(errno.EMFILE, "Too many open files", "run/x"), "run/x failed (Too many open files)"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "run cannot be"),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "run failed (writing failed"),
    (MemoryError(), "out of memory"),
]


@pytest.mark.parametrize(("error", "words"), FAILURES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("command", ["train", "sample", "export", "generate", "encode", "import", "evaluate"])
def test_a_failing_machine_is_one_line_in_every_command(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception, words: str
) -> None:
    def fail(cfg: object) -> None:
        raise error

    module = importlib.import_module(cli.COMMANDS[command][0])
    monkeypatch.setattr(module, "run", fail)
    folders = {key: ["folder=run"] for key in ("train", "sample", "evaluate")}
    where = (folders | {"export": ["to=run"]}).get(command, ["out=run"])
    required = {"generate": ["prompts=x"], "evaluate": ["models=[teacher]", "prompts=x", "metrics=[kid]"]}
    assert words in refused(*where, *required.get(command, []), command=command)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def full(new: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_aside(tmp_path / "x" / "weights", full)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "x" / "weights")
    assert list((tmp_path / "x").iterdir()) == []


def test_a_defect_while_a_refusal_is_handled_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), cli.user_errors():
        try:
            raise UserError("wrong input")
        except UserError:
            1 / 0  # noqa: B018 - the defect


def test_a_refusal_behind_another_error_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, cli.user_errors():
        raise RuntimeError("in a hook") from UserError("wrong input")
    assert caught.value.code == 2 and capsys.readouterr().err == "error: wrong input\n"


@pytest.mark.parametrize("module", ["swd", "swd.commands.cli"])
def test_it_runs_as_a_module(module: str) -> None:
    assert shell(sys.executable, "-m", module, "--version").stdout.startswith("swd ")
    result = shell(sys.executable, "-m", module, "trian")
    assert result.returncode == 2 and result.stderr.startswith("error: unknown command 'trian'")


def test_a_trial_counts_iterations_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    arguments = overrides(tiny_model, tmp_path / "run", callbacks="default")
    cfg = composed([*arguments, "+trainer.fast_dev_run=2"])
    trainer = train.build_trainer(cfg, tmp_path)
    assert trainer.max_steps == 2 and not trainer.fast_dev_run and not trainer.loggers
    kept = [type(callback).__name__ for callback in trainer.callbacks]
    assert not {"Checkpoint", "SaveAdapter", "Samples"} & set(kept)


def test_no_iteration_leaves_no_adapter(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    monkeypatch.undo()
    cfg = composed([*overrides(tiny_model, tmp_path / "run", callbacks="default"), "+trainer.max_time=00:00:00:00"])
    with pytest.raises(UserError, match="no iteration was completed"):
        train.fit(cfg)
    assert not (tmp_path / "run" / "adapter").exists()


def test_data_of_the_judge_are_for_the_judge_alone() -> None:
    with pytest.raises(UserError, match="data=judge is for task=judge alone"):
        train.build_task_and_data(composed(["folder=x", "name=y", "data=judge"]))
    with pytest.raises(UserError, match="choose them with data=judge"):
        train.build_task_and_data(composed(["folder=x", "name=y", "experiment=shapes_judge", "data=shapes"]))


def test_wandb_without_an_account_is_told_before_a_folder_is_made(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "logger.offline=true" in refused(*overrides(tiny_model, Path("run")), "logger=wandb")
    assert not Path("run").exists()


@pytest.mark.parametrize("option", ["default", "ci", "full"])
def test_a_preset_of_the_demo_is_an_experiment_now(refused: Refused, option: str) -> None:
    message = refused(f"preset={option}", command="demo")
    assert "unknown key preset; here it is experiment=demo_ci or experiment=demo_full" in message


@pytest.mark.parametrize(
    ("command", "argument", "nearest"),
    [
        ("train", "data.num_workers=2", "data.workers"),
        ("train", "trainer.steps=2", "trainer.max_steps"),
        ("train", "task.critic_update=2", "task.critic_updates"),
        ("train", "model=sd35_larg", "sd35_large"),
        ("train", "loss=dmd_mm", "dmd_mmd"),
        ("sample", "image_per_prompt=2", "images_per_prompt"),
    ],
)
def test_a_misspelt_key_or_option_names_the_nearest(
    refused: Refused, command: str, argument: str, nearest: str
) -> None:
    message = refused(argument, command=command)
    assert f"did you mean {nearest}" in message


@pytest.mark.parametrize("command", ["train", "sample"])
def test_listings_name_only_what_can_be_chosen(refused: Refused, command: str) -> None:
    models = {file.stem for file in (Path(cli.config_path()) / "model").glob("*.yaml")}
    message = refused("model=_base", command=command)
    assert set(message.partition("options of model are: ")[2].strip().split(", ")) == models
    assert "shapes" in models and not [name for name in models if "base" in name]
