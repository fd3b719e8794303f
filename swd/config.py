"""Checks configurations and builds what they describe.

Every node with a `_target_` must name a class on an allow list, with arguments that fit its constructor's signature.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import pkgutil
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from swd.io.limits import LARGEST_FLOAT, LARGEST_INTEGER, RANGES
from swd.io.masking import is_secret, mask, mask_url, secrets_of_environment
from swd.types import UserError, WrongProcess

NODES = ("task", "model", "schedule", "data", "trainer", "logger")
"""Groups whose option is one constructor."""
COLLECTIONS = ("loss", "callbacks")
"""Groups whose option is a dictionary of constructors, each under a name of its own."""
OPTIONAL = ("callbacks", "logger")
"""Groups that may be left out: `callbacks=null`."""
OPTIONAL_TABLES = ("timing",)
"""Tables of plain values that may be left out: `timing=null`."""
GIVEN: Mapping[str, Sequence[str]] = {"task": ("schedule", "loss", "model")}
"""Groups that are built once and passed to the constructor of another group, if it has an argument of that name. The
model comes last: its files may have to be downloaded, and a mistake in the others is to be told before."""
REFERRED = ("recipe", "sample_prompts")
"""Keys at the root that are read only where another one refers to them, as in `lr: ${recipe.lr}`."""
SCHEDULES: Mapping[str, tuple[str, str]] = {
    "flow": ("image_4step, image_6step or the model's own", "full_4step or full_2step"),
    "epsilon": ("sdxl_4step", "sdxl_full_4step or sdxl_full_2step"),
}
"""Options of `schedule` to recommend, by the process of their noise levels: scale by scale, and all of one size."""
GROUP = Any
"""Marks a root key of a command that is one of the groups above; its values are checked against constructors."""
SPECIAL = {"_target_", "_convert_", "_partial_"}
"""Hydra's own keys that a node may hold; others of the kind `_name_` are refused."""

OWN: Mapping[str, Mapping[str, Any]] = {
    "trainer": {"num_nodes": int | Literal["auto"], "timeout": float, "memory_gb": float | None}
}
"""Arguments of a group, with their types, that its command reads before it calls the constructor with the others."""

FOREIGN = {
    "ckpt_path": "resume=FILE",
    "checkpoint": "resume=FILE",
    "epochs": "trainer.max_steps=ITERATIONS",
    "max_epochs": "trainer.max_steps=ITERATIONS",
    "max_steps": "trainer.max_steps=ITERATIONS",
    "steps": "trainer.max_steps=ITERATIONS",
    "iterations": "trainer.max_steps=ITERATIONS",
    "lr": "task.lr=RATE",
    "learning_rate": "task.lr=RATE",
    "batch_size": "data.batch_size=NUMBER",
    "gpus": "trainer.devices=NUMBER",
    "devices": "trainer.devices=NUMBER",
    "precision": "model.precision=bf16",
    "output_dir": "output=FOLDER",
    "out": "output=FOLDER",
    "prompt": "prompts='[TEXT]'",
}
"""Names that other programs give to settings, with this project's name for each, for commands that train."""
FOREIGN_TO: Mapping[str, Mapping[str, str]] = {
    "train": FOREIGN | {"prompt": "sample_prompts='[TEXT]'"},
    "demo": FOREIGN
    | {"prompt": "sample_prompts='[TEXT]'", "preset": "experiment=demo_ci or experiment=demo_full, or neither"},
    "sample": {name: FOREIGN[name] for name in ("precision", "output_dir", "out", "prompt")}
    | {"checkpoint": "adapter=RUN", "ckpt_path": "adapter=RUN"},
    "generate": {"precision": FOREIGN["precision"], "prompt": "prompts=FILE", "output_dir": "out=FOLDER"},
    "evaluate": {"precision": FOREIGN["precision"], "prompt": "prompts=FILE", "adapter": "models='[RUN]'"}
    | {"dtype": "model.precision=bf16, or timing.precision=fp16", "timing.dtype": "timing.precision=fp16"}
    | {"compile": "timing.compile=whole", "tiny_vae": "timing.tiny_vae=FOLDER"},
    "encode": {"output_dir": "out=FOLDER"},
    "plan": {"gpus": "n_gpus=NUMBER", "devices": "n_gpus=NUMBER", "memory": "gpu=80GB"},
    "import": {"output_dir": "out=FOLDER"},
    "spectra": {"out": "folder=FOLDER", "output_dir": "folder=FOLDER", "data": "cache=FOLDER", "path": "cache=FOLDER"},
    "dashboard": {"out": "to=FILE", "name": "title=TEXT"},
    "export": {"output_dir": "to=FOLDER", "out": "to=FOLDER", "adapter": "run=RUN", "checkpoint": "run=RUN"},
    "report": {"output": "out=FILE", "run": "folders=[RUN]", "runs": "folders=[RUN]"},
    "compare": {"output": "out=FILE", "a": "paths=[A,B]", "b": "paths=[A,B]", "votes": "paths=[FILE]"},
}
"""The same for every command: those that do not train know fewer of these settings, some under other names."""

