"""Roles on one shared base: values and gradients equal those of separate copies."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import BLOCKS, build_conditioning, build_latents, build_networks, build_transformer, in_float64
from torch import Tensor, nn
from torch.testing import assert_close

from swd.losses.gan import GAN
from swd.modules.backbones.base import TARGETS
from swd.modules.backbones.sd3 import SD3Backbone
from swd.modules.in_pipelines import as_in_pipelines
from swd.modules.networks import SharedBase
from swd.modules.rms_norm import install_norms
from swd.types import Role, UserError

SIGMA = torch.tensor([0.9, 0.4])


def predict(networks: SharedBase, role: Role, x: Tensor | None = None) -> Tensor:
    return networks.x0(role, build_latents() if x is None else x, SIGMA, build_conditioning())[0]


def separate_copy(networks: SharedBase, role: Role, rank: int = 4) -> SD3Backbone:
    """A network of its own with the one adapter, switched by nobody."""
    network = build_transformer().requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), "default")
    parameters = dict(network.named_parameters())
    network.to(networks.backbone.dtype)
    for key, parameter in networks.backbone.network.named_parameters():
        if f".{role}." in key:
            parameters[key.replace(f".{role}.", ".default.")].data.copy_(parameter.data)
    install_norms(network)  # in float64 diffusers' own norm computes in float32
    return SD3Backbone(network)


def copy_gradients(backbone: SD3Backbone) -> dict[str, Tensor]:
    return {k: p.grad for k, p in backbone.network.named_parameters() if "lora_" in k and p.grad is not None}


def gradients(networks: SharedBase, role: Role) -> dict[str, Tensor]:
    return {
        k.replace(f".{role}.", ".default."): p.grad
        for k, p in networks.backbone.network.named_parameters()
        if f".{role}." in k and p.grad is not None
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() == actual.keys() and expected
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def assert_equal_in_float64(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() == actual.keys() and expected
    for key, value in expected.items():
        assert value.dtype == torch.float64
        assert_close(actual[key], value, rtol=1e-10, atol=1e-14, msg=lambda m, key=key: f"{key}: {m}")


def test_the_teacher_is_the_bare_base_bit_for_bit() -> None:
    networks, bare = build_networks(), SD3Backbone(build_transformer())
    x, conditioning = build_latents(), build_conditioning()
    with torch.no_grad():
        prediction, _ = bare.predict(x, SIGMA, conditioning)
        expected = networks.process.to_x0(x, prediction, SIGMA)
        with as_in_pipelines():
            assert torch.equal(predict(networks, "teacher"), expected)
        assert_close(predict(networks, "teacher"), expected, rtol=1e-4, atol=1e-5)
        outputs = [expected, predict(networks, "student"), predict(networks, "fake")]
    for a, b in [*pairwise(outputs), (outputs[0], outputs[2])]:
        assert (a - b).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_separate_copies(checkpointing: bool) -> None:
    """Forwards of all roles interleave, and backwards run while another role is active.

    In float64: a LoRA layer is one node, so that gradients are summed in another order than in peft's layers.
    """
    networks = in_float64(build_networks(checkpointing=checkpointing))
    x, conditioning = build_latents(), build_conditioning()
    student = predict(networks, "student")
    features = networks.features("fake", x, SIGMA, conditioning, (0,))[0]
    teacher = predict(networks, "teacher", student)
    fake = predict(networks, "fake", student.detach())
    with networks.role("fake"):
        (student - teacher).square().mean().backward()
    with networks.role("student"):
        (fake.pow(3).mean() + features.square().mean()).backward()

    alone, bare = separate_copy(networks, "student"), SD3Backbone(build_transformer().double().requires_grad_(False))
    install_norms(bare.network)
    process = networks.process
    student = process.to_x0(x, alone.predict(x, SIGMA, conditioning)[0], SIGMA)
    teacher = process.to_x0(student, bare.predict(student, SIGMA, conditioning)[0], SIGMA)
    (student - teacher).square().mean().backward()
    assert_equal_in_float64(gradients(networks, "student"), copy_gradients(alone))

    alone, student = separate_copy(networks, "fake"), student.detach()
    captured: list[Tensor] = []
    alone.network.transformer_blocks[0].register_forward_hook(lambda m, a, out: captured.append(out[1]))
    alone.predict(x, SIGMA, conditioning)
    fake = process.to_x0(student, alone.predict(student, SIGMA, conditioning)[0], SIGMA)
    (fake.pow(3).mean() + captured[0].square().mean()).backward()
    assert_equal_in_float64(gradients(networks, "fake"), copy_gradients(alone))
    assert all(p.grad is None for k, p in networks.named_parameters() if "lora_" not in k)


def test_nothing_but_the_adapters_ever_requires_a_gradient() -> None:
    networks = build_networks(checkpointing=True)

    def state() -> dict[str, bool]:
        return {key: p.requires_grad for key, p in networks.named_parameters()}

    before = state()
    assert before == {key: "lora_" in key for key in before}
    with pytest.raises(RuntimeError, match="stop"), networks.role("fake"), networks.role("teacher"):
        raise RuntimeError("stop")
    assert networks._current == "teacher"
    for role in ("fake", "student", "teacher"):
        with networks.role(role):
            assert state() == before
        predict(networks, role)
        networks.features(role, build_latents(), SIGMA, build_conditioning(), (1,))
    assert state() == before


def test_roles_nest_and_are_restored() -> None:
    networks = build_networks()
    with torch.no_grad():
        expected = {role: predict(networks, role) for role in ("student", "fake", "teacher")}
        with networks.role("student"):
            with networks.role("fake"):
                assert torch.equal(predict(networks, "teacher"), expected["teacher"])
            prediction, _ = networks.backbone.predict(build_latents(), SIGMA, build_conditioning())
        assert torch.equal(networks.process.to_x0(build_latents(), prediction, SIGMA), expected["student"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_float32_over_a_bf16_base(checkpointing: bool) -> None:
    networks, exact = build_networks(dtype=torch.bfloat16, checkpointing=checkpointing), build_networks()
    for key, parameter in networks.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in key else torch.bfloat16), key
    x0, expected = predict(networks, "student"), predict(exact, "student")
    assert x0.dtype == torch.float32
    assert (x0 - expected).norm() < 0.02 * expected.norm()
    x0.square().mean().backward()
    expected.square().mean().backward()
    for a, b in zip(networks.role_parameters("student"), exact.role_parameters("student"), strict=True):
        if b.grad is not None:
            assert a.grad.dtype == torch.float32
            assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm() + 1e-4


@pytest.mark.parametrize("role", ["student", "fake", "teacher"])
def test_features_are_the_image_tokens_after_each_block(role: Role) -> None:
    networks = build_networks()
    captured: dict[int, Tensor] = {}
    for i, block in enumerate(networks.backbone.network.transformer_blocks):
        block.register_forward_hook(lambda m, args, output, i=i: captured.__setitem__(i, output[1]))
    with torch.no_grad():
        _, features = networks.x0(role, build_latents(), SIGMA, build_conditioning(), (2, 0, 1, 0))
    assert [f.shape for f in features] == [(2, 16, 16)] * 4
    for feature, block in zip(features, (2, 0, 1, 0), strict=True):
        assert torch.equal(feature, captured[block])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [(1,), (0, 1), (1, 0), (2,)])
def test_early_exit_changes_neither_features_nor_gradients(checkpointing: bool, blocks: tuple[int, ...]) -> None:
    networks = build_networks(checkpointing=checkpointing)
    conditioning = build_conditioning()
    results, ran = [], []
    for block in networks.backbone.network.transformer_blocks:
        block.register_forward_hook(lambda m, args, output: ran.append(m))
    for early in (False, True):
        x = build_latents().requires_grad_()
        networks.zero_grad()
        ran.clear()
        if early:
            features = networks.features("fake", x, SIGMA, conditioning, blocks)
        else:
            features = networks.x0("fake", x, SIGMA, conditioning, blocks)[1]
        assert len(ran) == (max(blocks) + 1 if early else BLOCKS)
        torch.stack([f.square().mean() for f in features]).sum().backward()
        results.append(({"x": x.grad} | gradients(networks, "fake"), features))
    (full, full_features), (early_gradients, early_features) = results
    assert_same(early_gradients, full)
    assert all(map(torch.equal, early_features, full_features))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_prediction_without_graph_leaves_features_as_they_are(checkpointing: bool) -> None:
    networks = build_networks(checkpointing=checkpointing)
    results = []
    for partial in (False, True):
        x = build_latents().requires_grad_()
        x0, features = networks.x0("fake", x, SIGMA, build_conditioning(), (0, 1), grad_to_features_only=partial)
        assert torch.is_grad_enabled()
        loss = torch.stack([f.square().mean() for f in features]).sum()
        results.append((x0, *features, torch.autograd.grad(loss, x)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert (
            networks.x0("fake", build_latents(), SIGMA, build_conditioning(), (1,), grad_to_features_only=partial)[
                0
            ].requires_grad
            is not partial
        )
    # x_t itself still carries a graph; the network's prediction does not.
    prediction, _ = networks.backbone.predict(build_latents(), SIGMA, build_conditioning(), (1,), True)
    assert not prediction.requires_grad


def test_guidance_combines_two_passes() -> None:
    networks = build_networks()
    x, conditioning, empty = build_latents(), build_conditioning(), build_conditioning(1, seed=5)
    with torch.no_grad():
        text = predict(networks, "teacher")
        without = networks.x0("teacher", x, SIGMA, empty.expand(2))[0]
        guided = networks.guided_x0(x, SIGMA, conditioning, empty, 7.0)
        assert_close(guided, without + 7 * (text - without), rtol=1e-4, atol=1e-5)
        assert torch.equal(networks.guided_x0(x, SIGMA, conditioning, empty, 1.0), text)


@pytest.mark.parametrize(("rank", "alpha"), [(4, None), (4, 4), (4, 16), (2, 1)])
def test_the_update_is_scaled_by_alpha_over_rank(rank: int, alpha: float | None) -> None:
    networks = build_networks(rank, alpha)
    merged = build_transformer()
    weights, state = dict(merged.named_parameters()), networks.adapter_state("student")
    for key in [k for k in state if ".lora_A." in k]:
        update = state[key.replace("lora_A", "lora_B")] @ state[key]
        weights[key.replace(".lora_A", "")].data += (1.0 if alpha is None else alpha / rank) * update
    with torch.no_grad():
        prediction, _ = SD3Backbone(merged).predict(build_latents(), SIGMA, build_conditioning())
        expected = networks.process.to_x0(build_latents(), prediction, SIGMA)
        assert_close(predict(networks, "student"), expected, rtol=1e-4, atol=1e-4)


def test_adapters_start_from_the_seed_as_the_teacher() -> None:
    def fresh(seed: int) -> SharedBase:
        return SharedBase(SD3Backbone(build_transformer()), rank=4, seed=seed)

    a, b, other = fresh(3), fresh(3), fresh(4)
    with torch.no_grad():
        for role in ("student", "fake"):
            assert torch.equal(predict(a, role), predict(a, "teacher"))
    states = [n.adapter_state(role) for n in (a, other) for role in ("student", "fake")]
    key = next(k for k in states[0] if "lora_A" in k)
    assert_same(b.adapter_state("student"), states[0])
    assert_same(b.adapter_state("fake"), states[1])
    assert all(not torch.equal(x[key], y[key]) for i, x in enumerate(states) for y in states[:i])


def test_building_networks_leaves_the_global_generator_alone() -> None:
    backbone = SD3Backbone(build_transformer())
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    SharedBase(backbone, rank=2)
    assert torch.equal(torch.randn(3), expected)


def test_an_adapter_moves_to_another_network() -> None:
    source, target = build_networks(seed=0), build_networks(seed=1)
    with torch.no_grad():
        fake, expected = predict(target, "fake"), predict(source, "student")
        target.load_adapter("student", source.adapter_state("student"))
        assert torch.equal(predict(target, "student"), expected)
        assert torch.equal(predict(target, "fake"), fake)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in target.role_parameters("student"))


def test_an_adapter_of_another_shape_is_refused() -> None:
    networks = build_networks(rank=4)
    with pytest.raises(UserError, match="rank"):
        networks.load_adapter("student", build_networks(rank=2).adapter_state("student"))
    state = networks.adapter_state("student")
    del state[next(iter(state))]
    with pytest.raises(UserError, match="does not fit"):
        networks.load_adapter("student", state)


def test_what_does_not_fit_an_adapter_is_said_in_full() -> None:
    networks = build_networks(rank=4)
    state = networks.adapter_state("student")
    key = "transformer_blocks.0.attn.to_q.lora_A.weight"
    short = {k: v for k, v in state.items() if k != key}
    count = len(state)
    for given, message in (
        (short, f"adapter does not fit this model: {count - 1} tensors, expected {count} (e.g. {key})"),
        (
            state | {"a.x": state[key], "z.x": state[key]},
            f"adapter does not fit this model: {count + 2} tensors, expected {count} (e.g. a.x)",
        ),
        (
            state | {key: state[key][:2]},
            f"adapter does not fit: {key} has shape (2, 16), expected (4, 16); check the rank",
        ),
    ):
        with pytest.raises(UserError) as caught:
            networks.load_adapter("student", given)
        assert str(caught.value) == message
    assert_same(networks.adapter_state("student"), state)


def test_the_state_of_an_adapter_is_a_copy_without_a_graph() -> None:
    networks = build_networks()
    state = networks.adapter_state("student")
    before = {key: value.clone() for key, value in state.items()}
    assert not any(value.requires_grad for value in state.values())
    for value in state.values():
        value.zero_()
    assert_same(networks.adapter_state("student"), before)


def test_student_and_fake_are_the_roles_and_rank_64_the_default() -> None:
    networks = SharedBase(SD3Backbone(build_transformer()))
    assert networks.roles == ("student", "fake") and not networks.quantized
    ranks = {v.shape[0] for k, v in networks.adapter_state("fake").items() if ".lora_A." in k}
    assert ranks == {64}
    twin = SharedBase(SD3Backbone(build_transformer()), seed=0)
    assert_same(networks.adapter_state("student"), twin.adapter_state("student"))


def test_seeds_are_those_of_stored_runs() -> None:
    """Role number r of seed s starts from peft's draws after `manual_seed(2 s + r)`: stored runs depend on it."""
    networks = SharedBase(SD3Backbone(build_transformer()), rank=4, targets=("to_q", "net.2"), seed=3)
    for number, role in enumerate(networks.roles):
        config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "net.2"])
        alone = build_transformer()
        torch.manual_seed(2 * 3 + number)
        alone.add_adapter(config, "default")
        expected = {k: v for k, v in alone.named_parameters() if ".lora_A." in k}
        state = networks.adapter_state(role)
        assert len(expected) == len(state) / 2 > 2
        for key, value in expected.items():
            assert torch.equal(state[key.replace(".default.", ".")], value), key


