"""Samples that are held out: which they are, that none is ever trained on, and that all else stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from shards import make_pictures
from torch.utils.data import Dataset

from swd.callbacks.resume_rules import config_difference
from swd.data.datamodule import BatchPlan, PairData
from swd.data.held_out import is_held_out
from swd.data.indexed import IndexedShards
from swd.data.shards import CorruptSample
from swd.data.webdataset import ShardData
from swd.types import UserError

COUNT = 40
SHARE = 0.25


class Numbered(Dataset[dict[str, Any]]):
    """Pictures that are known by their captions."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixels": torch.full((3, 4, 4), index / 100), "prompt": str(index)}


def trained(data: Any, batches: int = 60) -> list[str]:
    """Captions of all samples of a run, which has several epochs."""
    found = [prompt for batch in data.batch_loader(BatchPlan(batches)) for prompt in batch.prompts]
    return [prompt.rpartition(" ")[2] for prompt in found]


def test_the_share_is_kept_and_samples_that_are_added_move_no_other() -> None:
    chosen = is_held_out(100_000, 0.03)
    assert chosen.mean() == pytest.approx(0.03, abs=0.002)
    assert np.array_equal(is_held_out(1000, 0.03), chosen[:1000])
    assert not (is_held_out(1000, 0.02) & ~chosen[:1000]).any()  # a larger share adds samples
    assert abs(np.corrcoef(chosen[:-1], chosen[1:])[0, 1]) < 0.02  # neighbours are independent


@pytest.mark.parametrize("kind", ["pairs", "shards"])
def test_what_is_held_out_is_never_trained_on_and_the_rest_is(kind: str, tmp_path: Path) -> None:
    if kind == "pairs":
        data: Any = PairData(Numbered(), 4, validation=SHARE)
        plain: Any = PairData(Numbered(), 4)
    else:
        folder = str(make_pictures(tmp_path / "shards", COUNT, shard_size=9))
        data = ShardData(folder, size=32, batch_size=4, validation=SHARE)
        plain = ShardData(folder, size=32, batch_size=4)
    held = data.held_out()
    expected = np.flatnonzero(is_held_out(COUNT, SHARE)).tolist()
    assert [int(caption.rpartition(" ")[2]) for caption in held.captions(COUNT)] == expected and len(expected) > 4
    assert set(map(int, trained(data))) == set(range(COUNT)) - set(expected)
    assert set(map(int, trained(plain))) == set(range(COUNT)) and plain.held_out() is None
    batch = held.batch([2, 0], 0)
    assert [int(prompt.rpartition(" ")[2]) for prompt in batch.prompts] == [expected[2], expected[0]]


def test_no_held_out_sample_takes_the_place_of_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(make_pictures(tmp_path / "shards", COUNT))
    held = set(np.flatnonzero(is_held_out(COUNT, SHARE)).tolist())
    before = {place - 1 for place in held} - held  # whose successors are held out
    assert before
    read = IndexedShards.read

    def damaged(self: Any, index: int, step: int) -> Any:
        if index in before:
            raise CorruptSample(f"sample {index} is damaged")
        return read(self, index, step)

    monkeypatch.setattr(IndexedShards, "read", damaged)
    data = ShardData(folder, size=32, batch_size=4, validation=SHARE)
    assert not held & set(map(int, trained(data)))


def test_data_of_their_own_leave_training_as_it_was(tmp_path: Path) -> None:
    own = PairData(Numbered(), 4, seed=5, validation=Numbered(7))
    assert trained(own) == trained(PairData(Numbered(), 4, seed=5))
    held = own.held_out()
    assert held is not None and held.captions(99) == [str(i) for i in range(7)]
    folder, other = (str(make_pictures(tmp_path / name, count)) for name, count in (("a", 9), ("b", 5)))
    shards = ShardData(folder, size=32, batch_size=3, seed=5, validation=other)
    assert trained(shards) == trained(ShardData(folder, size=32, batch_size=3, seed=5))
    held = shards.held_out()
    assert held is not None and len(held) == 5 and held.batch([4], 0).prompts[0].endswith("number 4")


def test_too_few_samples_are_named() -> None:
    held = PairData(Numbered(), 4, validation=Numbered(7)).held_out()
    assert held is not None
    held.check(7, "callbacks.metrics.pictures")
    with pytest.raises(UserError, match=r"callbacks\.metrics\.pictures=8, but data\.validation holds out 7 samples"):
        held.check(8, "callbacks.metrics.pictures")


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1])
def test_a_number_that_is_no_share_is_refused(share: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use a share of the data between 0 and 1"):
        PairData(Numbered(), 4, validation=share)
    with pytest.raises(UserError, match="use a share of the data between 0 and 1"):
        ShardData(str(make_pictures(tmp_path / "a", 4)), size=32, validation=share)


def test_shares_that_leave_nothing_or_cannot_be_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds out 0 of 3 samples"):
        PairData(Numbered(3), 1, validation=1e-9)
    with pytest.raises(UserError, match="use another share"):
        ShardData(str(make_pictures(tmp_path / "a", 4)), size=32, validation=1e-9)
    with pytest.raises(UserError, match="endless"):
        PairData(Numbered(), 4, endless=True, validation=0.5)
    with pytest.raises(UserError, match="streamed"):
        ShardData("pipe:cat a.tar", validation=0.5)


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [(None, 0.1, True), (0.1, 0.2, True), (0.1, 0.1, False), (None, "folder", False), ("folder", None, False)],
)
def test_a_run_goes_on_with_the_same_share_alone(old: Any, new: Any, differs: bool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "iteration-1.ckpt"
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"data": {"path": "a", "validation": old}}))
    found = config_difference(checkpoint, OmegaConf.create({"data": {"path": "a", "validation": new}}))
    assert (found is not None) == differs and (not differs or "data.validation" in str(found))