ELSEWHERE: Mapping[str, str] = {"preset": "swd demo has experiment=demo_ci and experiment=demo_full in its place"}
"""Names of settings that one command alone had before, with the place where they went."""

_command = "train"

PRETRAINED = "swd.modules.pretrained.Pretrained"

ALLOWED: Mapping[str, Collection[str]] = {
    "swd.modules.distiller": ("Distiller",),
    "swd.modules.pretrained": ("Pretrained",),
    "swd.modules.flow_matching": ("FlowMatching",),
    "swd.shapes.train_judge": ("JudgeTask", "JudgeData"),
    "swd.shapes.train_vae": ("VAETask",),
    "swd.schedule": ("ScaleSchedule",),
    "swd.losses": ("DMD", "MMD", "GAN"),
    "swd.data.datamodule": ("PairData",),
    "swd.data.encoded": ("EncodedPairs",),
    "swd.data.picture_files": ("FolderDataset",),
    "swd.shapes.dataset": ("ShapesDataset",),
    "swd.data.webdataset": ("ShardData",),
    "swd.callbacks": (
        "Checkpoint",
        "Metrics",
        "Monitor",
        "Progress",
        "Samples",
        "SaveAdapter",
        "Sentinel",
        "Students",
        "Validation",
    ),
    "swd.callbacks.fixed_losses": ("FixedLosses",),
    "swd.metrics.fid": ("Frechet",),
    "swd.metrics.kid": ("Kid",),
    "swd.metrics.cmmd": ("Cmmd",),
    "swd.metrics.precision_recall": ("Precision", "Recall"),
    "swd.metrics.text_image": ("ClipFeatures", "ClipScore", "PickScore"),
    "swd.metrics.diversity": ("Diversity",),
    "swd.metrics.external": ("External",),
    "swd.metrics.inception": ("InceptionFeatures",),
    "swd.metrics.dinov2": ("Dinov2Features",),
    "swd.metrics.clip_pictures": ("ClipPictureFeatures",),
    "swd.metrics.preparation": ("CentreCrop", "ShortSide", "Squash"),
    "swd.shapes.metrics": ("JudgeFeatures", "JudgeMmd", "ShapesAccuracy"),
    "swd.modules.sharding": ("DDP", "Sharded"),
    "lightning": ("Trainer",),
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.loggers": (
        "CSVLogger",
        "TensorBoardLogger",
        "WandbLogger",
        "MLFlowLogger",
        "CometLogger",
    ),
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "LearningRateMonitor",
        "ModelCheckpoint",
        "ModelSummary",
        "OnExceptionCheckpoint",
        "RichModelSummary",
        "ThroughputMonitor",
        "Timer",
    ),
    "lightning.pytorch.profilers": ("SimpleProfiler", "AdvancedProfiler", "PyTorchProfiler", "XLAProfiler"),
    "lightning.pytorch.strategies": (
        "DDPStrategy",
        "FSDPStrategy",
        "ModelParallelStrategy",
        "DeepSpeedStrategy",
        "SingleDeviceStrategy",
    ),
    "lightning.pytorch.plugins.environments": (
        "SLURMEnvironment",
        "TorchElasticEnvironment",
        "LightningEnvironment",
        "MPIEnvironment",
        "LSFEnvironment",
        "KubeflowEnvironment",
    ),
}
"""Classes that a configuration may build, by package; none runs or imports code that its arguments name.

`allow='[my_package.MyTerm]'` on the command line adds to it, and nothing else does.
"""

