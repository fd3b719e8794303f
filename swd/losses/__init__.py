"""Loss terms of scale-wise distillation."""

from swd.losses.base import CriticStep, FakePass, GeneratorStep, LossTerm, Metrics, ModelFacts, Predictors
from swd.losses.dmd import DMD
from swd.losses.gan import GAN
from swd.losses.mmd import MMD

__all__ = [
    "DMD",
    "GAN",
    "MMD",
    "CriticStep",
    "FakePass",
    "GeneratorStep",
    "LossTerm",
    "Metrics",
    "ModelFacts",
    "Predictors",
]
