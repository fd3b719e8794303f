"""Numbers that a cache stores, and damage that it names."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from swd.data import cache
from swd.data.cache import Assembler, pack_latents, pack_text, relative_error, restore, store, view
from swd.data.shards import CorruptSample
from swd.types import Conditioning


def packed(**tensors: Tensor) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(save(tensors)), np.uint8)


def array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(data), np.uint8)


def test_8_bits_hold_127_steps_of_each_sign_a_row() -> None:
    values = torch.tensor([[63.5, -63.5, 32.2, 0.0], [-254.0, 3.0, 2.9, -1.1], [0.0, 0.0, 0.0, 0.0]])
    stored = store("v", values, "int8")
    assert stored["v"].dtype == torch.int8 and stored.keys() == {"v", "v_scale"}
    assert stored["v"].tolist() == [[127, -127, 64, 0], [-127, 2, 1, -1], [0, 0, 0, 0]]
    assert torch.equal(stored["v_scale"], torch.tensor([0.5, 2.0, 1e-30]))
    back = restore("v", stored)
    assert back.dtype == torch.float32
    assert back.tolist() == [[63.5, -63.5, 32.0, 0.0], [-254.0, 4.0, 2.0, -2.0], [0.0, 0.0, 0.0, 0.0]]
    error, norm = relative_error(values, "int8")
    assert error == pytest.approx(0.2**2 + 1 + 0.9**2 + 0.9**2, rel=1e-5)
    assert norm == pytest.approx(values.square().sum().item())
    maps = store("v", values.view(3, 2, 1, 2), "int8")
    assert maps["v"].shape == (3, 2, 1, 2) and torch.equal(restore("v", maps), back.view(3, 2, 1, 2))
    nothing = store("v", torch.zeros(2, 0), "int8")
    assert nothing["v"].shape == (2, 0) and nothing["v_scale"].tolist() == [1.0, 1.0]


def test_other_precisions_hold_the_values_themselves() -> None:
    values = torch.tensor([[0.1, 1.0], [2.0, 3.0]]).T
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        stored = store("v", values, precision)  # type: ignore[arg-type]
        assert stored.keys() == {"v"} and stored["v"].dtype == dtype and stored["v"].is_contiguous()
        assert torch.equal(stored["v"], values.to(dtype)) and restore("v", stored) is stored["v"]
    error, norm = relative_error(values, "bf16")
    assert error == pytest.approx((0.1 - torch.tensor(0.1).bfloat16().item()) ** 2, rel=1e-3)
    assert norm == pytest.approx(14.01)


def test_a_text_is_stored_as_runs_of_rows_of_one_width() -> None:
    embeds = torch.zeros(1, 5, 4)
    embeds[0, 0, :2] = 1
    embeds[0, 1, 1] = 2  # its last value is in the second column too
    embeds[0, 2] = 3
    embeds[0, 4, 0] = 9  # masked
    mask, ids = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[8, 6]])
    found = view(array(pack_text(Conditioning(embeds, torch.tensor([[5.0, 7.0]]), ids, mask), "fp32")))
    assert found["shape"].tolist() == [5, 4] and found["runs"].tolist() == [[2, 2], [1, 4], [2, 0]]
    assert found["embeds0"].tolist() == [[1, 1], [0, 2]] and found["embeds1"].tolist() == [[3, 3, 3, 3]]
    assert found["embeds2"].shape == (2, 0) and found["pooled"].tolist() == [[5, 7]]
    assert found["mask"].tolist() == [1, 1, 1, 1, 0] and found["mask"].dtype == torch.uint8
    assert found["time_ids"].tolist() == [[8, 6]] and found["time_ids"].dtype == torch.float32
    assert len(found) == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_not_stored(value: float) -> None:
    bad = torch.full((1, 3, 4), value)
    with pytest.raises(CorruptSample, match=r"^latents of 3x4: mean has values that are not finite$"):
        pack_latents(bad, None, "fp32")
    with pytest.raises(CorruptSample, match=r"^latents of 3x4: std has values that are not finite$"):
        pack_latents(torch.zeros(1, 3, 4), bad, "bf16")
    with pytest.raises(CorruptSample, match=r"^text: pooled has values that are not finite$"):
        pack_text(Conditioning(torch.zeros(1, 3, 4), bad[:, 0]), "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_not_read(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = torch.tensor([largest, -largest, 0.0, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    assert torch.equal(view(packed(v=good))["v"], good)
    assert view(packed(v=good[:0]))["v"].shape == (0,)
    for value in (math.inf, -math.inf, math.nan, -math.nan):
        bad = good.clone()
        bad[2] = value
        with pytest.raises(CorruptSample, match=r"^v has values that are not finite$"):
            view(packed(v=bad))


def test_every_stored_type_is_read() -> None:
    tensors = {
        "a": torch.tensor([[1, -2], [3, 4]], dtype=torch.int8),
        "b": torch.tensor([5, 255], dtype=torch.uint8),
        "c": torch.tensor([-(2**31)], dtype=torch.int32),
        "d": torch.tensor([2**40], dtype=torch.int64),
    }
    found = view(array(save(tensors, {"note": "left out"})))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_a_scale_beyond_float32_is_damage() -> None:
    most = torch.finfo(torch.float32).max / 128
    assert view(packed(v_scale=torch.tensor([most, -most])))["v_scale"].shape == (2,)
    for scale in (1.01 * most, -1.01 * most):
        with pytest.raises(CorruptSample, match=r"^v_scale makes values that are not finite$"):
            view(packed(v_scale=torch.tensor([1.0, scale])))
    assert view(packed(scale_of=torch.tensor([1.01 * most])))["scale_of"].shape == (1,)


def a_text(**changes: Any) -> NDArray[np.uint8]:
    whole = {"shape": torch.tensor([2, 3]), "runs": torch.tensor([[2, 3]]), "embeds0": torch.ones(2, 3)}
    return packed(**{name: value for name, value in (whole | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": torch.tensor([[1, 3]])}, r"^a text of shape \[2, 3\] with rows \[\[1, 3\]\] is none$"),
        ({"runs": torch.tensor([[2, 4]])}, r"with rows \[\[2, 4\]\] is none$"),
        ({"runs": torch.tensor([[3, 3], [-1, 3]])}, r"with rows \[\[3, 3\], \[-1, 3\]\] is none$"),
        ({"runs": torch.tensor([[2, -1]])}, r"with rows \[\[2, -1\]\] is none$"),
        ({"shape": torch.tensor([2, 2**27])}, r"^a text of shape \[2, 134217728\]"),
        ({"shape": torch.tensor([0, 3]), "runs": torch.zeros(0, 2, dtype=torch.int64)}, r"shape \[0, 3\]"),
        ({"embeds0": None}, r"^texts do not belong to one cache \('embeds0'\)$"),
        ({"embeds0": torch.ones(2, 2)}, r"^texts do not belong to one cache \(\(2, 2\) beside \(2, 3\)\)$"),
    ],
)
def test_a_damaged_text_is_named(changes: dict[str, Any], message: str) -> None:
    Assembler(1).text(0, a_text())
    with pytest.raises(CorruptSample, match=message):
        Assembler(1).text(0, a_text(**changes))


def test_rows_of_a_batch_are_put_together() -> None:
    batch = Assembler(2)
    for row in (1, 0):
        more = {"pooled": torch.full((1, 2), float(row)), "mask": torch.tensor([1, row], dtype=torch.uint8)}
        batch.text(row, a_text(embeds0=torch.full((2, 3), row + 1.0), time_ids=torch.tensor([[row + 0.5]]), **more))
    found = batch.conditioning()
    assert torch.equal(found.embeds, torch.tensor([1.0, 2.0]).view(2, 1, 1).expand(2, 2, 3))
    assert found.pooled.tolist() == [[0, 0], [1, 1]] and found.time_ids.tolist() == [[0.5], [1.5]]
    assert found.mask.tolist() == [[1, 0], [1, 1]] and found.mask.dtype == torch.int64
    with pytest.raises(CorruptSample, match=r"^texts do not belong to one cache \(\(2, 3\) beside \(2, 3\)\)$"):
        batch.text(0, a_text(embeds0=torch.ones(2, 3, dtype=torch.bfloat16)))  # another dtype


def test_latents_that_do_not_belong_together_are_named() -> None:
    mean, std = torch.ones(2, 4, 4), torch.full((2, 4, 4), 0.5)
    batch = Assembler(2)
    batch.latents(0, (4, 4), packed(mean=mean, std=std))
    batch.latents(1, (4, 4), packed(mean=3 * mean, std=std))
    means, stds = batch.posteriors()[4, 4]
    assert torch.equal(means, torch.stack([mean, 3 * mean])) and torch.equal(stds, torch.stack([std, std]))
    with pytest.raises(CorruptSample, match=r"^latents of \(2, 4, 6\) beside \(2, 4, 4\)$"):
        batch.latents(1, (4, 4), packed(mean=torch.ones(2, 4, 6)))
    with pytest.raises(CorruptSample, match=r"^latents of \(2, 4, 4\) beside \(2, 4, 4\)$"):
        batch.latents(1, (4, 4), packed(mean=mean, std=std[:1]))
    with pytest.raises(CorruptSample, match=r"^latents lack 'mean'$"):
        batch.latents(1, (4, 4), packed(std=std))


def test_copies_change_the_dtype_and_never_the_shape() -> None:
    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.int64):
        target = cache.memory((2, 3), dtype)
        assert target.shape == (2, 3) and target.dtype == dtype
        cache.copy(target, torch.arange(6).view(2, 3).to(dtype))
        assert target.tolist() == [[0, 1, 2], [3, 4, 5]]
        cache.copy(target, torch.arange(6, 12, dtype=torch.int32).view(2, 3))
        assert target.tolist() == [[6, 7, 8], [9, 10, 11]]
        with pytest.raises(RuntimeError, match=r"^\(3,\) beside \(2, 3\)$"):
            cache.copy(target, torch.zeros(3, dtype=dtype))


def test_what_is_no_safetensors_file_says_so() -> None:
    def file(header: dict[str, Any], data: bytes = b"\0" * 8) -> NDArray[np.uint8]:
        text = json.dumps(header).encode()
        return array(len(text).to_bytes(8, "little") + text + data)

    good = {"dtype": "I8", "shape": [2, 2], "data_offsets": [2, 6]}
    assert view(file({"v": good}, bytes(range(8))))["v"].tolist() == [[2, 3], [4, 5]]
    for change in ({"dtype": "F64"}, {"shape": [3]}, {"data_offsets": [2]}, {"data_offsets": None}):
        with pytest.raises(CorruptSample, match=r"^no safetensors file \(.+\)$"):
            view(file({"v": good | change}))


def test_a_text_has_at_most_so_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_VALUES", 6)
    Assembler(1).text(0, a_text())
    monkeypatch.setattr(cache, "MOST_VALUES", 5)
    with pytest.raises(CorruptSample, match=r"^a text of shape \[2, 3\] with rows \[\[2, 3\]\] is none$"):
        Assembler(1).text(0, a_text())


def test_reasons_are_cut_at_80_characters() -> None:
    scaled = {"embeds0": torch.ones(2, 3, dtype=torch.int8), "embeds0_scale": torch.ones(3)}
    with pytest.raises(CorruptSample, match=r"^texts do not belong to one cache \(The size of tensor .{61}\)$"):
        Assembler(1).text(0, a_text(**scaled))
    data = bytes(packed(v=torch.ones(1))).replace(b'"F32"', b'"' + b"X" * 100 + b'"')
    header = data[8 : data.index(b"}}") + 2]
    with pytest.raises(CorruptSample, match=r"^no safetensors file \('X{79}\)$"):
        view(array(len(header).to_bytes(8, "little") + header + bytes(4)))
