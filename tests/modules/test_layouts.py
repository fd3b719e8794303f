"""Distillations on two and four processes, with whole copies and with divided weights, against one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families
import pytest
from layouts import Case, Result, result, train, train_all

TWO = [
    Case("ddp", layout="ddp"),
    Case("fsdp", layout="fsdp"),
]


def prepared(case: Case, folder: Path, family: str = "sd3") -> Case:
    """A case with the arguments of a tiny pipeline in `folder`."""
    model = families.settings(family, folder / family, **case.model)
    return replace(case, model=model, sizes=families.SIZES[family])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    families.save("sd3", folder / "sd3")
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """The folder with the results of `TWO`, all trained by one pair of processes."""
    train_all([prepared(case, folder) for case in TWO], 2, folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[Case], Result]:
    """The result of a case in this process alone; each is trained once."""
    known: dict[str, Result] = {}

    def train_alone(case: Case) -> Result:
        plain = replace(prepared(case, folder), name="alone", layout="one")
        if repr(plain) not in known:
            known[repr(plain)] = train(plain, folder)
        return known[repr(plain)]

    return train_alone


def differences(found: Result, expected: Result) -> tuple[float, float]:
    """The largest difference of a trained weight, and the largest relative one of a logged loss."""
    assert found.weights.keys() == expected.weights.keys() and len(found.metrics) == len(expected.metrics)
    weights = max(float((found.weights[key] - value).abs().max()) for key, value in expected.weights.items())
    relative = [
        abs(row[name] - value) / max(abs(value), 1e-6)
        for row, other in zip(found.metrics, expected.metrics, strict=True)
        for name, value in other.items()
        if not name.startswith("monitor/")
    ]
    return weights, max(relative)


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_processes_train_as_one(case: Case, two: Path, alone: Callable[[Case], Result]) -> None:
    weights, losses = differences(result(two, case.name), alone(case))
    assert weights <= 1e-6 and losses <= 1e-5
