"""Entry points: `swd COMMAND ...`, `python train.py ...`. Compose, run, and turn a user's error into one line."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import inspect
import os
import re
import string
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swd.io.files import ADVICE, failed_operation
from swd.io.masking import mask_text
from swd.io.memory import out_of_memory
from swd.io.ranks import is_first, ranks
from swd.io.signals import Stopped, listening
from swd.types import UserError

if TYPE_CHECKING:
    from swd.io.peers import Peers

COMMANDS = {
    "train": (
        "swd.commands.train",
        "distil a model, or train one of the embedded ones (experiment=shapes_teacher ...)",
    ),
    "sample": ("swd.commands.sample", "draw pictures of prompts"),
    "evaluate": ("swd.commands.evaluate", "draw the same prompts with several models, and compare quality and cost"),
    "export": ("swd.commands.export", "write a student as one folder for diffusers, peft and, mostly, ComfyUI"),
    "generate": ("swd.commands.generate", "let a teacher draw its own training set"),
    "import": ("swd.commands.import_pictures", "make shards of captioned pictures"),
    "encode": ("swd.commands.encode", "encode a data set once, for all trainings of one model"),
    "plan": ("swd.commands.plan", "count what a training needs: memory, batch, time, disk; downloads nothing"),
    "spectra": ("swd.commands.spectra", "measure which frequencies of latents noise covers, by level"),
    "dashboard": ("swd.commands.dashboard", "write a wandb workspace: losses, metrics by size, samples, throughput"),
    "demo": ("swd.commands.demo", "distil, sample, evaluate and report on the embedded teacher"),
    "report": ("swd.commands.report", "write one page about runs and evaluations: report FOLDER ..."),
    "compare": ("swd.commands.compare", "let people vote blindly between two folders of pictures, and count votes"),
}
"""For each command, the module whose `run` it calls, and its purpose."""

NEEDED = ("task", "model", "recipe", "schedule", "loss", "data", "sheet", "trainer")
GROUPS = (*NEEDED, "callbacks", "logger", "experiment")
"""Folders of `conf/`."""
POSITIONAL = {"report": "folders", "compare": "paths"}
"""Commands that take paths without a key, and the key that they go to."""
HYDRA_BUILDS = ("swd.commands.sweep.CheckSweep",)
"""Classes that Hydra builds by itself, from `hydra.callbacks`. Its launchers and sweepers it allows itself."""
WITH_VALUE = ("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir")
"""Flags of Hydra whose value is the next argument."""

# Notices of libraries that a user cannot act on.
NOTICES = (
    ".*`torch_dtype` is deprecated.*",
    ".*Already found a `peft_config`.*",
    ".*LeafSpec.*",
    ".*module\\(s\\) in eval mode.*",
    ".*Experiment logs directory.*",
    ".*does not have many workers.*",
    ".*`weights_only`.*",
    ".*`IterableDataset` has `__len__` defined.*",  # streams know how many batches they give
    ".*your dataloader is not resumable.*",  # PairData goes on exactly where the run stopped
    ".*The dirpath has changed from.*",  # every run has a folder of its own
    ".*callbacks used to create the checkpoint need to be provided.*",
    ".*Deterministic behavior.*",
    ".*could be decompression bomb.*",  # pictures have a limit of our own, which says what to do
    ".*Checkpoint directory .* exists and is not empty.*",  # of a run that goes on in its folder
    ".*with manual optimization and every_n_train_steps.*",  # whole iterations are what a resumed run continues from
    ".*returned a view tensor.*",  # FSDP2's advice to code that changes predictions in place, which none here does
)

INSTALLED = Path(__file__).parents[1] / "conf"
"""Folder of the package `swd.conf`, which an installation has and a checkout lacks."""
LISTED = "--help and --cfg job list what there is"
"""End of messages about unknown keys that resemble no known one."""


def main() -> None:
    """The installed `swd` command."""
    if "SWD_COMMAND" in os.environ and "SWD_START" in os.environ:  # a process that distributed training started
        launch(os.environ["SWD_COMMAND"])
        return
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print("usage: swd COMMAND [key=value ...]\n\nScale-wise distillation of diffusion models.\n\ncommands:")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:10}{text}")
        print("\nswd COMMAND --help lists the options of a command.")
        return
    if command == "--version":
        from swd import __version__

        print(f"swd {__version__}")
        return
    if command not in COMMANDS:
        close = nearest(command, COMMANDS)
        hint = f"did you mean {close}? " if close else ""
        _fail(f"unknown command {command!r}; {hint}commands are {', '.join(COMMANDS)}")
    os.environ["SWD_COMMAND"] = command
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    launch(command)


def launch(command: str) -> None:
    """Compose the configuration of `command` from the command line and call the command's `run` with it.

    Exits with status 2 and one line on standard error if the input was wrong, in a sweep too.
    """
    # Hydra. The command's module, and with it torch, is imported once the configuration is composed and checked: not
    # for help, and not to say that a key is unknown or a value of the wrong kind.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises errors instead of printing them itself
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(help_text(command))
        return
    import hydra

    from swd.config import for_command

    for_command(command)
    quiet_warnings()
    main = hydra.main(config_path=config_path(), config_name=command, **hydra_options(hydra.main))

    # The job, once its configuration is composed.
    started = False

    def job(cfg: Any) -> float | None:
        """Run the command; what it returns is the objective of a sweep."""
        nonlocal started
        started = True
        quiet_warnings()  # again: a sweep's job may run in a process of its own
        try:
            with user_errors(where=results_folder(cfg)), listening():  # here, before Hydra adds lines to them
                check_before_importing(cfg, command)
                run: Callable[..., float | None] = importlib.import_module(COMMANDS[command][0]).run
                return run(cfg)
        finally:
            remove_empty_output()

    # Composing, from the command line.
    with user_errors(), _short_usage():
        if command in POSITIONAL:
            sys.argv[1:] = with_paths(sys.argv[1:], POSITIONAL[command])
        sys.argv[1:] = [named for argument in sys.argv[1:] if (named := group_option(argument)) is not None]
        try:
            main(job)()
        except OSError as error:
            if started or error.errno in (None, errno.EPIPE):  # Hydra's own errors may be OSErrors without a number
                raise
            folder = error.filename
            reason = error.strerror
            raise UserError(
                f"output folder {folder} cannot be written ({reason}); choose another with output="
            ) from None


def check_before_importing(cfg: Any, command: str) -> None:
    """Refuse what is wrong with a configuration as far as source files say it: importing a command takes seconds.

    Classes that `allow=` names are not looked at, nor those whose constructors cannot be read, nor a configuration
    whose required key is missing; the command itself checks all once more.

    Raises:
        UserError: as `swd.config.check`.
    """
    from omegaconf import OmegaConf

    from swd.commands.early import check_named_values, check_presence
    from swd.commands.keys import ROOTS
    from swd.config import check
    from swd.source_parameters import parameters_in_source

    root = ROOTS.get(command)
    check_presence(command, cfg)
    if root is not None and not any(OmegaConf.is_missing(cfg, key) for key in cfg):
        check(cfg, root, allow=(), look=parameters_in_source)
        check_named_values(command, cfg)


def help_text(command: str) -> str:
    """The help of a command by its default configuration: the text that Hydra prints, without the second it takes.

    Hydra composes the configuration and lists the groups one by one; with overrides beside `--help` it still does.
    """
    import yaml

    folder = config_folder()
    template = yaml.safe_load((folder / f"{command}.yaml").read_text(encoding="utf-8"))["hydra"]["help"]["template"]
    files = [file.relative_to(folder) for file in folder.glob("*/**/*.yaml")]
    options: dict[str, list[str]] = {}
    for file in files:
        options.setdefault(file.parent.as_posix(), []).append(file.stem)
    own = sorted(group for group in options if group.partition("/")[0] != "hydra")
    groups = "".join(f"{group}: {', '.join(sorted(options[group]))}\n" for group in own)
    return string.Template(template).substitute(APP_CONFIG_GROUPS=groups)


def composing() -> Any:
    """Hydra's context in which this project's configuration is composed."""
    from hydra import initialize_config_dir, initialize_config_module

    folder = config_path()
    start = initialize_config_module if folder.startswith("pkg://") else initialize_config_dir
    return start(folder.removeprefix("pkg://"), **hydra_options(start))


def hydra_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a function of Hydra that differ between its versions.

    Hydra 1.4 takes an allow list for the objects that Hydra itself builds: it warns where a configuration names code
    without one, and 1.5 will refuse that. `version_base`, which 1.3 asks for, is deprecated in 1.4.

    Args:
        function: `hydra.main`, or one of Hydra's functions that initialize composing.
    """
    from hydra import main

    from swd.config import listed

    if "execution_whitelist" not in inspect.signature(main).parameters:
        return {"version_base": "1.3"}
    takes_list = "execution_whitelist" in inspect.signature(function).parameters
    return {"execution_whitelist": (*HYDRA_BUILDS, *listed())} if takes_list else {}