MOVED: Mapping[str, str] = {
    "swd.data.images.FolderDataset": "swd.data.picture_files.FolderDataset",
    "swd.data.shapes.ShapesDataset": "swd.shapes.dataset.ShapesDataset",
    "swd.modules.pretrain.flow.FlowMatching": "swd.modules.flow_matching.FlowMatching",
    "swd.modules.pretrain.judge.JudgeData": "swd.shapes.train_judge.JudgeData",
    "swd.modules.pretrain.judge.JudgeTask": "swd.shapes.train_judge.JudgeTask",
    "swd.modules.pretrain.vae.VAETask": "swd.shapes.train_vae.VAETask",
    "swd.callbacks.fixed.FixedLosses": "swd.callbacks.fixed_losses.FixedLosses",
}
"""Names of classes in version 0.1.0, whose configurations still load, and their names now."""


# The allow list


def listed() -> list[str]:
    """Dotted names of all classes in `ALLOWED`."""
    return [f"{package}.{own}" for package, classes in ALLOWED.items() for own in classes]


def allowed_here(cfg: DictConfig) -> tuple[str, ...]:
    """The names that the command line adds to what may be built.

    Raises:
        UserError: if it is no list of names, or comes from a file: a file that somebody sends must not allow itself
            anything.
    """
    names = OmegaConf.to_container(cfg, resolve=False).get("allow") or []  # type: ignore[union-attr]
    if not fits(names, list[str]):
        raise UserError(f"allow={names!r} is not valid; expected a list of names, as in allow='[my_package.MyTerm]'")
    if names and HydraConfig.initialized():
        given = [override for override in HydraConfig.get().overrides.task if re.match(r"\+*allow=", override)]
        if not given:
            raise UserError("allow is set in a file, and only the command line may: give allow='[my_package.MyTerm]'")
    for name in names:
        import_allowed(name)
    return tuple(names)


def import_allowed(name: str) -> Any:
    """The class, function or module that the command line allows.

    Raises:
        UserError: if it cannot be imported, or is neither callable nor a module.
    """
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:  # importing a module runs it, and it may fail in any way
        reason = f"{type(error).__name__}: {one_line(error)}"[:200]
        raise UserError(
            f"allow={name} cannot be imported ({reason}); give the full dotted name of a class of your own, and put "
            "its folder on PYTHONPATH"
        ) from None
    if not (callable(found) or inspect.ismodule(found)):
        raise UserError(f"allow={name} is a {type(found).__name__}; name a class, or the module of a family")
    return found


def target_of(name: Any, path: str, allow: Collection[str] = ()) -> Any:
    """The class that a `_target_` names, if a configuration may build it; imports nothing that is not on the list.

    Args:
        name: dotted, of the package that lists it or of the module that defines it.
        path: where the node is, for messages.
        allow: names beyond `ALLOWED`.

    Raises:
        UserError: if it is not on the list.
    """
    if isinstance(name, str):
        if name in allow:
            return import_allowed(name)
        name = MOVED.get(name, name)
        module, _, own = name.rpartition(".")
        for package, classes in ALLOWED.items():
            if own in classes and (module == package or module.startswith(f"{package}.")):
                found = getattr(importlib.import_module(package), own)
                if module in (package, found.__module__):
                    return found
    close = difflib.get_close_matches(str(name), listed(), 1, cutoff=0.8)
    raise UserError(
        f"{path}._target_={name} is not among the classes that a configuration may build; check its spelling"
        + (f" (did you mean {close[0]!r}?)" if close else "")
        + ", or name a class of your own on the command line: allow='[my_package.MyClass]'"
    )


def renamed(plain: Any) -> Any:
    """Plain values with the names that classes have now: see `MOVED`."""
    if isinstance(plain, dict):
        return {
            key: MOVED.get(value, value) if key == "_target_" and isinstance(value, str) else renamed(value)
            for key, value in plain.items()
        }
    return [renamed(value) for value in plain] if isinstance(plain, list) else plain


# Checking


def check(
    cfg: DictConfig,
    root: Mapping[str, Any] | None = None,
    allow: Collection[str] | None = None,
    look: Callable[[Any, str], Parameters | None] | None = None,
) -> None:
    """Check a composed configuration before anything is built.

    Args:
        cfg: the configuration.
        root: types of the plain values at the root; None: those are not looked at.
        allow: names that may be built beyond `ALLOWED`; None: those of `allow=` on the command line.
        look: returns the parameters of a `_target_`, given it and the path of its node, or None for one that is not
            looked at; None: `parameters_of`, which imports it.

    Raises:
        UserError: naming the key, the value and the fix.
    """
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration does not resolve: {unresolved(error)}") from None
    except RecursionError:
        raise UserError("configuration does not resolve: values refer to each other in a circle") from None
    assert isinstance(plain, dict)
    if root is not None:
        _check_root(plain, root)
    if isinstance(plain.get("task"), dict):
        plain["task"] = own_settings(plain["task"], "task", plain)
    _check_secrets(plain, "")
    allow = allowed_here(cfg) if allow is None else allow
    look = partial(parameters_of, allow=allow) if look is None else look
    for group in COLLECTIONS:
        _check_collection(plain.get(group), group)
    # The task refers to values of other groups; checked last, a wrong value is reported under the key that was set.
    order = sorted(plain, key=lambda key: (key == "task", key in COLLECTIONS))
    _check_node({key: plain[key] for key in order}, "", look)
    for key, value in plain.items() if root is not None else ():
        _check_group(key, value)
    if root is not None:
        check_read(cfg, look)


