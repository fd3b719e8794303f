"""The schema: every config node with a `_target_` is checked against the constructor's typed signature."""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from swd.types import UserError

NODES = ("task", "model", "schedule", "data", "trainer", "logger")
"""Groups whose option is one constructor."""
COLLECTIONS = ("loss", "callbacks")
"""Groups whose option is several constructors by name."""
SPECIAL = {"_target_", "_convert_", "_recursive_", "_partial_", "_args_"}


def check(cfg: DictConfig, root: Mapping[str, Any] | None = None) -> None:
    """Check a composed configuration before anything is built.

    Args:
        cfg: the configuration.
        root: types of the plain values at the root; None: those are not looked at.

    Raises:
        UserError: naming the key, the value and the fix.
    """
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration does not resolve: {one_line(error)}") from None
    assert isinstance(plain, dict)
    if root is not None:
        _check_root(plain, root)
    for group in COLLECTIONS:
        _check_collection(plain.get(group), group)
    # The task repeats the groups that it is built from: name their keys where the user knows them.
    _check_node({key: plain[key] for key in sorted(plain, key=lambda k: k == "task")}, "")


def _check_root(plain: dict[str, Any], root: Mapping[str, Any]) -> None:
    known = [*root, *NODES, *COLLECTIONS]
    for key, value in plain.items():
        if key not in known:
            raise UserError(_unknown_key(key, key, known))
        if key in root and not fits(value, root[key]):
            raise UserError(_bad_value(key, value, root[key]))


def _check_collection(nodes: Any, group: str) -> None:
    """Every entry must be a constructor: a misspelt name would leave a stray dictionary."""
    if not isinstance(nodes, dict):
        return
    known = [name for name, node in nodes.items() if isinstance(node, dict) and "_target_" in node]
    for name, node in nodes.items():
        if node is None:
            raise UserError(f"{group}.{name} is null; to leave it out, use ~{group}.{name}")
        if name not in known:
            raise UserError(_unknown_key(f"{group}.{name}", name, known))


def _check_node(node: Any, path: str) -> None:
    if isinstance(node, list):
        for i, value in enumerate(node):
            _check_node(value, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_call(node, path)
    for key, value in node.items():
        _check_node(value, f"{path}.{key}" if path else str(key))


def _check_call(node: dict[str, Any], path: str) -> None:
    try:
        target = hydra.utils.get_object(node["_target_"])
    except Exception:
        raise UserError(f"{path}._target_={node['_target_']} cannot be imported; check its spelling") from None
    function = target.__init__ if inspect.isclass(target) else target
    parameters = dict(inspect.signature(target).parameters)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    try:
        hints = get_type_hints(function)
    except Exception:  # a third party's annotations may not resolve; its own checks then apply
        hints = {}
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key not in parameters and not open_ended:
            raise UserError(_unknown_key(f"{path}.{key}", key, list(parameters)))
        if key in hints and not fits(value, hints[key]):
            raise UserError(_bad_value(f"{path}.{key}", value, hints[key]))
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and key not in node and not node.get("_partial_"):
            raise UserError(f"{path}.{key} is missing; {node['_target_']} needs it")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain configuration value can be passed where `hint` is annotated."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (isinstance(value, dict) and "_target_" in value):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return value in args
    if hint is bool or isinstance(value, bool):
        return hint is bool and isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float)
    if hint in (int, str):
        return isinstance(value, hint)
    if origin is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, list) and len(value) == len(args) and all(map(fits, value, args))
    if origin in (list, tuple, Sequence, set):
        return isinstance(value, list) and all(fits(v, args[0]) for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(v, args[1]) for v in value.values())
    return not isinstance(value, int | float | str | dict | list)


def _unknown_key(path: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    return f"unknown key {path.lstrip('.')}; {hint}"


def _bad_value(path: str, value: Any, hint: Any) -> str:
    return f"{path}={value!r} is not valid; expected {describe(hint)}"


def describe(hint: Any) -> str:
    """A type in words that a user can act on."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if hint is type(None):
        return "null"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(describe(a) for a in args)})"
    if origin in (list, tuple, Sequence):
        return f"a list of {describe(args[0])}"
    return getattr(hint, "__name__", str(hint))


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """Where two plain configurations differ first, "KEY was OLD, now NEW"; None where they agree."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            difference = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
            if difference:
                return difference
        return None
    same = list(old) == list(new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else old == new
    return None if same else f"{path} was {old}, now {new}"


def one_line(error: BaseException) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split())


def choice(group: str) -> str | None:
    """Which option of a config group was chosen for this run, None outside Hydra."""
    if not HydraConfig.initialized():
        return None
    chosen: Any = HydraConfig.get().runtime.choices.get(group)
    return chosen


def to_plain(cfg: DictConfig | ListConfig) -> Any:
    """The resolved configuration as plain dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True)
