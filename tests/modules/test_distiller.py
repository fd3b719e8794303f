"""The parts of a distillation: its options, its roles and optimizers, and what it draws with."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import families
import pytest
import torch
from counted import Counted
from lightning import LightningDataModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torch import nn
from torch.testing import assert_close

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD, LossTerm
from swd.losses.base import CriticStep, GeneratorStep, ModelFacts
from swd.losses.update import critic_loss, generator_gradient, student_x0, trainers, wanted
from swd.modules.ahead import with_predictions
from swd.modules.distiller import Distiller, check_optimizer, checked_decay, mean_metrics
from swd.modules.inputs import InputBuilder, Inputs
from swd.modules.networks import SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.sampling import initial_latents, sample_latents
from swd.modules.statistics import prediction_statistics
from swd.schedule import ScaleSchedule
from swd.types import Cached, CachedBatch, Conditioning, SeededDraws, UserError


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


class Watched(MMD):
    """Accepts a smallest size of the schedule of 4 or more, and notes what it was checked against."""

    def check(self, key: str, model: ModelFacts, schedule: ScaleSchedule) -> None:
        super().check(key, model, schedule)
        self.checked = model
        if schedule.sizes[0] < (4, 4):
            raise UserError(f"{key}: {schedule.sizes[0]} at sigma {schedule.sigmas[0]} is too small")


def test_terms_are_checked_against_the_model_and_the_schedule(model: Pretrained) -> None:
    term = Watched(blocks=(0,))
    Distiller(model, ScaleSchedule([0.75, 0.5], [4, 8]), {"mine": term})
    facts, family = term.checked, model.backbone_class
    assert (facts.family, facts.process, facts.limits) == ("sd3", family.process, model.limits)
    assert facts.poor_at_low_resolution is family.poor_at_low_resolution
    with says("loss.mine: (2, 2) at sigma 0.75 is too small"):
        Distiller(model, ScaleSchedule([0.75, 0.5], [2, 8]), {"mine": term})


def test_prompts_are_encoded_at_the_schedules_own_size_on_the_tasks_device(model: Pretrained) -> None:
    task = a_task(model)
    task.inputs = cast(Any, SimpleNamespace(encode_prompts=lambda *given: given, empty=lambda *given: given))
    elsewhere = torch.device("meta")
    task.to(elsewhere)
    assert cast(Any, task.encode_prompts(["a star", "a ring"])) == (["a star", "a ring"], None, elsewhere)
    assert cast(Any, task.empty) == (None, elsewhere)


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


# Iterations, with data that are encoded


def encoded_prompts(batch: int, seed: int) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(torch.randn(batch, 12, 32, generator=generator), torch.randn(batch, 32, generator=generator))


class Encoded(LightningDataModule):
    """Encoded batches of two samples, each with numbers of its own; `spoilt` numbers those whose latents are NaN."""

    is_cache = True

    def __init__(self, per_iteration: int, count: int = 12, spoilt: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.per_iteration = per_iteration
        self.batches = [self.batch(number, number in spoilt) for number in range(count)]

    @staticmethod
    def batch(number: int, spoilt: bool) -> CachedBatch:
        generator = torch.Generator().manual_seed(number)
        sizes = ScaleSchedule(families.SIGMAS, families.SIZES["sd3"]).sizes
        means = {
            size: torch.randn(2, 4, *size, generator=generator) * (float("nan") if spoilt else 1) for size in sizes
        }
        posteriors = {size: (mean, torch.full_like(mean, 0.1)) for size, mean in means.items()}
        return CachedBatch(Cached(encoded_prompts(2, number), posteriors), prompts=["a star", "a ring"])

    def empty(self, bucket: Any) -> Any:
        return encoded_prompts(1, 99)

    def train_dataloader(self) -> Any:
        return Iterations(self.batches, self.per_iteration)


RATES: dict[str, Any] = {"critic_updates": 2, "lr": 1e-2, "critic_lr": 2e-2, "clip": 0.05, "seed": 3}


def trained(task: Distiller, iterations: int, spoilt: tuple[int, ...] = (), **options: Any) -> Trainer:
    """The trainer after these iterations on `Encoded` data."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_steps=iterations, accelerator="cpu", devices=1, **quiet, **options)
    trainer.fit(task, datamodule=Encoded(task.batches_per_iteration, spoilt=spoilt))
    return trainer


def student_of(task: Distiller) -> torch.Tensor:
    return nn.utils.parameters_to_vector(task.networks.role_parameters("student")).detach().clone()


