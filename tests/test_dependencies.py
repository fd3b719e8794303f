"""The lower bounds in pyproject.toml are the versions that `make test-lowest` installs."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
NOT_RUN = {"mypy", "ruff", "pre-commit", "build", "wandb-workspaces", "hydra-optuna-sweeper", "torch"}
"""Linters, what makes releases, sends a dashboard to wandb or brings scipy: no test runs them. torch: older releases
bring gigabytes of CUDA, so the tests run with the locked one only."""


def pinned(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [requirement for text in texts if (requirement := Requirement(text)).name not in NOT_RUN]


def lowest(requirement: Requirement) -> Version:
    (bound,) = [one for one in requirement.specifier if one.operator == ">="]
    return Version(bound.version)


def test_the_lowest_versions_are_the_bounds() -> None:
    pins = pinned("requirements-lowest.txt")
    bounds = {canonicalize_name(requirement.name): lowest(requirement) for requirement in required()}
    assert {name: pins.get(name) for name in bounds} == bounds


def test_the_tested_versions_lie_within_the_bounds() -> None:
    pins = pinned("requirements.lock")
    found = {requirement: pins[canonicalize_name(requirement.name)] for requirement in required()}
    assert [str(requirement) for requirement, pin in found.items() if pin not in requirement.specifier] == []
