"""Where a run's metrics go: its `metrics.csv` always, and wandb, TensorBoard or another service on request."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig

from swd.config import allowed_here, build_node, node_of, stored
from swd.io.masking import mask_text
from swd.types import UserError

WANDB = ".WandbLogger"
TENSORBOARD = ".TensorBoardLogger"
WANDB_ID = "wandb_id"
"""Key of `run.json` with the id of the run on wandb."""
WITHOUT_WANDB = "logger.offline=true keeps the log in the run's folder, logger=csv does without wandb"
WANDB_SILENT = ("offline", "dryrun", "disabled")


def build_loggers(cfg: DictConfig, folder: Path, checkpoint: str | None = None) -> list[Logger]:
    """The configured logger, and before it the one that writes `metrics.csv`; none at all with `logger=none`.

    Args:
        cfg: the configuration.
        folder: of the run.
        checkpoint: the one that the run goes on from; its run on wandb goes on too.
    """
    node = node_of(cfg, "logger")
    if not node:
        return []
    if str(node.get("_target_")).endswith(WANDB):
        node |= {"name": node.get("name") or run_name(cfg), "id": node.get("id") or wandb_id(checkpoint)}
    chosen: Logger = build_node(node, "logger", allowed_here(cfg))
    return [chosen] if isinstance(chosen, CSVLogger) else [CSVLogger(str(folder), name=None, version=""), chosen]


def run_name(cfg: DictConfig) -> str:
    """The run's folder below `output`: no two runs have the same one, nor two jobs of a sweep."""
    plain = stored(cfg)  # no value of the environment, no credential
    folder = Path(str(plain["folder"]))
    with suppress(ValueError):
        return str(folder.relative_to(str(plain["output"])))
    return folder.name


def wandb_id(checkpoint: str | None) -> str:
    """The id on wandb of the run that a checkpoint is of, else a new one."""
    if checkpoint is not None:
        with suppress(OSError, ValueError, AttributeError):
            known = json.loads((Path(checkpoint).parent.parent / "run.json").read_text(encoding="utf-8")).get(WANDB_ID)
            if isinstance(known, str) and known.isalnum():
                return known
    return secrets.token_hex(4)


def recorded_id(loggers: Sequence[Logger]) -> dict[str, str]:
    """The record of the run on wandb in `run.json`; empty without one."""
    found = [str(logger.version) for logger in loggers if isinstance(logger, WandbLogger)]
    return {WANDB_ID: found[0]} if found else {}


def check_logger(cfg: DictConfig, trial: bool) -> None:
    """Raise UserError where wandb would ask for an account and nobody can answer, or TensorBoard's writer is missing.

    Args:
        cfg: the configuration.
        trial: whether the run only tries out whether everything works, and logs nothing.
    """
    node = node_of(cfg, "logger")
    target = str(node.get("_target_"))
    if target.endswith(TENSORBOARD) and not (find_spec("tensorboardX") or find_spec("tensorboard")):
        raise UserError(
            "logger=tensorboard needs a writer of its files: pip install tensorboardX; logger=csv does without"
        )
    settings = node.get("settings") or {}
    offline = node.get("offline") or trial or settings.get("mode") in WANDB_SILENT
    if target.endswith(WANDB) and not offline and not _logged_in(settings):
        raise UserError(f"logger=wandb: nobody is logged in; run `wandb login`, or {WITHOUT_WANDB}")


def _logged_in(settings: dict[str, Any]) -> bool:
    """Whether wandb has a key, needs none, or can ask for it."""
    if os.environ.get("WANDB_MODE") in WANDB_SILENT or settings.get("api_key") or sys.stdin.isatty():
        return True
    if any(os.environ.get(key) for key in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    for file in (os.environ.get("NETRC", "~/.netrc"), "~/_netrc", "~/.config/wandb/settings", "wandb/settings"):
        with suppress(OSError, ValueError):
            text = Path(file).expanduser().read_text(encoding="utf-8")
            host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "wandb"
            if host in text or "api_key" in text:
                return True
    return False


def start_loggers(trainer: Trainer, cfg: DictConfig) -> None:
    """Start the loggers, and give them the whole configuration: resolved, without credentials.

    wandb stores the command line, and gets it without credentials too.
    """
    given, sys.argv = sys.argv, [mask_text(argument) for argument in sys.argv]
    try:
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # `config.yaml` lies beside its file
                logger.log_hyperparams(stored(cfg))
    finally:
        sys.argv = given


def end_loggers(trainer: Trainer, failed: bool) -> None:
    """End the run on wandb: else the next one of this process, as of a sweep, would write into it."""
    if trainer.is_global_zero and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))
