"""Callbacks: progress, checkpoints, students, samples, metrics, held-out losses, curves of a run's health."""

from swd.callbacks.checkpoint import Checkpoint
from swd.callbacks.monitor import Monitor
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples
from swd.callbacks.sentinel import Sentinel
from swd.callbacks.students import SaveAdapter, Students
from swd.callbacks.training_metrics import Metrics
from swd.callbacks.validation import Validation

__all__ = [
    "Checkpoint",
    "Metrics",
    "Monitor",
    "Progress",
    "Samples",
    "SaveAdapter",
    "Sentinel",
    "Students",
    "Validation",
]
