"""Trainings of the pages on scale and faults: their keys exist, their batches divide over processes and parts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import composed

DOCS = Path(__file__).parents[1] / "docs"
TEXTS = [(DOCS / name).read_text(encoding="utf-8") for name in ("scale.md", "reliability.md", "checkpoints.md")]
LINES = [line.strip() for text in TEXTS for line in text.splitlines() if "train.py " in line]
COMMANDS = [line for line in dict.fromkeys(LINES) if line.startswith(("python ", "torchrun ", "srun "))]
OF_SLURM = 8 * 8
"""Processes that the batch script of docs/scale.md starts."""


def arguments(line: str) -> list[str]:
    """Those of the first training: of a sweep the first of each list of values, the lower end of each interval."""
    words = shlex.split(line, comments=True)
    given = [word for word in words[words.index("train.py") + 1 :] if word != "-m" and not word.startswith("hydra")]
    return [re.sub(r"interval\((.*)\)", r"\1", word).partition(",")[0] if "-m" in words else word for word in given]


def processes(line: str) -> int:
    """Of the launcher that stands in front of a training, or that Hydra is given; else those of one machine."""
    if line.startswith("srun --kill-on-bad-exit"):
        return OF_SLURM
    nodes = re.search(r"(?:--nnodes |hydra\.launcher\.nodes=)(\d+)", line)
    each = re.search(r"(?:--nproc-per-node |trainer\.devices=)(\d+)", line)
    return int(nodes[1] if nodes else 1) * int(each[1] if each else 8)


def test_there_are_commands_of_every_launcher_and_layout() -> None:
    for words in ("torchrun", "srun", "hydra/launcher=", "trainer=fsdp", "trainer=hsdp", "task.accumulate="):
        assert any(words in line for line in COMMANDS), words


@pytest.mark.parametrize("line", COMMANDS)
def test_a_training_has_data_and_a_batch_that_divides(line: str) -> None:
    cfg = composed([*arguments(line), "folder=x", "name=y"])
    assert cfg.data.batch_size % processes(line) == 0
    assert cfg.data.batch_size // processes(line) % cfg.task.get("accumulate", 1) == 0
    path = cfg.data.path if "path" in cfg.data else cfg.data.dataset.get("path", "drawn as it goes")
    assert path, "no data"
