"""Names of the families of networks, from the files of their package; nothing large is imported for them."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from swd.types import UserError

_NO_FAMILIES = ("base", "sdxl_refiner")
"""Modules beside the families that are none: the contract, and SDXL's refiner, which only draws training sets."""


def known_families() -> list[str]:
    """Names of the families in `swd.modules.backbones`."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent / "backbones")])
    return sorted(module.name for module in modules if module.name not in _NO_FAMILIES)


def unknown_family(name: str) -> UserError:
    """The error for a name that is no family's."""
    return UserError(
        f"model.family={name} is not known; use one of {', '.join(known_families())}, or a module of your own that "
        "the command line allows: allow='[my_package.my_family]'"
    )
