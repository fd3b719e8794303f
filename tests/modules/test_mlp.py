"""The feed-forward layer with GELU as one node: diffusers' values, gradients, and what is left to diffusers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from swd.modules.lora_linear import PlayedRole, install
from swd.modules.mlp import GELUFeedForward, TanhGELU, install_mlps


def layers(lora: list[str] | None = None, trained: bool = False, kind: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Diffusers' layer of 6 channels and ours, with adapters of rank 2 on some of its linear layers."""
    torch.manual_seed(0)
    theirs: Any = nn.ModuleList([FeedForward(6, activation_fn="gelu-approximate")])
    if lora:
        config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=lora)
        inject_adapter_in_model(config, theirs, "student")
    theirs = theirs.to(kind)
    for name, weight in theirs.named_parameters():
        weight.requires_grad_(trained or "lora_" in name)
        if "lora_" in name:
            weight.data = weight.data.to(torch.float32 if kind == torch.bfloat16 else kind)
    ours = copy.deepcopy(theirs)
    install_mlps(ours)
    install(ours, PlayedRole("student"))
    return theirs[0], ours[0]


def tokens(kind: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(kind)


def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of its cubed sum for the input and all trained weights."""
    x = x.clone().requires_grad_()
    output = layer(x)
    asked = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
    return [
        output,
        *torch.autograd.grad(output.float().pow(3).sum() if x.dtype != torch.float64 else output.pow(3).sum(), asked),
    ]


@pytest.mark.parametrize("lora", [None, ["net.0.proj", "net.2"]])
def test_a_single_vector_has_gradients_too(lora: list[str] | None) -> None:
    theirs, ours = layers(lora)
    vector = tokens()[0, 0]
    for a, b in zip(results(ours, vector), results(theirs, vector), strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lora", [None, ["net.0.proj", "net.2"], ["net.0.proj"], ["net.2"]])
def test_values_and_gradients_are_those_of_diffusers(lora: list[str] | None) -> None:
    theirs, ours = layers(lora)
    assert type(ours) is GELUFeedForward and type(theirs) is FeedForward
    one_node = lora is None or len(lora) == 2
    assert (ours(tokens().requires_grad_()).grad_fn.name() == "_FeedForwardBackward") is one_node
    for a, b in zip(results(ours, tokens()), results(theirs, tokens()), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert_close(ours(tokens()), theirs(tokens()), rtol=1e-10, atol=1e-12)


def test_trained_layers_have_the_frozen_ones_bits_and_diffusers_gradients() -> None:
    theirs, ours = layers(trained=True)
    frozen = copy.deepcopy(ours).requires_grad_(False)
    assert torch.equal(ours(tokens()), frozen(tokens())), "a copy starts as its teacher"
    for a, b in zip(results(ours, tokens()), results(theirs, tokens()), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    _, ours = layers(["net.0.proj", "net.2"])
    weights = [weight for weight in ours.parameters() if weight.requires_grad]
    torch.autograd.gradcheck(lambda x, *_: ours(x), (tokens().requires_grad_(), *weights))
    gelu = TanhGELU.gelu
    torch.autograd.gradcheck(lambda u: gelu(ours.net[0], u), (tokens().requires_grad_(),))


@pytest.mark.parametrize("frozen", ["0.proj.lora_A", "0.proj.lora_B", "2.lora_A", "2.lora_B", "0.proj", "2"])
def test_weights_that_are_not_frozen_get_their_gradients(frozen: str) -> None:
    found: list[list[Tensor | None]] = []
    for layer in layers(["net.0.proj", "net.2"]):
        layer.net.get_submodule(frozen).requires_grad_(False)
        layer(tokens()).pow(3).sum().backward()
        found.append([weight.grad for weight in layer.parameters()])
    theirs, ours = found
    assert sum(gradient is not None for gradient in theirs) == (3 if "lora" in frozen else 2)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_gelu_is_exact_for_small_and_large_numbers(scale: float) -> None:
    """In float32, and its gradient too."""
    _, ours = layers(kind=torch.float32)
    u = (scale * torch.linspace(-1, 1, 201)).requires_grad_()
    exact = u.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    found = ours.net[0].gelu(u)
    assert_close(found.double(), expected, rtol=2e-6, atol=2e-6 * scale)
    gradients = [torch.autograd.grad(output.sum(), leaf)[0] for output, leaf in ((found, u), (expected, exact))]
    assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-5)


def test_gelu_of_large_numbers_in_half_precision_has_finite_gradients() -> None:
    """float16 ends at 65504, which the square of 256 passes."""
    _, ours = layers(kind=torch.float16)
    u = torch.tensor([-6e4, -1000.0, -2.0, 2.0, 1000.0, 6e4], dtype=torch.float16, requires_grad=True)
    found = ours.net[0].gelu(u)
    assert_close(found, F.gelu(u, approximate="tanh"))
    found.sum().backward()
    assert u.grad is not None
    assert_close(u.grad[[0, 1, 4, 5]], torch.tensor([0, 0, 1, 1], dtype=torch.float16))


def test_gelu_knows_no_default_device() -> None:
    _, ours = layers(kind=torch.float32)
    x = tokens(torch.float32)
    expected = ours(x)
    with torch.device("meta"):
        assert torch.equal(ours(x), expected)
    with FakeTensorMode():
        assert ours.net[0].gelu(torch.ones(2)).shape == (2,)
    assert torch.equal(ours(x), expected)


def test_bf16_under_autocast() -> None:
    _, ours = layers(["net.0.proj", "net.2"], kind=torch.bfloat16)
    exact, _ = layers(["net.0.proj", "net.2"])
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ours, tokens(torch.bfloat16))
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in found[2:])
    for a, b in zip(found, results(exact, tokens(torch.bfloat16).double()), strict=True):
        assert (a.double() - b).norm() < 0.05 * b.norm()


def test_other_layers_are_left_to_diffusers() -> None:
    others = nn.ModuleList([FeedForward(6, activation_fn=name) for name in ("gelu", "geglu")])
    install_mlps(others)
    assert all(type(layer) is FeedForward for layer in others)
    assert type(others[0].net[0]) is GELU
    dropped = nn.ModuleList([FeedForward(6, activation_fn="gelu-approximate", dropout=0.5)]).requires_grad_(False)
    install_mlps(dropped)
    ours: Any = dropped[0]
    x = tokens(torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(ours(x), ours(x)), "dropout drops"
    assert torch.equal(ours.eval()(x), ours(x))
