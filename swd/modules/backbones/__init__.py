"""One file per family of networks, under the contract of `base.py`."""

from __future__ import annotations

import importlib
import inspect
import sys

from swd.modules.backbones.base import Backbone
from swd.modules.family_names import known_families, unknown_family
from swd.types import UserError


def load_family(name: str) -> type[Backbone]:
    """The backbone of a family.

    Args:
        name: a module of this package, or the dotted name of a module that is imported already and defines one
            `Backbone`. Names in files are not trusted, so nothing is imported here: `allow='[my_package.my_family]'` on
            the command line does that.

    Raises:
        UserError: if there is no such module, or it does not define exactly one backbone.
    """
    # The module.
    if name in known_families():
        module = importlib.import_module(f"{__name__}.{name}")
    elif "." in name and name in sys.modules:
        module = sys.modules[name]
    else:
        raise unknown_family(name)

    # The one backbone that it defines itself.
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Backbone)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise UserError(f"model.family={name} defines {len(found)} backbones; a family is one subclass of Backbone")
    return found[0]
