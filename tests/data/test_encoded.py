"""Pictures that are encoded once give the inputs that they give when they are encoded in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.testing import assert_close

from swd.commands.train import check_data
from swd.data import encoded
from swd.data.datamodule import BatchPlan, PairData
from swd.data.encoded import EncodedPairs
from swd.losses import MMD
from swd.modules.distiller import Distiller
from swd.modules.encoders import Encoders
from swd.modules.pretrained import Pretrained
from swd.shapes.dataset import ShapesDataset
from swd.types import CachedBatch, SeededDraws, UserError

PICTURES = ShapesDataset(length=6, resolution=64)
PLAN = BatchPlan(total=12, per_iteration=2)
"""Four epochs of three batches; two batches are an iteration, of one step of the schedule."""


def distillation(folder: Path) -> Distiller:
    model = Pretrained("sd3", str(folder), rank=4, precision="fp32", feature_blocks=(1,), max_text_tokens=12)
    return Distiller(model, tiny.build_schedule(), {"mmd": MMD(blocks=(1,))})


@pytest.fixture(scope="module")
def task(tiny_model: Path) -> Distiller:
    return distillation(tiny_model)


def data_of(task: Distiller, count: int = 6) -> EncodedPairs:
    """Data as they are when a training begins."""
    data = EncodedPairs(PICTURES, encoded=count, batch_size=2, seed=3)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=task, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    task.inputs.cache = data
    return data


@pytest.fixture(autouse=True)
def forget(task: Distiller) -> Iterator[None]:
    yield
    task.inputs.cache = None
    task.inputs._encoders = None
    task.inputs._empty.clear()


def tensors(batch: CachedBatch) -> list[Tensor]:
    pairs = batch.cached.posteriors.values()
    return [tensor for pair in pairs for tensor in pair] + [batch.cached.conditioning.embeds]


def test_inputs_are_those_of_encoding_each_batch(task: Distiller) -> None:
    stored = list(data_of(task).batch_loader(PLAN))
    found = [task.inputs.build(b, k // 2 % 3, SeededDraws(1, k)) for k, b in enumerate(stored)]
    assert task.inputs._encoders is None, "the encoders are freed"
    task.inputs.cache = None
    task.inputs._empty.clear()
    plain = PairData(PICTURES, batch_size=2, seed=3).batch_loader(PLAN)
    for k, batch in enumerate(plain):
        expected = task.inputs.build(batch, k // 2 % 3, SeededDraws(1, k))
        assert found[k].interval == expected.interval and stored[k].prompts == batch.prompts
        for name in ("source", "target"):
            assert_close(getattr(found[k], name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        for name in ("conditioning", "empty"):
            assert_close(getattr(found[k], name).embeds, getattr(expected, name).embeds, rtol=0, atol=1e-5)
    assert k == 11


def test_each_picture_is_encoded_once_at_each_size(task: Distiller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "AT_ONCE", 4)
    seen: list[tuple[int, int]] = []
    whole = Encoders.distribution

    def counted(encoders: Encoders, pixels: Tensor) -> Any:
        seen.append((len(pixels), pixels.shape[-1]))
        return whole(encoders, pixels)

    monkeypatch.setattr(Encoders, "distribution", counted)
    data = data_of(task)
    for _ in range(2):
        assert len(list(data.batch_loader(PLAN))) == 12
    assert seen == [(4, 32), (4, 48), (4, 64), (2, 32), (2, 48), (2, 64)]


def test_a_batch_has_the_sizes_of_its_step_alone(task: Distiller) -> None:
    sizes = [set(batch.cached.posteriors) for batch in data_of(task).batch_loader(PLAN)]
    assert sizes[::2] == 2 * [{(4, 4)}, {(4, 4), (6, 6)}, {(6, 6), (8, 8)}] and sizes[1::2] == sizes[::2]


def test_a_run_that_goes_on_gets_the_same_bits(task: Distiller) -> None:
    straight = list(data_of(task).batch_loader(PLAN))
    later = list(data_of(task).batch_loader(BatchPlan(total=20, start=8, per_iteration=2)))
    for expected, found in zip(straight[8:], later[:4], strict=True):
        assert found.prompts == expected.prompts
        assert all(map(torch.equal, tensors(found), tensors(expected)))


def test_processes_share_the_batches(task: Distiller) -> None:
    whole = list(data_of(task).batch_loader(PLAN))
    parts = [list(data_of(task).batch_loader(BatchPlan(12, 0, rank, 2, 2))) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        assert batch.prompts == [prompt for half in halves for prompt in half.prompts]


def test_the_last_pictures_are_those_at_the_end_of_the_data_set(task: Distiller) -> None:
    batch = data_of(task).last(3, step=1)
    assert batch.prompts == [PICTURES[i]["prompt"] for i in (5, 4, 3)]
    assert set(batch.cached.posteriors) == {(4, 4), (6, 6)}


def test_what_cannot_be_used_is_refused() -> None:
    for count in (0, 7):
        with pytest.raises(UserError, match=rf"^data\.encoded={count}; use a number from 1 to 6"):
            EncodedPairs(PICTURES, encoded=count)
    with pytest.raises(UserError, match=r"^data=shapes_encoded is for task=distill alone"):
        check_data(SimpleNamespace(), EncodedPairs(PICTURES, encoded=2))  # type: ignore[arg-type]
