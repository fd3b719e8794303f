"""The schema: values against types, unknown keys, messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swd.config import COLLECTIONS, GROUP, NODES, check, fits, one_line, type_text, unresolved
from swd.types import UserError

Kernel = Literal["linear", "rbf"]


class Other:
    """A type that configuration cannot write down."""


class Block:
    """A constructor with every kind of argument."""

    def __init__(
        self,
        rate: float,
        count: int = 1,
        kernel: Kernel = "linear",
        pair: tuple[int, int] | None = None,
        names: Sequence[str] = (),
        table: Mapping[str, float] | None = None,
        inner: Other | None = None,
    ) -> None: ...


class Open:
    """A constructor that takes anything."""

    def __init__(self, known: int = 1, **more: Any) -> None: ...


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [0, -3], [1.5, "1", True, None, [1], {}]),
        (float, [0.5, 3, float("inf")], ["0.5", True, None, []]),
        (str, ["", "a"], [1, True, None, []]),
        (bool, [True, False], [0, 1, "true", None]),
        (int | None, [1, None], ["1", True]),
        (Kernel, ["linear", "rbf"], ["cubic", None, 1]),
        (tuple[int, int], [[1, 2]], [[1], [1, 2, 3], [1, "2"], [1, 2.5], 1]),
        (tuple[int, ...], [[], [1, 2, 3]], [[1, "2"], 1]),
        (list[str], [[], ["a"]], ["a", [1]]),
        (Sequence[int | Sequence[int]], [[1, [2, 3]], []], [[1, "a"], [[1.5]], 16]),
        (dict[str, float], [{}, {"a": 1}], [{"a": "x"}, [1], 1]),
        (Mapping[str, int], [{"a": 1}], [{"a": 1.5}]),
        (Any, [1, "a", None, {}], []),
        (None, [None], [0, ""]),
        (Other, [{"_target_": "x"}], [1, "a", {}, {"weight": 1}, []]),
    ],
)
def test_values_fit_their_types(hint: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert fits(value, hint), value
    for value in bad:
        assert not fits(value, hint), value


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (bool, "true or false"),
        (float | None, "a number or null"),
        (Kernel, "linear | rbf"),
        (tuple[float, float], "a list of 2 values (a number, a number)"),
        (Sequence[str], "a list of text"),
        (Other, "Other"),
    ],
)
def test_types_are_described_in_words(hint: Any, words: str) -> None:
    assert type_text(hint) == words


GROUPS = dict.fromkeys((*NODES, *COLLECTIONS), GROUP)
"""The groups that a command reads."""
OWN = [f"{__name__}.{name}" for name in ("Block", "Open")]
"""Names that the command line allows here."""


def node(**values: Any) -> dict[str, Any]:
    return {"_target_": f"{__name__}.Block", "rate": 0.5} | values


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"task": node(cuont=2)}, ["unknown key task.cuont", "did you mean 'count'"]),
        ({"task": node(zzz=2)}, ["unknown key task.zzz", "known keys are rate, count"]),
        ({"task": node(count=1.5)}, ["task.count=1.5", "an integer"]),
        ({"task": node(rate="fast")}, ["task.rate='fast'", "a number"]),
        ({"task": node(kernel="cubic")}, ["task.kernel='cubic'", "linear | rbf"]),
        ({"task": node(pair=[1])}, ["task.pair=[1]", "a list of 2 values"]),
        ({"task": node(inner={"weight": 1})}, ["task.inner"]),
        ({"task": node(inner=node(count="x"))}, ["task.inner.count='x'"]),
        ({"data": {"parts": [node(), node(count="x")]}}, ["data.parts[1].count='x'"]),
        ({"task": {"_target_": f"{__name__}.Block"}}, ["task.rate is missing"]),
        ({"task": {"_target_": f"{__name__}.Blok", "rate": 1}}, ["task._target_", "Blok", "spelling"]),
        ({"task": {"_target_": "no.such.module"}}, ["task._target_", "no.such.module"]),
        ({"seed": "${nope}"}, ["does not resolve", "nope"]),
        ({"seed": "???"}, ["seed"]),
        ({"seed": 1.5}, ["seed=1.5", "an integer"]),
        ({"sed": 1}, ["unknown key sed", "did you mean 'seed'"]),
        ({"trainr": {"max_steps": 1}}, ["unknown key trainr", "did you mean 'trainer'"]),
        ({"callbacks": {"samples": node(), "sampels": {"every": 3}}}, ["callbacks.sampels", "did you mean 'samples'"]),
        ({"loss": {"dmd": node(), "mdm": {"weight": 3}}}, ["loss.mdm", "did you mean 'dmd'"]),
        ({"callbacks": {"samples": None}}, ["callbacks.samples is null", "~callbacks.samples"]),
    ],
)
def test_wrong_configurations_are_refused_in_one_line(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(OmegaConf.create(config), {"seed": int} | GROUPS, OWN)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"seed": 3, "task": node(pair=[1, 2], names=["a"], table={"a": 1}, inner=None)},
        {"task": node(inner=node()), "loss": {}, "callbacks": None, "logger": {}},
        {"task": {"_target_": f"{__name__}.Open", "known": 2, "anything": [1]}},
        {"task": {"_target_": f"{__name__}.Block", "_partial_": True}},
        {"n": 2, "seed": "${n}"},
    ],
)
def test_right_configurations_pass(config: dict[str, Any]) -> None:
    check(OmegaConf.create(config), {"seed": int, "n": int} | GROUPS, OWN)


def test_values_at_the_root_are_only_looked_at_on_request() -> None:
    check(OmegaConf.create({"anything": 1}))


def test_messages_become_one_line() -> None:
    assert one_line(ValueError("a\n   b\tc ")) == "a b c"


@pytest.mark.parametrize("read", [lambda cfg: cfg.timing.batch, lambda cfg: cfg["timing"]["batch"]])
def test_a_key_that_was_taken_out_and_is_read_is_named(read: Any) -> None:
    cfg = OmegaConf.create({"timing": {"runs": 1}, "seed": "${other}"})
    OmegaConf.set_struct(cfg, True)
    with pytest.raises(OmegaConfBaseException) as caught:
        read(cfg)
    assert unresolved(caught.value) == "timing.batch is missing and needed; set it, or leave out ~timing.batch"
    with pytest.raises(OmegaConfBaseException) as caught:
        cfg["seed"]
    assert unresolved(caught.value) == "seed refers to other, which is not set"
