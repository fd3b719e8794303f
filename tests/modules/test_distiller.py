"""What a distillation is built of: its options, its roles and optimizers, and what it draws with."""

from __future__ import annotations

import re
from typing import Any

import families
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from swd.losses import DMD, GAN, MMD, LossTerm
from swd.modules.distiller import Distiller, check_optimizer
from swd.modules.pretrained import Pretrained
from swd.modules.sampling import initial_latents, sample_latents
from swd.schedule import ScaleSchedule
from swd.types import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return families.pretrained("sd3", families.save("sd3", tmp_path_factory.mktemp("sd3") / "pipeline"))


def a_task(model: Pretrained, loss: dict[str, LossTerm] | None = None, **options: Any) -> Distiller:
    terms = {"dmd": DMD(), "gan": GAN(blocks=(0,))} if loss is None else loss
    return Distiller(model, ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]), terms, **options)


def says(message: str) -> Any:
    """A UserError with exactly this message."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


def test_both_optimizers_are_adamw_with_their_options(model: Pretrained) -> None:
    task = a_task(model, lr=1e-3, critic_lr=2e-3, betas=(0.5, 0.75), weight_decay=0.25)
    task.configure_model()
    optimizers = task.configure_optimizers()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW] * 2
    trained = [
        task.networks.role_parameters("student"),
        [*task.networks.role_parameters("fake"), *task.terms["gan"].parameters()],
    ]
    for optimizer, parameters, rate in zip(optimizers, trained, (1e-3, 2e-3), strict=True):
        (group,) = optimizer.param_groups
        assert list(map(id, group["params"])) == list(map(id, parameters)) and len(parameters) > 4
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (rate, (0.5, 0.75), 0.25)


def test_options_by_default(model: Pretrained) -> None:
    task = a_task(model)
    task.configure_model()
    for optimizer in task.configure_optimizers():
        group = optimizer.param_groups[0]
        assert (group["lr"], tuple(group["betas"]), group["weight_decay"]) == (5e-6, (0.9, 0.999), 0.01)
    assert (task.critic_updates, task.clip, task.seed, task.checkpointing) == (5, 10.0, 0, False)
    assert a_task(model, lr=1e-4).critic_lr == 1e-4, "the student's rate"


def test_without_a_critic_there_is_one_role_and_one_optimizer(model: Pretrained) -> None:
    for updates in (5, 0):
        task = a_task(model, {"mmd": MMD(blocks=(0,))}, critic_updates=updates)
        assert task.critic_updates == 0 and task.roles == ("student",)
    task.configure_model()
    assert len(task.configure_optimizers()) == 1 and task.networks.roles == ("student",)
    both = a_task(model, critic_updates=1)
    assert both.roles == ("student", "fake") and both.critic_updates == 1


def test_first_weights_follow_the_seed_and_leave_other_draws_alone(model: Pretrained) -> None:
    found = []
    for seed in (3, 3, 4):
        task = a_task(model, seed=seed)
        torch.manual_seed(9)
        before = torch.get_rng_state()
        task.configure_model()
        assert torch.equal(torch.get_rng_state(), before)
        networks = task.networks
        task.configure_model()
        assert task.networks is networks, "a second call changes nothing"
        weights = [*task.networks.role_parameters("student"), *task.terms["gan"].parameters()]
        found.append(nn.utils.parameters_to_vector(weights).detach())
    assert torch.equal(found[0], found[1]) and (found[0] - found[2]).abs().max() > 0.1
    head = found[0][-sum(p.numel() for p in task.terms["gan"].parameters()) :]
    torch.manual_seed(3)
    expected = GAN(blocks=(0,))
    expected.build(model.limits.width)
    assert torch.equal(head, nn.utils.parameters_to_vector(expected.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_updates": 0}, "task.critic_updates=0; use 1 or more, since there is a critic for dmd and gan"),
        ({"lr": 0.0}, "task.lr=0.0; use a finite number above 0"),
        ({"critic_lr": -1.0}, "task.critic_lr=-1.0; use a finite number above 0"),
        ({"clip": 0.0}, "task.clip=0.0; use a finite number above 0"),
        ({"betas": (0.9, 1.0)}, "task.betas=[0.9, 1.0]; use two numbers from 0 to below 1"),
        ({"betas": (-0.1, 0.9)}, "task.betas=[-0.1, 0.9]; use two numbers from 0 to below 1"),
        ({"weight_decay": -0.1}, "task.weight_decay=-0.1; use a finite number of 0 or more"),
    ],
)
def test_options_that_cannot_be_are_refused(model: Pretrained, options: dict[str, Any], message: str) -> None:
    with says(message):
        a_task(model, **options)


def test_options_at_their_limits_are_taken() -> None:
    check_optimizer(lr=1e-9, critic_lr=1e-9, clip=1e-9, betas=(0.0, 0.0), weight_decay=0.0)


def test_what_does_not_fit_the_model_is_refused_by_its_name(model: Pretrained) -> None:
    with says("loss.other.blocks: feature block 9 does not exist; this model has blocks 0 to 2"):
        a_task(model, {"other": MMD(blocks=(9,))})
    with says("loss.gan.critic_indices=[0, 28]; use [low, high] with 0 <= low <= high <= 27"):
        a_task(model, {"gan": GAN(blocks=(0,), critic_indices=(0, 28))})
    with says("size (7, 7): 7 is not divisible by 2, as this network needs; use 6 or 8"):
        Distiller(model, ScaleSchedule([1.0], [7]), {"mmd": MMD(blocks=(0,))})
    with says("loss is empty; choose at least one term, e.g. loss=mmd or loss=swd"):
        a_task(model, {})
    task = a_task(model, {"style": MMD(blocks=(0,), reduce="batch")})
    task.check_processes(1)
    with pytest.raises(UserError, match=r"^loss\.style\.reduce=batch .* 2 processes cannot share"):
        task.check_processes(2)


def test_checkpoints_hold_the_trained_weights_alone(model: Pretrained) -> None:
    task = a_task(model)
    task.configure_model()
    checkpoint: dict[str, Any] = {"state_dict": task.state_dict()}
    task.on_save_checkpoint(checkpoint)
    trained = {key: value for key, value in task.named_parameters() if value.requires_grad}
    assert checkpoint["state_dict"].keys() == trained.keys()
    assert {"student", "fake", "head"} == {
        next(name for name in ("student", "fake", "head") if f".{name}." in key) for key in trained
    }
    assert all(torch.equal(checkpoint["state_dict"][key], value) for key, value in trained.items())


def test_samples_are_those_of_the_exported_sampler(model: Pretrained) -> None:
    task = a_task(model)
    task.configure_model()
    for parameter in task.networks.role_parameters("student"):
        parameter.data += 0.1
    pictures, steps = task.sample(["a star", "a ring"], [3, 4], keep_x0=True)
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES["sd3"])
    scheduler = schedule.scheduler(model.limits.divisor, "flow")
    with torch.no_grad():
        conditioning = task.encoders.encode_prompts(["a star", "a ring"])
        latents = initial_latents([3, 4], model.channels, schedule.sizes[0])
        expected = task.encoders.decode(sample_latents(task.networks, scheduler, latents, conditioning))
    assert_close(pictures, expected, rtol=0, atol=1e-5)
    assert [tuple(x.shape[-2:]) for x in steps] == [tuple(8 * side for side in size) for size in schedule.sizes]
    assert torch.equal(steps[-1], pictures)
    alone, none = task.sample(["a ring"], [4])
    assert_close(alone[0], pictures[1], rtol=0, atol=1e-4)
    assert none == []
