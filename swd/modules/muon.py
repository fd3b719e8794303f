"""Muon for the matrices of a transformer, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from swd.types import UserError


def hidden_matrices(blocks: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The trainable matrices of transformer blocks, except those that compute modulations.

    A modulation is one scale for each channel, not a map between hidden states, which is what Muon is made for.
    """
    return [
        parameter
        for block in blocks
        for name, parameter in block.named_parameters()
        if parameter.ndim == 2 and parameter.requires_grad and "norm" not in name
    ]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, as in `torch.optim.Muon`) on hidden matrices and AdamW on the rest.

    Training from scratch on little compute gains most from it: orthogonalised updates move every direction of a
    matrix at the same rate. Muon's steps are scaled to the root mean square of AdamW's (arXiv 2502.16982, section 2.2).

    Args:
        network: the network whose trainable weights are optimized.
        matrices: the weights that Muon updates; AdamW updates all others.
        lr: learning rate of AdamW.
        muon_lr: learning rate of Muon.
        weight_decay: weight decay of both.

    Raises:
        UserError: when this PyTorch has no Muon (2.9 brought it).
    """

    def __init__(
        self,
        network: nn.Module,
        matrices: Sequence[nn.Parameter],
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.01,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"task.muon_lr needs PyTorch 2.9 or newer, found {torch.__version__}; set it to null")
        chosen = {id(parameter) for parameter in matrices}
        others = [p for p in network.parameters() if p.requires_grad and id(p) not in chosen]
        self.parts: tuple[Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay),
        )
        super().__init__([{"params": [*matrices, *others]}], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of Muon and of AdamW."""
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
