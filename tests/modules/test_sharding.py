"""Strategies and accumulation in one process: what they are, what they refuse, and a batch in parts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from layouts import Case, Encoded, a_task, train
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.futures import Future
from torch.testing import assert_close

from swd.losses import MMD
from swd.modules import accumulation
from swd.modules.accumulation import BatchPart, parts_at
from swd.modules.distiller import Distiller
from swd.modules.inputs import InputBuilder, Inputs
from swd.modules.layouts import divided_like, gathered, is_sharded, local_part, swap, whole_tensor
from swd.modules.sharding import (
    DDP,
    Sharded,
    average_stepped,
    check_strategy,
    check_torch,
    shard_heads,
    strategy_for,
    weights_fingerprint,
)
from swd.types import SeededDraws, UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Arguments of `Pretrained` for a tiny SD3."""
    return families.settings("sd3", families.save("sd3", tmp_path_factory.mktemp("sd3") / "pipeline"))


def says(message: str) -> Any:
    """A UserError with exactly this message."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}$")


# Strategies


def test_several_processes_have_whole_copies_unless_told_otherwise() -> None:
    assert [type(strategy_for(*given)) for given in (("auto", 2), ("ddp", 2))] == [DDP] * 2
    own = Sharded()
    assert strategy_for("auto", 1) == strategy_for("ddp", 1) == "auto" and strategy_for(own, 2) is own


class Bucket:
    """DDP's bucket of the gradients of two adapters in turn, one buffer of all of them."""

    def __init__(self) -> None:
        self.weights = [nn.Parameter(torch.zeros(2, 3)) for _ in range(4)]
        self.memory = torch.arange(24.0)

    def parameters(self) -> list[nn.Parameter]:
        return self.weights

    def gradients(self) -> list[Tensor]:
        return [part.view(2, 3) for part in self.memory.split(6)]

    def buffer(self) -> Tensor:
        return self.memory


def test_an_update_sends_the_gradients_of_what_it_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Sum:
        """Of this process's part and that of another one, whose values are ten times as large."""

        def __init__(self, tensor: Tensor, async_op: bool) -> None:
            assert async_op
            sent.append(tensor.numel())
            self.tensor = tensor.add_(10 * tensor)

        def get_future(self) -> Future[list[Tensor]]:
            done: Future[list[Tensor]] = Future()
            done.set_result([self.tensor])
            return done

    monkeypatch.setattr(distributed, "all_reduce", Sum)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    strategy = DDP()
    bucket: Any = Bucket()
    strategy.step_only(bucket.weights[::2])
    found = average_stepped(strategy.stepped, bucket).wait()
    scale = torch.tensor([5.5, 1.0, 5.5, 1.0]).repeat_interleave(6)
    assert torch.equal(found, torch.arange(24.0) * scale) and found is bucket.memory and sent == [12]
    strategy.step_only([nn.Parameter(torch.zeros(1))])
    assert average_stepped(strategy.stepped, bucket).wait() is bucket.memory and sent == [12]


@pytest.mark.parametrize(
    ("shard", "processes", "per_node", "size"), [(None, 8, 4, 8), ("node", 8, 4, 4), (2, 8, 4, 2), (8, 8, 8, 8)]
)
def test_groups_of_processes(shard: Any, processes: int, per_node: int, size: int) -> None:
    assert Sharded(shard).group_size(processes, per_node) == size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Sharded("machine"),
            "trainer.strategy.shard=machine; use a number of processes, node, or null for all",
        ),
        (lambda: Sharded(largest_state=0), "trainer.strategy.largest_state=0; use a finite number above 0"),
        (
            lambda: Sharded(3).group_size(4, 4),
            "trainer.strategy.shard=3: 4 processes are no whole number of groups of 3; use a divisor, or null for one "
            "group of all",
        ),
        (
            lambda: check_strategy(Sharded(), nn.Linear(1, 1), 2, 1),
            "this trainer shards a distillation; Linear trains one network of moderate size: use trainer=ddp",
        ),
    ],
)
def test_strategies_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with says(message):
        make()


