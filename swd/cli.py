"""Entry points: `swd COMMAND ...`, `python train.py ...`. Compose, run, and turn a user's error into one line."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from swd.types import UserError

COMMANDS = {
    "train": ("swd.train", "distil a model, or train one of the embedded ones (experiment=shapes_teacher ...)"),
    "sample": ("swd.sample", "draw pictures of prompts"),
    "export": ("swd.export", "write a student as one folder for diffusers, peft and, mostly, ComfyUI"),
    "generate": ("swd.data.generate", "let a teacher draw its own training set"),
    "import": ("swd.data.importer", "make shards of captioned pictures"),
    "encode": ("swd.data.encode", "encode a data set once, for all trainings of one model"),
    "demo": ("swd.demo", "distil, sample, evaluate and report on the embedded teacher"),
}
"""The module whose `run` a command calls, and what it is for."""

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
    ".*with manual optimization and every_n_train_steps.*",  # whole iterations are what a resumed run continues from
)


def main() -> None:
    """The installed `swd` command."""
    if "SWD_COMMAND" in os.environ and "LOCAL_RANK" in os.environ:  # a process that distributed training started
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
        _fail(f"unknown command {command!r}; commands are {', '.join(COMMANDS)}")
    os.environ["SWD_COMMAND"] = command
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    launch(command)


def launch(command: str) -> None:
    """Compose the configuration of `command` from the command line and call the command's `run` with it.

    Exits with status 2 and one line on standard error if the input was wrong, in a sweep too.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us instead of Hydra's own printer
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import hydra

    for text in NOTICES:
        warnings.filterwarnings("ignore", text)
    warnings.formatwarning = lambda message, *args, **kwargs: f"warning: {message}\n"
    run: Callable[..., None] = importlib.import_module(COMMANDS[command][0]).run
    main = hydra.main(version_base="1.3", config_path=config_path(), config_name=command)
    started = False

    def job(cfg: object) -> None:
        nonlocal started
        started = True
        with user_errors():  # here, before Hydra adds lines to them
            run(cfg)

    try:
        with user_errors(), _short_usage():
            main(job)()
    except OSError as error:
        if started:
            raise
        _fail(f"output folder {error.filename} cannot be written ({error.strerror}); choose another with output=")


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
def user_errors() -> Iterator[None]:
    """Turn wrong input into one line and exit status 2; leave defects of the program their traceback."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from swd.config import one_line

    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        cause = _user_error(error)
        if cause is not None:
            _fail(one_line(cause))
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
            _fail(one_line(error.__cause__))  # a constructor refused what the configuration gave it
        if isinstance(error, InstantiationException):
            raise
        if isinstance(error, HydraException | OmegaConfBaseException | YAMLError):
            _fail(_hydra_message(one_line(error)))
        raise


def config_path() -> str:
    """Folder of the configuration: `conf/` of a checkout, else the one installed as `swd.conf`."""
    folder = Path(__file__).parents[1] / "conf"
    return str(folder) if (folder / "train.yaml").is_file() else "pkg://swd.conf"


def _user_error(error: BaseException | None) -> BaseException | None:
    while error is not None:
        if isinstance(error, UserError | PermissionError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _hydra_message(text: str) -> str:
    """Hydra's own errors, reworded to name the fix."""
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown and unknown.group(1) == "model.guidance_scale":
        keys = "model.dmd_guidance_scale for the teacher in DMD, model.drawing_guidance_scale for what it draws"
        return f"model.guidance_scale is two keys now: {keys}"
    if unknown:
        known = "; --help and --cfg job list what there is"
        return f"unknown key {unknown.group(1)}{known}"
    group = re.search(
        r"Could not find '([^']+)' Available options in '([^']+)':\s*(.*?)(?:Config search path.*)?$", text
    )
    if group:
        return f"there is no {group.group(1)}; options of {group.group(2)} are: {', '.join(group.group(3).split())}"
    return text


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
