"""Checkpoints and adapters with changed bytes: right data or one clear line, never anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import composed, overrides

from swd.commands.train import fit
from swd.io import sealed
from swd.io.sealed import read_sealed, write_sealed
from swd.modules.adapters import load
from swd.modules.checkpoint_files import CheckpointFiles, damage, read_checkpoint
from swd.modules.checkpoint_student import from_checkpoint
from swd.types import UserError

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies
pytestmark = pytest.mark.slow

OLD = Path(__file__).parents[1] / "data" / "version_0_1" / "run"
BOUNDED = settings(max_examples=200, deadline=None, derandomize=True)
FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.sampled_from(["$tensor", "$pairs"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def flipped(data: bytes, flips: list[tuple[float, int]], end: int | None = None) -> bytes:
    """Bytes with some of the first `end` changed, each place a share of them."""
    changed = bytearray(data)
    for share, mask in flips:
        changed[int(share * (end or len(data)))] ^= mask
    return bytes(changed)


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of version 0.1 with its checkpoint in today's format."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(OLD, folder)
    CheckpointFiles().save_checkpoint(
        read_checkpoint(OLD / "checkpoints" / "iteration-2.ckpt"), folder / "checkpoints" / "new.ckpt"
    )
    return folder


@pytest.mark.parametrize("name", ["new.ckpt", "iteration-2.ckpt"])
def test_changed_bytes_of_a_checkpoint_are_found(run: Path, name: str) -> None:
    """In a file of version 0.1, which has no hash, a change may be where nothing is read: then the data are right."""
    whole = (run / "checkpoints" / name).read_bytes()
    expected = read_checkpoint(run / "checkpoints" / name)
    file = run / "checkpoints" / "changed.ckpt"

    @BOUNDED
    @given(FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        data = flipped(whole, flips)
        file.write_bytes(data)
        if data == whole:
            return
        reason = damage(file)
        assert reason is None or (reason and "\n" not in reason)
        if name == "new.ckpt":
            assert reason is not None
        for take in (read_checkpoint, from_checkpoint):
            try:
                found = take(file)
            except UserError as error:
                assert "\n" not in str(error) and str(file) in str(error)
            else:
                assert reason is None
                if take is read_checkpoint:
                    assert repr(found) == repr(expected)

    check()


def test_a_changed_header_under_a_right_hash_is_data_or_one_line(run: Path) -> None:
    whole = (run / "checkpoints" / "new.ckpt").read_bytes()
    file = run / "checkpoints" / "changed.ckpt"

    @BOUNDED
    @given(FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        file.write_bytes(flipped(whole, flips, header_end(whole)))
        try:
            with open(file, "r+b") as stream:
                place = sealed._seal_place(stream)
                digest = bytes.fromhex(sealed._hash(stream, place))
                stream.seek(place)
                stream.write(digest)
        except sealed.Damaged:
            pass
        for take in (read_checkpoint, from_checkpoint):
            try:
                assert take(file) is not None
            except UserError as error:
                assert "\n" not in str(error)

    check()


def test_any_tree_of_plain_values_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "x"

    @BOUNDED
    @given(PLAIN, st.lists(st.text(), max_size=3))
    def check(value: Any, names: list[str]) -> None:
        tensors = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
        write_sealed(file, {"value": value, "tensors": tensors}, "test", 1)
        found = read_sealed(file, "test")
        assert repr(found["value"]) == repr(value)
        assert {name: v.tolist() for name, v in found["tensors"].items()} == {n: v.tolist() for n, v in tensors.items()}

    check()


@pytest.mark.parametrize("summed", [True, False])
def test_changed_bytes_of_an_adapter_are_right_data_or_one_line(tiny_model: Path, tmp_path: Path, summed: bool) -> None:
    """Without the file of checksums, as a single file that was received, changed weights cannot be told from others."""
    fit(composed([*overrides(tiny_model, tmp_path / "run", loss="mmd", callbacks="adapter"), "trainer.max_steps=1"]))
    folder = tmp_path / "run" / "adapter"
    if not summed:
        (folder / "checksums.json").unlink()
    file = folder / "adapter_model.safetensors"
    whole, config = file.read_bytes(), (folder / "adapter_config.json").read_bytes()
    expected = load(folder).state

    @BOUNDED
    @given(FLIPS, st.booleans())
    def check(flips: list[tuple[float, int]], weights: bool) -> None:
        data = flipped(whole if weights else config, flips, header_end(whole) if weights and not summed else None)
        file.write_bytes(data if weights else whole)
        (folder / "adapter_config.json").write_bytes(config if weights else data)
        try:
            found = load(folder)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert not summed or data in (whole, config)
            if data in (whole, config):
                assert all(torch.equal(found.state[key], value) for key, value in expected.items())

    check()
    assert json.loads(config)
