"""Queries, keys and values as one node: values and gradients, and no work that is not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from swd.modules.heads import heads_of
from swd.modules.lora_linear import PlayedRole, install
from swd.modules.rms_norm import FrozenRMSNorm

HEADS = 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three_layers(adapted: tuple[str, ...] = ("0", "1", "2"), ranks: tuple[int, ...] = (3, 2, 3)) -> nn.ModuleList:
    """Three linear layers `[6 -> 8]`, the middle one without bias, with adapters on some of them."""
    torch.manual_seed(1)
    layers = nn.ModuleList([nn.Linear(6, 8, bias=number != 1) for number in range(3)])
    if adapted:
        pattern = {name: ranks[int(name)] for name in adapted}
        config = LoraConfig(
            r=3, lora_alpha=6, rank_pattern=pattern, init_lora_weights=False, target_modules=list(adapted)
        )
        inject_adapter_in_model(config, layers, "student")
        install(layers, PlayedRole("student"))
    layers.double()
    for name, weight in layers.named_parameters():
        weight.requires_grad_("lora_" in name)
    return layers


def norms() -> list[Any]:
    """Norms of queries and keys, none of values."""
    found = [FrozenRMSNorm(4, 1e-3).double().requires_grad_(False) for _ in range(2)]
    for number, norm in enumerate(found):
        norm.weight.copy_(random(4, seed=number))
    return [*found, None]


def one_by_one(x: Tensor, layers: Any, of_heads: list[Any]) -> list[Tensor]:
    """The heads by each layer's own call."""
    found = [layer(x).view(*x.shape[:2], HEADS, -1) for layer in layers]
    return [each if norm is None else norm(each) for each, norm in zip(found, of_heads, strict=True)]


def gradients(outputs: Any, asked: list[Tensor]) -> list[Tensor]:
    loss = torch.stack([(n + 1) * output.pow(3).sum() for n, output in enumerate(outputs)]).sum()
    return list(torch.autograd.grad(loss, asked))


@pytest.mark.parametrize("adapted", [(), ("0", "1", "2"), ("0", "2")])
def test_values_and_gradients_are_those_of_the_layers(adapted: tuple[str, ...]) -> None:
    layers, of_heads = three_layers(adapted), norms()
    asked = [random(2, 5, 6).requires_grad_(), *(weight for weight in layers.parameters() if weight.requires_grad)]
    found = heads_of(asked[0], layers, of_heads, HEADS)
    expected = one_by_one(asked[0], layers, of_heads)
    assert ("_Heads" in found[2].grad_fn.name()) is (len(adapted) != 2), "layers with and without adapters stay apart"
    pairs = zip([*found, *gradients(found, asked)], [*expected, *gradients(expected, asked)], strict=True)
    for a, b in pairs:
        assert_close(a, b, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        for a, b in zip(heads_of(asked[0], layers, of_heads, HEADS), expected, strict=True):
            assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_by_finite_differences() -> None:
    layers, of_heads = three_layers(), norms()
    weights = [weight for weight in layers.parameters() if weight.requires_grad]
    torch.autograd.gradcheck(
        lambda x, *_: tuple(heads_of(x, layers, of_heads, HEADS)), (random(2, 3, 6).requires_grad_(), *weights)
    )


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        self.count += func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        return func(*args, **(kwargs or {}))


def count(call: Any) -> int:
    with Products() as products:
        call()
    return products.count


def test_what_is_not_asked_for_costs_no_products() -> None:
    layers = three_layers()
    x = random(2, 5, 6).requires_grad_()
    assert count(lambda: heads_of(x, layers, [None] * 3, HEADS)) == 3 + 1 + 3, "bases, all A together, each B"
    loss = gradients_loss(heads_of(x, layers, [None] * 3, HEADS))
    of_x = 3 + 3 + 1
    assert count(lambda: torch.autograd.grad(loss, x, retain_graph=True)) == of_x, "no weight's gradient"
    assert count(loss.backward) == of_x + 1 + 3
    unasked = gradients_loss(heads_of(x.detach(), layers, [None] * 3, HEADS))
    assert count(unasked.backward) == 3 + 1 + 3, "none for the input"


def gradients_loss(outputs: Any) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


def test_a_frozen_adapter_gets_no_gradient() -> None:
    layers: Any = three_layers()
    layers[1].lora_B["student"].weight.requires_grad_(False)
    layers[2].lora_A["student"].weight.requires_grad_(False)
    gradients_loss(heads_of(random(2, 5, 6), layers, [None] * 3, HEADS)).backward()
    for layer in layers:
        for part in (layer.lora_A, layer.lora_B):
            weight = part["student"].weight
            assert (weight.grad is not None) is weight.requires_grad


def test_a_trained_bias_gets_its_gradient() -> None:
    layers: Any = three_layers(())
    layers[0].bias.requires_grad_(True)
    gradients_loss(heads_of(random(2, 5, 6).requires_grad_(), layers, [None] * 3, HEADS)).backward()
    assert layers[0].bias.grad.all()


def test_a_trained_norm_gets_its_gradient() -> None:
    layers, of_heads = three_layers(), norms()
    of_heads[1].weight.requires_grad_(True)
    gradients_loss(heads_of(random(2, 5, 6), layers, of_heads, HEADS)).backward()
    assert of_heads[1].weight.grad.all() and of_heads[0].weight.grad is None


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_heads_that_nothing_reads_have_a_gradient_of_zero(used: tuple[int, ...]) -> None:
    layers, of_heads = three_layers(), norms()
    asked = [random(2, 5, 6).requires_grad_(), *(weight for weight in layers.parameters() if weight.requires_grad)]
    found = []
    for heads in (heads_of(asked[0], layers, of_heads, HEADS), one_by_one(asked[0], layers, of_heads)):
        loss = torch.stack([heads[number].pow(3).sum() for number in used]).sum()
        found.append(torch.autograd.grad(loss, asked, materialize_grads=True, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("adapted", [(), ("0", "1", "2")])
def test_a_layer_whose_forward_pass_was_replaced_keeps_it(adapted: tuple[str, ...]) -> None:
    """As accelerate does it, which brings weights to the device first."""
    layers: Any = three_layers(adapted)
    x = random(2, 5, 6)
    before = heads_of(x, layers, [None] * 3, HEADS)
    own = layers[1].forward
    layers[1].forward = lambda given: 2 * own(given)
    after = heads_of(x, layers, [None] * 3, HEADS)
    for a, b, factor in zip(after, before, (1, 2, 1), strict=True):
        assert_close(a, factor * b, rtol=1e-12, atol=1e-12)


def test_dtypes_that_differ_without_autocast_are_left_to_the_layers() -> None:
    layers: Any = three_layers()
    for layer in layers:
        layer.base_layer.to(torch.float32)
    x = random(2, 5, 6).float()
    found = heads_of(x, layers, [None] * 3, HEADS)
    assert all("_Heads" not in output.grad_fn.name() for output in found)