def _check_root(plain: dict[str, Any], root: Mapping[str, Any]) -> None:
    _check_values(dict(sorted(plain.items(), key=lambda item: item[0] == "folder")), root, "")  # it may repeat `out`
    if {"name", "output"} <= set(root):
        check_names(plain.get("name"), plain.get("output"))


def _check_values(plain: Any, known: Mapping[str, Any], path: str) -> None:
    """Raise UserError unless plain values have the types of `known`; a type may itself be such a table of types."""
    for key, value in plain.items():
        where = f"{path}{key}"
        hint = known.get(key)
        if key not in known:
            raise UserError(_unknown_key(where, key, list(known)))
        if isinstance(hint, Mapping):
            if value is None and where in OPTIONAL_TABLES:
                continue
            if not isinstance(value, dict):
                raise UserError(f"{where}={value!r} is not valid; it has the keys {', '.join(hint)}")
            _check_values(value, hint, f"{where}.")
        elif not fits(value, hint):
            raise UserError(_bad_value(where, value, hint))
        if where == "seed":  # commands check their other numbers, with limits of their own
            _check_range(key, value, where)
        if value == "":
            raise UserError(f"{where} is empty; give {where}=VALUE")


def _check_group(key: str, value: Any) -> None:
    if key in NODES and key not in OPTIONAL and not (isinstance(value, dict) and "_target_" in value):
        raise UserError(f"{key}={value!r} names no {key}; leave it out for the default, or choose one: {key}=NAME")
    if key in (*COLLECTIONS, *OPTIONAL) and not (value is None or isinstance(value, dict)):
        raise UserError(f"{key}={value!r} is no option of {key}; --help lists them")


def check_read(cfg: DictConfig, look: Callable[[Any, str], Parameters | None]) -> None:
    """Raise UserError for a key of the command line that nothing reads in this configuration.

    A group that is built is read whole. The keys of `REFERRED`, and groups that the task's constructor does not take,
    are read only where another value refers to them.

    Args:
        cfg: the configuration.
        look: as of `check`.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    indirect = [key for key in REFERRED if key in raw]
    if isinstance(raw.get("task"), dict):
        taken = look(raw["task"].get("_target_"), "task")
        indirect += [part for part in GIVEN["task"] if taken is not None and part not in taken.names]
    read = references({key: value for key, value in raw.items() if key not in indirect}, raw)
    for key in given_keys():
        nested = [name for name in read if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.")]
        if key.partition(".")[0] in indirect and not nested:
            raise UserError(
                f"{key} is read by nothing here: whatever could refer to it has a value of its own; remove it"
            )


def references(value: Any, plain: Any) -> set[str]:
    """Dotted names that unresolved values refer to, directly or through one another.

    Args:
        value: the values whose references are followed.
        plain: the whole configuration, unresolved.
    """
    found: set[str] = set()
    waiting = [value]
    while waiting:
        names = set(re.findall(r"\$\{([\w.]+)\}", str(waiting.pop()))) - found
        found |= names
        for name in names:
            part = plain
            for key in name.split("."):
                part = part.get(key) if isinstance(part, dict) else None
            waiting.append(part)
    return found


def overrides() -> list[str]:
    """Arguments of the command line; empty if the program was not started from one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def given_keys() -> list[str]:
    """Keys that the command line sets or removes, dotted; without arguments that choose an option of a group."""
    found = []
    for argument in overrides():
        key, sign, _ = argument.partition("=")
        key = key.lstrip("+~")
        if not re.search("[@/]", key) and (
            not sign or key not in (*NODES, *COLLECTIONS, "experiment", "recipe", "sheet")
        ):
            found.append(key)
    return found


