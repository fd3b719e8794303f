"""A disk that takes no more ends every command that writes in one line, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image
from safetensors.torch import load_file
from shards import make_pictures

from swd.commands import cli
from swd.data.streamed import read_shard

LINES = ("list the ", "model ", "drawing ", "encoding ", "importing ", "loading ", "done: ", "distilling ", "warning: ")
"""Beginnings of lines that say what a command does."""


def launched(command: str, arguments: list[str], most: int) -> tuple[int, list[str]]:
    """Exit status and standard error of a command in a process of its own that may write `most` bytes into a file.

    The system refuses a larger file (EFBIG) at the same place and in the same way as a full disk refuses a byte.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # pytest has its own
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        GlobalHydra.instance().clear()
        os.environ.pop("SWD_COMMAND", None)
        sys.argv = [f"{command}.py", *arguments]
        code: object = 1
        try:
            cli.launch(command)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code if isinstance(code, int) else 1)
    os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        told = stream.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def whole(file: Path) -> None:
    """Fail unless a file can be read to its end."""
    reader: dict[str, Callable[[Path], object]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".png": lambda path: Image.open(path).load(),
        ".safetensors": load_file,
        ".ckpt": lambda path: zipfile.ZipFile(path).testzip(),
        ".tar": lambda path: list(read_shard(str(path))),
    }
    if file.suffix in reader:
        reader[file.suffix](file)


OUT = ["folder=out"]
CASES = {
    "train": ("train", ["folder=out", "trainer.max_steps=1", "loss=mmd", "callbacks=[checkpoint,adapter]"], 200_000),
    "train at its start": ("train", ["folder=out", "trainer.max_steps=1", "loss=mmd"], 1000),
    "sample": ("sample", ["adapter=null", "prompts=[a star]", "folder=out", "model.teacher_steps=1"], 100),
    "generate": ("generate", ["prompts=prompts.txt", "out=out", "model.teacher_steps=1"], 2500),
    "encode": ("encode", ["limit=2", "out=out"], 5000),
    "import": ("import", ["source=pictures", "out=out"], 3000),
    "import at its start": ("import", ["source=pictures", "out=out"], 100),
    "evaluate": (
        "evaluate",
        ["models=[teacher]", "prompts=shapes", "n=2", "metrics=[shapes_exact]", "folder=out"],
        100,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_write_that_fails_is_one_line_and_leaves_nothing_half_written(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, arguments, most = CASES[case]
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 2, [(64, 64)])
    (tmp_path / "prompts.txt").write_text("a red star\n")
    code, told = launched(command, arguments, most)
    assert code == 2, told
    errors = [line for line in told if not line.startswith(LINES)]
    assert len(errors) == 1 and errors[0].startswith(("error: out", "error: checkpoint out")), told
    assert "cannot be written" in errors[0] and "File too large" in errors[0], told
    for file in (tmp_path / "out").rglob("*"):
        assert not file.name.startswith((".running", f".{file.stem}.")), file
        whole(file)
