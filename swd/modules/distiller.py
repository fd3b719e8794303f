"""The LightningModule: wiring, alternation, optimizers. Equations are in losses, grids in schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Literal, cast

import torch
from lightning import LightningModule
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.nn import ModuleDict, Parameter, ParameterDict
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from swd.io import limits
from swd.losses.base import CriticStep, GeneratorStep, LossTerm, Metrics, ModelFacts
from swd.losses.update import critic_loss, generator_gradient, settle, student_x0, trainers, wanted
from swd.modules.accumulation import BatchPart, accumulate, parts_at
from swd.modules.adapters import check_start, read_adapter
from swd.modules.ahead import with_predictions
from swd.modules.bad_steps import Action, BadStepRule, BadSteps, owner_of
from swd.modules.checkpoint_files import optimizer_misfit, progress_in_iterations
from swd.modules.compiling import check_compiler, compile_blocks
from swd.modules.encoders import Encoders
from swd.modules.finite import Stepped, all_finite, failed_checks, stepped
from swd.modules.inputs import InputBuilder, Inputs
from swd.modules.layouts import swap, whole_tensor
from swd.modules.networks import Networks, SharedBase
from swd.modules.noise_ahead import NoiseAhead
from swd.modules.pretrained import Pretrained
from swd.modules.run_values import log_values
from swd.modules.sampling import initial_latents, sample_latents
from swd.modules.sharding import DDP
from swd.modules.statistics import prediction_statistics
from swd.modules.training_task import average_name, averaged
from swd.schedule import Frames, Resizing, ScaleSchedule
from swd.scheduler import ScaleWiseScheduler
from swd.types import CachedBatch, Checks, Conditioning, PictureBatch, Role, SeededDraws, UserError

SHRUNK = ("direct", "blend")
"""How `swd encode` shrinks pictures and clips: see `swd.schedule.Resizing`."""
FUSED = ("cpu", "cuda")
"""Devices on which AdamW steps in one operation."""
Observer = Callable[[Inputs], Metrics]
"""Takes the inputs of an iteration's generator update; returns scalars by name, the same names on every process."""