def check_names(name: Any, output: Any) -> None:
    """Raise UserError unless results of the run `name` lie in a folder below `output`."""
    for key, value in (("name", name), ("output", output)):
        if not isinstance(value, str):
            raise UserError(f"{key}={value!r} is not valid; expected text")
        if not (value.strip() and value.isprintable()):
            raise UserError(f"{key}={value!r} is no name of a folder; give {key}=NAME")
    parts = Path(name).parts
    if Path(name).is_absolute() or not parts or ".." in parts or name.startswith("~"):
        raise UserError(
            f"name={name} would leave output={output}; give a plain name, and say where results go with output=FOLDER"
        )
    long = max((part for part in (*parts, *Path(output).parts)), key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(long)) > 240:  # file systems take 255 bytes, and names of temporary files are a little longer
        raise UserError(f"{long[:60]}... is {len(os.fsencode(long))} bytes long; names of folders take at most 240")


def _check_secrets(value: Any, path: str) -> None:
    """Raise UserError for a credential of the environment in an ordinary value, which files would then hold."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if not is_secret(key):
                _check_secrets(inner, f"{path}.{key}" if path else str(key))
    if not isinstance(value, str):
        return
    outside_urls = mask_url(value) if "://" in value else value
    for name, secret in secrets_of_environment().items():
        if secret in outside_urls:
            raise UserError(
                f"{path} holds the value of the environment variable {name}, and would be written down; leave it out"
            )


def _check_collection(nodes: Any, group: str) -> None:
    """Raise UserError for an entry that is no constructor, as `loss.mdm.weight=1` makes for a misspelt name."""
    if not isinstance(nodes, dict):
        return
    known = [name for name, node in nodes.items() if isinstance(node, dict) and "_target_" in node]
    for name, node in nodes.items():
        if node is None:
            raise UserError(f"{group}.{name} is null; to leave it out, use ~{group}.{name}")
        if name not in known:
            raise UserError(_unknown_key(f"{group}.{name}", name, known))


def _check_node(node: Any, path: str, look: Callable[[Any, str], Parameters | None]) -> None:
    if isinstance(node, list):
        for i, value in enumerate(node):
            _check_node(value, f"{path}[{i}]", look)
    elif isinstance(node, int | float) and not isinstance(node, bool):
        _check_number(node, path)
    if not isinstance(node, dict):
        return
    if "_target_" in node and (parameters := look(node["_target_"], path)) is not None:
        _check_call(node, path, parameters)
    for key, value in node.items():
        _check_node(value, f"{path}.{key}" if path else str(key), look)


def _check_number(value: float, path: str) -> None:
    """Raise UserError for infinities, NaN, and numbers beyond 64-bit integers and 32-bit floats."""
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise UserError(
            f"{path}={value if abs(value) < 10**30 else 'a longer number'} is too large; use at most 2^63 - 1"
        )
    if not math.isfinite(value) or abs(value) > LARGEST_FLOAT:
        raise UserError(f"{path}={value} is not a finite number of 32 bits; use one below 3.4e38")


def _check_range(key: str, value: Any, path: str) -> None:
    """Raise UserError unless a number is in the range that arguments of the name `key` have, if they have one."""
    problem = RANGES[key].problem(value) if key in RANGES else None
    if problem:
        _check_number(value, path)
        raise UserError(f"{path}={value}; {problem}")


@dataclass(frozen=True)
class Parameters:
    """The parameters of a constructor.

    Attributes:
        names: of all that can be given by name, in their order.
        required: those without a default.
        hints: their types, as far as they are known.
        open_ended: whether any other name is taken too.
        ours: whether numbers have the ranges that this project gives to their names.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    hints: Mapping[str, Any]
    open_ended: bool
    ours: bool


def parameters_of(name: Any, path: str, allow: Collection[str] = ()) -> Parameters:
    """The parameters of a `_target_`, which is imported; arguments and errors as of `target_of`."""
    target = target_of(name, path, allow)
    function = target.__init__ if inspect.isclass(target) else target
    try:
        found = inspect.signature(target).parameters
    except (TypeError, ValueError):
        raise UserError(f"{path}._target_={name} is nothing that can be built; name a class") from None
    try:
        hints = get_type_hints(function)
    except Exception:  # a third party's annotations may not resolve; its own checks then apply
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return Parameters(
        tuple(found),
        tuple(key for key, value in found.items() if value.kind in named and value.default is value.empty),
        hints,
        any(value.kind is value.VAR_KEYWORD for value in found.values()),
        is_ours(target.__module__),
    )


