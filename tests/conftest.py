"""Shared fixtures; tests run offline, on the CPU and without an account."""

from __future__ import annotations

import gc
import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false")

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from browser import running_browser
from composing import compose_faster
from hydra.core.hydra_config import HydraConfig
from loading import copy_what_was_loaded
from undrawn import draw_nothing_on_meta

from swd.commands import cli

for number in (signal.SIGHUP, signal.SIGINT):
    # nohup and `&` have them ignored, which programs started by a test would inherit.
    signal.signal(number, signal.SIG_DFL if number == signal.SIGHUP else signal.default_int_handler)

DATA = Path(__file__).parent / "data"


NOTICES = (
    *cli.NOTICES,
    ".*The dirpath has changed from.*",
    ".*with manual optimization and every_n_train_steps.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out notices of libraries that nobody here can act on, and what libraries do more than once for nothing."""
    for text in NOTICES:
        config.addinivalue_line("filterwarnings", f"ignore:{text}")
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    compose_faster(patch)
    copy_what_was_loaded(patch)
    draw_nothing_on_meta(patch)
    patch.setattr(os, "fsync", lambda file: None)  # no test cuts the power


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later search for garbage: it takes a fifth of the tests' time otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # rather than at every 700 new objects: a training makes a hundred times as many


@pytest.fixture(scope="module", autouse=True)
def _leave_out_of_searches() -> Iterator[None]:
    """Leave out of them too what a file of tests keeps for later ones, such as networks and compositions."""
    yield
    gc.collect()
    gc.freeze()


class Golden:
    """Reference numbers by name, as tensors."""

    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].copy())

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.arrays.files if name.startswith(prefix)]


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(DATA / "golden.npz")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline in diffusers layout."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    tiny.build_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium. It ends with the module's tests: while it is open, `asyncio.run` fails in this process."""
    with running_browser() as found:
        yield found


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_command_line() -> Iterator[None]:
    """Let no test find the command line that Hydra keeps of an earlier one's command."""
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has a captioned picture and a captioned video by name; neither is read."""
    folder = tmp_path_factory.mktemp("captioned")
    for name in ("a.png", "b.mp4", "a.txt", "b.txt"):
        (folder / name).write_text("a red star")
    return folder
