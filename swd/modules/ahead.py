"""The student's predictions for several updates between which it does not change, in passes of many samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from swd.losses.base import Predictors
from swd.losses.update import student_input
from swd.modules.inputs import Inputs
from swd.types import Conditioning


def with_predictions(networks: Predictors, inputs: Sequence[Inputs], parts: int = 1) -> list[Inputs]:
    """The inputs of updates with the student's predictions on them, as each update alone would make them.

    Samples of all updates go through the student together, as far as their sizes agree. Without a graph they take less
    memory than an update with one, whose samples are fewer.

    Args:
        networks: the three roles.
        inputs: of updates that find the same student. Called without gradients.
        parts: number of passes that each process's samples are divided over; it divides the batches.
    """
    predictions: list[list[Tensor]] = [[] for _ in inputs]
    split = [each.parts(parts) for each in inputs]
    for part in range(parts):
        for group in _alike([each[part] for each in split]):
            found = _predict(networks, [split[number][part] for number in group])
            for number, x0_hat in zip(group, found, strict=True):
                predictions[number].append(x0_hat)
    return [replace(each, x0_hat=torch.cat(found)) for each, found in zip(inputs, predictions, strict=True)]


def _predict(networks: Predictors, inputs: Sequence[Inputs]) -> tuple[Tensor, ...]:
    """The student's clean predictions on inputs of one kind, in one pass."""
    noised = [student_input(networks.process, each.interval, each.source, each.draws) for each in inputs]
    x_t = torch.cat([each.x_t for each in noised])
    sigma = torch.cat([each.sigma for each in noised])
    conditioning = Conditioning.cat([each.conditioning for each in inputs])
    x0_hat = networks.x0("student", x_t, sigma, conditioning)[0]
    return x0_hat.split([len(each.x_t) for each in noised])


def _alike(inputs: Sequence[Inputs]) -> list[list[int]]:
    """Numbers of the inputs, grouped by whether one pass can take them."""
    groups: dict[object, list[int]] = {}
    for number, each in enumerate(inputs):
        key = (each.interval, each.bucket, each.conditioning.embeds.shape[1], each.conditioning.mask is None)
        groups.setdefault(key, []).append(number)
    return list(groups.values())
