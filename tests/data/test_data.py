"""The order of the data, and batches."""

from __future__ import annotations

import errno
import resource
from collections import Counter
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from swd.commands.cli import user_errors
from swd.commands.encode import as_shared
from swd.data.datamodule import GlobalBatches, Guarded, GuardedLoader, PairData, as_it_is, collate
from swd.data.iterations import Iterations
from swd.types import Batch, PictureBatch, UserError


def global_order(length: int | None, batch_size: int, total: int, start: int = 0, world: int = 1, seed: int = 0):
    """Indices of every global batch, put together from all processes."""
    parts = [list(GlobalBatches(length, batch_size, start, total, seed, rank, world)) for rank in range(world)]
    return [list(chain(*batches)) for batches in zip(*parts, strict=True)]


@pytest.mark.parametrize(("length", "batch_size"), [(12, 4), (10, 4), (7, 4), (3, 8), (1, 4)])
def test_every_epoch_covers_the_data_exactly_once(length: int, batch_size: int) -> None:
    epochs = 4
    total = -(-epochs * length // batch_size)
    flat = list(chain(*global_order(length, batch_size, total)))[: epochs * length]
    orders = [flat[i * length : (i + 1) * length] for i in range(epochs)]
    for order in orders:
        assert Counter(order) == Counter(range(length))
    if length > 6:
        assert len(set(map(tuple, orders))) == epochs, "every epoch has an order of its own"


@pytest.mark.parametrize("length", [10, 1000, None])
def test_the_global_order_is_the_same_for_any_number_of_processes_and_any_start(length: int | None) -> None:
    expected = global_order(length, 8, 20)
    for world in (1, 2, 4):
        for start in (0, 1, 7, 19, 20):
            assert global_order(length, 8, 20, start, world) == expected[start:]


def test_the_order_follows_the_seed() -> None:
    assert global_order(100, 10, 10, seed=1) != global_order(100, 10, 10, seed=2)
    assert global_order(100, 10, 10, seed=1) == global_order(100, 10, 10, seed=1)


def test_endless_data_counts_up() -> None:
    assert list(chain(*global_order(None, 4, 3))) == list(range(12))


def test_the_length_counts_skipped_batches_too() -> None:
    assert len(GlobalBatches(10, 4, 3, 20)) == 20


@pytest.mark.parametrize(("batch_size", "world"), [(6, 4), (1, 2), (0, 1), (-4, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch_size: int, world: int) -> None:
    with pytest.raises(UserError, match=f"data.batch_size={batch_size}"):
        GlobalBatches(10, batch_size, 0, 5, world=world)


class Numbers(Dataset[dict[str, Any]]):
    """Item i is a constant picture with caption i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": torch.full((3, 2, 2), float(index)), "prompt": str(index)}


def test_pictures_and_captions_stay_together() -> None:
    batch = collate([Numbers(9)[i] for i in (5, 2)])
    assert isinstance(batch, Batch) and len(batch) == 2
    assert batch.prompts == ["5", "2"] and batch.pixels[:, 0, 0, 0].tolist() == [5.0, 2.0]
    assert batch.to(torch.float64).pixels.dtype == torch.float64


class StubTrainer:
    """A stand-in with the attributes that `PairData` reads of a trainer, for a run of twelve batches."""

    global_rank, world_size = 0, 1

    def __init__(self, iteration: int = 0, batches_per_iteration: int | None = None) -> None:
        more = {} if batches_per_iteration is None else {"batches_per_iteration": batches_per_iteration}
        self.lightning_module = type("Task", (), more)()
        self.max_steps = 12 // (batches_per_iteration or 1)
        self.global_step = iteration


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_continues_where_it_stopped(workers: int) -> None:
    def prompts(updates: int, workers: int) -> list[list[str]]:
        data = PairData(Numbers(10), batch_size=4, workers=workers, seed=3)
        data.trainer = StubTrainer(updates)  # type: ignore[assignment]
        return [batch.prompts for batch in data.train_dataloader()]

    straight = prompts(0, 0)
    assert len(straight) == 12
    assert prompts(5, workers) == straight[5:]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_item_is_an_iteration_whose_batches_are_fetched_one_at_a_time(workers: int) -> None:
    def load(iteration: int, each: int | None) -> Any:
        data = PairData(Numbers(10), batch_size=4, workers=workers, seed=3)
        data.trainer = StubTrainer(iteration, each)  # type: ignore[assignment]
        return data.train_dataloader()

    straight = [batch.prompts for batch in load(0, None)]
    iterations = load(0, 3)
    assert len(iterations) == 4
    assert [[batch.prompts for batch in item] for item in iterations] == [straight[i : i + 3] for i in (0, 3, 6, 9)]
    resumed = [[batch.prompts for batch in item] for item in islice(load(2, 3), 2)]
    assert resumed == [straight[6:9], straight[9:]]
    first = [next(item).prompts for item in iterations]  # what an iteration leaves out is passed over
    assert first == straight[::3]


def test_batches_of_an_iteration_are_changed_when_they_are_fetched() -> None:
    given = [PictureBatch(torch.full((1, 3, 2, 2), float(i)), prompts=[str(i)]) for i in range(6)]
    fetched: list[str] = []

    def double(batch: Any) -> Any:
        fetched.extend(batch.prompts)
        return replace(batch, pixels=2 * batch.pixels)

    means = []
    for item in Iterations(given, 3):
        moved = item.map(double).to(torch.float64)
        means += [(batch.pixels.mean().item(), batch.pixels.dtype, len(fetched)) for batch in moved]
    assert means == [(2.0 * i, torch.float64, i + 1) for i in range(6)]


def test_what_reads_ahead_ends_with_the_iterations() -> None:
    ended: list[int] = []

    def batches() -> Any:
        try:
            yield from range(4)
        finally:
            ended.append(1)

    class Loader:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            return batches()

    loader: Any = Loader()
    items = iter(Iterations(loader, 2))
    first = next(items)
    assert next(iter(first)) == 0 and not ended
    del items
    assert ended == [1], "while an error's traceback, say, still holds an iteration"


@pytest.mark.parametrize("dataset", [Numbers(0), object()])
def test_empty_data_is_refused(dataset: Any) -> None:
    data = PairData(dataset)
    data.trainer = StubTrainer(0)  # type: ignore[assignment]
    with pytest.raises(UserError, match="empty"):
        data.train_dataloader()


def test_endless_data_that_ends_is_refused() -> None:
    data = PairData(Numbers(47), batch_size=4, endless=True)
    data.trainer = StubTrainer(0)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"47 samples.*48 fresh ones.*data\.endless=false"):
        data.train_dataloader()
    data.dataset = Numbers(48)
    assert sum([len(batch) for batch in data.train_dataloader()], 0) == 48


class Refusing(Numbers):
    """Item 5 is wrong input."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            raise UserError("five.png is broken; remove it")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_input_in_a_worker_ends_in_its_own_line(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = PairData(Refusing(6), batch_size=2, workers=workers)
    data.trainer = StubTrainer(0)  # type: ignore[assignment]
    seen: list[str] = []
    with pytest.raises(SystemExit) as ended, user_errors():
        for batch in data.train_dataloader():
            seen += batch.prompts
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: five.png is broken; remove it\n"
    order = list(chain(*global_order(6, 2, 3)))
    assert seen == [str(i) for i in order[: order.index(5) // 2 * 2]]


class Cramped(Dataset[Any]):
    """Its loader process may not make a shared file larger than a page."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return {"pixels": torch.zeros(3, 64, 64), "prompt": "x"}


@pytest.mark.parametrize("kind", ["batches", "rows"])
def test_full_shared_memory_is_one_line_and_no_endless_wait(kind: str) -> None:
    dataset: Any = Guarded(Cramped(), list) if kind == "batches" else Cramped()
    collate: Any = as_it_is if kind == "batches" else as_shared
    loader = GuardedLoader(dataset, batch_sampler=[[0, 1], [2, 3]], collate_fn=collate, num_workers=1, timeout=60)
    with pytest.raises(UserError, match=r"no room in shared memory \(File too large\); .*data\.workers=0"):
        list(loader)


class Failing(Numbers):
    """Item 5 is on a disk that fails."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 5:
            raise OSError(errno.EIO, "Input/output error", "pictures/five.png")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_that_fails_in_a_worker_names_its_file(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    data = PairData(Failing(6), batch_size=2, workers=workers)
    data.trainer = StubTrainer(0)  # type: ignore[assignment]
    with pytest.raises(SystemExit) as ended, user_errors():
        list(data.train_dataloader())
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: pictures/five.png failed (Input/output error); the disk or")
