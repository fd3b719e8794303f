"""Devices, nodes and strategy of a training, from what the launcher started."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from swd.commands.processes import Launched, count, distribute, settle_devices
from swd.io.ranks import Ranks
from swd.types import UserError

FOUR = Ranks(3, 4, 1, 2, 1, "torchrun")
"""The last of four processes on two machines."""


@pytest.mark.parametrize(
    ("given", "here", "expected"),
    [
        ({"devices": "auto", "num_nodes": "auto"}, FOUR, {"devices": 2, "num_nodes": 2}),
        ({}, FOUR, {"devices": 2, "num_nodes": 2}),
        ({"devices": -1}, FOUR, {"devices": 2, "num_nodes": 2}),
        ({"devices": 2, "num_nodes": 2}, FOUR, {"devices": 2, "num_nodes": 2}),
        ({"devices": "0,1"}, FOUR, {"devices": "0,1", "num_nodes": 2}),
        ({"devices": "auto", "num_nodes": "auto"}, Ranks(), {"devices": "auto"}),
        ({"devices": 3, "num_nodes": 1}, Ranks(), {"devices": 3}),
        ({"devices": 2}, Ranks(1, 2, 1, 2, 0, "lightning"), {"devices": 2}),
    ],
)
def test_devices_and_nodes_are_what_was_started(given: dict[str, Any], here: Ranks, expected: dict[str, Any]) -> None:
    options = {"accelerator": "cpu"} | given
    settle_devices(options, here)
    assert options == {"accelerator": "cpu"} | expected
    if here.launched:
        assert count(options) == here.world


@pytest.mark.parametrize(
    ("given", "here", "message"),
    [
        ({"devices": 4}, FOUR, "trainer.devices=4 on 2 nodes, but torchrun started 4 processes, 2 on each of 2 nodes"),
        ({"num_nodes": 1}, FOUR, "trainer.devices=auto on 1 node, but torchrun started 4"),
        ({"devices": "0,1,2"}, FOUR, "trainer.devices=0,1,2 on 2 nodes"),
        ({"num_nodes": 2}, Ranks(), "trainer.num_nodes=2, but no launcher .* torchrun --nnodes 2"),
        ({"timeout": 0}, Ranks(), "trainer.timeout=0"),
    ],
)
def test_numbers_that_contradict_the_launcher_are_refused(given: dict[str, Any], here: Ranks, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settle_devices({"accelerator": "cpu"} | given, here)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun started 2 processes on this machine, and each sees 1 GPU; start 1"):
        settle_devices({}, FOUR)
    with pytest.raises(UserError, match="--gpus-per-node in the place of --gpus-per-task"):
        settle_devices({}, Ranks(0, 8, 0, 8, 0, "srun"))


@pytest.mark.parametrize("name", ["auto", "ddp"])
def test_ddp_is_what_auto_means_and_outlives_a_stall(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"strategy": name, "devices": 2}
    distribute(options, timeout=3000)
    assert isinstance(options["strategy"], DDPStrategy) and options["strategy"]._timeout == timedelta(seconds=3060)
    assert options["strategy"]._ddp_kwargs["find_unused_parameters"]
    assert [type(plugin) for plugin in options["plugins"]] == [LightningEnvironment]
    alone: dict[str, Any] = {"strategy": name, "devices": 1}
    distribute(alone)
    assert alone["strategy"] == "auto"


def test_lightning_is_told_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"PROCID": 3, "LOCALID": 1, "NODEID": 1, "STEP_ID": 0, "NTASKS": 4, "NNODES": 2, "JOB_ID": 12}
    for key, value in step.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[3-4]")
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    options: dict[str, Any] = {"strategy": "auto", "devices": 2, "num_nodes": 2}
    distribute(options)
    (found,) = options["plugins"]
    assert isinstance(found, Launched) and found.creates_processes_externally
    assert (found.global_rank(), found.world_size(), found.local_rank(), found.node_rank()) == (3, 4, 1, 1)
    assert (found.main_address, found.main_port) == ("gpu3", 15012)
