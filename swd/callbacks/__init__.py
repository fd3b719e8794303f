"""Callbacks: progress, checkpoints, samples."""

from swd.callbacks.checkpoint import Checkpoint, SaveAdapter
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples

__all__ = ["Checkpoint", "Progress", "Samples", "SaveAdapter"]