def is_ours(module: str) -> bool:
    """Whether numbers in the configuration of a module's classes have this project's ranges."""
    return module.startswith(("swd.", "lightning."))


def _check_call(node: dict[str, Any], path: str, parameters: Parameters) -> None:
    """Raise UserError unless the keys of a node beside its `_target_` fit the parameters."""
    names = [name for name in parameters.names if name not in GIVEN.get(path, ())]
    required = [name for name in parameters.required if name not in GIVEN.get(path, ())]
    hints = {**parameters.hints, **OWN.get(path, {})}
    known = [*names, *(key for key in OWN.get(path, {}) if key not in names)]

    # Each key against them, and numbers of this project's classes against their ranges.
    if parameters.ours and node.get("_partial_"):
        raise UserError(f"{path}._partial_ is not taken here; {node['_target_']} is built at once")
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key.startswith("_") and key.endswith("_"):
            raise UserError(f"{path}.{key} is not taken here; give {node['_target_']} its arguments by name")
        if key not in known and not parameters.open_ended:
            raise UserError(_unknown_key(f"{path}.{key}", key, known))
        if key in hints and not fits(value, hints[key]):
            raise UserError(_bad_value(f"{path}.{key}", value, hints[key]))
        for number in value if isinstance(value, list) else [value]:
            if parameters.ours:
                _check_range(key, number, f"{path}.{key}")

    # Arguments that are missing.
    for key in required:
        if key not in node and not node.get("_partial_"):
            raise UserError(f"{path}.{key} is missing; {node['_target_']} needs it")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain configuration value can be passed where `hint` is annotated."""
    origin = get_origin(hint)
    args = get_args(hint)
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


def for_command(command: str) -> None:
    """Say which command runs in this process; messages about unknown keys depend on it."""
    global _command
    _command = command


def running_command() -> str:
    """The command that runs in this process."""
    return _command


def called_here(key: str) -> str | None:
    """This project's name for a setting of another program, in the command that runs; None where there is none."""
    return FOREIGN_TO[_command].get(key)


def _unknown_key(path: str, key: str, known: list[str]) -> str:
    if path == key and (name := called_here(key)):
        return f"unknown key {key}; here it is {name}"
    if path == key and key in ELSEWHERE:
        return f"unknown key {key}; {ELSEWHERE[key]}"
    close = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
    return f"unknown key {path.lstrip('.')}; {hint}"


def _bad_value(path: str, value: Any, hint: Any) -> str:
    listed = f": {path}='[{value}]'" if get_origin(hint) is list and isinstance(value, str) and value else ""
    return f"{path}={value!r} is not valid; expected {type_text(hint)}{listed}"


def type_text(hint: Any) -> str:
    """A type in words that a user can act on."""
    origin = get_origin(hint)
    args = get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(arg) for arg in args)
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if hint is type(None):
        return "null"
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    if hint in names:
        return names[hint]
    if origin is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)} values ({', '.join(type_text(a) for a in args)})"
    if origin in (list, tuple, Sequence):
        return f"a list of {type_text(args[0])}"
    if origin in (dict, Mapping):
        return "keys with values"
    return getattr(hint, "__name__", str(hint))


def setting_differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The differences of two plain configurations: the key of each, and "KEY was OLD, now NEW"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            yield from setting_differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return
    same = list(old) == list(new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else old == new
    if not same:
        yield path, f"{path} was {old}, now {new}"


def first_difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first difference of two plain configurations as "KEY was OLD, now NEW"; None where they agree."""
    return next((text for _, text in setting_differences(old, new, path)), None)


def unresolved(error: BaseException) -> str:
    """The message of an OmegaConf error on one line; for a reference to nothing, it names both keys."""
    text = one_line(error)
    taken_out = re.match(r"Key '[^']+' is not in struct full_key: (\S+)", text)
    if taken_out:
        return f"{taken_out[1]} is missing and needed; set it, or leave out ~{taken_out[1]}"
    found = re.search(r"Interpolation key '([^']+)' not found.*full_key: (\S+)", text)
    return f"{found[2]} refers to {found[1]}, which is not set" if found else text


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
    """The resolved configuration as plain dicts and lists.

    Raises:
        UserError: if a value refers to nothing.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"configuration does not resolve: {unresolved(error)}") from None


# Building: no other part of the package calls constructors that a configuration names