def test_lora_weights_over_a_bf16_base_are_multiplied_in_bf16() -> None:
    """peft casts their input up to float32 by itself, which costs memory and time for the same numbers."""
    networks = build_networks(dtype=torch.bfloat16)
    layer = networks.backbone.network.transformer_blocks[1].attn.to_q.lora_A["student"]
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda module, given, output: seen.append(given[0].dtype))
    predict(networks, "student")
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        predict(networks, "student")
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert seen == [torch.bfloat16] * 2, "whatever autocast takes by default"


def test_only_the_notice_of_a_second_adapter_is_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_transformer()
    add = network.add_adapter

    def noisy(*args: object, **options: object) -> None:
        warnings.warn("something else", UserWarning, stacklevel=2)
        add(*args, **options)

    monkeypatch.setattr(network, "add_adapter", noisy)
    with pytest.warns(UserWarning) as caught:
        SharedBase(SD3Backbone(network), rank=2)
    assert {str(warning.message) for warning in caught} == {"something else"}


def test_checkpointed_blocks_get_their_keyword_arguments() -> None:
    networks = build_networks(checkpointing=True)

    class Scaled(nn.Module):
        def forward(self, x: Tensor, factor: float) -> Tensor:
            return factor * x.square()

    x = torch.tensor([2.0], requires_grad=True)
    networks.backbone.network._gradient_checkpointing_func(Scaled(), x, factor=3.0).backward()
    assert x.grad.item() == 12


