"""The Inception network of FID against the same architecture written out with torch's functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from swd.io.files import file_hash
from swd.metrics.inception import Inception, InceptionFeatures, convert
from swd.types import UserError

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights, batch statistics too, that keep activations near 1 and make many of them negative."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in Inception().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            made[name] = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            made[name] = 1 + 0.5 * noise.tanh()
        else:
            made[name] = 0.3 * noise
    return made


@pytest.fixture(scope="module")
def pth(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the common one: both classifiers are in it."""
    file = tmp_path_factory.mktemp("pth") / "inception.pth"
    classifiers = {"fc.weight": torch.zeros(1008, 2048), "AuxLogits.fc.bias": torch.zeros(1008)}
    torch.save(weights | classifiers, file)
    return file


@pytest.fixture(scope="module")
def converted(pth: Path) -> Path:
    return convert(pth, pth.with_suffix(".safetensors"), sha256=file_hash(pth))


def by_functions(w: Weights, x: Tensor) -> Tensor:
    """Features `[B, 2048]` of pictures in [-1, 1], every layer and padding written out."""

    def conv(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        shape = (1, -1, 1, 1)
        scale = w[f"{name}.bn.weight"] / (w[f"{name}.bn.running_var"] + 0.001).sqrt()
        return (
            (x - w[f"{name}.bn.running_mean"].view(shape)) * scale.view(shape) + w[f"{name}.bn.bias"].view(shape)
        ).relu()

    def average(x: Tensor) -> Tensor:
        ones = torch.ones(1, 1, *x.shape[2:])
        box = torch.ones(1, 1, 3, 3)
        sums = F.conv2d(x.flatten(0, 1)[:, None], box, padding=1).view(x.shape)
        return sums / F.conv2d(ones, box, padding=1)

    def a(x: Tensor, n: str) -> Tensor:
        five = conv(conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", padding=2)
        three = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        three = conv(three, f"{n}.branch3x3dbl_3", padding=1)
        return torch.cat([conv(x, f"{n}.branch1x1"), five, three, conv(average(x), f"{n}.branch_pool")], 1)

    def b(x: Tensor, n: str) -> Tensor:
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{n}.branch3x3dbl_3", stride=2)
        return torch.cat([conv(x, f"{n}.branch3x3", stride=2), double, F.max_pool2d(x, 3, 2)], 1)

    def c(x: Tensor, n: str) -> Tensor:
        wide, tall = (0, 3), (3, 0)
        one = conv(
            conv(conv(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2", padding=wide), f"{n}.branch7x7_3", padding=tall
        )
        two = conv(x, f"{n}.branch7x7dbl_1")
        for i, padding in ((2, tall), (3, wide), (4, tall), (5, wide)):
            two = conv(two, f"{n}.branch7x7dbl_{i}", padding=padding)
        return torch.cat([conv(x, f"{n}.branch1x1"), one, two, conv(average(x), f"{n}.branch_pool")], 1)

    def d(x: Tensor, n: str) -> Tensor:
        three = conv(conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", stride=2)
        seven = conv(conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", padding=(0, 3))
        seven = conv(conv(seven, f"{n}.branch7x7x3_3", padding=(3, 0)), f"{n}.branch7x7x3_4", stride=2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(x: Tensor, n: str, pooled: Tensor) -> Tensor:
        three = conv(x, f"{n}.branch3x3_1")
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        parts = [conv(x, f"{n}.branch1x1")]
        for inner, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3")):
            parts += [conv(inner, f"{n}.{name}a", padding=(0, 1)), conv(inner, f"{n}.{name}b", padding=(1, 0))]
        return torch.cat([*parts, conv(pooled, f"{n}.branch_pool")], 1)

    x = conv(conv(x, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = F.max_pool2d(conv(x, "Conv2d_2b_3x3", padding=1), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = a(x, name)
    x = b(x, "Mixed_6a")
    for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = c(x, name)
    x = d(x, "Mixed_7a")
    x = e(x, "Mixed_7b", average(x))
    x = e(x, "Mixed_7c", F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1))
    return x.flatten(2).mean(2)


def test_network_equals_its_architecture_written_out(weights: Weights, converted: Path) -> None:
    picture = torch.randint(0, 256, (3, 299, 299), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = InceptionFeatures(str(converted), steps=())(picture[None])
    expected = by_functions(weights, picture[None].float() / 127.5 - 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_number_of_parameters_and_well_known_shapes() -> None:
    network = Inception()
    # 27,161,264 of Inception v3 with both classifiers of 1,000 classes, less 3,326,696 and 2,049,000 of those.
    assert sum(each.numel() for each in network.parameters()) == 21_785_568
    state = network.state_dict()
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5b.branch_pool.bn.running_mean": (32,),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_1.conv.weight": (448, 1280, 1, 1),
        "Mixed_7c.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.running_var": (192,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert sum(name.endswith("conv.weight") for name in state) == 94


def test_resize_to_299_is_bilinear_without_widening(converted: Path) -> None:
    extractor = InceptionFeatures(str(converted), steps=())
    picture = torch.randint(0, 256, (3, 40, 598), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    prepared = extractor.prepare(picture)
    assert prepared.shape == (3, 299, 299)
    # Halving by two neighbours alone: output column i has its centre between input columns 2 i and 2 i + 1.
    rows = [(min(max((i + 0.5) * 40 / 299 - 0.5, 0), 39)) for i in range(299)]
    for i in (0, 1, 150, 298):
        low = min(int(rows[i]), 38)
        share = rows[i] - low
        column = (picture[:, :, 200].float() + picture[:, :, 201].float()) / 2
        expected = ((1 - share) * column[:, low] + share * column[:, low + 1]) / 255
        torch.testing.assert_close(prepared[:, i, 100], expected, rtol=1e-4, atol=1e-4)


def test_conversion_records_the_source_and_drops_the_classifiers(pth: Path, converted: Path, weights: Weights) -> None:
    with safe_open(converted, "pt") as opened:
        assert opened.metadata()["source_sha256"] == file_hash(pth)
        assert set(opened.keys()) == set(weights)
    assert InceptionFeatures(str(converted)).weights_id() == file_hash(converted)


def test_conversion_refuses_other_files(pth: Path, tmp_path: Path, weights: Weights) -> None:
    target = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match=f"has SHA-256 {file_hash(pth)}, which does not begin with '6726825d'"):
        convert(pth, target)
    with pytest.raises(UserError, match="does not begin with ''"):
        convert(pth, target, sha256="")
    with pytest.raises(UserError, match="there is no file"):
        convert(tmp_path / "absent.pth", target)
    for fault, made in {
        "lacks Mixed_5b.branch1x1.bn.bias": {k: v for k, v in weights.items() if k != "Mixed_5b.branch1x1.bn.bias"},
        "has an unknown Mixed_8a.weight": weights | {"Mixed_8a.weight": torch.zeros(1)},
        "has another shape of Conv2d_1a_3x3.conv.weight": weights | {"Conv2d_1a_3x3.conv.weight": torch.zeros(1)},
    }.items():
        torch.save(made, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=fault):
            convert(tmp_path / "wrong.pth", target, file_hash(tmp_path / "wrong.pth"))
    torch.save({"weights": Path("x")}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="is no file of weights"):
        convert(tmp_path / "code.pth", target, file_hash(tmp_path / "code.pth"))
    assert not target.exists()


def test_absent_weights_are_one_line_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the Inception network of FID and has no path") as none:
        InceptionFeatures(None).check()
    with pytest.raises(UserError, match=r"there is no Inception network at .*absent\.safetensors; download") as absent:
        InceptionFeatures(str(tmp_path / "absent.safetensors")).check()
    with pytest.raises(UserError, match=r"is not a \.safetensors file; convert it once"):
        InceptionFeatures("pt_inception-2015-12-05-6726825d.pth").check()
    assert all("\n" not in str(error.value) for error in (none, absent))
    save_file({"a": torch.zeros(4)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"cut\.safetensors is damaged"):
        InceptionFeatures(str(tmp_path / "cut.safetensors")).check()


def test_features_of_a_picture_do_not_depend_on_its_batch_and_weights_can_be_freed(converted: Path) -> None:
    extractor = InceptionFeatures(str(converted))
    assert extractor.name == "inception-512bicubic-256lanczos-crop256"
    pictures = torch.randint(0, 256, (3, 3, 64, 48), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    together = extractor(pictures)
    network = extractor.load()
    assert network is extractor.load()
    extractor.unload()
    alone = extractor([pictures[1]])
    assert extractor.load() is not network
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5 * float(together.abs().max()))
    assert not list(extractor.parameters()) and not extractor.state_dict()
