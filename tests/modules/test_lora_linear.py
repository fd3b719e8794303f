"""The LoRA layer as one node: values, gradients and what falls back to peft's own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from tiny import build_conditioning, build_latents, build_networks, in_float64
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from swd.modules.lora_linear import PlayedRole, RoleLinear, follow, install, lora_linear
from swd.modules.quantize import quantize

EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_layer(bias: bool = True, alpha: float = 6.0, kind: torch.dtype = torch.float64, **options: Any) -> Linear:
    """peft's layer `[7 -> 5]` with two adapters of rank 3 whose weights are not zero."""
    torch.manual_seed(1)
    base = nn.Linear(7, 5, bias).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=alpha, init_lora_weights=False, target_modules=["0"], **options)
    network: Any = nn.Sequential(base)
    for role in ("student", "fake"):
        inject_adapter_in_model(config, network, role)
    return network[0].to(kind).requires_grad_(False)


def trained(layer: Linear, role: str) -> list[nn.Parameter]:
    """A and B of a role, ready to get a gradient."""
    return [part[role].weight.requires_grad_() for part in (layer.lora_A, layer.lora_B)]


def results(layer: Linear, role: str, x: Tensor, call: Callable[..., Tensor]) -> list[Tensor]:
    """The output, and the gradients of its cubed sum for the input and both factors."""
    inputs = [x.clone().requires_grad_(), *trained(layer, role)]
    output = call(layer, inputs[0])
    return [output.detach(), *torch.autograd.grad(output.pow(3).sum(), inputs)]


CALLS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda layer, x: layer(x),
    "checkpointed": lambda layer, x: checkpoint(layer, x, use_reentrant=False),
    "transposed input": lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1),
    "compiled": lambda layer, x: torch.compile(layer, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("bias", "alpha", "shape"), [(True, 6.0, (2, 4, 7)), (False, 3.0, (4, 2, 7))])
def test_values_and_gradients_are_those_of_peft(call: str, bias: bool, alpha: float, shape: tuple[int, ...]) -> None:
    theirs = a_layer(bias, alpha)
    theirs._active_adapter = ["student"]
    expected = results(theirs, "student", random(*shape), lambda layer, x: layer(x))
    ours = a_layer(bias, alpha)
    assert install(ours, PlayedRole("student")) == [] and type(ours) is RoleLinear
    for a, b in zip(results(ours, "student", random(*shape), CALLS[call]), expected, strict=True):
        assert_close(a, b, **EXACT)
    assert all(p.grad is None for p in ours.base_layer.parameters())


def test_one_node_stands_for_the_layer_and_none_where_nothing_is_trained() -> None:
    layer = a_layer()
    install(layer, PlayedRole("student"))
    trained(layer, "student")
    assert layer(random(2, 7)).grad_fn.name() == "_LoraLinearBackward"
    output = layer(random(2, 7))  # kept, since torch 2.7 frees its node with it
    assert not output.grad_fn.next_functions[0][0], "the input needs no gradient"
    with torch.no_grad():
        assert layer(random(2, 7)).grad_fn is None


def test_gradients_by_finite_differences() -> None:
    x, down, up = (random(*shape).requires_grad_() for shape in ((2, 3, 4), (2, 4), (5, 2)))
    weight, bias = random(5, 4, seed=1), random(5, seed=2)
    torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, bias, a, b, 0.7), (x, down, up))


def test_all_layers_follow_one_role() -> None:
    network = nn.Sequential(a_layer(), nn.Tanh(), nn.Linear(5, 7).double().requires_grad_(False), a_layer())
    played = PlayedRole()
    install(network, played)
    x = random(3, 7)
    outputs = {}
    for role in ("teacher", "student", "fake"):
        played.role = role
        outputs[role] = network(x)
        for layer in (network[0], network[3]):
            y = random(2, 7, seed=3)
            expected = layer.base_layer(y)
            if role != "teacher":
                expected = expected + 2 * y @ layer.lora_A[role].weight.t() @ layer.lora_B[role].weight.t()
            assert_close(layer(y), expected, **EXACT)
    bare = network[3].base_layer(network[2](network[0].base_layer(x).tanh()))
    assert torch.equal(outputs["teacher"], bare), "bit for bit"


