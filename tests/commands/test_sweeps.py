"""Sweeps: on joblib's processes, as jobs of SLURM, and by a search for the best settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import ROOT

from swd.commands.cli import _hydra_message

SBATCH = """#!{python}
import pathlib, sys
given = pathlib.Path(sys.argv[-1])
pathlib.Path({folder!r}, "script.sh").write_text(given.read_text())
sys.exit("sbatch: error: invalid partition")
"""


def sweep(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "SWD_COMMAND"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *arguments],
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "package", "extra"),
    [
        (
            "Could not find 'hydra/launcher/joblib' Available options in 'hydra/launcher': basic",
            "joblib-launcher",
            "sweep",
        ),
        (
            "Could not find 'hydra/sweeper/optuna' Available options in 'hydra/sweeper': basic",
            "optuna-sweeper",
            "sweep",
        ),
        (
            "In 'hydra/launcher/slurm': Could not load 'hydra/launcher/submitit_slurm'. Config search path: ...",
            "submitit-launcher",
            "slurm",
        ),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(text: str, package: str, extra: str) -> None:
    message = _hydra_message(text)
    assert re.fullmatch(rf"hydra/\w+=\w+ needs a package: pip install hydra-{package} .*\[{extra}\]\)", message)


def test_a_job_of_slurm_has_the_nodes_tasks_and_gpus_that_are_asked_for(tmp_path: Path) -> None:
    """A stand-in for sbatch keeps the script and refuses it."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        program = programs / name
        program.write_text(SBATCH.format(python=sys.executable, folder=str(tmp_path)))
        program.chmod(0o755)
    result = sweep(
        ["hydra/launcher=slurm", "hydra.launcher.nodes=2", "hydra.launcher.partition=gpu", "task.lr=1e-4,1e-5"],
        tmp_path,
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    script = (tmp_path / "script.sh").read_text()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.M))
    expected = {"nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "8", "cpus-per-task": "8", "time": "1440"}
    assert expected.items() <= given.items() and given["partition"] == "gpu" and given["array"].startswith("0-1")
    assert re.search(r"^srun .*-m submitit\.core\._submit ", script, re.M)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1] == "error: hydra/launcher: sbatch: error: invalid partition"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("hydra_plugins.hydra_optuna_sweeper") is None, reason="hydra-optuna-sweeper is not there")
def test_a_search_takes_the_metric_of_each_run(tmp_path: Path) -> None:
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    small = ["data.batch_size=2", "task.critic_updates=1", "schedule.sizes=[6,6,8,16]", "trainer.max_steps=1"]
    given = ["callbacks=none", "loss=mmd", "optimized_metric=loss/x0_mse", "task.lr=interval(1e-5,1e-3)"]
    result = sweep([*search, *small, *given], tmp_path)
    assert result.returncode == 0, result.stderr
    (found,) = tmp_path.glob("outputs/sweep/*/optimization_results.yaml")
    assert re.search(r"task\.lr: 0\.000\d+\nbest_value: \d", found.read_text())
