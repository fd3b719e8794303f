"""Training stops at the first value that is not finite, before weights, checkpoints or a student take it on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tiny import composed, overrides
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader

from swd.commands.train import fit
from swd.diffusion import Ranges
from swd.losses import functional
from swd.losses.dmd import DMD
from swd.losses.gan import GAN
from swd.losses.mmd import MMD
from swd.modules import bad_steps, distiller
from swd.modules.checkpoint_files import damage
from swd.modules.distiller import Distiller, check_optimizer
from swd.modules.finite import all_finite, failed_checks
from swd.modules.inputs import InputBuilder
from swd.modules.training_task import WatchedTask, check_finite
from swd.types import Conditioning, UserError

NAN, INF = float("nan"), float("inf")


def train(model: Path, folder: Path, *arguments: str, **more: Any) -> None:
    fit(composed([*overrides(model, folder, **{"task__on_bad_step": "stop"} | more), *arguments]))


def spoil(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, call: int, change: Callable[[Any], Any]) -> None:
    """Let the numbered call of a method, from 1, return something changed."""
    original, calls = getattr(owner, method), [0]

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = original(self, *args, **kwargs)
        return change(result) if calls[0] == call else result

    monkeypatch.setattr(owner, method, changed)


def times(factor: float) -> Callable[[Any], Any]:
    return lambda result: (result[0] * factor, result[1])


CASES: dict[str, tuple[type, str, int, float, str, str]] = {
    # what, whose call, times what: iteration, step and update, and the loss that is named
    "mmd nan": (MMD, "generator", 2, NAN, "iteration 2, step 2 of 3 of the schedule, generator update", "mmd"),
    "gan inf": (GAN, "generator", 3, INF, "iteration 3, step 3 of 3 of the schedule, generator update", "gan"),
    "dmd nan": (DMD, "generator", 2, NAN, "iteration 2, step 2 of 3 of the schedule, generator update", "dmd"),
    "fake": (DMD, "critic", 4, NAN, "iteration 2, step 2 of 3 of the schedule, critic update 2 of 2", "fake_score"),
    "head": (GAN, "critic", 5, INF, "iteration 3, step 3 of 3 of the schedule, critic update 1 of 2", "discriminator"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_stops_the_run_with_its_place(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    owner, method, call, factor, place, name = CASES[case]
    spoil(monkeypatch, owner, method, call, times(factor))
    with pytest.raises(UserError) as caught:
        train(tiny_model, tmp_path, loss="swd", trainer__max_steps=4, callbacks__checkpoint__every=1)
    last = int(place.split(",")[0].removeprefix("iteration ")) - 1
    file = tmp_path / "checkpoints" / f"iteration-{last}.ckpt"
    assert f"training stopped at {place}: not finite: {name}," in str(caught.value)
    assert f"last good checkpoint: {file};" in str(caught.value) and "\n" not in str(caught.value)
    assert damage(file) is None and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("part", ["data", "prompts"])
def test_data_that_are_not_finite_are_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    if part == "data":
        spoil(monkeypatch, InputBuilder, "latents", 2, lambda pair: (pair[0] * INF, pair[1]))
    else:
        spoil(monkeypatch, InputBuilder, "encode_prompts", 3, lambda c: c.map(lambda t: t * NAN))
    name = {"data": "latents of the data", "prompts": "encoded prompts"}[part]
    with pytest.raises(UserError, match=f"iteration 2, .*: not finite: {name}, .*no checkpoint had been written"):
        train(tiny_model, tmp_path, loss="mmd")


def test_no_weight_changes_in_the_update_that_stops(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Distiller] = []
    update = Distiller._generator_update

    def noted(self: Distiller, inputs: Any) -> Any:
        before = {key: value.clone() for key, value in self.networks.state_dict().items()}
        kept.append(self)
        try:
            return update(self, inputs)
        except UserError:
            after = self.networks.state_dict()
            assert all(torch.equal(after[key], value) for key, value in before.items())
            raise

    monkeypatch.setattr(Distiller, "_generator_update", noted)
    spoil(monkeypatch, MMD, "generator", 1, times(NAN))
    with pytest.raises(UserError, match="no weight was changed"):
        train(tiny_model, tmp_path, loss="mmd")
    assert kept


def test_a_gradient_norm_beyond_float32_stops_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, MMD, "generator", 1, times(1e38))
    with pytest.raises(UserError, match=r"iteration 1, .*not finite: .*gradient norm of the student"):
        train(tiny_model, tmp_path, loss="mmd")


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e30, "iteration 1, before its checkpoint: not finite: .*prediction"),
        (1e38, "iteration 1, step 1 of 3 of the schedule, generator update: not finite: weights of the student"),
    ],
)
def test_weights_that_explode_replace_no_checkpoint_and_no_student(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr: float, message: str
) -> None:
    """After one update of the first they are finite, and yet nothing that they predict is."""

    def raised(optimizers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        optimizers[0].param_groups[0]["lr"] = lr
        return optimizers

    spoil(monkeypatch, Distiller, "configure_optimizers", 1, raised)
    arguments = overrides(tiny_model, tmp_path, loss="mmd", trainer__max_steps=1)
    with pytest.raises(UserError, match=message):
        fit(composed([*arguments, "callbacks=[checkpoint,adapter]"]))
    assert not list(tmp_path.glob("checkpoints/*.ckpt")) and not (tmp_path / "adapter").exists()


def test_weights_are_looked_at_with_the_next_update_which_does_not_count_as_skipped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look waits for the GPU: one an update, and one at an iteration's end. The message names the broken step."""
    looks: list[str] = []

    def noted(trainer: Any, checks: Any) -> list[str]:
        looks.append("+".join(name for name in checks if name.startswith("weights")))
        return failed_checks(trainer, checks)

    monkeypatch.setattr(bad_steps, "failed_checks", noted)
    monkeypatch.setattr(distiller, "failed_checks", noted)
    arguments = {"loss": "dmd_mmd", "task__on_bad_step": "skip"}
    train(tiny_model, tmp_path / "a", **arguments, trainer__max_steps=2)
    critic, student = "weights of the critic", "weights of the student"
    assert looks == ["", critic, critic, student] * 2

    looks.clear()
    spoil(
        monkeypatch, Distiller, "configure_optimizers", 1, lambda both: both[1].param_groups[0].update(lr=1e38) or both
    )
    with pytest.raises(
        UserError, match=f"iteration 1, .*critic update 1 of 2: not finite: {critic}; nothing was saved"
    ):
        train(tiny_model, tmp_path / "b", **arguments)
    assert looks == ["", critic]