class Distiller(LightningModule):
    """Scale-wise distillation of one pretrained model (SwD paper, section 4.1).

    One call of `training_step` is one iteration: `critic_updates` critic updates, then a generator update, each on a
    fresh batch. Iteration k trains step `k mod N` of the schedule. `global_step` counts iterations.

    Args:
        model: the teacher.
        schedule: noise levels and sizes.
        loss: terms by name, at least one.
        seed: of every random draw.
        critic_updates: critic updates before each generator update; without effect where no term trains a critic.
        accumulate: parts that each process's share of a batch is worked on in, one after the other: the same update
            with less memory. 1: the released scripts. A pass with a graph takes a part, and in a critic update the data
            to compare with; one without a graph the part of each critic update.
        even_parts: fewer parts at smaller sizes, none of which takes more memory than at the largest size. False: as
            many at each size.
        lr: student's learning rate.
        critic_lr: fake network's and head's learning rate; None: the student's.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip: gradient norm is clipped to this, for each optimizer.
        checkpointing: recompute activations in the backward pass.
        compiled: run the networks' blocks as compiled code (`swd.modules.compiling`); the numbers agree but for
            rounding. The first iterations compile.
        ema: decay of a moving average of the student's weights, in [0, 1); None or 0: none, as in the paper.
        on_bad_step: "skip" leaves out an update whose loss, gradient or data are not finite on any process, on all of
            them; "stop" ends the run at it.
        skips_in_a_row: skipped updates of one optimizer in a row after which the run ends; 5: the weights are broken
            then, since every update has data of its own.
        skips_in_all: skipped updates after which it ends; 100: half a percent of a run of 3,000 iterations.
        downscale: "direct" shrinks pictures from full size to each of a step's two sizes, which is ours; "cascade"
            shrinks the larger of the two once more, as the released code does.
        frames: those of a video's smaller sizes are a "blend" of two neighbours, or the "nearest". The sources do not
            say; the default is ours.
        exploding: a gradient norm above this many times its running median is bad too; None: none is. 100 is ours: in
            healthy trainings on shapes the largest was 4 times the median.

    Attributes:
        average: the average, of trained weights alone; None without one.
        steps: steps of the schedule that iterations train, one after the other: all, or those of the model that is an
            expert for some noise levels.

    Raises:
        UserError: if schedule, loss and model do not fit together.
    """

    deed = "distilling"
    """Description of the task for messages."""
    bad_steps: BadSteps
    """Record of the updates that were skipped."""
    seconds: dict[str, float]
    """Seconds of each phase of the iteration that runs, by its name; whoever reads them clears them."""
    observers: list[Observer]
    """Called on every process at the end of an iteration; what they return is logged in its row."""

    def __init__(
        self,
        model: Pretrained,
        schedule: ScaleSchedule,
        loss: Mapping[str, LossTerm],
        seed: int = 0,
        critic_updates: int = 5,
        accumulate: int = 1,
        even_parts: bool = True,
        lr: float = 5e-6,
        critic_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        clip: float = 10.0,
        checkpointing: bool = False,
        compiled: bool = False,
        ema: float | None = None,
        on_bad_step: Action = "skip",
        skips_in_a_row: int = 5,
        skips_in_all: int = 100,
        exploding: float | None = 100.0,
        downscale: Literal["direct", "cascade"] = "direct",
        frames: Frames = "blend",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold only what is trained
        self.model = model
        self.schedule = schedule
        self.steps = schedule.steps_of(model.backbone_class.process)
        self.seed = seed
        settle(loss)
        check_parts(model, schedule, loss)
        self.terms: Any = ModuleDict(dict(loss))
        self.critic_updates = critic_updates if trainers(loss) else 0
        if critic_updates < 1 and trainers(loss):
            names = " and ".join(trainers(loss))
            raise UserError(f"task.critic_updates={critic_updates}; use 1 or more, since there is a critic for {names}")
        limits.number("task.accumulate", accumulate, least=1)
        self.accumulate = accumulate
        self.even_parts = even_parts
        self.lr = lr
        self.critic_lr = lr if critic_lr is None else critic_lr
        check_optimizer(lr=lr, critic_lr=self.critic_lr, clip=clip, betas=betas, weight_decay=weight_decay)
        self.betas = betas
        self.weight_decay = weight_decay
        self.clip = clip
        self.checkpointing = checkpointing
        self.compiled = compiled
        self.ema = checked_decay(ema)
        self.average: AveragedModel | None = None
        self._plays_average = False
        if compiled:
            check_compiler("task.compiled=true")
        self.bad_steps = BadSteps(BadStepRule(on_bad_step, skips_in_a_row, skips_in_all, exploding))
        self.seconds: dict[str, float] = {}
        self.observers: list[Observer] = []
        self.last_metrics: Metrics = {}
        self._stepped: Stepped | None = None  # looked at with the next update's checks, and at an iteration's end
        self._noise_ahead: NoiseAhead | None = None  # on a GPU, which computes meanwhile
        self._seen: Inputs | None = None  # of the last update, one sample: what is tried before weights are saved
        self.networks: Networks
        self.inputs = InputBuilder(model, schedule, Resizing(downscale, frames))

    # Building

    @property
    def batches_per_iteration(self) -> int:
        """Number of batches, one an update, that an item of the loader has (see `swd.data.iterations`)."""
        return self.critic_updates + 1

    @property
    def updates(self) -> int:
        """Number of updates done, of critic and generator together."""
        return self.global_step * self.batches_per_iteration

    @property
    def roles(self) -> tuple[Role, ...]:
        """Trainable roles; without a critic no fake network exists at all."""
        return ("student", "fake") if self.critic_updates else ("student",)

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)
        self.inputs.cache = data if getattr(data, "is_cache", False) else None

    def configure_model(self) -> None:
        if hasattr(self, "networks"):
            return
        self.networks = self.model.networks(self.roles, self.seed, self._root_device)
        if self.model.init_adapter:
            assert isinstance(self.networks, SharedBase)
            self.networks.load_adapter("student", read_adapter(self.model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for term in self.terms.values():
                term.build(self.model.limits.width)
        if self.checkpointing:
            self.networks.enable_checkpointing()
        if self.compiled:
            compile_blocks(self.networks)
        if self.ema is not None:
            self.average = averaged(self._student_weights(), self.ema)
        self.inputs.load(self._root_device)

    @property
    def _root_device(self) -> torch.device:
        """Where this trains; Lightning moves the task there only after `configure_model`."""
        return self.device if self._trainer is None else self.trainer.strategy.root_device

    @property
    def _steps_fused(self) -> bool:
        """Whether AdamW changes all weights in one operation."""
        return self._root_device.type in FUSED

    @property
    def encoders(self) -> Encoders:
        """Text encoders and VAE; loaded when they are first asked for, which with cached data may be never."""
        return self.inputs.encoders(self._root_device)

    @property
    def empty(self) -> Conditioning:
        """The conditioning that guidance takes in place of a prompt's, for the schedule's own size, one row."""
        return self.inputs.empty(None, self.device)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of B prompts, for the schedule's own size. With cached data the encoders are freed again."""
        return self.inputs.encode_prompts(prompts, None, self.device)

    def configure_optimizers(self) -> list[Optimizer]:
        options: dict[str, Any] = {"betas": tuple(self.betas), "weight_decay": self.weight_decay}
        rates = (self.lr, self.critic_lr)
        trained = self._trained(self.networks, self.terms)
        options["fused"] = self._steps_fused
        return [AdamW(parameters, lr=lr, **options) for parameters, lr in zip(trained, rates, strict=False)]

    def _trained(self, networks: Networks, terms: ModuleDict) -> list[list[Parameter]]:
        """The parameters of each optimizer: the student's, and the critic's if there is one."""
        student = networks.role_parameters("student")
        return [student, [*networks.role_parameters("fake"), *terms.parameters()]] if self.critic_updates else [student]

    def check_data(self, data: Any) -> None:
        """Raise UserError for data that were shrunk already, in another way than this task is to shrink them."""
        changed = [f"task.{key}={value}" for key, value in vars(self.inputs.resizing).items() if value not in SHRUNK]
        if changed and getattr(data, "is_cache", False):
            raise UserError(
                f"{' and '.join(changed)} is of pictures, and these data are a cache, made directly from full size and "
                "with blended frames; leave it out, or train on the pictures themselves"
            )

    def check_processes(self, processes: int) -> None:
        """Raise UserError if a term of the loss cannot be shared by so many processes, or by the parts of a batch."""
        for name, term in self.terms.items():
            term.check_processes(f"loss.{name}", processes)
            if self.accumulate > 1:
                term.check_accumulate(f"loss.{name}", self.accumulate)

    def check_batch(self, batch_size: int, processes: int) -> None:
        """Raise UserError if each process's share of a batch does not divide into `accumulate` parts."""
        share = batch_size // processes
        if share % self.accumulate:
            each = f" for each of {processes} processes" if processes > 1 else ""
            raise UserError(
                f"task.accumulate={self.accumulate} does not divide {share} samples{each} (data.batch_size="
                f"{batch_size}); use a divisor"
            )

    def on_fit_start(self) -> None:
        processes = self.trainer.world_size  # whatever launcher started them
        self.check_processes(processes)
        batch_size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if batch_size is not None:
            self.check_batch(batch_size, processes)
        if self._root_device.type == "cuda":
            self._noise_ahead = NoiseAhead(self._root_device)

    def on_fit_end(self) -> None:
        if self._noise_ahead is not None:
            self._noise_ahead.close()
            self._noise_ahead = None

    @property
    def draws_alone(self) -> bool:
        """Whether the student takes every step of its schedule: one of several experts does not."""
        return len(self.steps) == len(self.schedule)

    # One iteration

    def training_step(self, batches: Iterator[PictureBatch | CachedBatch], batch_idx: int) -> None:
        if self._noise_ahead is None:
            self._iteration(batches)
            return
        with self._noise_ahead.iteration(SeededDraws(self.seed, self.global_step), self.steps):
            self._iteration(batches)

    def _iteration(self, batches: Iterator[PictureBatch | CachedBatch]) -> None:
        critic: list[Metrics] = []
        ahead = [self._next_inputs(batches, update) for update in range(self.critic_updates)]
        for update in range(self.critic_updates):
            with self.phase("critic"):
                if update == 0:
                    ahead = self._with_predictions(ahead)
                critic.append(self._critic_update(ahead.pop(0)))
        inputs = self._next_inputs(batches, self.critic_updates)
        with self.phase("generator"):
            generator = self._generator_update(inputs)
            if self._stepped is not None:
                self._stepped.stop_if(self.trainer, failed_checks(self.trainer, self._stepped.checks))
                self._stepped = None
        self._report(generator | mean_metrics([row for row in critic if row]), inputs)
        if generator:
            if self.average is not None:
                self.average.update_parameters(self._student_weights())
            self._seen = inputs.first()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of an iteration whose time is measured: waiting for data, inputs, critic, generator.

        It is added to `seconds`; `trainer.profiler=simple` adds up the time of each over the run.
        """
        profiler: Profiler = cast(Any, self.trainer).profiler
        start = perf_counter()
        with profiler.profile(f"[Distiller]{name}"):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def _next_inputs(self, batches: Iterator[PictureBatch | CachedBatch], update: int) -> Inputs:
        """The inputs of an update of this iteration, made of its next batch.

        Raises:
            UserError: if there is none.
        """
        iteration = self.global_step
        step = self.steps[iteration % len(self.steps)]
        place = self._place(iteration, step, update)
        with self.phase("data"):
            batch = next(batches, None)
        if batch is None:  # StopIteration would end the iteration without an error
            raise UserError(
                f"{place}: the data have no batch for it; an item of their loader must have "
                f"{self.batches_per_iteration}, as those of swd.data.iterations.Iterations"
            )
        with self.phase("inputs"):
            first = self.global_rank * len(batch)
            draws = SeededDraws(self.seed, iteration, update, first, self._noise_ahead)
            return self.inputs.build(batch, step, draws, place)

    def _place(self, iteration: int, step: int, update: int) -> str:
        """Where an update stands in the run; counts from 0 are shown from 1."""
        where = f"step {step + 1} of {len(self.schedule)} of the schedule"
        which = f"critic update {update + 1} of {self.critic_updates}"
        return f"iteration {iteration + 1}, {where}, {which if update < self.critic_updates else 'generator update'}"

    @torch.no_grad()
    def _with_predictions(self, inputs: list[Inputs]) -> list[Inputs]:
        """The inputs of an iteration's critic updates with the student's predictions; it changes after them only."""
        return with_predictions(self.networks, inputs, self.parts_of(inputs[0].interval.index))

    def _critic_update(self, inputs: Inputs) -> Metrics:
        """The critic's metrics; none if the update was skipped."""
        done, norm = self._descend("fake", self._critic_part, inputs)
        return {} if norm is None else done.metrics | {"monitor/gradient_norm_critic": norm}

    def parts_of(self, step: int) -> int:
        """Number of parts that each process's share of a batch is worked on in, at a step of the schedule.

        The same on all processes, whatever the aspect ratios of their pictures: sharded networks run equally often.
        """
        if self.accumulate == 1 or not self.even_parts:
            return self.accumulate
        sizes = self.schedule.sizes
        return parts_at(sizes[step], sizes[-1], self.model.text_tokens, self.accumulate)

    def _shares(self, inputs: Inputs) -> int:
        """Number of parts that the global batch is worked on in."""
        return self.trainer.world_size * self.parts_of(inputs.interval.index)

    def _critic_part(self, inputs: Inputs) -> BatchPart:
        """The critic's loss on a batch, or on a part of it."""
        x0_hat = inputs.x0_hat
        assert x0_hat is not None  # `training_step` has made it
        step = CriticStep(
            self.networks,
            inputs.conditioning,
            inputs.empty,
            x0_hat,
            inputs.target,
            inputs.draws,
            wanted(trainers(self.terms), "critic_pass"),
            self._shares(inputs),
        )
        checks = inputs.finite() | {"the student's prediction": all_finite([x0_hat])}
        loss, metrics = critic_loss(self.terms, step, checks)
        return BatchPart(loss, x0_hat, metrics, checks)

    def _generator_update(self, inputs: Inputs) -> Metrics:
        """The generator's metrics; none if the update was skipped."""
        done, norm = self._descend("student", self._generator_part, inputs)
        if norm is None:
            return {}
        distance = (done.x0_hat - inputs.target).square().mean()
        average = partial(self.trainer.strategy.reduce, reduce_op="mean")
        watched = prediction_statistics(done.x0_hat, inputs.target, average, self.trainer.world_size)
        norms = {"monitor/gradient_norm_student": norm}
        return {"loss": done.metrics["loss"], "x0_mse": distance} | done.metrics | norms | watched

    def _generator_part(self, inputs: Inputs) -> BatchPart:
        """The generator's loss on a batch, or on a part of it."""
        x0_hat = self._student_x0(inputs)
        leaf = x0_hat.detach().requires_grad_()
        step = GeneratorStep(
            self.networks,
            inputs.conditioning,
            inputs.empty,
            leaf,
            inputs.target,
            inputs.draws,
            wanted(self.terms, "generator_pass"),
            self._shares(inputs),
        )
        checks = inputs.finite() | {"the student's prediction": all_finite([leaf])}
        loss, gradient, metrics = generator_gradient(self.terms, step, checks)
        return BatchPart((x0_hat * gradient).sum(), leaf.detach(), {"loss": loss} | metrics, checks)

    def _descend(
        self, role: Literal["student", "fake"], work: Callable[[Inputs], BatchPart], inputs: Inputs
    ) -> tuple[BatchPart, Tensor | None]:
        """One optimizer step down the gradient of the losses that `work` makes, if everything checked is finite.

        Returns:
            Results of the batch, and the gradient's norm before clipping; None for it if the update was skipped.
        """
        optimizer = self._optimizer(role)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.zero_grad()
        if isinstance(self.trainer.strategy, DDP):
            self.trainer.strategy.step_only(parameters)
        parts = self.parts_of(inputs.interval.index)
        done = accumulate(inputs, parts, work, self.manual_backward, self.trainer.strategy)
        norm = clipped(parameters, self.clip)
        owner = owner_of(role)
        checks = done.checks | {f"gradient norm of {owner}": norm.isfinite()}
        good = self.bad_steps.good(self.trainer, role, norm, checks, inputs.place, self._stepped)
        self._stepped = None
        if good:
            self._stepped = stepped(partial(self._step, role), parameters, f"weights of {owner}", inputs.place)
            return done, norm.detach()
        optimizer.zero_grad()
        if role == "student":
            self._step(role)  # without gradients AdamW changes nothing; the iteration counts
        return done, None

    @torch.no_grad()
    def predictions(self) -> Checks:
        """Whether the trained networks as they are now predict finite values, on one sample of the last update.

        Weights may be finite and yet so large that nothing they predict is: better known before they are saved.
        """
        if self._seen is None:
            return {}
        seen = self._seen
        x0_hat = self._student_x0(seen)
        found = {"the student's prediction": all_finite([x0_hat])}
        if "fake" in self.roles:
            sigma = torch.full((1,), seen.interval.sigma, device=x0_hat.device)
            x0 = self.networks.x0("fake", x0_hat, sigma, seen.conditioning)[0]
            found["the fake network's prediction"] = all_finite([x0])
        return found

    def _student_x0(self, inputs: Inputs) -> Tensor:
        return student_x0(self.networks, inputs.interval, inputs.source, inputs.conditioning, inputs.draws)

    def _optimizer(self, role: Literal["student", "fake"]) -> Any:
        """Lightning's wrapper of a role's optimizer."""
        optimizers = self.optimizers()
        return optimizers[("student", "fake").index(role)] if isinstance(optimizers, list) else optimizers

    def _step(self, role: Literal["student", "fake"]) -> None:
        """One step of a role's optimizer, counted in `global_step` if it is the student's."""
        optimizer = self._optimizer(role)
        if role == "student":
            optimizer.step()
        else:  # the wrapper does the same and counts: `global_step` would be the sum over both optimizers
            self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)

    def _report(self, local: Metrics, inputs: Inputs) -> None:
        """Log the metrics of an iteration, averaged over the processes, as one row, and keep them for callbacks.

        Those whose names have no group, as `monitor/` is one, go into the group `loss/`.
        """
        for observer in self.observers:
            local = local | observer(inputs)
        local = local | {"monitor/skipped": torch.tensor(float(self.bad_steps.total), device=self.device)}
        values = self.trainer.strategy.reduce(torch.stack([v.float() for v in local.values()]), reduce_op="mean")
        self.last_metrics = dict(zip(local, values, strict=True))
        row = {name if "/" in name else f"loss/{name}": value for name, value in self.last_metrics.items()}
        row["monitor/interval"] = torch.tensor(float(inputs.interval.index))
        log_values(self.trainer, row)

    # The average of the student's weights

    def _student_weights(self) -> ParameterDict:
        """The student's trained parameters by their names in `networks`, with slashes for dots."""
        student = set(self.networks.role_parameters("student"))
        named = self.networks.named_parameters()
        return ParameterDict({average_name(name): parameter for name, parameter in named if parameter in student})

    @contextmanager
    def averaged_student(self) -> Iterator[None]:
        """Context in which the student has the average of its weights; without an average nothing changes."""
        if self.average is None or self._plays_average:
            yield
            return
        pairs = list(zip(self._student_weights().parameters(), self.average.module.parameters(), strict=True))
        self._plays_average = True
        swap(pairs)
        try:
            yield
        finally:
            swap(pairs)
            self._plays_average = False

    # Sampling

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str] | Conditioning, seeds: Sequence[int], keep_x0: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Draw pictures with the student, by the sampler that the exported model uses.

        The student has the average of its weights, if there is one. With cached data, encoders are loaded for this and
        freed again: of prompts that are encoded, the VAE alone.

        Returns:
            Pictures `[B, 3, H, W]` in [-1, 1], and on request the decoded prediction of every step.
        """
        conditioning = prompts if isinstance(prompts, Conditioning) else self.encode_prompts(list(prompts))
        latents, predictions = self.draw_latents(conditioning, seeds, keep_x0)
        with self.inputs.lent_encoders(self._root_device, text=False) as encoders:
            return encoders.decode(latents), [encoders.decode(x) for x in predictions]

    @torch.no_grad()
    def draw_latents(
        self, conditioning: Conditioning, seeds: Sequence[int], keep_x0: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Clean latents `[B, C, *size]` of pictures by the student, and on request the prediction of every step."""
        scheduler = self.scheduler()
        scheduler.keep_x0 = keep_x0
        latents = initial_latents(seeds, self.model.channels, self.schedule.sizes[0]).to(self.device)
        with self.averaged_student():
            latents = sample_latents(self.networks, scheduler, latents, conditioning.to(self.device))
        return latents, scheduler.x0_predictions

    def scheduler(self) -> ScaleWiseScheduler:
        """The sampler of this schedule and model."""
        return self.schedule.scheduler(self.model.limits.divisor, self.model.backbone_class.process.prediction_type)

    # Checkpoints: only what is trained, and where the data stands

    def kept_state(self, state: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The part of a state dict that a checkpoint holds: what is trained, and the average.

        Args:
            state: of the whole task; None: as it is now.
        """
        state = self.state_dict() if state is None else state
        trained = {key for key, parameter in self.named_parameters() if parameter.requires_grad}
        return {key: value for key, value in state.items() if key in trained or key.startswith("average.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.kept_state(checkpoint["state_dict"])
        checkpoint["swd"] = {"updates": self.updates, "seed": self.seed, "bad_steps": self.bad_steps.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.bad_steps.load_state_dict(checkpoint.get("swd", {}).get("bad_steps", {}))
        progress_in_iterations(checkpoint, self.batches_per_iteration)
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:  # as steps are made here, wherever and by which version it was written
                group["fused"] = self._steps_fused

    def misfit(self, checkpoint: Mapping[str, Any]) -> str | None:
        """Description of what a checkpoint lacks or has in another shape; None if it fits. Loads no weights."""
        if (seed := checkpoint.get("swd", {}).get("seed", self.seed)) != self.seed:
            return f"its draws are of seed {seed} rather than {self.seed}"
        updates = checkpoint.get("swd", {}).get("updates")
        if not isinstance(checkpoint["global_step"], int):
            return "its global_step is no number"
        expected = checkpoint["global_step"] * self.batches_per_iteration
        if updates != expected:
            return f"it counts {updates} updates rather than {expected}, or is not of a distillation with this program"
        trained = self._shapes()
        state = {key: tuple(value.shape) for key, value in checkpoint["state_dict"].items()}
        needed = {key: shape for each in trained for key, shape in each.items()}
        if self.ema is not None:
            needed |= {average_key(key): shape for key, shape in trained[0].items()} | {"average.n_averaged": ()}
        for key, shape in needed.items():
            if state.get(key) != shape:
                return f"{key} is missing or has another shape"
        stored = checkpoint["optimizer_states"]
        if len(stored) != len(trained):
            return f"it has {len(stored)} optimizers rather than {len(trained)}"
        skipped = checkpoint["swd"].get("bad_steps", {}).get("total", 0)
        # An optimizer all of whose updates were skipped has no moments yet.
        pairs = [(one, each) for one, each in zip(stored, trained, strict=True) if one["state"] or not skipped]
        wrong = (optimizer_misfit(one, list(each.values())) for one, each in pairs)
        return next((reason for reason in wrong if reason), None)

    def state_bytes(self) -> int:
        """Bytes of a checkpoint's weights and optimizer moments; loads no weights."""
        trained = [sum(4 * math.prod(shape) for shape in group.values()) for group in self._shapes()]
        return 3 * sum(trained) + (trained[0] if self.ema is not None else 0)

    def _shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Name and shape of what each optimizer trains, without weights in memory."""
        networks = self.model.untrained_networks(self.roles)
        terms = copy.deepcopy(self.terms)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            for term in terms.values():
                term.build(self.model.limits.width)
        whole = ModuleDict({"networks": networks, "terms": terms})
        names = {parameter: name for name, parameter in whole.named_parameters()}
        groups = self._trained(networks, terms)
        return [{names[parameter]: tuple(parameter.shape) for parameter in group} for group in groups]


def checked_decay(ema: float | None) -> float | None:
    """The decay of the average of the weights, None for no average.

    Raises:
        UserError: if it is not from 0 to below 1.
    """
    if ema is not None and not 0 <= ema < 1:
        raise UserError(f"task.ema={ema}; use a decay from 0 to below 1, such as 0.999, or null for no average")
    return ema or None


def average_key(key: str) -> str:
    """The key in a checkpoint of the average of a weight of the student."""
    return f"average.module.{average_name(key.removeprefix('networks.'))}"


def clipped(parameters: Sequence[Parameter], most: float) -> Tensor:
    """The norm of all gradients together as it was before they were clipped here to `most`, by their common factor."""
    total = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    norm = whole_tensor(total)
    # Torch multiplies by a factor of 1 too, which changes nothing; on a GPU, looking at the norm would mean waiting.
    if not (norm.is_cpu and norm + 1e-6 <= most):
        clip_grads_with_norm_(parameters, most, total, foreach=True)
    return norm


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over several updates; empty where there are none."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in (rows[0] if rows else {})}


def check_parts(model: Pretrained, schedule: ScaleSchedule, terms: Mapping[str, LossTerm]) -> None:
    """Raise UserError if the model cannot take a size or the levels of the schedule, or a term does not fit them."""
    if model.tuning == "lora":
        model.check_targets()
    if model.init_adapter:
        check_start(model)
    schedule.check_process(model.backbone_class.process.prediction_type)
    for size in schedule.sizes:
        model.limits.check_size(size)
    family = model.backbone_class
    if not schedule.steps_of(family.process):
        raise UserError(
            f"schedule.sigmas={list(schedule.sigmas)} has no level that model.family={model.family} takes, which is an "
            "expert for others; name levels of its own too"
        )
    facts = ModelFacts(model.family, family.process, model.limits, family.poor_at_low_resolution)
    for name, term in terms.items():
        term.check(f"loss.{name}", facts, schedule)


def check_optimizer(lr: float, critic_lr: float, clip: float, betas: tuple[float, float], weight_decay: float) -> None:
    """Raise UserError for a value that AdamW or clipping cannot work with."""
    for key, value in {"lr": lr, "critic_lr": critic_lr, "clip": clip}.items():
        limits.number(f"task.{key}", value, above=0)
    if not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"task.betas={list(betas)}; use two numbers from 0 to below 1")
    limits.number("task.weight_decay", weight_decay, least=0)