def with_paths(arguments: Sequence[str], key: str) -> list[str]:
    """A command line in which the arguments that are paths have become one `key=[PATH, ...]` at its end.

    A path is an argument that is no flag and holds no "=", or that exists as it is typed.
    """
    paths: list[str] = []
    others: list[str] = []
    previous = ""
    for argument in arguments:
        plain = not argument.startswith("-") and previous not in WITH_VALUE
        is_path = plain and ("=" not in argument or Path(argument).exists())
        (paths if is_path else others).append(argument)
        previous = argument
    return [*others, f"{key}=[{','.join(map(_quoted, paths))}]"] if paths else others


def group_option(argument: str) -> str | None:
    """An argument of the command line in Hydra's words: `GROUP=null`, which Hydra does not know, is translated.

    Returns:
        None where null is the default anyway.

    Raises:
        UserError: if a group cannot be empty.
    """
    key, sign, value = argument.partition("=")
    key = key.lstrip("+")
    if sign and not key:
        raise UserError(f"{argument!r} has no key in front of the =; --help lists the keys")
    if sign and key in GROUPS and not _names_options(argument):
        raise UserError(f"{argument}: options of a group are names, as in loss=mmd; --help lists them")
    if not sign or key not in GROUPS or value not in ("null", "Null", "NULL", "~", "None", "none", ""):
        return argument
    if key == "experiment":
        return None
    if key in ("callbacks", "logger"):
        return f"{key}=none"
    if value == "none":
        return argument  # Hydra lists the options
    raise UserError(f"{argument} chooses no {key}, and one is needed; leave it out for the default, or give {key}=NAME")


