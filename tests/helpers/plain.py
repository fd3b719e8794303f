"""The plain ways to compute what the program computes faster: peft's own layers, and every pass and step by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swd.diffusion import RectifiedFlow, expand
from swd.losses.base import Step
from swd.losses.update import student_x0
from swd.modules import distiller, joint_attention, joint_block, mlp, rms_norm
from swd.modules.inputs import Inputs
from swd.modules.lora_linear import RoleLinear


def one_by_one(networks: Any, inputs: Sequence[Inputs], parts: int = 1) -> list[Inputs]:
    """`with_predictions` by a pass for each update and part."""
    found = []
    for each in inputs:
        x0_hats = [student_x0(networks, p.interval, p.source, p.conditioning, p.draws) for p in each.parts(parts)]
        found.append(replace(each, x0_hat=torch.cat(x0_hats)))
    return found


def go_the_plain_way(monkeypatch: pytest.MonkeyPatch, norms: bool = True) -> None:
    """Switch every saving off; `norms`: that of the norms too, which diffusers computes in float32 at most."""
    monkeypatch.setattr(RoleLinear, "_is_plain", lambda layer, role: False)
    if norms:
        monkeypatch.setattr(rms_norm, "install_norms", lambda network: None)
    monkeypatch.setattr(joint_attention, "install_attention", lambda network: None)
    monkeypatch.setattr(joint_block, "install_blocks", lambda network: None)
    monkeypatch.setattr(mlp, "install_mlps", lambda network: None)
    monkeypatch.setattr(Step, "_joins", lambda step: False)
    monkeypatch.setattr(distiller, "with_predictions", one_by_one)
    monkeypatch.setattr(distiller, "FUSED", ())
    monkeypatch.setattr(RectifiedFlow, "add_noise", lambda _, x0, eps, sigma: blended(x0, eps, expand(sigma, x0)))
    monkeypatch.setattr(RectifiedFlow, "to_x0", lambda _, x_t, velocity, sigma: x_t - expand(sigma, x_t) * velocity)


def blended(x0: Tensor, eps: Tensor, share: Tensor) -> Tensor:
    """Noised latents, operation by operation."""
    return (1 - share) * x0 + share * eps


class BlockRuns:
    """Runs of the blocks of a network: a list of the samples of each run, by the block's number."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.samples: list[list[int]] = [[] for _ in blocks]
        for number, block in enumerate(blocks):
            block.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.samples[number].append(len(output[1]))

        return hook

    @property
    def runs(self) -> int:
        """Number of runs of all blocks."""
        return sum(map(len, self.samples))