def test_numbers_that_are_not_finite_are_refused_from_the_start() -> None:
    for term in (lambda: MMD(weight=INF), lambda: GAN(weight=-1.0), lambda: DMD(weight=10**400)):
        with pytest.raises(UserError, match=r"weight=.*; use a finite number of 0 or more"):
            term()
    for key, value in {"guidance_scale": INF, "weight": NAN}.items():
        with pytest.raises(UserError, match=f"loss.dmd.{key}"):
            DMD(**{key: value})
    for key in ("lr", "critic_lr", "clip"):
        values: dict[str, Any] = {"lr": 1.0, "critic_lr": 1.0, "clip": 1.0, key: INF}
        with pytest.raises(UserError, match=rf"task\.{key}=inf; use a finite number above 0"):
            check_optimizer(**values, betas=(0.9, 0.999), weight_decay=0.0)


def test_the_dmd_direction_hides_nothing_but_a_zero_denominator() -> None:
    hat, real = torch.ones(4, 2, 2), torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(4, 1, 1).expand(4, 2, 2).clone()
    fake = torch.zeros(4, 2, 2)
    fake[2, 0, 0], fake[3, 1, 1] = NAN, INF
    direction = functional.dmd_direction(hat, real, fake)
    assert_close(direction[0], torch.zeros(2, 2))
    assert_close(direction[1], torch.zeros(2, 2))  # the denominator is exactly 0
    assert direction[2, 0, 0].isnan() and direction[3, 1, 1].isinf()


def test_pictures_that_are_not_finite_are_not_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, Distiller, "sample", 1, lambda drawn: (drawn[0], [drawn[1][0] * NAN, *drawn[1][1:]]))
    options = ["callbacks=[samples]", "callbacks.samples.every=1", "callbacks.samples.prompts=[a red star]"]
    with pytest.warns(UserWarning, match="no samples of iteration 1: .*not finite"):
        train(tiny_model, tmp_path, *options, loss="mmd")
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["iteration-000002.png"]


# Tasks with automatic optimization


class Line(WatchedTask):
    """A linear map whose loss, gradient or weights break at the third update."""

    deed = "fitting a line"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.map = fault, torch.nn.Linear(1, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.map(batch).square().mean()
        self.checks = {"line": loss.detach().isfinite()}
        if batch_idx == 2 and self.fault == "loss":
            loss = loss * NAN
        if batch_idx == 2 and self.fault == "gradient":
            loss.register_hook(lambda gradient: gradient * INF)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.map.parameters(), lr=1e-3)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 2 and self.fault == "weights":
            self.trainer.optimizers[0].param_groups[0]["lr"] = INF
        self.before = self.map.weight.detach().clone()


@pytest.mark.parametrize(
    ("fault", "names"), [("loss", "loss, gradient norm"), ("gradient", "gradient norm"), ("weights", "weights")]
)
def test_other_tasks_stop_likewise(tmp_path: Path, fault: str, names: str) -> None:
    task = Line(fault)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=5, default_root_dir=tmp_path, accelerator="cpu", **quiet)
    with pytest.raises(UserError, match=rf"training stopped at iteration 3: not finite: {names};"):
        trainer.fit(task, DataLoader(torch.ones(8, 1)))
    assert fault == "weights" or torch.equal(task.map.weight, task.before)