def _names_options(argument: str) -> bool:
    """Whether the value of `GROUP=VALUE` is a name, names or null; for numbers Hydra ends in a traceback."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        value = OverridesParser.create().parse_override(argument).value()
    except Exception:  # Hydra itself reports an argument that it cannot read
        return True
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return not isinstance(value, bool | int | float)


def quiet_warnings() -> None:
    """Print warnings on one line, and leave out those that a user cannot act on."""
    for text in NOTICES:
        warnings.filterwarnings("ignore", text)
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {mask_text(str(message))}\n"


def results_folder(cfg: Any) -> str | None:
    """The folder that a command writes to; None if its configuration does not give it."""
    for key in ("out", "to", "folder"):
        with suppress(Exception):  # missing or unresolved: the command itself reports it
            if cfg.get(key):
                return str(cfg[key])
    return None


def remove_empty_output() -> None:
    """Remove the folder that Hydra made for this run, and the one around it, if the run left nothing there."""
    from hydra.core.hydra_config import HydraConfig

    with suppress(Exception):  # no run of Hydra's, as in a test
        folder = Path(HydraConfig.get().runtime.output_dir)
        if folder.resolve() != Path.cwd():
            for empty in (folder, folder.parent):
                with suppress(OSError):  # not empty, or removed by another process
                    empty.rmdir()


@contextmanager
def _short_usage() -> Iterator[None]:
    """argparse's complaint about the command line on one line, without its usage text."""

    def error(parser: argparse.ArgumentParser, message: str) -> None:
        _fail(f"{message}; options such as -m come before key=value, see --help")

    original = argparse.ArgumentParser.error
    argparse.ArgumentParser.error = error  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        argparse.ArgumentParser.error = original  # type: ignore[method-assign]


