"""The contract of a backbone: the one place that knows how a network family wants to be called."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from swd.diffusion import Process, expand
from swd.io.limits import LARGEST_SIDE
from swd.modules.encoders import Encoders
from swd.scheduler import to_layout, unpack
from swd.types import Conditioning, Size, UserError

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
"""Linear layers that get LoRA: attention and MLP (SwD paper, appendix A), by the names that most families use."""


@dataclass(frozen=True)
class NetworkLimits:
    """Valid input of a network, by its own configuration.

    Attributes:
        divisor: latent sides must be multiples of this, because of the patches or the UNet's halvings.
        max_side: largest latent side that the positional embedding covers, None without a limit.
        blocks: number of blocks that features can be read from.
        width: feature width D.
        channels: latent channels C.
        native: latent size that the model draws by default, (H, W) or (F, H, W).
        max_frames: largest number of latent frames, None without a limit.
    """

    divisor: int
    max_side: int | None
    blocks: int
    width: int
    channels: int
    native: Size
    max_frames: int | None = None

    @property
    def axes(self) -> int:
        """Number of axes of a latent size: 2 for (H, W), 3 for (F, H, W)."""
        return len(self.native)

    def check_size(self, size: Size) -> None:
        """Raise UserError for a latent size that the network cannot take.

        Networks that compute their positions have no `max_side`; their sides are limited by `LARGEST_SIDE`.
        """
        if len(size) != self.axes:
            expected = "(H, W)" if self.axes == 2 else "(F, H, W)"
            raise UserError(f"size {size} has {len(size)} axes; this model takes {expected}")
        for side in size:
            if not 1 <= side <= LARGEST_SIDE:
                raise UserError(f"size {size}: {side} is no side of a latent; use 1 to {LARGEST_SIDE}")
        for side in size[-2:]:
            self._check_side(side, size)
        if self.max_frames and size[0] > self.max_frames:
            raise UserError(f"size {size}: {size[0]} frames are beyond the positional limit {self.max_frames}")

    def _check_side(self, side: int, size: Size) -> None:
        """Raise UserError for a height or width of `size` that the network cannot take."""
        if side % self.divisor:
            lower = side - side % self.divisor
            valid = sorted({lower or self.divisor, lower + self.divisor})
            raise UserError(
                f"size {size}: {side} is not divisible by {self.divisor}, as this network needs; "
                f"use {' or '.join(map(str, valid))}"
            )
        if self.max_side and side > self.max_side:
            raise UserError(f"size {size}: {side} is beyond the positional limit {self.max_side} of this model")

    def check_block(self, block: int) -> None:
        """Raise UserError for a feature block that does not exist."""
        if not 0 <= block < self.blocks:
            raise UserError(f"feature block {block} does not exist; this model has blocks 0 to {self.blocks - 1}")


class DiffusersModel(Protocol):
    """Members of diffusers' models that this package uses and `nn.Module` does not declare.

    Attributes:
        config: the content of `config.json`, with the defaults of what it leaves out.
    """

    config: Mapping[str, Any]

    def add_adapter(self, adapter_config: Any, adapter_name: str) -> None:
        """Put a LoRA on the layers that a `peft.LoraConfig` names."""

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Recompute activations in the backward pass, block by block, with the given function or PyTorch's own."""


class LastFeatures(NamedTuple):
    """Where a pass has its last features, and how much of it goes on behind them.

    Attributes:
        block: number of the block.
        rows: number of samples that go on.
        samples: number of samples in all.
        graph: whether what goes on is differentiated.
    """

    block: int
    rows: int
    samples: int
    graph: bool = True


class _Done(Exception):
    """Ends a forward pass early, once the last block asked for has run."""