def average_of(task: Distiller) -> torch.Tensor:
    """The average, in the order of `student_of`."""
    assert task.average is not None
    names = {parameter: name for name, parameter in task.networks.named_parameters()}
    ordered = [names[parameter].replace(".", "/") for parameter in task.networks.role_parameters("student")]
    return nn.utils.parameters_to_vector([task.average.module[name] for name in ordered]).detach().clone()


def critic_of(task: Distiller) -> torch.Tensor:
    weights = [*task.networks.role_parameters("fake"), *task.terms.parameters()]
    return nn.utils.parameters_to_vector(weights).detach().clone()


def update_by_hand(task: Distiller, inputs: Inputs, critic: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss that is differentiated in an update, and its metrics."""
    networks, terms = task.networks, task.terms
    x0_hat = inputs.x0_hat
    if x0_hat is None:
        x0_hat = student_x0(networks, inputs.interval, inputs.source, inputs.conditioning, inputs.draws)
    leaf = x0_hat.detach().requires_grad_(not critic)
    common = (networks, inputs.conditioning, inputs.empty, leaf, inputs.target, inputs.draws)
    if critic:
        return critic_loss(terms, CriticStep(*common, wanted(trainers(terms), "critic_pass"), 1))
    loss, gradient, metrics = generator_gradient(terms, GeneratorStep(*common, wanted(terms, "generator_pass"), 1))
    distance = (leaf.detach() - inputs.target).square().mean()
    statistics = prediction_statistics(leaf.detach(), inputs.target)
    return (x0_hat * gradient).sum(), metrics | statistics | {"loss": loss, "x0_mse": distance}


def iterations_by_hand(task: Distiller, count: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The student's weights after each iteration, and the last iteration's metrics."""
    data = Encoded(3)
    batches, builder = iter(data.batches), InputBuilder(task.model, task.schedule)
    builder.cache = data
    optimizers, students = task.configure_optimizers(), []
    for iteration in range(count):
        rows: list[dict[str, torch.Tensor]] = []
        built = [builder.build(next(batches), iteration % 3, SeededDraws(3, iteration, update)) for update in range(3)]
        with torch.no_grad():  # one pass, since AdamW enlarges the rounding of passes of other sizes
            built[:2] = with_predictions(task.networks, built[:2])
        for owner, inputs in zip(("critic", "critic", "student"), built, strict=True):
            optimizer = optimizers[owner == "critic"]
            task.zero_grad()
            loss, metrics = update_by_hand(task, inputs, owner == "critic")
            loss.backward()
            norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
            optimizer.step()
            rows.append(metrics | {f"monitor/gradient_norm_{owner}": norm})
        students.append(student_of(task))
    return students, rows[2] | {name: (rows[0][name] + rows[1][name]) / 2 for name in rows[0]}


def test_iterations_are_those_made_by_hand(model: Pretrained) -> None:
    task, other = a_task(model, **RATES, ema=0.3), a_task(model, **RATES)
    seen: list[Inputs] = []
    task.observers.append(lambda inputs: seen.append(inputs) or {"watched": torch.tensor(7.0)})
    trainer = trained(task, 4, profiler=SimpleProfiler())
    other.configure_model()
    students, metrics = iterations_by_hand(other, 4)

    assert_close(student_of(task), students[-1], rtol=0, atol=1e-6)
    assert_close(critic_of(task), critic_of(other), rtol=0, atol=1e-6)
    assert metrics["monitor/gradient_norm_student"] > 0.05, "the gradient is clipped"
    expected = metrics | {"watched": torch.tensor(7.0), "monitor/skipped": torch.tensor(0.0)}
    assert task.last_metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(task.last_metrics[name], value.detach(), rtol=1e-4, atol=1e-6)
        assert trainer.callback_metrics[name if "/" in name else f"loss/{name}"] == task.last_metrics[name]
    assert trainer.callback_metrics["monitor/interval"] == 0 and [each.interval.index for each in seen] == [0, 1, 2, 0]
    assert (task.global_step, task.updates, task.batches_per_iteration) == (4, 12, 3)

    # The average is the first student, then goes towards the later ones; in update n the decay is at most
    # (1 + n) / (10 + n).
    average = students[0]
    for n, student in enumerate(students[1:], 1):
        average = torch.lerp(average, student, 1 - min(0.3, (1 + n) / (10 + n)))
    assert_close(average_of(task), average, rtol=0, atol=1e-6)

    calls = {"data": 12, "inputs": 12, "critic": 8, "generator": 4}
    recorded = cast(SimpleProfiler, trainer.profiler).recorded_durations
    assert task.seconds.keys() == calls.keys()
    for name, count in calls.items():
        assert len(recorded[f"[Distiller]{name}"]) == count
        assert sum(recorded[f"[Distiller]{name}"]) <= task.seconds[name] < sum(recorded[f"[Distiller]{name}"]) + 1


@pytest.mark.parametrize(
    ("spoilt", "place", "names"),
    [
        (1, "iteration 1, step 1 of 3 of the schedule, critic update 2 of 2", ("fake_score", "discriminator")),
        (5, "iteration 2, step 2 of 3 of the schedule, generator update", ("gan", "dmd")),
    ],
)
def test_the_place_and_everything_that_is_not_finite_are_named(
    model: Pretrained, tmp_path: Path, spoilt: int, place: str, names: tuple[str, str]
) -> None:
    owner = "the critic" if "critic" in place else "the student"
    found = f"latents of the data, the student's prediction, {', '.join(names)}, gradient norm of {owner}"
    with pytest.raises(UserError) as caught:
        trained(a_task(model, **RATES, on_bad_step="stop"), 2, (spoilt,), default_root_dir=tmp_path)
    assert str(caught.value).startswith(f"training stopped at {place}: not finite: {found}; no weight was changed")


@pytest.mark.filterwarnings("ignore:iteration .* was skipped")
def test_a_skipped_update_changes_its_weights_by_nothing_and_counts(model: Pretrained, tmp_path: Path) -> None:
    task = a_task(model, **RATES, ema=0.3)
    trainer = trained(task, 1, (2,), default_root_dir=tmp_path)
    fresh = a_task(model, **RATES)
    fresh.configure_model()
    assert torch.equal(student_of(task), student_of(fresh)) and (critic_of(task) - critic_of(fresh)).abs().max() > 0.01
    assert task.average is not None and task.average.n_averaged == 0 and task.predictions() == {}
    assert task.global_step == 1 and task.last_metrics["monitor/skipped"] == 1
    assert "loss" not in task.last_metrics and "monitor/gradient_norm_critic" in task.last_metrics
    assert all(p.grad is None for group in trainer.optimizers[0].param_groups for p in group["params"])

    task = a_task(model, **RATES)
    trained(task, 1, (0, 1), default_root_dir=tmp_path)
    assert torch.equal(critic_of(task), critic_of(fresh)) and (student_of(task) - student_of(fresh)).abs().max() > 1e-3
    assert task.global_step == 1 and task.last_metrics["monitor/skipped"] == 2
    assert "loss" in task.last_metrics and "monitor/gradient_norm_critic" not in task.last_metrics


def test_an_iteration_without_enough_batches_is_refused(model: Pretrained) -> None:
    task = a_task(model, **RATES)
    task.trainer = cast(Any, SimpleNamespace(profiler=PassThroughProfiler(), global_step=4, global_rank=0))
    with says(
        "iteration 5, step 2 of 3 of the schedule, critic update 2 of 2: the data have no batch for it; an item of "
        "their loader must have 3, as those of swd.data.iterations.Iterations"
    ):
        task._next_inputs(iter([]), 1)


def test_each_process_draws_for_its_own_samples(model: Pretrained) -> None:
    task = a_task(model, **RATES)
    task.inputs.cache = Encoded(3)
    task.trainer = cast(Any, SimpleNamespace(profiler=PassThroughProfiler(), global_step=4, global_rank=3))
    inputs = task._next_inputs(iter(Encoded(3).batches), 1)
    assert inputs.draws == SeededDraws(3, 4, 1, first=6) and inputs.interval.index == 1


def test_data_are_a_cache_if_they_say_so(model: Pretrained) -> None:
    task, data = a_task(model), Encoded(1)
    for owner, cache in ((SimpleNamespace(datamodule=data), data), (SimpleNamespace(), None)):
        task.trainer = cast(Any, owner)
        task.setup("fit")
        assert task.inputs.cache is cache
    for other in (SimpleNamespace(), SimpleNamespace(is_cache=False), None):
        task.inputs.cache = data
        task.trainer = cast(Any, SimpleNamespace(datamodule=other))
        task.setup("fit")
        assert task.inputs.cache is None


def test_what_the_networks_predict_is_tried_on_one_sample(model: Pretrained) -> None:
    task = a_task(model, **RATES)
    trained(task, 1)
    student, fake = "the student's prediction", "the fake network's prediction"
    assert task.predictions() == {student: True, fake: True}
    assert task._seen is not None and len(task._seen.source) == 1
    for parameter in task.networks.role_parameters("fake"):
        parameter.data.fill_(float("inf"))
    assert task.predictions() == {student: True, fake: False}
    for parameter in task.networks.role_parameters("student"):
        parameter.data.fill_(float("inf"))
    assert task.predictions() == {student: False, fake: False}
    alone = a_task(model, {"mmd": MMD(blocks=(0,))})
    alone.configure_model()
    alone._seen = task._seen
    assert alone.predictions() == {student: True}


# Checkpoints


def checkpoint_of(task: Distiller, trainer: Trainer) -> dict[str, Any]:
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    checkpoint = {"state_dict": task.state_dict(), "optimizer_states": states, "global_step": task.global_step}
    task.on_save_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.filterwarnings("ignore:iteration .* was skipped")
def test_a_checkpoint_fits_the_task_that_wrote_it_and_no_other(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = a_task(model, **RATES, ema=0.5)
    checkpoint = checkpoint_of(task, trained(task, 2, (0,), default_root_dir=tmp_path))
    assert checkpoint["swd"]["updates"] == 6 and checkpoint["swd"]["bad_steps"]["total"] == 1
    state = checkpoint["state_dict"]
    averages = {key: value for key, value in state.items() if key.startswith("average.")}
    assert averages.pop("average.n_averaged") == 2
    assert [tuple(v.shape) for v in averages.values()] == [
        tuple(p.shape) for p in task.networks.role_parameters("student")
    ]
    assert task.kept_state().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in task.kept_state().items())

    other = a_task(model, **RATES, ema=0.5)
    assert other.misfit(checkpoint) is None
    loops = checkpoint_loops(6)
    other.on_load_checkpoint(checkpoint | {"loops": loops})
    assert loops == checkpoint_loops(2), "counted in batches before"
    assert other.bad_steps.total == 1
    for old in ({}, {"swd": {}}):
        other.on_load_checkpoint(old | {"global_step": 2, "loops": checkpoint_loops(2)})
        assert other.bad_steps.total == 0

    assert a_task(model, **RATES).misfit(checkpoint) is None, "an average that is not asked for does no harm"
    no_average = checkpoint | {"state_dict": {k: v for k, v in state.items() if not k.startswith("average.")}}
    assert re.fullmatch(r"average\.module\.\S+ is missing or has another shape", other.misfit(no_average) or "")
    shapes = other._shapes()
    monkeypatch.setattr(other, "_shapes", lambda: shapes)  # each of many calls would build the networks
    for key in state:
        lacks = {k: v for k, v in state.items() if k != key}
        wrong = state | {key: torch.zeros(1, 2, 3)}
        for changed in (lacks, wrong):
            reason = other.misfit(checkpoint | {"state_dict": changed})
            assert reason == f"{key} is missing or has another shape"


def checkpoint_loops(completed: int) -> dict[str, Any]:
    counts = dict.fromkeys(("ready", "started", "processed", "completed"), completed)
    progress = {"total": dict(counts), "current": dict(counts)}
    state = {"_batches_that_stepped": completed}
    return {"fit_loop": {"epoch_loop.batch_progress": progress, "epoch_loop.state_dict": state}}


def test_what_a_checkpoint_counts_and_its_optimizers_must_fit(model: Pretrained) -> None:
    task = a_task(model, **RATES)
    checkpoint = checkpoint_of(task, trained(task, 1))
    assert task.misfit(checkpoint) is None
    counts = "it counts {} updates rather than {}, or is not of a distillation with this program"
    student, critic = checkpoint["optimizer_states"]
    empty = student | {"state": {}}
    skipped = {"updates": 3, "bad_steps": {"total": 1}}
    lengths = [len(each["param_groups"][0]["params"]) for each in (student, critic)]
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"global_step": "1"}, "its global_step is no number"),
        ({"global_step": 2}, counts.format(3, 6)),
        ({"swd": {}}, counts.format(None, 3)),
        ({"swd": {"updates": 3}}, None),
        ({"optimizer_states": [student]}, "it has 1 optimizers rather than 2"),
        ({"optimizer_states": [empty, critic]}, "an optimizer has lost its moments"),
        ({"optimizer_states": [empty, critic], "swd": {"updates": 3}}, "an optimizer has lost its moments"),
        (
            {"optimizer_states": [empty, critic], "swd": {"updates": 3, "bad_steps": {}}},
            "an optimizer has lost its moments",
        ),
        ({"optimizer_states": [empty, critic], "swd": skipped}, None),
        ({"swd": skipped}, None),
        (
            {"optimizer_states": [critic, critic], "swd": skipped},
            f"an optimizer is for {lengths[1]} parameters rather than {lengths[0]}",
        ),
        (
            {"optimizer_states": [student, student]},
            f"an optimizer is for {lengths[0]} parameters rather than {lengths[1]}",
        ),
    ]
    for change, reason in cases:
        assert task.misfit(checkpoint | change) == reason, change
    without = {key: value for key, value in checkpoint.items() if key != "swd"}
    assert task.misfit(without) == counts.format(None, 3)


