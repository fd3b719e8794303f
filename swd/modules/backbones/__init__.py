"""One file per family of networks, under the contract of `base.py`."""

from __future__ import annotations

import importlib
import pkgutil

from swd.modules.backbones.base import Backbone
from swd.types import UserError


def known_families() -> list[str]:
    """Names of the families in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def load_family(name: str) -> type[Backbone]:
    """The backbone of a family.

    Args:
        name: a module of this package, or the dotted name of any other that defines one `Backbone`.

    Raises:
        UserError: if there is no such module, or it does not define exactly one backbone.
    """
    path = name if "." in name else f"{__name__}.{name}"
    if "." not in name and name not in known_families():
        raise UserError(
            f"model.family={name} is not known; use one of {', '.join(known_families())}, or a module's name"
        )
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise UserError(f"model.family={name} cannot be imported ({error}); check its spelling") from None
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Backbone) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise UserError(f"model.family={name} defines {len(found)} backbones; a family is one subclass of Backbone")
    return found[0]