def count_products(function: Callable[[], Any]) -> int:
    """Number of matrix products that a call starts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        function()
    return counter.count


def test_weights_that_are_not_asked_for_cost_no_products() -> None:
    layer = a_layer()
    install(layer, PlayedRole("fake"))
    weights = trained(layer, "fake")
    x = random(4, 7).requires_grad_()
    assert count_products(lambda: layer(x)) == 3
    loss = layer(x).square().sum()
    assert count_products(lambda: torch.autograd.grad(loss, x, retain_graph=True)) == 3
    assert count_products(lambda: loss.backward()) == 5
    assert all(weight.grad is not None for weight in weights)
    unasked = layer(x.detach()).square().sum()
    assert count_products(unasked.backward) == 3, "none for the input"


@pytest.mark.parametrize("grad", [False, True])
def test_under_autocast_products_are_of_its_dtype_and_gradients_float32(grad: bool) -> None:
    layer = a_layer(kind=torch.float32)
    layer.base_layer.to(torch.bfloat16)
    install(layer, PlayedRole("student"))
    weights = trained(layer, "student")
    exact = a_layer()
    install(exact, PlayedRole("student"))
    x = random(6, 7)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        output = layer(x.float())
    assert output.dtype == torch.bfloat16
    expected = results(exact, "student", x, lambda layer, x: layer(x))
    assert (output.double() - expected[0]).norm() < 0.01 * expected[0].norm()
    if grad:
        found = torch.autograd.grad(output.pow(3).sum(), weights)
        for a, b in zip(found, expected[2:], strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("alpha", [3.0, 5.0])
def test_bf16_is_rounded_where_peft_rounds(alpha: float) -> None:
    theirs, ours = (a_layer(alpha=alpha, kind=torch.float32) for _ in range(2))
    theirs._active_adapter = ["student"]
    install(ours, PlayedRole("student"))
    x = 3 * random(40, 7).bfloat16()
    for layer in (theirs, ours):
        layer.base_layer.to(torch.bfloat16)
        layer.cast_input_dtype_enabled = False
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16 and torch.equal(ours(x), theirs(x))


def test_what_is_not_plain_goes_through_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Tensor:
        raise AssertionError("the node is for plain layers alone")

    monkeypatch.setattr("swd.modules.lora_linear.lora_linear", never)
    eight_bits = nn.Sequential(a_layer(kind=torch.float32))
    quantize(eight_bits, ["base_layer"], "int8")
    heard = a_layer(kind=torch.float32)
    seen: list[int] = []
    heard.lora_B["student"].register_forward_hook(lambda *_: seen.append(1))
    for layer in (eight_bits[0], a_layer(lora_dropout=0.5, kind=torch.float32).eval(), heard):
        install(layer, PlayedRole("student"))
        y = random(2, 7).float()
        down, up = trained(layer, "student")
        assert_close(layer(y), layer.base_layer(y) + 2 * y @ down.t() @ up.t())
        assert list(layer.active_adapters) == ["student"] and not layer.disable_adapters
    assert seen == [1]
    plain = a_layer(kind=torch.float32)
    install(plain, PlayedRole("student"))
    with pytest.raises(AssertionError, match="plain"):
        plain(y)


def test_what_is_known_of_a_layer_follows_its_changes() -> None:
    layer = a_layer()
    install(layer, PlayedRole("student"))
    x = random(2, 7)

    def expected(of: Any) -> Tensor:
        down, up = of.lora_A["student"].weight, of.lora_B["student"].weight
        return of.base_layer(x) + of.scaling["student"] * x @ down.t() @ up.t()

    assert_close(layer(x), expected(layer), **EXACT)
    copied: Any = copy.deepcopy(layer)
    copied.lora_A["student"].weight.data.mul_(3)
    copied.base_layer.weight.data.mul_(2)
    assert_close(copied(x), expected(copied), **EXACT)
    assert_close(layer(x), expected(layer), **EXACT)
    layer.scaling["student"] = 5.0
    layer.base_layer = nn.Linear(7, 5).double()
    assert_close(layer(x), expected(layer), **EXACT)
    for parts, new in ((layer.lora_A, nn.Linear(7, 3, bias=False)), (layer.lora_B, nn.Linear(3, 5, bias=False))):
        parts["student"] = new.double()
        assert_close(layer(x), expected(layer), **EXACT)


def test_what_a_layer_is_given_later_takes_part() -> None:
    x = random(2, 7)

    def dropout(layer: Any) -> None:
        layer.lora_dropout["student"] = nn.Linear(7, 7).double().requires_grad_(False)

    def variant(layer: Any) -> None:
        layer.lora_variant["student"] = SimpleNamespace(forward=lambda module, result, **_: 3 * result)

    def forward(layer: Any) -> None:
        base = layer.base_layer
        base.forward = lambda given: nn.functional.linear(2 * given, base.weight)

    for change in (dropout, variant, forward):
        theirs, ours = a_layer(), a_layer()
        follow(theirs, "student")
        install(ours, PlayedRole("student"))
        before = ours(x)
        for layer in (theirs, ours):
            torch.manual_seed(0)
            change(layer)
        assert_close(ours(x), theirs(x), **EXACT)
        assert (ours(x) - before).abs().max() > 0.1


def test_gradients_of_a_whole_network_are_those_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    conditioning = build_conditioning().to(torch.float64)
    found = []
    for plain in (True, False):
        if not plain:
            monkeypatch.setattr(RoleLinear, "_is_plain", lambda layer, role: False)
        networks = in_float64(build_networks())
        weights = networks.role_parameters("student")
        with networks.role("student"):
            output, _ = networks.backbone.predict(build_latents().double(), torch.tensor([0.9, 0.4]), conditioning)
        gradients = torch.autograd.grad(output.square().mean(), weights, allow_unused=True)
        found.append([output, *(gradient for gradient in gradients if gradient is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-12)
