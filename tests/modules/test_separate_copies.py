"""Roles as whole copies of the network (`tuning: full`)."""

from __future__ import annotations

import pytest
import torch
from tiny import build_conditioning, build_latents, build_transformer
from torch import Tensor
from torch.testing import assert_close

from swd.modules.backbones.sd3 import SD3Backbone
from swd.modules.networks import Role, SeparateCopies
from swd.types import UserError

SIGMA = torch.tensor([0.9, 0.4])


def build(dtype: torch.dtype = torch.float32, roles: tuple[Role, ...] = ("student", "fake")) -> SeparateCopies:
    return SeparateCopies(SD3Backbone(build_transformer().to(dtype)), roles)


def predict(networks: SeparateCopies, role: Role) -> Tensor:
    return networks.x0(role, build_latents(), SIGMA, build_conditioning())[0]


def test_copies_start_as_the_teacher_and_change_alone() -> None:
    networks = build()
    with torch.no_grad():
        expected = predict(networks, "teacher")
        assert all(torch.equal(predict(networks, role), expected) for role in ("student", "fake"))
        for parameter in networks.role_parameters("fake"):
            parameter += 0.1
        assert (predict(networks, "fake") - expected).abs().max() > 1e-2
        assert all(torch.equal(predict(networks, role), expected) for role in ("student", "teacher"))
        features = networks.features("student", build_latents(), SIGMA, build_conditioning(), (1,))
        assert torch.equal(
            networks.x0("student", build_latents(), SIGMA, build_conditioning(), (1,))[1][0], features[0]
        )


def test_every_weight_of_a_copy_is_trained_and_none_of_the_teacher() -> None:
    networks = build()
    predict(networks, "student").square().mean().backward()
    student, fake = networks.role_parameters("student"), networks.role_parameters("fake")
    count = len(list(build_transformer().parameters()))
    assert len(student) == len(fake) == count and len({id(p) for p in [*student, *fake]}) == 2 * count
    assert all(p.requires_grad for p in [*student, *fake])
    assert not any(p.requires_grad for p in networks.backbone.parameters())
    reached = [p.grad is not None and bool(p.grad.any()) for p in student]
    assert sum(reached) > 0.9 * count and all(p.grad is None for p in [*fake, *networks.backbone.parameters()])


def test_student_and_fake_are_the_roles_by_default() -> None:
    assert SeparateCopies(SD3Backbone(build_transformer())).roles == ("student", "fake")
    alone = build(roles=("student",))
    assert list(alone.copies) == ["student"]
    with pytest.raises(UserError, match=r"^role 'fake' does not exist here; trainable roles are \['student'\]$"):
        predict(alone, "fake")


def test_copies_of_a_bf16_network_are_float32_and_compute_in_bf16() -> None:
    networks, exact = build(torch.bfloat16), build()
    assert {p.dtype for p in networks.role_parameters("student")} == {torch.float32}
    assert {p.dtype for p in networks.backbone.parameters()} == {torch.bfloat16}
    assert networks.backbone_of("student").dtype == torch.bfloat16, "that it computes in"
    seen: list[torch.dtype] = []
    for role in ("student", "teacher"):
        layer = networks.backbone_of(role).network.transformer_blocks[1].attn.to_q
        layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    x0, expected = predict(networks, "student"), predict(exact, "student")
    assert x0.dtype == torch.float32 and (x0 - expected).norm() < 0.02 * expected.norm()
    with torch.no_grad():
        assert_close(predict(networks, "teacher"), x0.detach(), rtol=0, atol=0.1)
    assert seen == [torch.bfloat16] * 2


def test_checkpointing_recomputes_the_blocks_of_every_role_and_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        networks = build()
        ran: list[Role] = []
        if checkpointing:
            networks.enable_checkpointing()
        for role in ("student", "fake", "teacher"):
            block = networks.backbone_of(role).network.transformer_blocks[0]
            block.register_forward_pre_hook(lambda module, given, role=role, ran=ran: ran.append(role))
        x = build_latents().requires_grad_()
        for role in ("student", "fake", "teacher"):
            networks.x0(role, x, SIGMA, build_conditioning())[0].square().mean().backward()
        assert ran == [role for role in ("student", "fake", "teacher") for _ in range(2 if checkpointing else 1)]
        found.append([x.grad, *(p.grad for p in networks.role_parameters("student") if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-7)
