"""Curves that show whether a distillation is healthy, and where its time goes."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from swd.losses.base import Metrics
from swd.losses.functional import dmd_direction
from swd.modules.distiller import Distiller
from swd.modules.inputs import Inputs
from swd.modules.sampling import sample_latents
from swd.modules.statistics import cosine, rms, similarity, velocity
from swd.types import Conditioning, UserError

PHASES = ("data", "inputs", "critic", "generator")
LEVELS = 4
"""Parts that the noise levels are divided into for the critic's error, from clean to noisy."""


class Monitor(Callback):
    """Adds curves to the rows that a distillation logs: `monitor/...` and `time/...` (docs/monitoring.md has each).

    Times and memory are in every row. A probe, which runs forwards of its own on every process, is made every `every`
    iterations: the student draws a few prompts of the batch with several seeds each, in latents; critic and teacher
    predict these drawings noised again. Its draws depend on (seed, iteration) alone, and disturb no others.

    Args:
        every: iterations between probes; null: none. 100 is ours: a probe of the defaults runs as many samples forwards
            as one iteration of the paper's runs forwards and backwards, which then is 1% of the time.
        prompts: of the batch that are drawn on each process, at most; no more than the batch has.
        seeds: drawings of each prompt, one after the other, so that a probe needs no more memory than training.
    """

    def __init__(self, every: int | None = 100, prompts: int = 4, seeds: int = 4) -> None:
        if every is not None and every < 1:
            raise UserError(f"callbacks.monitor.every={every}; use 1 or more, or null for no probes")
        for key, value, least in (("prompts", prompts, 1), ("seeds", seeds, 2)):
            if value < least:
                raise UserError(f"callbacks.monitor.{key}={value}; use {least} or more")
        self.every = every
        self.prompts = prompts
        self.seeds = seeds
        self._task: Distiller | None = None
        self._before = perf_counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(pl_module, Distiller):
            self._task = pl_module
            pl_module.observers.append(self.observe)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._task is not None:
            self._task.observers.remove(self.observe)
            self._task = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = perf_counter()

    def observe(self, inputs: Inputs) -> Metrics:
        """The values of the iteration that ends, on every process."""
        assert self._task is not None
        task = self._task
        values = self._times(task, len(inputs.target)) | peak_memory(task.device)
        found = {name: torch.tensor(value, device=task.device) for name, value in values.items()}
        # The student's update of this iteration is done, so `global_step` counts it.
        if self.every is not None and task.draws_alone and task.global_step % self.every == 0:
            found |= Probe(task, inputs, self.prompts, self.seeds).values()
            self._before = perf_counter()  # the next iteration's time is without it
        return found

    def _times(self, task: Distiller, batch: int) -> dict[str, float]:
        """Seconds of the iteration and of its phases, and samples a second over all processes."""
        now = perf_counter()
        seconds = now - self._before
        self._before = now
        found = {
            f"time/{name}": task.seconds.get(name, 0.0) for name in PHASES if name != "critic" or task.critic_updates
        }
        task.seconds.clear()
        samples = batch * task.batches_per_iteration * task.trainer.world_size
        return found | {"time/iteration": seconds, "time/samples_per_second": samples / max(seconds, 1e-9)}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far in GB: of the machine, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"monitor/memory_host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if device.type == "cuda":
        found["monitor/memory_device"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


@dataclass(frozen=True)
class Drawing:
    """One seed's drawings of B prompts.

    Attributes:
        x0: clean prediction of every step, `[B, C, *size]` each.
        number: of the seed, from 0.
    """

    x0: list[Tensor]
    number: int


class Probe:
    """Measures a distillation on drawings of its own student.

    Args:
        task: the distillation.
        inputs: whose prompts are drawn.
        prompts: how many of them, at most.
        seeds: drawings of each.
    """

    def __init__(self, task: Distiller, inputs: Inputs, prompts: int, seeds: int) -> None:
        count = min(prompts, len(inputs.target))
        self.task = task
        self.inputs = inputs
        self.seeds = seeds
        self.conditioning = inputs.conditioning.rows(slice(count))
        # `iteration` of the draws is the one that ended, as in its own updates.
        first = task.global_rank * count
        self.draws = replace(inputs.draws, update=0, first=first)
        self.totals: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def values(self) -> Metrics:
        """Mean of each value over prompts, seeds and steps of the schedule."""
        last: list[Tensor] = []
        first: list[Tensor] = []
        for number in range(self.seeds):
            drawing = self._draw(number)
            first.append(drawing.x0[0])
            last.append(drawing.x0[-1])
            if "fake" in self.task.roles:
                self._compare(drawing)
        self._add("similarity_first", similarity(torch.stack(first)))
        self._add("similarity", similarity(torch.stack(last)))
        return {f"monitor/{name}": torch.stack(values).mean() for name, values in self.totals.items()}

    def _add(self, name: str, value: Tensor) -> None:
        self.totals.setdefault(name, []).append(value)

    def _draw(self, number: int) -> Drawing:
        """The student's latents from pure noise, by the sampler that the exported student uses."""
        task = self.task
        schedule = task.inputs.schedule_for(self.inputs.bucket)
        scheduler = schedule.scheduler(task.model.limits.divisor, task.model.backbone_class.process.prediction_type)
        scheduler.keep_x0 = True
        like = torch.empty(len(self.conditioning), task.model.channels, *schedule.sizes[0], device=task.device)
        noise = self.draws.noise(f"monitor/seed {number}", like)
        sample_latents(task.networks, scheduler, noise, self.conditioning)
        return Drawing([x0.float() for x0 in scheduler.x0_predictions], number)

    def _compare(self, drawing: Drawing) -> None:
        """Critic and teacher on the drawings of every step, noised again."""
        for step, x0_hat in enumerate(drawing.x0):
            purpose = f"monitor/{drawing.number}/{step}"
            self._critic_error(x0_hat, step, f"{purpose}/critic")
            self._matching(x0_hat, f"{purpose}/matching")

    def _noised(self, x0_hat: Tensor, purpose: str, index: Tensor) -> tuple[Tensor, Tensor]:
        process = self.task.networks.process
        sigma = process.level(index).to(x0_hat.device)
        return process.add_noise(x0_hat, self.draws.noise(purpose, x0_hat), sigma), sigma

    def _critic_error(self, x0_hat: Tensor, step: int, purpose: str) -> None:
        """The critic's squared error; each sample's level is of another quarter of the table, so that all are met."""
        networks = self.task.networks
        low, high = networks.process.ranges.whole
        within = self.draws.index(purpose, 0, (high - low + 1) // LEVELS - 1, len(x0_hat))
        # Index 0 is the noisiest in rectified flow and the cleanest in the other process, so levels are put in order.
        part = (self.draws.first + torch.arange(len(x0_hat)) + step) % LEVELS
        index = low + part * ((high - low + 1) // LEVELS) + within
        levels = networks.process.level(torch.tensor([low, high]))
        part = part if levels[0] < levels[1] else LEVELS - 1 - part
        x_t, sigma = self._noised(x0_hat, purpose, index)
        predicted = networks.x0("fake", x_t, sigma, self.conditioning)[0]
        errors = (predicted - x0_hat).square().flatten(1).mean(1)
        self._add("critic_error", errors.mean())
        self._add(f"critic_error_step_{step + 1}", errors.mean())
        for number, error in zip(part.tolist(), errors, strict=True):
            self._add(f"critic_error_level_{number + 1}", error)

    def _matching(self, x0_hat: Tensor, purpose: str) -> None:
        """The direction that DMD would give the drawings, and its two parts."""
        networks, conditioning = self.task.networks, self.conditioning
        # Whichever term has the teacher guided says by how much, and at which levels.
        guided_term = next((term for term in self.task.terms.values() if hasattr(term, "guidance_scale")), None)
        guidance: float = getattr(guided_term, "guidance_scale", 1.0)
        low, high = getattr(guided_term, "indices", None) or networks.process.ranges.renoise
        x_t, sigma = self._noised(x0_hat, purpose, self.draws.index(purpose, low, high, len(x0_hat)))
        fake = networks.x0("fake", x_t, sigma, conditioning)[0]
        teacher = networks.x0("teacher", x_t, sigma, conditioning)[0]
        guided = teacher
        if guidance != 1.0:
            without = networks.x0("teacher", x_t, sigma, self._empty())[0]
            guided = networks.backbone.guide(teacher, without, guidance, x_t)
            parts = matching_and_guidance(teacher, without, fake, guidance)
            self._add("matching_over_guidance", (rms(parts[0]) / rms(parts[1]).clamp(min=1e-12)).mean())
        direction = dmd_direction(x0_hat, guided, fake)
        speed = rms(velocity(networks.process, x_t, guided, sigma))
        self._add("direction_over_velocity", (rms(direction) / speed.clamp(min=1e-12)).mean())
        self._add("teacher_fake_cosine", cosine(guided, fake).mean())

    def _empty(self) -> Conditioning:
        return self.inputs.empty.expand(len(self.conditioning))


def matching_and_guidance(with_prompt: Tensor, without: Tensor, fake: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """The two parts of DMD's direction before it is normalised (arXiv 2511.22677).

    Args:
        with_prompt, without: the teacher's clean predictions with and without the prompt.
        fake: the critic's clean prediction.
        guidance: scale w of classifier-free guidance.

    Returns:
        `D_f - D_c` and `-(w - 1) (D_c - D_0)`; their sum is `D_f - D_r` with `D_r` the guided prediction.
    """
    return fake - with_prompt, -(guidance - 1) * (with_prompt - without)
