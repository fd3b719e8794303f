"""A pretrained model that a configuration names: its folder, its limits, and how it is loaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

from swd.io import limits
from swd.modules import hub
from swd.modules.adapters import add_updates
from swd.modules.attention import Attention, check_gpu, use_attention
from swd.modules.backbones import load_family
from swd.modules.backbones.base import Backbone
from swd.modules.base_adapters import BaseAdapter, read_entries
from swd.modules.encoders import Encoders
from swd.modules.family_folder import FamilyFolder
from swd.modules.guidance import guidance_scales
from swd.modules.model_folders import first_misfit
from swd.modules.networks import Networks
from swd.modules.pipeline_folder import LOADING_FAILS, PipelineFolder, reason_of
from swd.modules.quantize import Quantization
from swd.modules.targets import check_targets, covered_share
from swd.modules.tuning import Tuning
from swd.types import Role, Size, UserError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LEAST_SHARE = 0.1
"""Share of a network's linear weights below which `Pretrained.check_targets` warns. Ours: attention alone holds a third
and more; names that miss the fused layers of a network can hold a twentieth."""


class Pretrained(FamilyFolder):
    """A diffusers pipeline and how the project uses it. Building one reads configuration files only.

    Args:
        family: the backbone's module: a name in `swd.modules.backbones`, or the dotted name of any other.
        path: folder in diffusers layout, id of a repository on the Hugging Face hub, or `swd://assets/...` for the
            embedded ones.
        revision: branch, tag or commit of a repository on the hub.
        size: latent side, (H, W) or (F, H, W) of finished pictures; None: the network's own.
        tuning: "lora" trains adapters on one frozen base; "full" trains whole copies of it.
        rank: LoRA rank.
        alpha: LoRA alpha; None: alpha = rank.
        targets: names of the linear layers that get LoRA; None: the family's own.
        precision: dtype of the frozen base; LoRA and losses are always float32. "auto": bf16 where the machine computes
            it natively. "fp16" draws alone, on devices that do not.
        vae_precision: dtype of the VAE, "fp32" or "bf16"; None: the base's, or float32 where the model needs that.
        attention: kernel that computes attention, see `swd.modules.attention`; None: PyTorch's choice. "sage" draws
            alone.
        quantization: stores the frozen base's linear layers in 8 bits, "int8" or "fp8".
        dmd_guidance_scale: classifier-free guidance of the teacher in DMD; 1 for none, and DMD takes no less. The
            default is that of the released script for Stable Diffusion 3.5 Medium.
        drawing_guidance_scale: classifier-free guidance of the teacher when it draws: its training set, samples, the
            rows of an evaluation; 1 for none. The default is the paper's for Stable Diffusion 3.5 (appendix A).
        embedded_guidance: guidance scale that a guidance-distilled network (FLUX.1-dev) takes as input, in all roles.
        feature_blocks: blocks that MMD and GAN read by default.
        max_text_tokens: length that the pipeline's T5 prompt is padded to.
        teacher_steps: steps of the teacher's own sampler, 1 to 1000.
        init_adapter: folder of an adapter to start the student from: a run, an export, or a published PEFT folder.
        negative_prompt: what the teacher is guided away from when it draws; None: the empty prompt. The pipeline's own
            example for Wan has a long one; which the paper's pictures and videos were drawn with is not published.
        adapters: LoRAs that are added to the base's weights when it is loaded, in this order, for all that uses it:
            teacher, fake score and student, drawing and sampling. Each is a path as `swd sample adapter=` takes it,
            or `{path, weight}`; a run records the `hash` of their weights. In a pipeline of several experts an entry
            has the `expert` that it is for, by its name there.
        guidance_scale: single scale in runs of earlier versions, for both of the scales above unless they are given.

    Attributes:
        tuned: `tuning`, `rank`, `alpha`, `targets`, `init_adapter` and `quantization` together.
        initial: weights of `init_adapter`, after they were checked and until the student takes them; None otherwise.

    Raises:
        UserError: if the folder is missing or incomplete, or settings contradict each other.
    """

    initial: dict[str, Tensor] | None = None
    _tokenizers_checked = False

    def __init__(
        self,
        family: str,
        path: str,
        revision: str | None = None,
        size: int | Sequence[int] | None = None,
        tuning: Literal["lora", "full"] = "lora",
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        precision: Precision = "auto",
        quantization: Quantization | None = None,
        dmd_guidance_scale: float | None = None,
        drawing_guidance_scale: float | None = None,
        embedded_guidance: float | None = None,
        feature_blocks: Sequence[int] = (11,),
        max_text_tokens: int = 256,
        teacher_steps: int = 28,
        init_adapter: str | None = None,
        guidance_scale: float | None = None,
        vae_precision: Literal["fp32", "bf16"] | None = None,
        negative_prompt: str | None = None,
        adapters: Sequence[str | Mapping[str, Any]] | None = None,
        attention: Attention | None = None,
    ) -> None:
        for key, value in (("path", path), ("revision", revision)):
            if value is not None and not value.strip():
                raise UserError(
                    f"model.{key} is empty; give model.{key}=VALUE" + (", or null" if key != "path" else "")
                )
        # Settings are checked first, so that a mistake in them is reported without asking the hub.
        backbone = load_family(family)
        most_tokens = backbone.encoders_type.most_text_tokens
        named = backbone.targets if targets is None else tuple(targets)
        self.tuned = Tuning(tuning, rank, alpha, named, init_adapter, quantization)
        self.precision = precision
        self.vae_precision = vae_precision
        self.attention: Attention = attention or "native"
        self.dmd_guidance_scale, self.drawing_guidance_scale = guidance_scales(
            dmd_guidance_scale, drawing_guidance_scale, guidance_scale
        )
        self.embedded_guidance = embedded_guidance
        self.negative_prompt = negative_prompt
        self._check_drawing(backbone)
        self.feature_blocks = tuple(feature_blocks)
        self.max_text_tokens = max_text_tokens
        self.teacher_steps = teacher_steps
        limits.whole("model.max_text_tokens", max_text_tokens, 1, most_tokens, f"all that {family}'s pipeline takes")
        limits.whole("model.teacher_steps", teacher_steps, 1, limits.STEPS)
        limits.number("model.embedded_guidance", embedded_guidance, 0, limits.GUIDANCE)
        self.adapters = read_entries(adapters)

        # Then the folder, and the settings that depend on it.
        super().__init__(family, path, revision)
        self._check_fit()
        self.size: Size = self.limits.native if size is None else (size, size) if isinstance(size, int) else tuple(size)
        self.limits.check_size(self.size)
        self.adapters = tuple(adapter.checked(self) for adapter in self.adapters)

    def _check_drawing(self, backbone: type[Backbone]) -> None:
        """Check that the stock pipeline takes what the teacher is to draw with."""
        if self.negative_prompt is not None and self.drawing_guidance_scale == 1:
            raise UserError(
                "model.negative_prompt has no effect where model.drawing_guidance_scale is 1, no guidance; make it null"
            )
        if self.drawing_guidance_scale != 1 and not backbone.guidance_arguments(self.drawing_guidance_scale):
            raise UserError(
                f"model.drawing_guidance_scale={self.drawing_guidance_scale}: {backbone.pipeline_type} has no "
                "classifier-free guidance, its network is fed model.embedded_guidance; use 1"
            )
        if self.negative_prompt is not None and "negative_prompt" not in backbone.pipeline_arguments():
            raise UserError(
                f"model.negative_prompt has no effect: {backbone.pipeline_type} takes none, and guides away from the "
                "empty prompt if at all; leave it out"
            )

    def _check_fit(self) -> None:
        """Check settings that depend on the network."""
        self.tuned.check_width(self.limits.width)
        if self.embedded_guidance is not None and not self.network_config.get("guidance_embeds"):
            text = (
                f"model.embedded_guidance={self.embedded_guidance} has no effect: this network is fed no guidance scale"
            )
            if "guidance_embeds" not in self.network_config:
                raise UserError(f"{text}; make it null")
            warnings.warn(f"{text} (guidance_embeds in its config.json is false)", stacklevel=2)
        if self.network_config.get("guidance_embeds") and self.embedded_guidance is None:
            raise UserError(
                "model.embedded_guidance is null, but this network is fed a guidance scale; give "
                "model.embedded_guidance=SCALE, as its model card says for drawing"
            )

    @property
    def tuning(self) -> Literal["lora", "full"]:
        """ "lora" where adapters are trained, "full" where whole copies are."""
        return self.tuned.tuning

    @property
    def rank(self) -> int:
        """LoRA rank."""
        return self.tuned.rank

    @property
    def alpha(self) -> float | None:
        """LoRA alpha; None: alpha = rank."""
        return self.tuned.alpha

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the linear layers that get LoRA."""
        return self.tuned.targets

    @property
    def init_adapter(self) -> str | None:
        """The adapter that the student starts from; None for a fresh one."""
        return self.tuned.init_adapter

    @property
    def quantization(self) -> Quantization | None:
        """8-bit format of the frozen base; None for none."""
        return self.tuned.quantization

    @property
    def text_tokens(self) -> int:
        """Number of text tokens that the network sees."""
        kind = self.backbone_class.encoders_type
        first = kind.text_encoders[0]
        return kind.text_tokens(self.max_text_tokens, self.files.config(first) if first in self.files.parts else {})

    def check_targets(self) -> None:
        """Raise UserError if a target names no layer of the network; loads no weights.

        Warns if the layers that are named hold less than `LEAST_SHARE` of the weights: a student with so little to
        train learns slowly or not at all, and names that fit one family often miss most of another.
        """
        check_targets(self.meta_network, self.targets)
        share = covered_share(self.meta_network, self.targets)
        if self.tuning == "lora" and share < LEAST_SHARE:
            warnings.warn(
                f"model.targets={list(self.targets)} adapt {share:.1%} of the weights in this network's linear layers; "
                "name more of them, or leave model.targets=null for the family's own",
                stacklevel=2,
            )

    def latent_dtype(self, pipe: Any) -> torch.dtype:
        """The dtype of latents in the stock pipeline."""
        if self.backbone_class.float_latents:
            return torch.float32
        dtype: torch.dtype = getattr(pipe, self.backbone_class.subfolder).dtype
        return dtype

    def dtype(self, device: torch.device | str = "cpu") -> torch.dtype:
        """The base's dtype on `device`."""
        if self.precision == "auto":
            return torch.bfloat16 if native_bf16(torch.device(device)) else torch.float32
        return DTYPES[self.precision]

    def draw_with(self, steps: int | None, guidance: float | None) -> None:
        """Let the teacher draw with other steps and another guidance scale than those that it was built with.

        Args:
            steps: of its own sampler; None: as before.
            guidance: of classifier-free guidance, or the scale that a guidance-distilled network is fed; None: as
                before.

        Raises:
            UserError: if the stock pipeline would ignore the guidance, or the negative prompt.
        """
        if steps is not None:
            self.teacher_steps = steps
        if guidance is not None and self.network_config.get("guidance_embeds"):
            self.embedded_guidance = float(guidance)
        elif guidance is not None:
            self.drawing_guidance_scale = float(guidance)
            self._check_drawing(self.backbone_class)

    def check_trainable(self) -> None:
        """Raise UserError for a precision or a kernel that only drawing can do with."""
        if self.precision == "fp16":
            raise UserError(
                "model.precision=fp16 is for drawing: small gradients and distances vanish in half precision; use bf16"
            )
        if self.attention == "sage":
            raise UserError("model.attention=sage is for drawing: it has no gradients; use another, or leave it out")
        check_gpu(self.attention)

    def vae_dtype(self, base: torch.dtype, kept: bool = False) -> torch.dtype:
        """The VAE's dtype: `vae_precision`, else by `Encoders.vae_precision`, which has the arguments."""
        if self.vae_precision is not None:
            return torch.bfloat16 if self.vae_precision == "bf16" else torch.float32
        return self.backbone_class.encoders_type.vae_precision(self.vae_config, base, kept)

    def fetch(self) -> Path:
        """The folder with all weights in it; downloads what is missing of a repository on the hub.

        Raises:
            UserError: if a part is missing, or a tokenizer is another model's.
        """
        return self._complete().path

    def _complete(self) -> PipelineFolder:
        """The folder with all weights; each call asks the hub for a repository, tokenizers are checked once."""
        files = PipelineFolder(hub.weights(self.path, self.revision)) if hub.is_hub_id(self.path) else self.files
        if not self._tokenizers_checked:
            self.check_parts({*self.files.absent, *(name for name in self._known_parts if name not in files.index)})
            files.check_tokenizers()
            self._tokenizers_checked = True
        return files

    def network(self, device: torch.device | str = "cpu") -> Backbone:
        """Load the denoising network alone, `adapters` added to its weights.

        Raises:
            UserError: if its configuration and its weights disagree.
        """
        files = self._complete()
        part = self.backbone_class.subfolder
        misfit = first_misfit(files.path / part, self.meta_network)
        if misfit:
            raise UserError(f"model.path={files.path}: {part!r} has weights of another configuration: {misfit}")
        network = files.load(part, self.dtype(device))
        self.add_adapters(network)
        use_attention(network, self.attention, torch.device(device))
        return self.backbone_class(network, self.embedded_guidance)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the denoising networks in a pipeline of several, in its order; empty where there is one."""
        others = self.backbone_class.other_experts
        return tuple(sorted((self.backbone_class.subfolder, *others))) if others else ()

    @property
    def own_adapters(self) -> list[BaseAdapter]:
        """Those of `adapters` that are added to this network, and not to another expert."""
        return self.adapters_of(self.backbone_class.subfolder)

    def adapters_of(self, part: str) -> list[BaseAdapter]:
        """Those of `adapters` that are added to a denoising network of the pipeline."""
        return [adapter for adapter in self.adapters if adapter.expert in (None, part)]

    def add_adapters(self, network: torch.nn.Module, part: str | None = None) -> None:
        """Add `adapters` to the weights of a network that was just loaded: this one, or the expert called `part`."""
        chosen = self.adapters_of(part or self.backbone_class.subfolder)
        add_updates(network, [(adapter.read(self), adapter.weight) for adapter in chosen])

    def networks(self, roles: Sequence[Role], seed: int = 0, device: torch.device | str = "cpu") -> Networks:
        """Load the base and give it its trainable roles: adapters, or copies of it."""
        return self.tuned.networks(self.network(device), roles, seed)

    def untrained_networks(self, roles: Sequence[Role]) -> Networks:
        """`networks` on the meta device, without weights, for the names and shapes of trained parameters."""
        with torch.device("meta"):
            backbone = self.backbone_class(copy.deepcopy(self.meta_network), self.embedded_guidance)
            return self.tuned.networks(backbone, roles, stored=False)

    def pipeline(self, dtype: torch.dtype = torch.float32, kept: bool = False, **overrides: Any) -> Any:
        """The stock pipeline; `transformer=None` (or `unet=None`) leaves the network out.

        Args:
            dtype: dtype of the weights.
            kept: whether the VAE's output is training data, see `Encoders.vae_precision`.
            overrides: parts to use instead of those in the folder.
        """
        pipeline_class = getattr(diffusers, self.backbone_class.pipeline_type)
        vae_dtype = self.vae_dtype(dtype, kept)
        files = self._complete()
        parts: dict[str, Any] = dict.fromkeys(self._absent)  # the pipeline requires an argument for each
        for name in self.files.parts:
            # A `variant` for the pipeline would also replace plain weights, so parts without those are loaded here.
            if name not in overrides and files.has_variant(name):
                parts[name] = files.load(name, vae_dtype if name == "vae" else dtype)
        for name in self.backbone_class.other_experts:
            if name not in overrides and self.adapters_of(name):
                parts[name] = files.load(name, dtype)
                self.add_adapters(parts[name], name)
        # Text alone is read: a processor's tokenizer takes its place, which the class would refuse as an argument.
        names = [name for name in self.files.parts if "tokenizer" in name and files.is_processor(name)]
        tokenizers = {name: files.tokenizer(name) for name in names if name not in overrides}
        try:
            pipe = pipeline_class.from_pretrained(
                files.path,
                torch_dtype={"default": dtype, "vae": vae_dtype},
                use_safetensors=True,
                local_files_only=True,
                **parts | dict.fromkeys(tokenizers) | overrides,
            )
        except LOADING_FAILS as error:
            raise UserError(
                f"model.path={files.path} cannot be loaded as {pipeline_class.__name__} ({reason_of(error)})"
            ) from None
        for name, tokenizer in tokenizers.items():
            setattr(pipe, name, tokenizer)
        return pipe

    @property
    def _absent(self) -> list[str]:
        """Parts for which the pipeline must be given None: null in the index, or optional and not in the index."""
        optional = self.backbone_class.encoders_type.optional
        return [*self.files.absent, *(name for name in optional if name not in self.files.index)]

    def encoders(self, device: torch.device | str = "cpu", text: bool = True) -> Encoders:
        """Load text encoders and VAE; the VAE alone unless `text`."""
        backbone = self.backbone_class
        unused = () if text else backbone.encoders_type.text_encoders
        left_out = dict.fromkeys(
            [backbone.subfolder, *backbone.other_experts, *(name for name in unused if name in self.files.index)]
        )
        pipeline = self.pipeline(self.dtype(device), kept=True, **left_out)
        if self._absent:
            # In place of a missing encoder's text the pipeline puts zeros, and reads their width from its network.
            network = SimpleNamespace(config=SimpleNamespace(**self.network_config))
            object.__setattr__(pipeline, backbone.subfolder, network)
        return backbone.encoders_type(pipeline, self.max_text_tokens)


def native_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware (elsewhere it is emulated and slow)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