def test_a_state_that_no_process_can_gather_is_refused_before_any_weight_is_loaded(model: dict[str, Any]) -> None:
    task = a_task(Case("full", model=model | {"tuning": "full"}, task={"ema": 0.5}))
    network = task.model.meta_network
    weights = sum(p.numel() for p in network.parameters())
    head = a_task(Case("full", model=model)).terms["gan"]
    head.build(16)
    heads = sum(p.numel() for p in head.parameters())
    # Student and critic with two moments each, and the average of the student.
    size = 4 * (3 * (2 * weights + heads) + weights)
    assert task.state_bytes() == size
    Sharded(largest_state=size / 1e9).check_task(task)
    with says(
        f"weights and optimizer moments of this run have {size / 1e9:.3g} GB, more than the first process may gather "
        "for a checkpoint (trainer.strategy.largest_state=1e-06); raise that if its machine has the memory, or use "
        "model.tuning=lora"
    ):
        check_strategy(Sharded(largest_state=1e-6), task, 2, 1)
    assert not hasattr(task, "networks")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", ModelParallelStrategy(), FSDPStrategy()])
def test_strategies_of_lightning_that_shard_are_refused(strategy: Any, model: dict[str, Any]) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    with says(f"trainer.strategy={name} does not fit a distillation; use trainer=fsdp, hsdp or ddp"):
        check_strategy(strategy, a_task(Case("other", model=model)), 2, 1)
    for known in ("auto", "ddp", DDP(), Sharded()):
        check_strategy(known, a_task(Case("known", model=model)), 2, 1)


def test_a_parameter_outside_of_modules_cannot_be_sharded() -> None:
    term = nn.Module()
    term.scale = nn.Parameter(torch.ones(1))
    with says("loss.own: its parameter scale is in no module, so it cannot be sharded; use trainer=ddp"):
        shard_heads("loss.own", term, None)  # type: ignore[arg-type]


def test_a_fingerprint_is_of_all_that_is_trained() -> None:
    task = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16().requires_grad_(False))
    first = weights_fingerprint(task)
    with torch.no_grad():
        task[1].weight += 1
        assert weights_fingerprint(task) == first, "it is frozen"
        task[0].bias[1] += 1e-6
    assert weights_fingerprint(task) != first


def test_tensors_that_are_not_divided_stay_as_they_are() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    values = {"x": a, "y": [b, (1, "z")]}
    found = gathered(values)
    assert found == {"x": a, "y": [b, (1, "z")]} and found["x"] is a and found["y"][0] is b
    assert local_part(a) is a and whole_tensor(a) is a and divided_like(a, b) is a and not is_sharded(nn.Linear(1, 1))
    places = a.data_ptr(), b.data_ptr()
    swap([(a, b)])
    assert (b.data_ptr(), a.data_ptr()) == places and a.tolist() == [1, 1]


# A batch in parts


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_parts_of_a_batch_make_the_update_of_the_batch(model: dict[str, Any], tmp_path: Path, tuning: str) -> None:
    settings = model | {"tuning": tuning}
    case = Case("whole", iterations=2, model=settings, terms={"mmd": {"distance": "squared"}}, task={"ema": 0.5})
    expected = train(case, tmp_path)
    for parts in (2, 4):
        found = train(replace(case, name=f"{parts}", task={"accumulate": parts, "ema": 0.5}), tmp_path)
        for key, value in expected.weights.items():
            assert_close(found.weights[key], value, rtol=0, atol=2e-6)
        for row, other in zip(found.metrics, expected.metrics, strict=True):
            assert row.keys() == other.keys() and "monitor/x0_spread" in row
            for name, number in other.items():
                assert row[name] == pytest.approx(number, rel=1e-4, abs=1e-6), name


def test_smaller_sizes_take_more_samples_at_once_and_make_the_same_update(
    model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulation, "PIXELS_OF_TEXT", 0)  # tiny pictures have fewer pixels than text
    case = Case("whole", model=model, loss="mmd", terms={"mmd": {"distance": "squared"}})
    expected = train(case, tmp_path)
    seen: list[int] = []
    part = Distiller._generator_part

    def noted(self: Distiller, inputs: Inputs) -> BatchPart:
        seen.append(len(inputs.target))
        return part(self, inputs)

    monkeypatch.setattr(Distiller, "_generator_part", noted)
    found = train(replace(case, name="even", task={"accumulate": 4}), tmp_path)
    # Sizes 4, 6 and 8: 16 pixels of 4 samples are as many as 64 of one, 36 of two are more.
    assert seen == [4, 1, 1, 1, 1, 1, 1, 1, 1]
    for key, value in expected.weights.items():
        assert_close(found.weights[key], value, rtol=0, atol=2e-6)
    for row, other in zip(found.metrics, expected.metrics, strict=True):
        assert all(row[name] == pytest.approx(number, rel=1e-4, abs=1e-6) for name, number in other.items())
    seen.clear()
    train(replace(case, name="uneven", iterations=1, task={"accumulate": 4, "even_parts": False}), tmp_path)
    assert seen == [1, 1, 1, 1]