def build(cfg: DictConfig, key: str, allow: Collection[str] | None = None) -> Any:
    """Build one group of a configuration: an object, or a dict of objects by name.

    Args:
        cfg: the whole configuration.
        key: the group, such as "model" or "callbacks".
        allow: names that may be built beyond `ALLOWED`; None: those of `allow=` on the command line.

    Raises:
        UserError: if the group is missing, names what may not be built, or a constructor refuses its arguments.
    """
    allow = allowed_here(cfg) if allow is None else allow
    node = node_of(cfg, key)
    _check_node(node, key, partial(parameters_of, allow=allow))
    given = {}
    if key in GIVEN:
        taken = inspect.signature(target_of(node.get("_target_"), key, allow)).parameters
        given = {part: build(cfg, part, allow) for part in GIVEN[key] if part in taken}
    return _construct(node, key, allow, given)


def own_settings(node: dict[str, Any], key: str, groups: Mapping[str, Any]) -> dict[str, Any]:
    """A node without the groups that its constructor gets built; configurations of version 0.1.0 repeat them there.

    Args:
        node: of the group `key`, plain values.
        key: a group that `GIVEN` names.
        groups: plain values of the whole configuration.

    Raises:
        UserError: if the node holds one of those groups with other values.
    """
    for part in GIVEN[key]:
        if part in node and node[part] != groups.get(part):
            raise UserError(
                f"{key}.{part} is not set here: the {key} is given the {part} of the configuration; "
                f"choose {part}=NAME, or set {part}.SETTING=VALUE"
            )
    return {name: value for name, value in node.items() if name not in GIVEN[key]}


def node_of(cfg: DictConfig, key: str) -> dict[str, Any]:
    """A group of a configuration as plain values; empty for a group that may be left out and is.

    Raises:
        UserError: if it is missing.
    """
    node = None if OmegaConf.is_missing(cfg, key) else cfg.get(key)
    node = to_plain(node) if isinstance(node, DictConfig | ListConfig) else node
    if node is None and key in (*COLLECTIONS, *OPTIONAL):
        return {}
    if not isinstance(node, dict):
        raise UserError(f"{key} is missing; choose one with {key}=NAME, --help lists them")
    return own_settings(node, key, to_plain(cfg)) if key in GIVEN else node


def build_node(node: Any, path: str, allow: Collection[str] = ()) -> Any:
    """Build a node of plain values.

    Args:
        node: dicts with a `_target_` become objects, wherever they are in it.
        path: name of the node in messages.
        allow: names that may be built beyond `ALLOWED`.

    Raises:
        UserError: as `build`.
    """
    _check_node(node, path, partial(parameters_of, allow=allow))
    return _construct(node, path, allow)


def arguments_of(cfg: DictConfig, key: str) -> dict[str, Any]:
    """The arguments that `build` would give the constructor of a group, built."""
    allow = allowed_here(cfg)
    node = node_of(cfg, key)
    _check_node(node, key, partial(parameters_of, allow=allow))
    return {name: _construct(value, f"{key}.{name}", allow) for name, value in node.items() if name not in SPECIAL}


def with_schedules(error: WrongProcess) -> UserError:
    """The error of a schedule that does not fit the model, with the options of `schedule` that do."""
    return UserError(f"{error}, or use schedule={SCHEDULES[error.needed][error.full_size]}")


