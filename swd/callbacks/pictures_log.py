"""Pictures with captions for the loggers that take some: wandb and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image


def log_pictures(trainer: Trainer, name: str, pictures: Sequence[Image.Image], captions: Sequence[str]) -> None:
    """Give pictures to the loggers, at the current iteration.

    Args:
        trainer: of the run.
        name: under which they are shown, e.g. "samples".
        pictures: RGB.
        captions: one a picture.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, list(pictures), step=step, caption=list(captions))
        if isinstance(logger, TensorBoardLogger):
            for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
                tag = f"{name}/{number}" if len(pictures) > 1 else name
                logger.experiment.add_image(tag, np.asarray(picture), step, dataformats="HWC")
                logger.experiment.add_text(f"{tag}/caption", caption, step)
