"""Sweeps (`-m`): every job is checked before the first one runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from swd.commands.cli import COMMANDS, user_errors
from swd.config import check, check_names, to_yaml
from swd.io.files import write_text
from swd.io.masking import mask, mask_text
from swd.types import UserError


class CheckSweep(Callback):
    """A Hydra callback that ends the program with one line before wrong input makes a folder or starts a sweep."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with user_errors():
            HydraConfig.instance().set_config(config)  # names may refer to it
            if "name" in config and "output" in config:
                check_names(config.name, config.output)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        command = config.hydra.job.config_name
        module = importlib.import_module(COMMANDS[command][0])
        with user_errors():
            if "allow" in (config.hydra.sweeper.get("params") or {}):
                raise UserError("hydra.sweeper.params sets allow, and only the command line may; give allow='[NAME]'")
        if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            return  # other sweepers choose their values while they run
        with user_errors():
            for arguments in jobs(config):
                # Values that Hydra only knows once a job runs must not be read.
                own = ["folder=sweep"] if "folder" in module.ROOT else []
                cfg = compose(command, [*arguments, "hydra.job.num=0", *own], return_hydra_config=True)
                HydraConfig.instance().set_config(cfg)
                with open_dict(cfg):
                    del cfg["hydra"]
                check(cfg, module.ROOT)
                if hasattr(module, "prepare"):
                    module.prepare(cfg)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take credentials out of the copy of the command line that Hydra keeps beside the jobs of a sweep."""
        file = Path(str(config.hydra.sweep.dir)) / "multirun.yaml"
        if config.hydra.mode != RunMode.MULTIRUN or not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        if mask_text(text) != text:
            plain = mask(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
            write_text(file, to_yaml(masked_texts(plain)))


def masked_texts(value: Any) -> Any:
    """Plain values whose texts, such as arguments of a command line, hold no credentials."""
    if isinstance(value, dict):
        return {key: masked_texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked_texts(inner) for inner in value]
    return mask_text(value) if isinstance(value, str) else value


def jobs(config: DictConfig) -> list[list[str]]:
    """The command-line arguments of every job of a sweep."""
    arguments = [str(argument) for argument in config.hydra.overrides.task]
    params = config.hydra.sweeper.get("params") or {}
    arguments += [f"{key}={value}" for key, value in params.items()]
    overrides = OverridesParser.create().parse_overrides(arguments)
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]
