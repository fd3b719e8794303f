"""Callbacks: progress, checkpoints, samples, curves of a run's health."""

from swd.callbacks.checkpoint import Checkpoint, SaveAdapter
from swd.callbacks.monitor import Monitor
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples
from swd.callbacks.sentinel import Sentinel

__all__ = ["Checkpoint", "Monitor", "Progress", "Samples", "SaveAdapter", "Sentinel"]
