"""Overrides that hypothesis makes up: each gives a plan of a training, or one clear line; nothing is trained."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import tiny
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from swd.commands import cli, train
from swd.config import check

COUNT = int(os.environ.get("SWD_FUZZ", "10000"))
"""Examples of the long test."""
PARTS = 10
"""Each draws its share of them from a seed of its own."""
BOUNDED = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


KEYS = tiny.keys_of(OmegaConf.to_container(tiny.composed([]), resolve=False))
GROUPS = (
    "task",
    "model",
    "schedule",
    "loss",
    "data",
    "trainer",
    "callbacks",
    "logger",
    "experiment",
    "recipe",
    "sheet",
)
OPTIONS = sorted({path.stem for path in (Path(cli.config_path())).rglob("*.yaml")})

numbers = st.one_of(
    st.integers(-3, 20),
    st.integers(),
    st.floats(allow_nan=True),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, "1e400", "-0.0", "1_000", "0x10", "007", ".5", "1e-320"]),
)
words = st.one_of(
    st.sampled_from(
        ["null", "true", "auto", "''", "x", "../x", "/nowhere", "bf16", "???", "${seed}", "${oc.env:HOME}"]
    ),
    st.text(max_size=8),
    st.text(st.sampled_from("[]{}()=,:'\"\\$!~+@#%& ab1.-"), max_size=8),
)
values = st.recursive(
    st.one_of(numbers, words).map(str),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda parts: f"[{','.join(parts)}]"),
        st.lists(inner, max_size=2).map(lambda parts: "{" + ",".join(f"k{i}:{p}" for i, p in enumerate(parts)) + "}"),
    ),
    max_leaves=5,
)
keys = st.one_of(
    st.sampled_from(KEYS), st.sampled_from(KEYS).map(lambda key: f"{key}.more"), st.text("ab._@/", max_size=5)
)
arguments = st.one_of(
    st.tuples(st.sampled_from(["", "", "", "+", "++"]), keys, values).map(
        lambda parts: f"{parts[0]}{parts[1]}={parts[2]}"
    ),
    st.tuples(st.sampled_from(GROUPS), st.sampled_from(OPTIONS)).map("=".join),
    keys.map(lambda key: f"~{key}"),
    st.text(max_size=10),
)
lines = st.lists(arguments, min_size=1, max_size=3).filter(lambda line: not any(asks(argument) for argument in line))


def asks(argument: str) -> bool:
    """Whether an argument is a flag, which may print help or begin a sweep, or holds what no shell passes on."""
    return argument.startswith("-") or "\0" in argument or not argument.isprintable()


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory; the command `train` only plans."""

    def plan(cfg: DictConfig) -> None:
        check(cfg, train.ROOT)
        train.prepare(cfg)

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("overrides")
        patch.chdir(folder)
        patch.setattr(train, "run", plan)
        patch.delenv("SWD_COMMAND", raising=False)
        patch.setattr(sys, "argv", ["train.py"])
        yield folder
        HydraConfig.instance().cfg = None


def ends_well(model: Path, place: Path, line: list[str]) -> str:
    """How a command line ends: "planned" or "refused"; anything else is an error here."""
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    sys.argv = ["train.py", *tiny.overrides(model, place / "run", callbacks="default"), *line]
    told = io.StringIO()
    with redirect_stderr(told):
        try:
            cli.launch("train")
        except SystemExit as stop:
            assert stop.code == 2, (line, stop.code, told.getvalue())
            errors = [text for text in told.getvalue().splitlines() if not text.startswith("warning: ")]
            assert len(errors) == 1 and errors[0].startswith("error: ") and len(errors[0]) < 2000, (line, errors)
            assert not re.search(r"Traceback|object at 0x", errors[0]), (line, errors)
            return "refused"
    return "planned"


@pytest.mark.filterwarnings("ignore")
@settings(BOUNDED, max_examples=15)
@given(lines)
@example(["allow.more={}"])
@example(["schedule.sigmas.foo=1"])
@example(["~trainer.max_steps"])
@example(["+@=[]"])
@example(["~model=3"])
def test_any_override_gives_a_plan_or_one_line(tiny_model: Path, place: Path, line: list[str]) -> None:
    ends_well(tiny_model, place, line)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_overrides_give_a_plan_or_one_line(tiny_model: Path, place: Path, part: int) -> None:
    @seed(part)
    @settings(BOUNDED, derandomize=False, max_examples=COUNT // PARTS, phases=[Phase.generate])  # no shrinking: slow
    @given(lines)
    def many(line: list[str]) -> None:
        ends_well(tiny_model, place, line)

    many()
