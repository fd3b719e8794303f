"""One update's loss from a set of terms: pure functions over steps, used by the distiller and by the golden tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from swd.diffusion import Process
from swd.losses.base import CriticStep, FakePass, GeneratorStep, LossTerm, Metrics, Predictors
from swd.schedule import Interval, upsample
from swd.types import Checks, Conditioning, Draws, Noised, UserError


def student_x0(
    networks: Predictors, interval: Interval, source: Tensor, conditioning: Conditioning, draws: Draws
) -> Tensor:
    """The student's clean prediction at the target size (SwD paper, section 4.1).

    Args:
        networks: the three roles.
        interval: the step of the schedule.
        source: clean latents `[B, C, *interval.source]`.
        conditioning: B rows.
        draws: where the noise comes from.

    Returns:
        `x0_hat` `[B, C, *interval.target]`, float32.
    """
    noised = student_input(networks.process, interval, source, draws)
    return networks.x0("student", noised.x_t, noised.sigma, conditioning)[0]


def student_input(process: Process, interval: Interval, source: Tensor, draws: Draws) -> Noised:
    """The student's input at a step of the schedule: upsampled data, noised; arguments as of `student_x0`."""
    z = upsample(source.float(), interval.target)
    sigma = torch.full((len(z),), interval.sigma, device=z.device)
    return Noised(process.add_noise(z, draws.noise("student/noise", z), sigma), sigma)


def generator_gradient(
    terms: Mapping[str, LossTerm], step: GeneratorStep, checks: Checks | None = None
) -> tuple[Tensor, Tensor, Metrics]:
    """Total generator loss, its gradient with respect to `step.x0_hat` (a leaf), and metrics.

    Terms are differentiated one after the other, so that only one feature graph is in memory at a time. They are
    differentiated with `autograd.grad`, so that no gradient is added to the fake network's parameters.

    Args:
        terms: by name.
        step: the update.
        checks: filled in, by the term's name, with whether its weighted loss and its gradient are finite.
    """
    total = torch.zeros((), device=step.x0_hat.device)
    gradient = torch.zeros_like(step.x0_hat)
    metrics: Metrics = {}
    order = sorted(terms, key=_shared_pass_first(terms))
    readers = [name for name in order if terms[name].generator_pass.blocks]
    for name in order:
        loss, values = terms[name].generator(step)
        # Terms that read the fake network's features share their graph, so all but the last one must retain it.
        own = torch.autograd.grad(loss, step.x0_hat, retain_graph=name in readers[:-1])[0]
        if checks is not None:
            checks[name] = loss.detach().isfinite() & own.isfinite().all()
        gradient += own
        total += loss.detach()
        metrics |= values
        del loss
    return total, gradient, metrics


def _shared_pass_first(terms: Mapping[str, LossTerm]) -> Callable[[str], tuple[bool, bool, str]]:
    """Sorting key by which the terms that read the shared fake pass run next to each other."""
    return lambda name: (not terms[name].generator_pass.blocks, not terms[name].generator_pass.prediction, name)


def critic_loss(
    terms: Mapping[str, LossTerm], step: CriticStep, checks: Checks | None = None
) -> tuple[Tensor, Metrics]:
    """Total critic loss and metrics of the terms that train the fake network.

    `checks` is filled in, by the name of the critic's loss, with whether it is finite.
    """
    losses: list[Tensor] = []
    metrics: Metrics = {}
    step.reads_real = any(term.reads_real for term in trainers(terms).values())
    for name, term in trainers(terms).items():
        loss, values = term.critic(step)
        if checks is not None:
            checks[term.critic_name or f"critic of {name}"] = loss.detach().isfinite()
        losses.append(loss)
        metrics |= values
    return torch.stack(losses).sum(), metrics


def trainers(terms: Mapping[str, LossTerm]) -> dict[str, LossTerm]:
    """The terms that train the fake network."""
    return {name: term for name, term in terms.items() if term.trains_fake}


def wanted(terms: Mapping[str, LossTerm], attribute: str) -> FakePass:
    """Union of the outputs that terms need from the fake pass; `attribute` is "generator_pass" or "critic_pass"."""
    passes: Sequence[FakePass] = [getattr(term, attribute) for term in terms.values()]
    return reduce(or_, passes, FakePass())


def settle(terms: Mapping[str, LossTerm]) -> None:
    """Let every term of a loss choose the options that depend on the other terms.

    Raises:
        UserError: if there is no term at all, or one asks for a fake network that no term trains.
    """
    if not terms:
        raise UserError("loss is empty; choose at least one term, e.g. loss=mmd or loss=swd")
    has_fake = bool(trainers(terms))
    for name, term in terms.items():
        term.settle(f"loss.{name}", has_fake)
