"""Sweeps (`-m`): every job is checked before the first one runs."""

from __future__ import annotations

import importlib
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from swd.cli import COMMANDS, user_errors
from swd.config import check


class CheckSweep(Callback):
    """A Hydra callback that ends the program with one line if any job of a sweep has wrong input."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        command = config.hydra.job.config_name
        module = importlib.import_module(COMMANDS[command][0])
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return  # other sweepers choose their values while they run
        with user_errors():
            for arguments in jobs(config):
                # What Hydra only knows once a job runs must not be asked for.
                cfg = compose(command, [*arguments, "hydra.job.num=0", "folder=sweep"], return_hydra_config=True)
                HydraConfig.instance().set_config(cfg)
                with open_dict(cfg):
                    del cfg["hydra"]
                check(cfg, module.ROOT)
                if hasattr(module, "prepare"):
                    module.prepare(cfg)


def jobs(config: DictConfig) -> list[list[str]]:
    """The command-line arguments of every job of a sweep."""
    arguments = list(OmegaConf.to_container(config.hydra.overrides.task))  # type: ignore[arg-type]
    params = config.hydra.sweeper.get("params") or {}
    arguments += [f"{key}={value}" for key, value in params.items()]
    overrides = OverridesParser.create().parse_overrides(arguments)  # type: ignore[arg-type]
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