def test_a_written_model_is_not_replaced_by_one_that_its_type_cannot_hold() -> None:
    network = torch.nn.Linear(2, 2)
    network.weight.data.fill_(1e6)
    check_finite(network, "judge x")
    with pytest.raises(UserError, match="judge x has weights that are not finite"):
        check_finite(network.half(), "judge x")


# Several processes


class Passing:
    """Networks whose features are the latents themselves."""

    class process:
        ranges = Ranges((0, 0), (0, 0), (0, 0))

    def features(self, role: str, x_t: Tensor, sigma: Tensor, conditioning: Any, blocks: Any) -> list[Tensor]:
        return [x_t.flatten(2).transpose(1, 2)]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("distance", ["squared", "pseudo_huber"])
def test_shares_of_a_batch_give_the_gradient_of_the_whole(kernel: Any, distance: Any) -> None:
    """Gradients of processes are averaged, so the average over shares must be the whole batch's."""
    from swd.losses import GeneratorStep
    from swd.types import SeededDraws

    generator = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(6, 3, 4, 4, generator=generator) for _ in range(2))
    term = MMD(kernel=kernel, distance=distance, noise="none", bandwidth=3.0, features="teacher")
    empty: Any = Conditioning(torch.zeros(1, 1, 1))

    def value(rows: slice, shares: int) -> tuple[Tensor, Tensor]:
        x0_hat = fake.clone().requires_grad_()
        networks: Any = Passing()
        step = GeneratorStep(networks, empty, empty, x0_hat[rows], real[rows], SeededDraws(0), shares=shares)
        loss, _ = term.generator(step)
        return loss.detach(), torch.autograd.grad(loss, x0_hat)[0]

    loss, gradient = value(slice(0, 6), 1)
    parts = [value(slice(2 * i, 2 * i + 2), 3) for i in range(3)]
    assert_close(torch.stack([part[0] for part in parts]).mean(), loss)
    assert_close(torch.stack([part[1] for part in parts]).mean(0), gradient)


def test_a_batch_compared_as_one_set_is_refused_with_more_than_one_process(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss\.mmd\.reduce=batch .* 2 processes .*reduce=image"):
        train(tiny_model, tmp_path / "two", loss="mmd", loss__mmd__reduce="batch", trainer="ddp_cpu")
    assert not (tmp_path / "two").exists()
    train(tiny_model, tmp_path / "one", loss="mmd", loss__mmd__reduce="batch", trainer__max_steps=1)


SECOND_IS_BROKEN = """
import os
from swd.losses.mmd import MMD
from swd.commands.cli import launch

original, calls = MMD.generator, []

def generator(self, step):
    calls.append(1)
    loss, metrics = original(self, step)
    if os.environ.get("LOCAL_RANK") == "1" and len(calls) == 2:
        loss = loss + float("inf")  # its gradient stays finite, so that no other process sees it
    return loss, metrics

MMD.generator = generator
launch("train")
"""


@pytest.mark.slow
def test_all_processes_stop_when_one_of_them_must(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SECOND_IS_BROKEN)
    arguments = overrides(tiny_model, tmp_path / "run", loss="mmd", trainer="ddp_cpu", trainer__max_steps=4)
    arguments.append("task.on_bad_step=stop")
    environment = {k: v for k, v in os.environ.items() if k != "SWD_COMMAND"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "program.py", *arguments, "callbacks.checkpoint.every=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "iteration 2, step 2 of 3 of the schedule, generator update: not finite: mmd;" in result.stderr
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-1.ckpt"]


class OfADevice(Tensor):
    """Stands for a tensor of a GPU, where another operation looks at it."""

    is_cpu = False


@pytest.mark.parametrize("kind", [Tensor, OfADevice])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_finite_means_every_element_of_every_tensor(dtype: torch.dtype, kind: type[Tensor]) -> None:
    largest = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype).as_subclass(kind)
    rest = [torch.zeros(0), torch.tensor([2**40]), torch.tensor(-1.0), largest[:, ::2], -largest]
    assert all_finite(rest) and all_finite([]) and all_finite(rest[:2]), "a sum of squares would overflow"
    for value in (NAN, INF, -INF):
        for place in ((0, 0), (2, 4)):
            spoilt = largest.clone()
            spoilt[place] = value
            for others in (rest, 3 * rest, [*rest, torch.zeros(2**17, dtype=dtype)]):  # few, many, large and small ones
                found = all_finite([*others, spoilt])
                assert found.dtype == torch.bool and found.shape == () and not found
    large = torch.zeros(2**17, dtype=dtype)
    assert all_finite([*3 * rest, large])
    large[-1] = NAN
    assert not all_finite([*3 * rest, large])