def _construct(node: Any, path: str, allow: Collection[str], given: Mapping[str, Any] | None = None) -> Any:
    """Build a checked node; `given` holds arguments of its constructor that are built already."""
    if isinstance(node, list):
        return [_construct(value, f"{path}[{i}]", allow) for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {key: _construct(value, f"{path}.{key}", allow) for key, value in node.items() if key not in SPECIAL}
    if "_target_" not in node:
        return values
    values |= given or {}
    target = target_of(node["_target_"], path, allow)
    if node.get("_partial_"):
        return partial(target, **values)
    try:
        return target(**values)
    except WrongProcess as error:
        raise with_schedules(error) from None
    except UserError:
        raise
    except ValueError as error:  # a constructor refused what the configuration gave it
        raise UserError(f"{path}: {one_line(error)}") from error
    except Exception as error:
        if not str(target.__module__).startswith("lightning."):
            raise
        # A constructor of Lightning fails because of its arguments or of a missing package, whatever it raises.
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error


# Reading recorded configurations, which may come from somebody else


class _Values(yaml.SafeLoader):
    """A YAML loader that takes plain values only: no tags, no anchors, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent) or getattr(self.peek_event(), "anchor", None):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("anchors and aliases are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1] if len(keys) < 1000 else ["more than 1000 keys"]
        if twice:
            raise yaml.YAMLError(f"found duplicate key {twice[0]}")
        return super().construct_mapping(node, deep)


# A date is text, as in OmegaConf.
_Values.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
LARGEST_RECORD = 2**20
"""Most bytes of a recorded configuration; ours take about 5,000."""


def read_recorded(file: Path) -> dict[str, Any]:
    """The configuration that a run recorded, as plain values: nothing in it is resolved, built or imported.

    Args:
        file: the run's `config.yaml`.

    Raises:
        UserError: if it cannot be read, or holds anything but plain values by name.
    """
    try:
        if file.stat().st_size > LARGEST_RECORD:
            raise UserError(f"{file} has more than {LARGEST_RECORD:,} bytes; it is no recorded configuration")
        value = yaml.load(file.read_text(encoding="utf-8"), Loader=_Values)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); copy the run again") from None
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        reason = {RecursionError: "nested too deeply", UnicodeDecodeError: "not UTF-8 text"}.get(type(error))
        raise UserError(f"{file} is damaged ({reason or one_line(error)[:200]}); copy the run again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged (it holds no keys with values); copy the run again")
    _check_plain(value, "", file)
    return value


def _check_plain(value: Any, path: str, file: Path) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(f"{file} is damaged (key {key!r} below {path or 'the root'} is no text); copy it again")
            _check_plain(inner, f"{path}.{key}" if path else key, file)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{path}[{i}]", file)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise UserError(f"{file} is damaged ({path} is a {type(value).__name__}, no plain value); copy it again")


def check_recorded(node: Any, key: str, target: str, file: Path) -> None:
    """Raise UserError unless a node of a recorded configuration describes `target` by plain values alone.

    Args:
        node: part of the result of `read_recorded`.
        key: name of the node.
        target: the only `_target_` that it may have; nodes inside it may have none.
        file: the recorded configuration, for messages.
    """
    if not isinstance(node, dict):
        raise UserError(f"{file} has no {key}; name it on the command line: {key}=NAME")
    if node.get("_target_", target) != target:
        raise UserError(f"{file}: {key}._target_={node['_target_']} is not taken from a file; a {key} is {target}")

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name.startswith("_") and path != key:
                    raise UserError(f"{file}: {path}.{name} is not taken from a file; remove it")
                walk(inner, f"{path}.{name}")
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(inner, f"{path}[{i}]")
        elif isinstance(value, str) and "${" in value:
            raise UserError(f"{file}: {path}={value!r} refers to something outside of it; give ++{path}=VALUE")

    for name, value in node.items():
        if name.startswith("_") and name != "_target_":
            raise UserError(f"{file}: {key}.{name} is not taken from a file; remove it")
        walk(value, f"{key}.{name}")


# Writing configurations


def stored(cfg: DictConfig) -> dict[str, Any]:
    """A configuration for files: resolved, except for values of the environment, and without credentials.

    `${oc.env:NAME}` stays as it is, also inside other values and in values that refer to those.
    """
    # Resolve with a marker in the place of each environment variable.
    used: dict[str, str] = {}

    def name_it(name: str, *default: Any) -> Any:
        if name not in os.environ and default:
            return default[0]
        used[name] = os.environ.get(name, "")
        return f"SWDENV{name}SWDEND"

    OmegaConf.register_new_resolver("oc.env", name_it, replace=True)
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except Exception:  # a reference that computes with the value; it is kept as it was typed
        plain = OmegaConf.to_container(cfg, resolve=False)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)

    # Put `${oc.env:NAME}` where markers or the variables' values stand.
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        if not isinstance(value, str):
            return value
        for name, content in used.items():
            if len(content) >= 4:  # Hydra may have resolved it before, as in `folder`; shorter text occurs by chance
                value = value.replace(content, f"${{oc.env:{name}}}")
        return re.sub("SWDENV(.+?)SWDEND", r"${oc.env:\1}", value)

    result: dict[str, Any] = mask(named(plain))
    return result


class _Dumper(yaml.SafeDumper):
    """Writes text that looks like a number in quotes, as OmegaConf does, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> Any:
    try:
        float(text)
    except ValueError:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text)


def to_yaml(plain: Any) -> str:
    """Plain values as YAML, which `read_recorded` and OmegaConf read as the same values."""
    text: str = yaml.dump(plain, Dumper=_Dumper, allow_unicode=True, sort_keys=False, default_flow_style=False)
    return text
