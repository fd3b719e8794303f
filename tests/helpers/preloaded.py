"""Imports what the commands need: programs of `processes.Fork` are forked from a process that has done only this."""

from __future__ import annotations

import gc
import importlib
import os

MODULES = (
    "swd.callbacks",
    "swd.commands.evaluate",
    "swd.commands.generate",
    "swd.commands.train",
    "swd.shapes.dataset",
    "swd.shapes.pipeline",
    "swd.modules.backbones.sd3",
    "torch.distributed",
)

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # as `swd.commands.cli.launch` sets it before it imports
for name in MODULES:
    importlib.import_module(name)
gc.collect()
gc.freeze()