@pytest.mark.parametrize(
    ("attribute", "value", "private"),
    [("active_adapters", ["fake"], "_active_adapter"), ("disable_adapters", True, "_active_adapter"),
     ("disable_adapters", False, "_disable_adapters")],
)  # fmt: skip
def test_a_peft_that_works_otherwise_is_noticed_when_networks_are_built(
    attribute: str, value: object, private: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraLayer, attribute, property(lambda layer: value))
    with pytest.raises(RuntimeError) as caught:
        SharedBase(SD3Backbone(build_transformer()), rank=2, roles=("student",))
    assert str(caught.value) == f"this peft version does not follow {private}; swd needs peft 0.17 to 0.21"


def test_an_unknown_role_is_refused() -> None:
    networks = build_networks(roles=("student",))
    with pytest.raises(UserError, match="'fake' does not exist"):
        predict(networks, "fake")
    assert networks._current == "teacher"
    assert networks.role_parameters("fake") == []


@pytest.mark.parametrize("targets", [(), ("nothing",), ("to_q", "to_qq"), ("norm1",)])
def test_targets_that_match_no_linear_layer_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"model\.targets"):
        SharedBase(SD3Backbone(build_transformer()), rank=4, targets=targets)


def test_a_copy_of_the_networks_trains_on_its_own() -> None:
    networks = build_networks()
    twin = copy.deepcopy(networks)
    predict(twin, "student").square().mean().backward()
    assert not gradients(networks, "student")
    assert isinstance(twin, nn.Module) and gradients(twin, "student")


def test_first_weights_depend_neither_on_the_default_device_nor_on_other_draws() -> None:
    """Where layers are made on another device by default, as Lightning does on a GPU, numbers are those of the CPU."""

    def first_weights() -> dict[str, Tensor]:
        networks = SharedBase(SD3Backbone(base), 4, roles=("student", "fake"), seed=3)
        return {role + key: value for role in networks.roles for key, value in networks.adapter_state(role).items()}

    base = build_transformer()
    expected = first_weights()
    assert any(value.any() for value in expected.values())
    base = build_transformer()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    with torch.device("meta"):
        actual = first_weights()
    assert torch.equal(torch.get_rng_state(), state)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())


def test_the_discriminator_s_first_weights_are_those_of_the_cpu() -> None:
    def first_weights() -> dict[str, Tensor]:
        term = GAN(blocks=(1,))
        torch.manual_seed(5)
        term.build(16)
        return dict(term.named_parameters())

    expected = first_weights()
    with torch.device("meta"):
        actual = first_weights()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