@contextmanager
def user_errors(where: str | None = None) -> Iterator[None]:
    """Turn wrong input and a failing machine into one line and exit status 2; defects keep their traceback.

    Args:
        where: the folder of the results, for failed writes that do not say which file it was.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Stopped as stop:
        if is_first():  # all processes of a run stop together
            print(mask_text(str(stop)), file=sys.stderr)
        sys.exit(stop.code)
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        # The program that read the output has ended (swd sample | head); Python must not flush it once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = message_for_user(error, where)
        if message is None:
            _end_all(error)
            raise
        _fail(message)


def _end_all(error: Exception) -> None:
    """Exit together with the other processes of a training, if there are any, because of a defect."""
    from swd.io.peers import connected

    together = connected()
    if together is not None:
        from swd.commands.processes import end_together

        sys.exit(end_together(together, error))


def message_for_user(error: BaseException, where: str | None = None) -> str | None:
    """An error in one line for the user; None if it is a defect of the program."""
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from swd.config import one_line, unresolved

    cause = _machine_or_user(error, where)
    if cause is not None:
        return cause
    if type(error).__module__.startswith("submitit."):
        return f"hydra/launcher: {one_line(error)[:300]}"
    memory = out_of_memory(error)
    if memory is not None:
        return f"{memory}; use a smaller batch or model"
    if isinstance(error, InstantiationException):
        return None
    if isinstance(error, OverrideParseException):
        return _quoting(error.override, one_line(error))
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        wrong = [
            a for a in sys.argv[1:] if re.fullmatch(r"\+*([\w@]+)=([\d.+-]+|true|false|null|.*null.*|\{.*\})", a, re.I)
        ]
        return f"{' '.join(wrong) or 'an argument'}: options of a group are names, as in loss=mmd; see --help"
    if (argument := _unapplied(error)) is not None:
        return _unusable(argument, one_line(error))
    if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
        reason = "" if error.__cause__ is None else f" ({one_line(error.__cause__)})"
        return _hydra_message(unresolved(error), reason)
    return None


def _unusable(argument: str, reason: str) -> str:
    """Message on an argument that made Hydra raise an error that is not written for users."""
    if "@" in argument.partition("=")[0]:
        return f"{argument} does not name a group in front of the @; write GROUP@PACKAGE=NAME, or leave out the @"
    if argument.startswith("~"):
        return f"{argument} does not say what to take out; write ~KEY, ~GROUP or ~GROUP=NAME"
    return f"{argument} cannot be used here ({reason}); a list is set as a whole, as in [A, B]"


def _unapplied(error: BaseException) -> str | None:
    """The argument that Hydra was reading or applying when an error arose that is none of Hydra's own."""
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException

    if isinstance(error, HydraException):
        return None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        override = frame.f_locals.get("override")
        if isinstance(override, Override) and frame.f_globals.get("__name__", "").startswith("hydra."):
            return override.input_line
    return None


def config_path() -> str:
    """Where Hydra finds the configuration: `conf/` of a checkout, else the one installed as `swd.conf`."""
    folder = config_folder()
    return "pkg://swd.conf" if folder == INSTALLED else str(folder)


def config_folder() -> Path:
    """Folder of the configuration: `conf/` of a checkout, else the one beside the installed package's modules."""
    folder = Path(__file__).parents[2] / "conf"
    return folder if (folder / "train.yaml").is_file() else INSTALLED


