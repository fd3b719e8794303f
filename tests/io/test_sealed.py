"""Files of tensors and plain values: round trips, and changes of any byte."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swd.io.sealed import Damaged, check_seal, read_sealed, read_unchecked, read_version, write_sealed


def tree() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 6, generator=draw)
    return {
        "weights": {"a.b": whole, "a": {"b": whole[:, ::2]}, "sha256": torch.tensor(3.5), "": whole[2]},
        "moments": {0: {"step": torch.tensor(7), "avg": torch.randn(2, 0, 3)}, 3: {"flag": torch.tensor([True])}},
        "types": [torch.randn(3, generator=draw).to(t) for t in (torch.bfloat16, torch.float16, torch.float64)],
        "plain": [1, -(2**70), 1e-300, -0.0, True, None, "é\n\x00", "", [], {}, (), (1, [2, (3,)])],
        "odd": {"$tensor": "x", 5: {"$pairs": 1}, None: 0, (1, 2): 3, True: 4},
        "numbers": {"inf": math.inf, "minus": -math.inf},
    }


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert repr(a) == repr(b)


def test_a_tree_comes_back_equal_and_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "x"
    write_sealed(file, tree(), "test", 3)
    assert_equal(read_sealed(file, "test"), tree())
    assert read_version(file, "test") == 3 and read_version(file, "other") is None
    assert torch.equal(load_file(file)["moments.0.step"], torch.tensor(7))
    assert read_unchecked(file, "test", "none")["plain"] == tree()["plain"]
    assert_equal(read_unchecked(file, "test", "own"), tree())
    write_sealed(tmp_path / "y", {"nan": math.nan}, "test", 1)
    assert math.isnan(read_sealed(tmp_path / "y", "test")["nan"])


def test_equal_trees_become_equal_bytes(tmp_path: Path) -> None:
    for name in "abcd":
        write_sealed(tmp_path / name, tree(), "test", 1)
    assert len({(tmp_path / name).read_bytes() for name in "abcd"}) == 1


def test_what_is_read_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    """Optimizers on the CPU keep the tensors that they are given, and write into them."""
    write_sealed(tmp_path / "x", tree(), "test", 1)
    found = read_sealed(tmp_path / "x", "test")["weights"]["a.b"]
    found.zero_()
    assert found.abs().sum() == 0
    assert_equal(read_sealed(tmp_path / "x", "test"), tree())


def test_every_flipped_bit_every_cut_and_every_addition_is_found(tmp_path: Path) -> None:
    small = {"weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True])}, "plain": [1, -0.5, None, "é"]}
    write_sealed(tmp_path / "x", small, "test", 1)
    data = (tmp_path / "x").read_bytes()
    file = tmp_path / "y"
    draw = random.Random(0)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        with pytest.raises(Damaged):
            check_seal(file)
    for length in (*range(0, len(data), 7), len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(Damaged):
            check_seal(file)
    file.write_bytes(data + b"x")
    with pytest.raises(Damaged):
        check_seal(file)


def test_files_of_other_kinds_are_damaged_ones(tmp_path: Path) -> None:
    file = tmp_path / "x"
    save_file({"a": torch.ones(3)}, file)
    with pytest.raises(Damaged, match="has no hash"):
        check_seal(file)
    with pytest.raises(Damaged, match="it cannot be read"):
        read_unchecked(file, "test")
    for text in (b"", b"no file of this kind", (5).to_bytes(8, "little") + b"[1,2]", b"\xff" * 100):
        file.write_bytes(text)
        assert read_version(file, "test") is None
        with pytest.raises(Damaged):
            check_seal(file)


@pytest.mark.parametrize("value", [object(), {1, 2}, Path("x"), b"x"], ids=lambda value: type(value).__name__)
def test_values_that_it_cannot_hold_are_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"callbacks\.mine\.2 is a {type(value).__name__}; use numbers"):
        write_sealed(tmp_path / "x", {"callbacks": {"mine": [0, 1, value]}}, "test", 1)
