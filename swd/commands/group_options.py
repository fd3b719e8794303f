"""Options of the configuration's groups by name, as lists on the command line name them; imports nothing large."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from swd.commands.cli import composing
from swd.config import to_plain
from swd.types import UserError


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Hydra's composition, where no command line has started it."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with composing():
        yield


def options(group: str) -> list[str]:
    """Names of the options of a group of the configuration."""
    with hydra_ready():
        found: list[str] = GlobalHydra.instance().config_loader().get_group_options(group)
    return [name for name in found if not name.startswith("_")]


def check_option(group: str, name: Any, key: str) -> None:
    """Raise UserError if a group has no option of this name; arguments as of `option`."""
    known = options(group)
    if name not in known:
        raise UserError(f"{key}: there is no {group} {name!r}; choose from {', '.join(known)}")


def option(group: str, name: Any, key: str) -> dict[str, Any]:
    """An option of a group as plain values.

    Args:
        group: a folder of the configuration.
        name: the option's.
        key: what the user calls the setting.

    Raises:
        UserError: if there is no such option.
    """
    node: dict[str, Any] = composed(group, name, key)[group]
    return node


def composed(group: str, name: Any, key: str) -> dict[str, Any]:
    """An option of a group, as `option`, under the group's name, and beside it what its file sets in other groups."""
    check_option(group, name, key)
    with hydra_ready():
        found: dict[str, Any] = to_plain(compose(f"{group}/{name}"))
    return found


def metric_node(entry: Any) -> tuple[str | None, dict[str, Any]]:
    """Name and constructor of an entry of `metrics`: a name, or a mapping that changes some of its options.

    The name is None for a constructor (`_target_`), whose metric names itself.
    """
    given = _metric_mapping(entry)
    if "_target_" in given:
        return None, given
    more = {key: value for key, value in given.items() if key not in ("metric", "name")}
    merged: Any = OmegaConf.to_container(OmegaConf.merge(option("metric", given["metric"], "metrics"), more))
    return given["name"], merged


def check_metrics(cfg: DictConfig) -> None:
    """Raise UserError for an entry of `metrics` that names no metric; none is composed, which takes long."""
    for entry in to_plain(cfg.metrics):
        given = _metric_mapping(entry)
        if "_target_" not in given:
            check_option("metric", given["metric"], "metrics")


def _metric_mapping(entry: Any) -> dict[str, Any]:
    """An entry of `metrics` as a mapping that has `metric` and `name`, or a `_target_`."""
    given = {"metric": entry} if isinstance(entry, str) else entry
    if isinstance(given, dict) and "_target_" in given:
        return given
    if not isinstance(given, dict) or not isinstance(given.get("metric"), str):
        raise UserError(f"metrics: {entry!r} is no metric; give a name, or {{metric: NAME, OPTION: VALUE}}")
    name = given.get("name", given["metric"])
    if not isinstance(name, str):
        raise UserError(f"metrics: name={name!r} is no name; use letters and digits")
    return given | {"name": name}