def _machine_or_user(error: BaseException | None, where: str | None) -> str | None:
    """The message if the error, or a cause of it (`raise ... from`), is wrong input or a failure of the machine.

    Errors that were merely being handled when this one was raised are not looked at.
    """
    from swd.config import one_line

    while error is not None:
        if isinstance(error, UserError):
            return one_line(error)
        failed = failed_operation(error, where)
        if failed is not None:
            assert failed.errno is not None
            place = failed.filename or "a file"
            verb = (
                "cannot be written"
                if failed.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
                else "failed"
            )
            return f"{place} {verb} ({failed.strerror}); {ADVICE[failed.errno]}"
        error = error.__cause__
    return None


# Hydra's own errors, reworded to name the fix


def _quoting(override: str, text: str) -> str:
    """Message about an argument that Hydra cannot read, with the corrected one where quotes or brackets suffice."""
    key, sign, value = override.partition("=")
    if not sign:
        return f"{override!r} is no key=value; --help lists the keys"
    if re.search(r"[^\w.@/:$~+-]", key):
        return f"{override!r} is no key=value: {key!r} is no name of a key; put quotes around the whole argument"
    opened = [value.count(a) - value.count(b) for a, b in ("[]", "{}")]
    closed = value + "]" * max(opened[0], 0) + "}" * max(opened[1], 0)
    for advice, mended in (
        ("close its bracket", closed if value[:1] in "[{" and closed != value else None),
        ("put its parts in quotes of their own", _quoted_list(value)),
        ("put its value in quotes of its own", _quoted(value)),
    ):
        if mended is not None and _is_readable(f"{key}={mended}"):
            more = ", or write prompts into a file: prompts_file=FILE" if key == "prompts" else ""
            return f"{mask_text(override)} cannot be read; {advice}: {_for_shell(f'{key}={mended}')}{more}"
    return f"{override!r} cannot be read ({text.partition(' See https')[0]})"


def _quoted(value: str) -> str:
    inner = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
    return '"' + re.sub(r'(\\*)"', r'\1\1\\"', inner.strip()) + ('\\"' if inner.endswith("\\") else '"')


def _quoted_list(value: str) -> str | None:
    if not (value.startswith("[") and value.endswith("]")):
        return None
    parts = [part.strip() for part in value[1:-1].split(",")]
    return (
        "[" + ",".join(part if part[:1] in "'\"" and part[-1:] == part[:1] else _quoted(part) for part in parts) + "]"
    )