def test_parts_at_a_size_are_the_fewest_in_the_memory_of_the_largest() -> None:
    # With 64 tokens of text, 512 pixels: 768, 1,536 and 4,608.
    parts = [[parts_at((side, side), (64, 64), 64, count) for side in (16, 32, 64)] for count in (1, 2, 4, 6, 12)]
    assert parts == [[1, 1, 1], [1, 1, 2], [1, 2, 4], [1, 2, 6], [2, 4, 12]]
    assert parts_at((1, 16, 16), (4, 16, 16), 0, 4) == 1 and parts_at((2, 16, 16), (4, 16, 16), 0, 4) == 2


def test_a_part_draws_what_its_rows_draw_in_the_batch(model: dict[str, Any]) -> None:
    task = a_task(Case("parts", model=model))
    builder = InputBuilder(task.model, task.schedule)
    builder.cache = data = Encoded(task)
    inputs = builder.build(data[0], 1, SeededDraws(3, 1, 0, first=8))
    assert inputs.parts(1) == [inputs]
    parts = inputs.parts(2)
    assert [part.draws.first for part in parts] == [8, 10]
    reads: tuple[Callable[[Inputs], Tensor], ...] = (
        lambda each: each.source,
        lambda each: each.target,
        lambda each: each.conditioning.embeds,
        lambda each: each.draws.noise("student/noise", each.target),
    )
    for read in reads:
        assert torch.equal(torch.cat([read(part) for part in parts]), read(inputs))
    assert parts[1].place == inputs.place and parts[1].interval == inputs.interval


def test_a_check_fails_if_it_does_in_any_part() -> None:
    def part(value: float, fine: bool) -> BatchPart:
        number = torch.tensor(value)
        return BatchPart(
            number, torch.full((1, 2), value), {"loss": number}, {"a": torch.tensor(fine), "b": number > 0}
        )

    both = BatchPart.joined([part(1.0, True), part(4.0, False)])
    assert both.loss == 2.5 and both.metrics == {"loss": torch.tensor(2.5)}
    assert both.x0_hat.tolist() == [[1, 1], [4, 4]] and {k: bool(v) for k, v in both.checks.items()} == {
        "a": False,
        "b": True,
    }


def test_parts_that_cannot_be_are_refused(model: dict[str, Any]) -> None:
    with says("task.accumulate=0; use a finite number of 1 or more"):
        a_task(Case("none", model=model, task={"accumulate": 0}))
    task = a_task(Case("three", model=model, task={"accumulate": 3}))
    task.check_batch(12, 2)
    with says("task.accumulate=3 does not divide 4 samples for each of 2 processes (data.batch_size=8); use a divisor"):
        task.check_batch(8, 2)
    with says("task.accumulate=3 does not divide 8 samples (data.batch_size=8); use a divisor"):
        task.check_batch(8, 1)
    set_wise = a_task(Case("set", model=model, task={"accumulate": 2}, terms={"mmd": {"reduce": "batch"}}))
    with says(
        "loss.mmd.reduce=batch compares the whole batch as one set, which cannot be done in 2 parts; use "
        "loss.mmd.reduce=image, or task.accumulate=1"
    ):
        set_wise.check_processes(1)
    MMD(reduce="batch").check_accumulate("loss.mmd", 1)


def test_an_old_torch_is_refused() -> None:
    with says("weights are divided from torch 2.8 on, and this is 2.7.1+cu126; upgrade it, or use trainer=ddp"):
        check_torch("2.7.1+cu126")
    for version in ("2.8.0", "2.13.0+cpu", "2.10.0"):
        check_torch(version)
