"""Student, teacher and fake score: roles of one frozen base with LoRA adapters, or separate copies."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swd.modules import joint_attention, joint_block, mlp, rms_norm, time_waves
from swd.modules.autocast import autocast_on_meta
from swd.modules.backbones.base import TARGETS, Backbone
from swd.modules.layouts import whole_tensor
from swd.modules.lora_linear import PlayedRole, follow, install
from swd.modules.quantize import QuantizedLinear
from swd.modules.targets import check_targets, names_for_peft
from swd.types import Conditioning, Role, UserError


class Networks(nn.Module, ABC):
    """Student, fake score and teacher as one object; implements `swd.losses.Predictors`.

    Args:
        backbone: the teacher.
        roles: which trainable roles exist; MMD alone needs no "fake".

    Attributes:
        recompute: whether checkpointing, where it is enabled, recomputes; it may change between two passes.
    """

    def __init__(self, backbone: Backbone, roles: Sequence[Role]) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        rms_norm.install_norms(backbone.network)
        joint_attention.install_attention(backbone.network)
        joint_block.install_blocks(backbone.network)
        mlp.install_mlps(backbone.network)
        time_waves.install_waves(backbone.network)
        self.process = backbone.process
        self.roles = tuple(roles)
        self.played = PlayedRole()
        self.recompute = True

    @property
    def _current(self) -> Role:
        """The role that is played now."""
        return self.played.role

    @property
    def narrows(self) -> bool:
        """Whether `x0` takes `rows`."""
        return self.backbone.narrows

    # Implemented by the two kinds of networks

    @abstractmethod
    def backbone_of(self, role: Role) -> Backbone:
        """The network that plays `role`; call it inside `self.role(role)`."""

    @abstractmethod
    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        """The trainable parameters of a role."""

    @abstractmethod
    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass, block by block, in the role of the forward pass.

        It is done as long as `recompute` is True. States of generators are not kept: nothing in a block is random.
        """

    def _checkpoint(self, backbone: Backbone) -> None:
        """Do so in one network."""

        def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self.recompute:
                return module(*args, **kwargs)
            role = self._current
            last = backbone.last

            @contextmanager
            def as_before() -> Iterator[None]:
                with self.role(role), backbone.without_text_mlp(last):
                    yield

            def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return nullcontext(), as_before()

            args, kwargs = backbone.narrow(module, args, kwargs)
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
            return checkpoint(module.__call__, *args, **options, **kwargs)

        backbone.diffusers_model.enable_gradient_checkpointing(run)

    def _set(self, role: Role) -> None:
        """Make `role` the current one."""
        if role != "teacher" and role not in self.roles:
            raise UserError(f"role {role!r} does not exist here; trainable roles are {list(self.roles)}")
        self.played.role = role

    @contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Context in which the networks play `role`; afterwards they play the same role as before."""
        before = self._current
        self._set(role)
        try:
            yield
        finally:
            self._set(before)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of bf16 arithmetic for a bf16 base; trained weights stay float32 and are cast when they are used."""
        dtype = self.backbone.dtype
        if dtype != torch.bfloat16:
            return nullcontext()
        device = next(self.backbone.parameters()).device.type
        return autocast_on_meta(dtype) if device == "meta" else torch.autocast(device, dtype)

    # Predictions, for losses and samplers

    def x0(
        self,
        role: Role,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
        rows: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Clean prediction `[B, C, *size]` float32 of a role, and features of `blocks`.

        With `rows`, which needs `narrows`, only so many samples go on behind the last of `blocks`: the first ones,
        whose prediction it is.
        """
        with self.role(role), self.autocast():
            prediction, features = self.backbone_of(role).predict(
                x_t, sigma, conditioning, blocks, grad_to_features_only, rows
            )
        return self.process.to_x0(x_t[:rows], prediction, sigma[:rows]), features

    def features(
        self, role: Role, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Features `[B, L, D]` of `blocks` of a role, with early exit."""
        with self.role(role), self.autocast():
            return self.backbone_of(role).features(x_t, sigma, conditioning, blocks)

    def guided_x0(
        self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, empty: Conditioning, guidance: float
    ) -> Tensor:
        """The teacher's clean prediction with classifier-free guidance, as `Backbone.guide` combines the two passes.

        It equals what the stock pipeline predicts at this level, given the same scale and the family's own `empty`.

        Args:
            x_t: noised latent `[B, C, *size]`.
            sigma: noise levels `[B]`.
            conditioning: B rows.
            empty: conditioning in place of a prompt, one row (`Pretrained.unconditional`).
            guidance: 1 for none: one pass instead of two.
        """
        if guidance == 1.0:
            return self.x0("teacher", x_t, sigma, conditioning)[0]
        both = Conditioning.cat([conditioning, empty.expand(len(x_t))])
        x0 = self.x0("teacher", torch.cat([x_t, x_t]), torch.cat([sigma, sigma]), both)[0]
        text, unconditional = x0.chunk(2)
        return self.backbone.guide(text, unconditional, guidance, x_t)


class SharedBase(Networks):
    """One frozen network in device memory that plays all roles.

    The student and the fake score are LoRA adapters on it; the teacher is the base with both off, bit for bit.
    Adapters are switched by `role`, which all layers read from one object (`RoleLinear`): peft's own switches flip
    `requires_grad`, which loses gradients without an error if it happens between a forward pass and its backward pass.

    Args:
        backbone: the base, frozen here.
        rank: LoRA rank r.
        alpha: LoRA alpha; the update is scaled by alpha / r. None: alpha = r.
        targets: names of the linear layers that get an adapter.
        roles: which trainable roles exist; MMD alone needs no "fake".
        seed: of the adapters' initial weights.
    """

    def __init__(
        self,
        backbone: Backbone,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] = TARGETS,
        roles: Sequence[Role] = ("student", "fake"),
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, roles)
        check_targets(backbone.network, targets)
        self._add_adapters(rank, alpha, targets, seed)
        self._layers: list[LoraLayer] = [m for m in self.backbone.network.modules() if isinstance(m, LoraLayer)]
        self._other_layers = install(self.backbone.network, self.played)
        for layer in self._layers:
            # Without this, peft casts bf16 input to float32 for the LoRA weights, and autocast casts it back to bf16.
            layer.cast_input_dtype_enabled = self.backbone.dtype == torch.float32
        self._unfreeze_adapters()
        self._self_test()

    def _add_adapters(self, rank: int, alpha: float | None, targets: Sequence[str], seed: int) -> None:
        """Add an adapter for each trainable role."""
        names = names_for_peft(self.backbone.network, targets)
        # Drawn on the CPU, whatever the default device is, so that initial weights are the same on every device.
        without_weights = next(self.backbone.parameters()).is_meta
        with torch.random.fork_rng(devices=[]), torch.device("meta" if without_weights else "cpu"):
            for number, role in enumerate(self.roles):
                torch.manual_seed(2 * seed + number)
                self._add_adapter(role, rank, alpha, names)

    def _add_adapter(self, name: str, rank: int, alpha: float | None, targets: Sequence[str]) -> None:
        """Add a float32 adapter called `name`, with fresh weights, to the base."""
        config = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets),
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Already found a `peft_config`.*")  # a second adapter is intended
            self.backbone.diffusers_model.add_adapter(config, adapter_name=name)
        for key, parameter in self.backbone.network.named_parameters():
            if f".{name}." in key:
                parameter.data = parameter.data.float()

    def _unfreeze_adapters(self) -> None:
        """Make the adapters of all roles trainable: peft freezes an adapter when another one is added."""
        for key, parameter in self.named_parameters():
            if "lora_" in key:
                parameter.requires_grad_(True)

    def _self_test(self) -> None:
        """Raise RuntimeError unless peft follows the private attributes that `follow` writes; they may change."""
        layer = self._layers[0]
        follow(layer, self.roles[0])
        if list(layer.active_adapters) != [self.roles[0]] or layer.disable_adapters:
            raise RuntimeError("this peft version does not follow _active_adapter; swd needs peft 0.17 to 0.21")
        follow(layer, "teacher")
        if not layer.disable_adapters:
            raise RuntimeError("this peft version does not follow _disable_adapters; swd needs peft 0.17 to 0.21")

    def backbone_of(self, role: Role) -> Backbone:
        return self.backbone

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in 8 bits."""
        return any(isinstance(layer.get_base_layer(), QuantizedLinear) for layer in self._layers)

    def _set(self, role: Role) -> None:
        super()._set(role)
        for layer in self._other_layers:
            follow(layer, role)

    def enable_checkpointing(self) -> None:
        self._checkpoint(self.backbone)

    # Weights

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        return [p for key, p in self.named_parameters() if f".{role}." in key and "lora_" in key]

    def adapter_state(self, role: Role) -> dict[str, Tensor]:
        """A role's LoRA weights in peft's layout, without the adapter's name; whole, so all processes call it."""
        state: dict[str, Tensor] = get_peft_model_state_dict(self.backbone.network, adapter_name=role)
        return {key: whole_tensor(value.detach()).clone() for key, value in state.items()}

    def load_adapter(self, role: Role, state: dict[str, Tensor]) -> None:
        """Set a role's LoRA weights.

        Raises:
            UserError: if a key or a shape does not fit.
        """
        own = self.adapter_state(role)
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))[0]
            raise UserError(f"adapter does not fit this model: {len(state)} tensors, expected {len(own)} (e.g. {odd})")
        for key, value in state.items():
            if value.shape != own[key].shape:
                raise UserError(
                    f"adapter does not fit: {key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}; "
                    "check the rank"
                )
        set_peft_model_state_dict(self.backbone.network, state, adapter_name=role)


class SeparateCopies(Networks):
    """A whole trainable copy of the network for each role (`tuning: full`), and the frozen teacher.

    Copies are float32 whatever the teacher's dtype, and compute under autocast where that is bf16.

    Args:
        backbone: the teacher, frozen here.
        roles: which trainable roles exist.
    """

    def __init__(self, backbone: Backbone, roles: Sequence[Role] = ("student", "fake")) -> None:
        super().__init__(backbone, roles)
        dtype = backbone.dtype
        self.copies = nn.ModuleDict()
        for name in self.roles:
            copied = copy.deepcopy(backbone).float().requires_grad_(True)
            copied._dtype = dtype
            self.copies[name] = copied

    def backbone_of(self, role: Role) -> Backbone:
        if role == "teacher":
            return self.backbone
        copied = self.copies[role]
        assert isinstance(copied, Backbone)  # `__init__` puts nothing else there
        return copied

    def role_parameters(self, role: Role) -> list[nn.Parameter]:
        return list(self.copies[role].parameters())

    def enable_checkpointing(self) -> None:
        roles: tuple[Role, ...] = ("teacher", *self.roles)
        for role in roles:
            self._checkpoint(self.backbone_of(role))
