"""A loss term of one's own, in a module outside the package, trains by the command line alone."""

from __future__ import annotations

import ast
import csv
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from processes import Fork, environment
from tiny import overrides

from swd.commands import cli

ROOT = Path(__file__).parents[2]

MY_TERMS = '''
import torch
from torch import nn

from swd.losses import FakePass, LossTerm


class MyTerm(LossTerm):
    """A learned direction on feature means: its critic trains it to tell fake from real, and the student follows."""

    trains_fake = True
    critic_name = "direction"

    def __init__(self, weight: float = 0.5, block: int = 0):
        super().__init__()
        self.weight, self.block = weight, block
        self.generator_pass = self.critic_pass = FakePass(blocks=(block,))

    def check(self, key, model, schedule):
        model.check_blocks(f"{key}.block", [self.block])

    def build(self, width):
        self.direction = nn.Linear(width, 1, bias=False)

    def score(self, step):
        fake = step.fake_features("renoise", (12, 27), (self.block,))[0]
        real = step.noise_real("renoise", (12, 27))
        reference = step.networks.features("fake", real.x_t, real.sigma, step.conditioning, (self.block,))[0]
        return torch.tanh(self.direction(fake.mean(1) - reference.mean(1))).mean()

    def generator(self, step):
        loss = self.score(step)
        return self.weight * loss, {"mine": loss.detach()}

    def critic(self, step):
        return -self.score(step), {}
'''


DOC = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
MINE = ["allow=[my_terms.MyTerm]", "+loss.mine._target_=my_terms.MyTerm"]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the package, on the path of Python."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_terms", raising=False)
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run."""
    with open(folder / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def swd(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    try:
        cli.launch("train")
    finally:
        HydraConfig.instance().cfg = None


def test_it_joins_dmd_and_gan(tiny_model: Path, tmp_path: Path, modules: Path) -> None:
    (modules / "my_terms.py").write_text(MY_TERMS)
    command = [sys.executable, str(ROOT / "train.py"), *overrides(tiny_model, tmp_path / "run", loss="dmd_gan"), *MINE]
    own = environment() | {"PYTHONPATH": str(modules)}
    process = Fork(command, own, tmp_path, tmp_path / "out.txt", tmp_path / "err.txt")
    assert process.wait(300) == 0, process.err.read_text()
    found = rows(tmp_path / "run")
    assert len(found) == 2
    for row in found:
        parts = row["loss/dmd"] + 5e-3 * row["loss/gan"] + 0.5 * row["loss/mine"]
        assert row["loss/mine"] != 0 and row["loss/loss"] == pytest.approx(parts, rel=1e-5)
        assert row["loss/fake_score"] > 0 and row["loss/discriminator"] > 0


def test_it_trains_alone(tiny_model: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (modules / "my_terms.py").write_text(MY_TERMS)
    arguments = [*overrides(tiny_model, tmp_path / "run", loss="mmd"), "~loss.mmd", *MINE, "+loss.mine.weight=0.25"]
    swd(monkeypatch, *arguments)
    for row in rows(tmp_path / "run"):
        assert row["loss/mine"] != 0 and row["loss/loss"] == pytest.approx(0.25 * row["loss/mine"], rel=1e-5)


def test_the_term_of_the_page_trains_by_its_command(
    tiny_model: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", DOC, re.S) if "class MyTerm" in block]
    (modules / "my_terms.py").write_text(text)
    (command,) = re.findall(r"^python train\.py (.*)$", DOC, re.M)
    swd(monkeypatch, *overrides(tiny_model, tmp_path / "run"), *shlex.split(command))
    for row in rows(tmp_path / "run"):
        parts = row["loss/dmd"] + 5e-3 * row["loss/gan"] + 0.5 * row["loss/mine"]
        assert row["loss/mine"] > 0 and row["loss/loss"] == pytest.approx(parts, rel=1e-5)


def test_it_checks_itself(
    tiny_model: Path, tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (modules / "my_terms.py").write_text(MY_TERMS)
    with pytest.raises(SystemExit) as caught:
        swd(monkeypatch, *overrides(tiny_model, tmp_path / "run"), *MINE, "+loss.mine.block=7")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: loss.mine.block: feature block 7 does not exist")


def test_no_term_is_named_outside_its_own_file() -> None:
    """`fixed_losses` measures by MMD, whatever is trained."""
    named = set()
    for path in (ROOT / "swd").rglob("*.py"):
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        imported = {alias.name for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names}
        if imported & {"DMD", "GAN", "MMD"}:
            named.add(path.relative_to(ROOT / "swd").as_posix())
    assert named == {"losses/__init__.py", "callbacks/fixed_losses.py"}
