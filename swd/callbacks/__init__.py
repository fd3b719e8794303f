"""Callbacks: progress, checkpoints, samples, metrics, losses on data that are held out."""

from swd.callbacks.checkpoint import Checkpoint, SaveAdapter
from swd.callbacks.metrics import Metrics
from swd.callbacks.progress import Progress
from swd.callbacks.sample_sheets import Samples
from swd.callbacks.validation import Validation

__all__ = ["Checkpoint", "Metrics", "Progress", "Samples", "SaveAdapter", "Validation"]
