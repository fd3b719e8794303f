"""Callbacks: progress, checkpoints, students, samples."""

from swd.callbacks.checkpoint import Checkpoint
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples
from swd.callbacks.students import SaveAdapter, Students

__all__ = ["Checkpoint", "Progress", "Samples", "SaveAdapter", "Students"]
