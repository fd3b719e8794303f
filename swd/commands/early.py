"""Values that commands take from lists of names, checked before a command and all that it needs is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from omegaconf import DictConfig, OmegaConf

from swd.commands.gpus import checked_gpu
from swd.commands.group_options import check_metrics
from swd.modules.family_names import known_families, unknown_family

CHECKS: Mapping[str, Callable[[DictConfig], object]] = {"plan": checked_gpu, "evaluate": check_metrics}
"""What a command checks by itself, by its name. The command checks it again, for those who call it from Python."""


def check_named_values(command: str, cfg: DictConfig) -> None:
    """Check the values at the root that only this command has, and the model's family.

    Raises:
        UserError: naming the value and the fix.
    """
    family = OmegaConf.select(cfg, "model.family")
    if isinstance(family, str) and "." not in family and family not in known_families():
        raise unknown_family(family)
    if command in CHECKS:
        CHECKS[command](cfg)