def test_shapes_are_those_of_the_optimizers_and_need_no_weights(model: Pretrained) -> None:
    task = a_task(model, **RATES)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    shapes = task._shapes()
    assert torch.equal(torch.get_rng_state(), before) and not list(task.parameters())
    task.configure_model()
    names = {parameter: name for name, parameter in task.named_parameters()}
    for each, optimizer in zip(shapes, task.configure_optimizers(), strict=True):
        assert list(each.items()) == [(names[p], tuple(p.shape)) for p in optimizer.param_groups[0]["params"]]


# The average


def test_the_student_plays_its_average_within_the_context_alone(model: Pretrained) -> None:
    task = a_task(model, ema=0.5)
    with task.averaged_student():
        pass  # before there is one
    task.configure_model()
    assert task.average is not None
    for parameter in task.average.module.parameters():
        parameter.fill_(2.0)
    own = student_of(task)
    with task.averaged_student():
        assert (student_of(task) == 2).all()
        with task.averaged_student():
            assert (student_of(task) == 2).all()
        assert (student_of(task) == 2).all()
        assert torch.equal(average_of(task), own), "they are exchanged"
    assert torch.equal(student_of(task), own)
    with pytest.raises(KeyError), task.averaged_student():
        raise KeyError
    assert torch.equal(student_of(task), own)
    with task.averaged_student():
        assert (student_of(task) == 2).all()


