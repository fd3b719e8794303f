"""Callbacks: progress, checkpoints, students, samples, curves of a run's health."""

from swd.callbacks.checkpoint import Checkpoint
from swd.callbacks.monitor import Monitor
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples
from swd.callbacks.sentinel import Sentinel
from swd.callbacks.students import SaveAdapter, Students

__all__ = ["Checkpoint", "Monitor", "Progress", "Samples", "SaveAdapter", "Sentinel", "Students"]