class Backbone(nn.Module, ABC):
    """A denoising network under one contract.

    Code outside passes `x_t`, `sigma` and `Conditioning`; packing, position ids, timestep units and guidance inputs are
    known only here. A new family implements `limits_of`, `block_list`, `call` and, where a block does not return its
    image stream alone, `image_stream`; and it names its encoders and its pipeline.

    Args:
        network: the diffusers model, of the class named `network_type`.
        guidance: guidance scale, an input of guidance-distilled networks; others ignore it.

    Attributes:
        process: the diffusion process.
        subfolder: the network's name in the pipeline.
        network_type: its diffusers class.
        pipeline_type: the diffusers pipeline that it is part of.
        pipeline_aliases: pipelines that use the same weights for other tasks.
        encoders_type: text encoders and VAE of that pipeline.
        masked_text: whether the network takes a mask of the text's tokens.
        video: whether it draws videos.
        has_refiner: whether there are refiners, networks of their own that take over for the last steps.
        layout: how its pipeline takes latents, see `swd.scheduler.to_layout`.
        float_latents: whether its pipeline carries latents in float32 whatever the network's dtype.
        called_with_first_size: whether its pipeline refuses latents of another size than its height and width, so that
            with a scale-wise scheduler it is called with those of the first size.
        unknown_settings: settings of `model_index.json`, or of the network's configuration, that mark variants which
            this backbone does not support.
        known_settings: settings of `model_index.json` that must have these values.
        lora_arguments: arguments of the pipeline's `load_lora_weights` for this network, beside the weights.
        other_experts: denoising networks of the pipeline, of the same class, that take other noise levels: the family
            of each by its name in the pipeline. `process` says which levels this one takes.
        trains_from_scratch: whether `initialise` has weights for `task.from_scratch`.
        targets: linear layers that get LoRA unless a configuration names others.
        comfyui: whether ComfyUI supports this family and loads its LoRA under the names of `comfy_key`.
        poor_at_low_resolution: whether the teacher draws poorly at sizes below its native one.
        narrows: whether a pass may go on with some of its samples behind a block: where `behind` names all that runs
            there but for the network's last layers, and `rows_of` cuts its inputs.
        text_mlp: name of a block's submodule that only its text tokens go through, once the image tokens have done with
            them; None where blocks have none. In the block of the last features it runs for the samples that go on.
        last_norm: name of the norm behind all blocks, where that and what follows it can take the samples that go on
            alone; None where they need as many as the network was given: then zeros stand for the others.
        last: the last features of the forward pass that runs, where not all its samples go on behind them.
    """

    process: ClassVar[Process]
    subfolder: ClassVar[str] = "transformer"
    network_type: ClassVar[str]
    pipeline_type: ClassVar[str]
    pipeline_aliases: ClassVar[tuple[str, ...]] = ()
    encoders_type: ClassVar[type[Encoders]]
    masked_text: ClassVar[bool] = False
    video: ClassVar[bool] = False
    has_refiner: ClassVar[bool] = False
    layout: ClassVar[str] = "map"
    float_latents: ClassVar[bool] = False
    called_with_first_size: ClassVar[bool] = False
    unknown_settings: ClassVar[tuple[str, ...]] = ()
    known_settings: ClassVar[Mapping[str, Any]] = {}
    lora_arguments: ClassVar[Mapping[str, Any]] = {}
    other_experts: ClassVar[Mapping[str, str]] = {}
    trains_from_scratch: ClassVar[bool] = False
    targets: ClassVar[tuple[str, ...]] = TARGETS
    comfyui: ClassVar[bool] = False
    poor_at_low_resolution: ClassVar[bool] = False
    narrows: ClassVar[bool] = False
    text_mlp: ClassVar[str | None] = None
    last_norm: ClassVar[str | None] = None

    def __init__(self, network: nn.Module, guidance: float | None = None) -> None:
        super().__init__()
        self.network = network
        self.guidance = guidance
        self._dtype: torch.dtype | None = None
        self._found: dict[int, Tensor] = {}  # features of the forward pass that runs
        self._narrow: dict[nn.Module, int] = {}  # number of samples that a module takes of those it is given
        self.last: LastFeatures | None = None

    @staticmethod
    @abstractmethod
    def limits_of(config: dict[str, Any]) -> NetworkLimits:
        """Limits from the network's `config.json`, before any weight is loaded."""

    @staticmethod
    def frame_rate(config: dict[str, Any]) -> int:
        """Frames a second of the videos that a network of this `config.json` draws; 16, of Wan2.1, by default."""
        return 16

    @staticmethod
    @abstractmethod
    def conditioning_widths(config: dict[str, Any]) -> tuple[int, int | None]:
        """Widths of text tokens and of the pooled embedding (None without one) that the network takes."""

    @classmethod
    def random_conditioning(cls, config: dict[str, Any], batch: int, tokens: int, seed: int = 0) -> Conditioning:
        """Random conditioning of the right shape, to run a network without its encoders."""
        generator = torch.Generator().manual_seed(seed)
        width, pooled = cls.conditioning_widths(config)
        embeds = torch.randn(batch, tokens, width, generator=generator)
        pooled_embeds = None if pooled is None else torch.randn(batch, pooled, generator=generator)
        return Conditioning(embeds, pooled_embeds, mask=torch.ones(batch, tokens) if cls.masked_text else None)

    @staticmethod
    def initialise(network: nn.Module, seed: int) -> None:
        """Set the weights with which training from scratch begins; only for families with `trains_from_scratch`.

        Args:
            network: the diffusers model.
            seed: of the weights; equal seeds give equal ones.
        """
        raise NotImplementedError("this family is not trained from scratch")

    @staticmethod
    def sampling_arguments(max_text_tokens: int, guidance: float | None) -> dict[str, Any]:
        """Arguments with which the stock pipeline samples a distilled student, besides prompt, size and steps."""
        return {"guidance_scale": 1.0, "max_sequence_length": max_text_tokens}

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        """Arguments of the stock pipeline for classifier-free guidance with an empty prompt."""
        return {"guidance_scale": scale}

    @staticmethod
    def unconditional(empty: Conditioning, pipeline_config: Mapping[str, Any]) -> Conditioning:
        """Conditioning in place of a prompt, for classifier-free guidance as in the stock pipeline: the empty prompt's.

        Args:
            empty: the encoded empty prompt.
            pipeline_config: the pipeline's `model_index.json`.
        """
        return empty

    @staticmethod
    def mend(pipe: Any) -> None:
        """Mend a fault of the stock pipeline, with which the teacher would draw otherwise than it was trained."""

    @classmethod
    def guide(cls, text: Tensor, empty: Tensor, scale: float, x_t: Tensor | float = 0.0) -> Tensor:
        """Classifier-free guidance of two predictions as the stock pipeline has it: `empty + scale * (text - empty)`.

        Args:
            text, empty: with and without the prompt, `[B, C, *size]`: predictions, or the clean latents that they
                imply.
            scale: the guidance scale; 1 gives `text`.
            x_t: for clean latents, the noised one; a family that guides otherwise measures velocities from it.
        """
        return empty + scale * (text - empty)

    @classmethod
    def pipeline_arguments(cls) -> set[str]:
        """Names of the arguments that the stock pipeline is called with."""
        return set(inspect.signature(getattr(diffusers, cls.pipeline_type).__call__).parameters)

    @classmethod
    def to_pipeline(cls, latents: Tensor) -> Tensor:
        """Latents in the layout that the stock pipeline takes."""
        return to_layout(latents, cls.layout)

    @classmethod
    def from_pipeline(cls, latents: Tensor, size: Size) -> Tensor:
        """Latents `[B, C, *size]` of those in the stock pipeline's loop: maps as they are, or tokens `[B, L, 4 C]`."""
        return latents if cls.layout == "map" else unpack(latents, size)

    @classmethod
    def from_output(cls, latents: Tensor, size: Size, encoders: Encoders) -> Tensor:
        """Latents `[B, C, *size]` of what the stock pipeline returns for `output_type="latent"`: those of its loop.

        Args:
            latents: the pipeline's result.
            size: the size that it was drawn at.
            encoders: of the pipeline, for families whose pipeline returns the VAE's own latents.
        """
        return cls.from_pipeline(latents, size)

    @classmethod
    def lora_prefix(cls) -> str:
        """What LoRA keys of this network begin with in files for the stock pipeline: its name there, in most."""
        return cls.subfolder

    @classmethod
    def expert(cls) -> str | None:
        """The network's name in the pipeline, for records; None where it is the only denoising network."""
        return cls.subfolder if cls.other_experts else None

    @staticmethod
    def comfy_key(module: str) -> str:
        """ComfyUI's name of a LoRA module; `module` is the module's path in the diffusers network."""
        return f"transformer.{module}"

    @classmethod
    def comfy_weights(cls, module: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """LoRA weights of a module, with scale 1, under the keys that ComfyUI reads for this family: peft's by default.

        Args:
            module: the module's path in the diffusers network.
            down: `lora_A` `[r, in]`.
            up: `lora_B` `[out, r]`.
        """
        name = cls.comfy_key(module)
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}

    @property
    @abstractmethod
    def block_list(self) -> Sequence[nn.Module]:
        """The blocks, counted from 0."""

    @property
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The modules that hold nearly all weights, in the order in which they run: the units of sharding.

        They need not be those that features are read from.
        """
        return self.block_list

    @abstractmethod
    def call(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction `[B, C, *size]`, in the network's own dtype."""

    def behind(self, block: int) -> Sequence[nn.Module]:
        """The modules that run behind a block one after the other, up to the last of `repeated_blocks`."""
        order = list(self.repeated_blocks)
        return order[order.index(self.block_list[block]) + 1 :]

    def rows_of(self, value: Any, rows: int) -> Any:
        """The first samples of what a module `behind` a block is given: of a tensor, its rows; else as it is."""
        # A slice of all rows would cost a copy of the gradient.
        return value[:rows] if isinstance(value, Tensor) and len(value) > rows else value

    def timestep(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """The network's timestep input for `sigma`, one value a sample `[B]`, on a scale of 0 to 1000."""
        return self.process.timestep(expand(sigma, x_t.new_empty(1)).expand(len(x_t)))

    def image_stream(self, output: Any) -> Tensor:
        """The image tokens `[B, L, D]` in a block's output."""
        tensor: Tensor = output
        return tensor

    @property
    def diffusers_model(self) -> DiffusersModel:
        """The network again, typed as the diffusers model that it is."""
        return cast(DiffusersModel, self.network)

    def module_list(self, name: str) -> list[nn.Module]:
        """The modules of one of the network's lists, in order."""
        modules = self.network.get_submodule(name)
        assert isinstance(modules, nn.ModuleList), f"{name} of {self.network_type} is no list of modules"
        return list(modules)

    @property
    def limits(self) -> NetworkLimits:
        """Limits of this network."""
        return self.limits_of(dict(self.diffusers_model.config))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in: half as soon as any of its weights is (some families keep a few).

        float64 is for checks.
        """
        if self._dtype is None:
            dtypes = {p.dtype for name, p in self.network.named_parameters() if "lora_" not in name}
            kinds = (torch.bfloat16, torch.float16, torch.float64)
            self._dtype = next((kind for kind in kinds if kind in dtypes), torch.float32)
        return self._dtype

    def predict(
        self,
        x_t: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        blocks: Sequence[int] = (),
        grad_to_features_only: bool = False,
        rows: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Prediction and features in one pass.

        Args:
            x_t: noised latent `[B, C, *size]`.
            sigma: noise levels `[B]` or a scalar.
            conditioning: B rows.
            blocks: blocks whose features are returned.
            grad_to_features_only: blocks after the last one asked for run without a graph (the prediction is
                detached), which saves their activations.
            rows: the first samples, which alone go on behind the last block asked for; None: all do. Only where
                `narrows`.

        Returns:
            The prediction `[B, C, *size]`, or that of the first `rows` samples; one `[B, L, D]` per block asked for.
        """

        def after(block: int) -> None:
            # The blocks after this one run without a graph.
            if grad_to_features_only and block == max(blocks):
                torch.set_grad_enabled(False)

        behind: AbstractContextManager[None] = nullcontext()
        if rows is not None:
            behind = self._narrowed(LastFeatures(max(blocks), rows, len(x_t)))
        elif grad_to_features_only:
            behind = self.without_text_mlp(LastFeatures(max(blocks), len(x_t), len(x_t), graph=False))
        with self._hooks(blocks, after) as found, behind, torch.set_grad_enabled(torch.is_grad_enabled()):
            prediction = self.call(x_t, sigma, conditioning)
        return prediction if rows is None else self.rows_of(prediction, rows), [found[block] for block in blocks]

    def features(self, x_t: Tensor, sigma: Tensor, conditioning: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        """Features `[B, L, D]` per block asked for; stops at the last of them."""

        def after(block: int) -> None:
            if block == max(blocks):
                raise _Done

        last = LastFeatures(max(blocks), 0, len(x_t))
        with self._hooks(blocks, after) as found, self.without_text_mlp(last), suppress(_Done):
            self.call(x_t, sigma, conditioning)
        return [found[block] for block in blocks]

    def expose_features(self) -> None:
        """Let hooks that the network has already run at an early exit too, and see the features as outputs.

        Neither before hooks are added that take the place of the last, nor before the backbone is copied: the copy
        would run this network.
        """
        network = cast(Any, self.network)
        original = network.forward

        def forward(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
            output = None
            has_graph = torch.is_grad_enabled()
            with suppress(_Done):
                output = original(*args, **kwargs)
            torch.set_grad_enabled(has_graph)  # which `predict` may have changed; hooks must see the graph of features
            return output, list(self._found.values())

        def unwrap(module: nn.Module, args: Any, output: tuple[Any, list[Tensor]]) -> Any:
            if output[0] is None:
                raise _Done
            return output[0]

        network.forward = forward
        network.register_forward_hook(unwrap)

    @contextmanager
    def _hooks(self, blocks: Sequence[int], after: Callable[[int], None]) -> Iterator[dict[int, Tensor]]:
        """Context that finds the features of `blocks`, and calls `after` with the number of each once it has run."""
        found: dict[int, Tensor] = {}

        def hook_of(block: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[block] = self.image_stream(output)
                after(block)

            return hook

        self._found = found
        handles = [self.block_list[b].register_forward_hook(hook_of(b)) for b in sorted(set(blocks))]
        try:
            yield found
        finally:
            self._found = {}  # or the features would stay in memory
            for handle in handles:
                handle.remove()

    @contextmanager
    def _narrowed(self, last: LastFeatures) -> Iterator[None]:
        """Context in which what runs behind a block takes the first samples."""

        def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return self.narrow(module, args, kwargs)

        modules = [*self.behind(last.block)]
        filled = modules[-1:]  # the network's last layers find as many samples as it was given
        if self.last_norm:
            modules.append(self.network.get_submodule(self.last_norm))
            filled = []
        self._narrow = dict.fromkeys(modules, last.rows)
        handles = [module.register_forward_pre_hook(cut, with_kwargs=True) for module in modules]
        handles += [module.register_forward_hook(_filled(last.samples)) for module in filled]
        try:
            with self.without_text_mlp(last):
                yield
        finally:
            self._narrow = {}
            for handle in handles:
                handle.remove()

    @contextmanager
    def without_text_mlp(self, last: LastFeatures | None) -> Iterator[None]:
        """Context in which a block's `text_mlp` runs as far as the pass goes on behind it; None: as it is.

        Checkpointing enters it again, with the `last` of the forward pass.
        """
        module = None if last is None else self._text_mlp_of(self.block_list[last.block])
        if last is None or module is None:
            yield
            return

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            if last.graph:
                return tuple(self.rows_of(value, last.rows) for value in args)
            torch.set_grad_enabled(False)  # as for all that runs behind
            detached: tuple[Any, ...] = tree_map_only(Tensor, torch.detach, args)
            return detached

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            torch.set_grad_enabled(has_graph)  # or sharding would not see that the block has a graph
            return filled(module, args, output)

        has_graph = torch.is_grad_enabled()
        filled = _filled(last.samples)
        cut = module.register_forward_pre_hook(before)
        fill = module.register_forward_hook(after)
        self.last = last
        try:
            yield
        finally:
            self.last = None
            cut.remove()
            fill.remove()

    def _text_mlp_of(self, block: nn.Module) -> nn.Module | None:
        """The block's `text_mlp`; None also where the block was compiled, whose code does not see new hooks in it."""
        compiled = hasattr(block.forward, "_torchdynamo_orig_callable") or block._compiled_call_impl is not None
        return None if compiled or not self.text_mlp else getattr(block, self.text_mlp, None)

    def narrow(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a module's call, cut to the samples that the module is to take.

        Checkpointing must call it before it stores them: what is recomputed later is the bare module.
        """
        rows = self._narrow.get(module)
        if rows is None:
            return args, kwargs
        cut = {name: self.rows_of(value, rows) for name, value in kwargs.items()}
        return tuple(self.rows_of(value, rows) for value in args), cut


def _filled(samples: int) -> Callable[..., Any]:
    """A hook that puts zeros behind the rows of a module's output, up to `samples`."""

    def fill(tensor: Tensor) -> Tensor:
        missing = samples - len(tensor)
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor

    return lambda module, args, output: tree_map_only(Tensor, fill, output)