def _is_readable(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_override(override).value()
    except Exception:  # the parser raises many kinds of errors
        return False
    return True


def _for_shell(argument: str) -> str:
    """The argument quoted for a shell, in single quotes where that is possible."""
    if "'" not in argument:
        return f"'{argument}'"
    return '"' + re.sub(r'([\\"$`])', r"\\\1", argument) + '"'


REWORDED = (
    (
        r"Multiple values for ([\w/]+)\. .*override [\w/]+: ([^']+)'",
        r"\1 has one option at a time: give \1=\2 without +",
    ),
    (
        r"force-add of config groups is not supported: '\++([^']+)'",
        r"\1 chooses an option of a group: leave out the +",
    ),
    (
        r"Ambiguous value for argument '(\w[\w.]*)=(.*?)' 1\. .*",
        r"""\1=\2 holds a comma: as text it is '\1="\2"', as a list '\1=[\2]', and -m runs one job for each""",
    ),
    (r"Could not delete from config\. '([^']+)' does not exist\.", r"~\1: there is no such key to take out"),
    (
        r"Could not append to config\. An item is already at '([^']+)'.*",
        r"+\1: this key is there already; leave out the +",
    ),
)
"""Patterns of Hydra's messages about arguments that it can parse but not apply, and the messages in their place."""


def _hydra_message(text: str, reason: str = "") -> str:
    """Hydra's message in this project's words, with the fix; an unknown one is returned as it is."""
    # Arguments that Hydra can parse but not apply.
    for pattern, message in REWORDED:
        if re.match(pattern, text):
            return re.sub(pattern, message, text)
    merged = re.match(r"Error merging override (.*)", text)
    if merged:
        return f"{merged[1]} cannot be used here{reason}"

    # Unknown keys.
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and unknown.group(1) == "model.guidance_scale":
        keys = "model.dmd_guidance_scale for the teacher in DMD, model.drawing_guidance_scale for what it draws"
        return f"model.guidance_scale is two keys now: {keys}"
    if unknown:
        key = unknown.group(1)
        return _unknown_key(key)

    # Unknown options of a group.
    missing = _missing_plugin(text)
    if missing is not None:
        return missing
    group = re.search(
        r"Could not find '([^']+)' Available options in '([^']+)':\s*(.*?)(?:Config search path.*)?$", text
    )
    if group:
        options = group.group(3).split()
        close = nearest(group.group(1).rpartition("/")[2], options)
        hint = f"did you mean {close}? " if close else ""
        return f"there is no {group.group(1)}; {hint}options of {group.group(2)} are: {', '.join(options)}"
    return text


def _unknown_key(key: str) -> str:
    """The message for a key that the composed configuration lacks."""
    from swd.config import running_command

    known = known_keys(running_command())
    if key in known:
        return f"{key} was taken out by another argument (~{key.partition('.')[0]} ...); leave out one of the two"
    return f"unknown key {key}; {_hint(key, known)}"


def _hint(key: str, known: Sequence[str]) -> str:
    """The way out of an unknown key: its name here, the nearest one, or the commands that have it."""
    from swd.config import ELSEWHERE, called_here

    name = called_here(key)
    if name:
        return f"here it is {name}"
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    close = nearest(key, known)
    if close:
        return f"did you mean {close}?"
    owners = [f"swd {command}" for command in COMMANDS if key in known_keys(command)]
    if not owners:
        return LISTED
    *first, last = owners
    listed = f"{', '.join(first)} and {last}" if first else last
    return f"{LISTED}; this key belongs to {listed}"


PLUGINS = {
    "joblib": ("hydra-joblib-launcher", "sweep"),
    "optuna": ("hydra-optuna-sweeper", "sweep"),
    "slurm": ("hydra-submitit-launcher", "slurm"),
    "submitit_slurm": ("hydra-submitit-launcher", "slurm"),
    "submitit_local": ("hydra-submitit-launcher", "slurm"),
}
"""Options of Hydra's launchers and sweepers that come in packages of their own: the package, and our extra for it."""


def _missing_plugin(text: str) -> str | None:
    """The message for an option of `hydra/launcher` or `hydra/sweeper` whose package is not installed."""
    found = re.search(r"Could not (?:find|load) 'hydra/(launcher|sweeper)/(\w+)'", text)
    if found is None or found[2] not in PLUGINS:
        return None
    package, extra = PLUGINS[found[2]]
    return f"hydra/{found[1]}={found[2]} needs a package: pip install {package} (or swd with its extra: .[{extra}])"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like a misspelt one; None if none is."""
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff=0.7)), None)


def known_keys(command: str) -> list[str]:
    """Every key of a command's configuration by default, dotted; empty where it cannot be composed."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    try:
        with composing():
            plain = OmegaConf.to_container(compose(command), resolve=False)
    except Exception:  # the message then has no hint
        return []
    return list(_flat(plain, ""))


def _flat(value: object, path: str) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield f"{path}{key}"
        yield from _flat(inner, f"{path}{key}.")


def _fail(message: str) -> NoReturn:
    """Print the message as an error and exit with status 2; of several processes, one prints and all exit."""
    together = _processes()
    if together is not None:
        sys.exit(together.end(message))
    print(f"error: {mask_text(message)}", file=sys.stderr)
    sys.exit(2)


def _processes() -> Peers | None:
    """The other processes of this program, where they can be told of an error."""
    try:
        here = ranks()
    except UserError:
        return None
    if here.world == 1:
        return None
    from swd.io.peers import connect, connected

    if connected() is None and here.launcher == "torchrun":
        with suppress(UserError):
            return connect(20.0)
    return connected()


if __name__ == "__main__":
    main()
