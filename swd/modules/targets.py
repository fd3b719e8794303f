"""Names of linear layers, as peft reads them: a layer's path, or the end of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from swd.types import UserError


def is_target(layer: str, targets: Collection[str]) -> bool:
    """Whether a layer is one of `targets`: by its path `a.b.c`, or by the end of it, `b.c` or `c`."""
    parts = layer.split(".")
    return any(".".join(parts[start:]) in targets for start in range(len(parts)))


def targets_of(modules: set[str], layers: Sequence[str]) -> list[str]:
    """Short names that together mean exactly `modules` among `layers`."""
    found: set[str] = set()
    for module in sorted(modules):
        parts = module.split(".")
        for start in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[start:])
            meant = (layer for layer in layers if is_target(layer, [end]))
            if start == 0 or (not parts[start].isdigit() and modules.issuperset(meant)):
                found.add(end)
                break
    return sorted(found)


def names_for_peft(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names with which peft adapts the linear layers that `targets` name.

    Peft refuses a name that a list of modules elsewhere in the network has too; the layers' paths take its place.

    Args:
        network: the network, without adapters.
        targets: names of linear layers.
    """
    modules = dict(network.named_modules())
    names: list[str] = []
    for target in targets:
        meant = [name for name in modules if is_target(name, [target])]
        is_ambiguous = any(isinstance(modules[name], nn.ModuleList) for name in meant)
        names += [name for name in meant if isinstance(modules[name], nn.Linear)] if is_ambiguous else [target]
    return names


def covered_share(network: nn.Module, targets: Sequence[str]) -> float:
    """Share of the weights in linear layers that lie in layers which `targets` name, 0 to 1."""
    sizes = {name: m.in_features * m.out_features for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    return sum(size for name, size in sizes.items() if is_target(name, targets)) / max(1, sum(sizes.values()))


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raise UserError for a target that names no linear layer: it would silently stay without an adapter."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not targets:
        raise UserError("model.targets is empty; name the linear layers to adapt, e.g. [to_q, to_k, to_v]")
    for target in targets:
        if not any(is_target(layer, [target]) for layer in layers):
            raise UserError(f"model.targets: no linear layer of this model is called {target!r}; check its spelling")
