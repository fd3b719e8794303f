"""Strategies of Lightning's for a distillation on several processes: DDP, and FSDP2 with one mesh for all it trains."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, Literal, Protocol, cast

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, distributed, nn
from torch.distributed import GradBucket
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.torch_version import TorchVersion

from swd.io import limits
from swd.modules.backbones.base import Backbone
from swd.modules.layouts import divided_like, gathered, reshard
from swd.modules.networks import Networks, SeparateCopies
from swd.modules.training_task import average_name
from swd.types import UserError

LARGEST_STATE = 128.0
"""GB of weights and optimizer moments that the first process may gather in its host's memory: ours, a quarter of the
512 GB that machines with eight GPUs have at least."""


class Shardable(Protocol):
    """A distillation, as far as its layout on processes is concerned; `swd.modules.distiller.Distiller` is one."""

    networks: Networks
    terms: nn.ModuleDict
    average: AveragedModel | None

    def kept_state(self) -> dict[str, Tensor]:
        """The part of the task's state that a checkpoint holds."""

    def state_bytes(self) -> int:
        """Bytes of a checkpoint's weights and optimizer moments; loads no weights."""


class DDP(DDPStrategy):
    """A whole copy of everything on each process; gradients are averaged.

    Student and fake network step in turn, so that some parameters have no gradient in an update. A distillation's
    frozen weights and buffers are left alone: every process has read them from the same files, they never change, and
    some of their types cannot be sent (fp8). An update sends the gradients of what it steps, and no others.

    Attributes:
        stepped: what the running update of a distillation steps.
    """

    layout = "a whole copy each"

    def __init__(self) -> None:
        super().__init__(find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.stepped: set[nn.Parameter] = set()

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        is_distillation = isinstance(getattr(model, "networks", None), Networks)
        if is_distillation:
            frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            buffers = [name for name, _ in model.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*deprecated")  # torch 2.7 has no other name for it
            wrapped = super()._setup_model(model)
        if is_distillation:
            # Without the annotations of `average_stepped`, which are strings, and torch refuses those.
            wrapped.register_comm_hook(self.stepped, lambda stepped, bucket: average_stepped(stepped, bucket))
        return wrapped

    def step_only(self, parameters: Iterable[nn.Parameter]) -> None:
        """Say what the next update steps."""
        self.stepped.clear()
        self.stepped.update(parameters)


def average_stepped(stepped: set[nn.Parameter], bucket: GradBucket) -> Future[Tensor]:
    """Average gradients over the processes, those of `stepped` alone; a hook that DDP calls for each bucket of them.

    Buckets hold gradients of both sides, since the layers of both adapters lie side by side. The others are not read:
    DDP leaves a parameter alone that was used on no process.
    """
    buffer = bucket.buffer()
    pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
    own = [gradient for parameter, gradient in pairs if parameter in stepped]
    if not own:
        nothing: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
        nothing.set_result(buffer)
        return nothing
    joined = torch.cat([gradient.flatten() for gradient in own]).div_(distributed.get_world_size())

    def put_back(sent: Future[list[Tensor]]) -> Tensor:
        parts = sent.value()[0].split([gradient.numel() for gradient in own])
        for gradient, part in zip(own, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return buffer

    work = distributed.all_reduce(joined, async_op=True)
    assert work is not None  # it is where an operation does not block
    return work.get_future().then(put_back)


class Sharded(ModelParallelStrategy):
    """A part of all weights, gradients and optimizer moments on each process (FSDP2), or on each of a group (HSDP).

    Its checkpoints are those of one process: whole tensors under the same names, so that any layout goes on with them.

    Args:
        shard: number of processes that the weights are divided over, each such group holding all of them; "node": the
            processes of a machine; None: all processes.
        largest_state: GB of weights and optimizer moments that the first process may gather in its host's memory for a
            checkpoint.

    Raises:
        UserError: for numbers out of range; when a run begins, if its processes cannot be divided so, if it is no
            distillation, or if its state is larger.
    """

    def __init__(
        self,
        shard: int | Literal["node"] | None = None,
        largest_state: float = LARGEST_STATE,
    ) -> None:
        if isinstance(shard, str) and shard != "node":
            raise UserError(f"trainer.strategy.shard={shard}; use a number of processes, node, or null for all")
        limits.number("trainer.strategy.largest_state", largest_state, above=0)
        super().__init__(data_parallel_size=1, tensor_parallel_size=1)
        self.shard = shard
        self.largest_state = largest_state

    @property
    def layout(self) -> str:
        """How weights lie on the processes, in words."""
        return f"weights divided over {self.group_size(self.world_size, self.num_processes)}"

    # Building

    def group_size(self, processes: int, per_node: int) -> int:
        """Number of processes that the weights are divided over.

        Args:
            processes: of the run.
            per_node: of one machine.

        Raises:
            UserError: if it does not divide the number of processes.
        """
        size = per_node if self.shard == "node" else processes if self.shard is None else int(self.shard)
        if size < 1 or processes % size:
            raise UserError(
                f"trainer.strategy.shard={self.shard}: {processes} processes are no whole number of groups of {size}; "
                "use a divisor, or null for one group of all"
            )
        return size

    def setup_environment(self) -> None:
        task = self.lightning_module
        assert task is not None  # Lightning connects it before
        self.check_task(task)
        self._setup_distributed()
        size = self.group_size(self.world_size, self.num_processes)
        groups = self.world_size // size
        shape, names = ((size,), ("shard",)) if groups == 1 else ((groups, size), ("replicate", "shard"))
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        self._device_mesh = mesh
        task._device_mesh = mesh

    def check_task(self, task: nn.Module) -> None:
        """Raise UserError if a task is no distillation, or its state larger than the first process may gather.

        So it is on a torch whose FSDP2 takes one dtype for base and adapters, and averages with NCCL alone.
        """
        check_torch(torch.__version__)
        if not hasattr(task, "state_bytes"):
            raise UserError(
                f"this trainer shards a distillation; {type(task).__name__} trains one network of moderate size: use "
                "trainer=ddp"
            )
        size = cast(Shardable, task).state_bytes() / 1e9
        if size > self.largest_state:
            raise UserError(
                f"weights and optimizer moments of this run have {size:.3g} GB, more than the first process may "
                f"gather for a checkpoint (trainer.strategy.largest_state={self.largest_state:g}); raise that if its "
                "machine has the memory, or use model.tuning=lora"
            )

    def setup(self, trainer: Trainer) -> None:
        task = cast(Any, self.lightning_module)
        check_equal(task, self)
        shard(task, self.device_mesh)
        super().setup(trainer)

    # State: whole tensors outside, parts inside

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: weights are loaded before they are divided, at the same point of a run as without sharding."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, on the CPU of the first process. All processes call it at the same time."""
        task = self.lightning_module
        assert task is not None
        reshard(task)
        state: dict[str, Any] = gathered(cast(Shardable, task).kept_state())
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state dict, whole, on the CPU of the first process."""
        plain: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = gathered(plain.state_dict())
        return state if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole tensors, of which every process has all, into parameters that may be divided."""
        task = self.lightning_module
        assert task is not None
        reshard(task)
        own = dict(task.named_parameters())
        state = checkpoint["state_dict"]
        parts = {key: divided_like(value, own[key]) if key in own else value for key, value in state.items()}
        task.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load whole optimizer states, of which every process has all."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(divided_state(optimizer, state))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write on the first process, as one process does."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read on every process, as one process does."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def check_torch(version: str) -> None:
    """Raise UserError for a torch that cannot divide a distillation."""
    if TorchVersion(version) < "2.8":
        raise UserError(f"weights are divided from torch 2.8 on, and this is {version}; upgrade it, or use trainer=ddp")


def divided_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state of an optimizer with its moments divided as the parameters are, which it numbers in order."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divided(value: Any, parameter: Tensor) -> Any:
        is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
        return divided_like(value, parameter) if is_moment else value

    moments = {
        number: {name: divided(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


# Dividing


def shard(task: Shardable, mesh: DeviceMesh) -> None:
    """Divide the networks, the heads and the average of a distillation that has no optimizer yet over a mesh.

    Weights are loaded, adapters added and checkpointing is on before: FSDP2 refuses or breaks what would change them
    later. There is no mixed-precision policy, since autocast casts what is trained, and no ignored parameter. All lie
    on one mesh, without which clipping and AdamW could not take them together.
    """
    networks = task.networks
    copies = list(networks.copies.values()) if isinstance(networks, SeparateCopies) else []
    for backbone in (networks.backbone, *copies):
        shard_backbone(cast(Backbone, backbone), mesh)
    for name, term in task.terms.items():
        shard_heads(f"loss.{name}", term, mesh)
    if task.average is not None:
        divide_average(task.average, networks)


def shard_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Divide a network: each block by itself, then what is left of the network, which is what gets called."""
    blocks = backbone.repeated_blocks  # before the first is divided, which renames its class
    for block in blocks:
        fully_shard(block, mesh=mesh)
        block.register_forward_pre_hook(contiguous_inputs, prepend=True, with_kwargs=True)
    fully_shard(backbone.network, mesh=mesh)
    # FSDP2 would learn the order of blocks from the forward pass, which `autograd.grad` makes it forget.
    for before, block in pairwise(blocks):
        cast(FSDPModule, block).set_modules_to_backward_prefetch([cast(FSDPModule, before)])
    reshard_after_inference(backbone.network)
    # FSDP2 makes the outermost weights whole again when a gradient reaches an output, so features must be outputs.
    backbone.expose_features()


def contiguous_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a block contiguous inputs, before FSDP2's own hook sees them.

    That hook takes a view of each input, but not where activation checkpointing computes the block again. For a batch
    of one sample a view of a transposed tensor has other strides, with which PyTorch multiplies it in another way, and
    checkpointing refuses what comes out.
    """

    def contiguous(value: Any) -> Any:
        return value.contiguous() if isinstance(value, Tensor) else value

    return tuple(map(contiguous, args)), {name: contiguous(value) for name, value in kwargs.items()}


def reshard_after_inference(network: nn.Module) -> None:
    """Let a network that has run without a graph be divided again at once.

    FSDP2 leaves the outermost weights whole for the backward pass, in which it divides them; where none comes, code
    that reads parameters would meet whole ones.
    """
    has_graph = True

    def before(*_: Any) -> None:
        nonlocal has_graph
        has_graph = torch.is_grad_enabled()

    def after(*_: Any) -> None:
        if not has_graph:
            cast(FSDPModule, network).reshard()

    network.register_forward_pre_hook(before)
    network.register_forward_hook(after)


def shard_heads(key: str, term: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the modules that a loss term owns; `key` names the term in messages.

    Raises:
        UserError: for a parameter that is in no module, since only a module's forward pass makes weights whole.
    """
    bare = next((name for name, _ in term.named_parameters(recurse=False)), None)
    if bare is not None:
        raise UserError(f"{key}: its parameter {bare} is in no module, so it cannot be sharded; use trainer=ddp")
    for child in term.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            shard_heads(key, child, mesh)
        elif any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)


def divide_average(average: AveragedModel, networks: Networks) -> None:
    """Divide the average of the student's weights as those are."""
    targets = {average_name(name): parameter for name, parameter in networks.named_parameters()}
    holder = cast(nn.ParameterDict, average.module)
    for name in list(holder):
        holder[name] = nn.Parameter(divided_like(holder[name].detach(), targets[name]), requires_grad=False)


def check_equal(task: nn.Module, strategy: Strategy) -> None:
    """Raise UserError, on all processes, unless all start from the same trained weights.

    FSDP2 sends none: weights that differ would be a mixture of all processes' without any error.
    """
    mine = weights_fingerprint(task)
    first = strategy.broadcast(mine)
    differ = torch.tensor(float(mine != first), device=strategy.root_device)
    if strategy.reduce(differ, reduce_op="sum"):
        raise UserError(
            "processes start from different trained weights; give all of them the same seed, model and files, and the "
            "same versions of torch and peft"
        )


def weights_fingerprint(task: nn.Module) -> str:
    """Hash of the names and values of all trained weights, which lie whole on this process."""
    digest = hashlib.sha256()
    for name, value in trained(task):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def trained(task: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the parameters that require a gradient."""
    return ((name, value) for name, value in task.named_parameters() if value.requires_grad)


def check_strategy(strategy: Any, task: nn.Module, processes: int, nodes: int) -> None:
    """Let a strategy refuse, before any model is loaded, a task or a number of processes.

    Raises:
        UserError: by a sharding strategy, or for one of Lightning's whose checkpoints a distillation cannot go on from.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if hasattr(task, "state_bytes") and name.lower().startswith(("fsdp", "deepspeed", "modelparallel")):
        raise UserError(f"trainer.strategy={name} does not fit a distillation; use trainer=fsdp, hsdp or ddp")
    if isinstance(strategy, Sharded):
        strategy.check_task(task)
        strategy.group_size(processes, processes // nodes)


def strategy_for(strategy: Any, processes: int) -> Any:
    """The strategy for a value of `trainer.strategy`: "auto" and "ddp" are `DDP` with several processes."""
    if strategy not in ("auto", "ddp"):
        return strategy
    return DDP() if processes > 1 else "auto"