def test_decays_and_means() -> None:
    assert (checked_decay(None), checked_decay(0), checked_decay(0.25)) == (None, None, 0.25)
    for ema in (1, -0.1):
        with says(f"task.ema={ema}; use a decay from 0 to below 1, such as 0.999, or null for no average"):
            checked_decay(ema)
    rows = [{"a": torch.tensor(1.0), "b": torch.tensor(-2.0)}, {"a": torch.tensor(4.0), "b": torch.tensor(3.0)}]
    assert mean_metrics(rows) == {"a": 2.5, "b": 0.5} and mean_metrics([]) == {}


def test_options_reach_what_they_set(model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    task = a_task(model)
    rule = task.bad_steps.rule
    assert (rule.action, rule.in_a_row, rule.in_all, rule.exploding) == ("skip", 5, 100, 100.0) and task.ema is None
    assert task.automatic_optimization is False and task.strict_loading is False
    options = {"on_bad_step": "stop", "skips_in_a_row": 2, "skips_in_all": 3, "exploding": None}
    rule = a_task(model, **options).bad_steps.rule
    assert (rule.action, rule.in_a_row, rule.in_all, rule.exploding) == ("stop", 2, 3, None)
    calls: list[bool] = []
    monkeypatch.setattr(SharedBase, "enable_checkpointing", lambda self: calls.append(True))
    encoders = Counted(monkeypatch)
    for checkpointing, expected in ((False, []), (True, [True])):
        task = a_task(model, checkpointing=checkpointing)
        task.configure_model()
        assert calls == expected and task.average is None
    assert encoders.text == [True, True], "loaded at once"


@pytest.mark.parametrize("fused", [None, False, True])
def test_a_run_goes_on_with_fused_steps_whichever_version_wrote_it(model: Pretrained, fused: bool | None) -> None:
    task = a_task(model)
    states = [{"param_groups": [{"fused": fused}, {}]}, {"param_groups": [{"lr": 1.0}]}]
    task.on_load_checkpoint({"optimizer_states": states, "global_step": 2, "loops": checkpoint_loops(2)})
    assert states == [{"param_groups": [{"fused": True}] * 2}, {"param_groups": [{"lr": 1.0, "fused": True}]}]
    task.configure_model()
    assert [optimizer.defaults["fused"] for optimizer in task.configure_optimizers()] == [True] * 2
