"""Parameters read from source files are those of the imported classes."""

from __future__ import annotations

import importlib
from typing import Any, get_args

import pytest

from swd.commands import cli, keys
from swd.config import Parameters, listed, parameters_of
from swd.data.cache import Precision
from swd.source_parameters import parameters_in_source

INHERITED = {
    "swd.metrics.precision_recall.Recall",
    "swd.metrics.preparation.CentreCrop",
    "swd.metrics.preparation.ShortSide",
    "swd.metrics.preparation.Squash",
    "swd.shapes.metrics.JudgeFeatures",
    "lightning.pytorch.plugins.environments.TorchElasticEnvironment",
    "lightning.pytorch.plugins.environments.KubeflowEnvironment",
}
"""Classes with the constructor of a base, or one that a decorator makes."""


def known(hint: Any) -> bool:
    """Whether no part of a type was left open."""
    return hint is not Any and all(known(each) for each in get_args(hint))


@pytest.mark.parametrize("name", listed())
def test_a_class_has_the_parameters_that_its_source_says(name: str) -> None:
    found = parameters_in_source(name)
    if name in INHERITED:
        assert found is None
        return
    expected = parameters_of(name, "here")
    assert found is not None
    assert found.names == tuple(key for key in expected.names if not key.endswith("kwargs") or key in found.names)
    assert found.required == expected.required
    assert (found.open_ended, found.ours) == (expected.open_ended, expected.ours)
    for key, hint in found.hints.items() if expected.hints else ():  # some third parties' types do not resolve
        if known(hint):
            assert expected.hints[key] in (hint, type(hint)), key


def test_types_that_matter_are_read() -> None:
    def read(name: str) -> Parameters:
        found = parameters_in_source(name)
        assert found is not None
        return found

    model = read("swd.modules.pretrained.Pretrained").hints
    for key in ("rank", "precision", "tuning", "targets", "quantization", "size"):
        assert known(model[key]), key
    task = read("swd.modules.distiller.Distiller").hints
    for key in ("on_bad_step", "betas", "downscale", "frames", "lr", "checkpointing"):
        assert known(task[key]), key
    assert known(read("lightning.Trainer").hints["max_steps"])


def test_what_may_not_be_built_is_not_looked_at() -> None:
    for name in ("os.system", "swd.io.files.write_json", "swd.modules.distiller.Nothing", "", None, 3):
        assert parameters_in_source(name) is None


@pytest.mark.parametrize("command", keys.ROOTS)
def test_a_command_checks_the_keys_that_are_checked_before_it_is_imported(command: str) -> None:
    assert importlib.import_module(cli.COMMANDS[command][0]).ROOT is keys.ROOTS[command]


def test_the_precision_of_a_cache_is_one_list() -> None:
    assert keys.ENCODE["precision"] == Precision
