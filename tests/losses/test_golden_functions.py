"""Our functions against stored numbers of the released code (tests/data/golden.npz), one function at a time."""

from __future__ import annotations

import families
import pytest
import torch
from conftest import Golden
from stored import TOLERANCE, load_head
from torch.testing import assert_close

from swd.diffusion import RectifiedFlow, rectified_flow_table
from swd.losses import functional as L
from swd.losses.gan_head import GANHead
from swd.modules.backbones import load_family
from swd.schedule import ScaleSchedule, downscale, upsample


def test_noise_table(golden: Golden) -> None:
    assert_close(rectified_flow_table(), golden["sched/sigmas"], **TOLERANCE)
    assert_close(1000 * rectified_flow_table()[:-1], golden["sched/timesteps"], **TOLERANCE)
    for steps in (4, 6):
        index = golden[f"sched/boundary_idx_{steps}"]
        assert_close(RectifiedFlow().level(index), golden[f"sched/boundary_sigmas_{steps}"], **TOLERANCE)


@pytest.mark.parametrize("family", ["sd3", "flux", "wan", "sana"])
def test_networks_are_fed_the_stored_timesteps(golden: Golden, family: str) -> None:
    """At every interval start of 4 and 6 steps; FLUX takes them on a scale of 1."""
    pipeline = families.build(family)
    backbone = load_family(family)(pipeline.transformer, 4.5)
    fed: list[torch.Tensor] = []
    backbone.network.register_forward_pre_hook(lambda m, args, kw: fed.append(kw["timestep"]), with_kwargs=True)
    text = backbone.random_conditioning(dict(backbone.network.config), 1, 3)
    size = (1, 4, 4) if backbone.video else (4, 4)
    for steps in (4, 6):
        fed.clear()
        for sigma in golden[f"sched/boundary_sigmas_{steps}"][:-1]:
            with torch.no_grad():
                backbone.call(torch.zeros(1, backbone.limits.channels, *size), sigma, text)
        unit = 1000 if family == "flux" else 1
        assert_close(unit * torch.cat(fed), golden[f"sched/boundary_timesteps_{steps}"], rtol=1e-5, atol=1e-3)


def test_add_noise(golden: Golden) -> None:
    process = RectifiedFlow()
    x0, noise = golden["sched/scale_noise_x0"], golden["sched/scale_noise_noise"]
    x_t = process.add_noise(x0, noise, process.level(golden["sched/scale_noise_idx"]))
    assert_close(x_t, golden["sched/scale_noise_out"], **TOLERANCE)


@pytest.mark.parametrize("case", ["gen_1blk", "disc_1blk"])
def test_gan(golden: Golden, case: str) -> None:
    blocks = int(case.split("_")[1].removesuffix("blk"))
    head = load_head(golden, "gan/head/", 24)
    fake = [golden[f"gan/fake{i}"].requires_grad_() for i in range(blocks)]
    true = [golden[f"gan/true{i}"].requires_grad_() for i in range(blocks)]
    fake_logits = L.discriminator_logits(head, fake)
    if case.startswith("gen"):
        loss = L.gan_generator_loss(fake_logits)
    else:
        loss = L.gan_discriminator_loss(fake_logits, L.discriminator_logits(head, true))
    loss.backward()
    assert_close(loss, golden[f"gan/{case}/out"], **TOLERANCE)
    stored = golden.names(f"gan/{case}/grad_")
    assert stored
    for name in stored:
        key = name.split("/grad_")[1]
        if key.startswith("head/"):
            actual = dict(head.named_parameters())["layers." + key.removeprefix("head/")].grad
        else:
            actual = (fake if key.startswith("fake") else true)[int(key[4:])].grad
        assert_close(actual, golden[name], **TOLERANCE)


def test_head_widths(golden: Golden) -> None:
    widths = golden["gan/dims"].tolist()
    assert [head[2].out_features for head in GANHead(24).layers] == widths[1:]


def test_mmd_every_stored_case(golden: Golden) -> None:
    cases = sorted({n.split("/")[1] for n in golden.names("mmd/") if n.endswith("/params")})
    assert len(cases) > 30
    for case in cases:
        kernel, c, bandwidth, batchwise = golden[f"mmd/{case}/params"].tolist()
        fake = golden[f"mmd/{case}/y"].requires_grad_()
        loss = L.mmd_loss(
            golden[f"mmd/{case}/x"],
            fake,
            kernel="rbf" if kernel else "linear",
            c=c,
            bandwidth=bandwidth,
            reduce="batch" if batchwise else "image",
        )
        loss.backward()
        tolerance = {"rtol": 1e-5, "atol": 5e-7} if kernel else TOLERANCE
        assert_close(loss, golden[f"mmd/{case}/out"], **tolerance, msg=lambda m, case=case: f"mmd/{case}: {m}")
        expected = golden[f"mmd/{case}/grad_y"]
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if kernel else TOLERANCE
        assert_close(fake.grad, expected, **tolerance, msg=lambda m, case=case: f"mmd/{case} gradient: {m}")


@pytest.mark.parametrize("c", [0.0, 0.001])
def test_mmd_of_equal_features(golden: Golden, c: float) -> None:
    x = golden[f"mmd/equal_c{c:g}/x"]
    fake = x.clone().requires_grad_()
    loss = L.mmd_loss(x, fake, c=c)
    loss.backward()
    assert_close(loss, golden[f"mmd/equal_c{c:g}/out"], **TOLERANCE)
    # At c = 0 the reference differentiates a square root at 0 and gives NaN; ours must stay finite.
    assert torch.equal(fake.grad, torch.zeros_like(x))


def test_mmd_of_bf16_features_is_computed_in_float32(golden: Golden) -> None:
    x, y = golden["mmd/bf16/x"].bfloat16(), golden["mmd/bf16/y"].bfloat16()
    assert_close(L.mmd_loss(x, y), golden["mmd/bf16/out"], **TOLERANCE)


@pytest.mark.parametrize("case", ["0", "1"])
def test_dmd(golden: Golden, case: str) -> None:
    x0_hat = golden[f"dmd/{case}/fake_sample"].requires_grad_()
    direction = L.dmd_direction(x0_hat, golden[f"dmd/{case}/real_pred_x0"], golden[f"dmd/{case}/fake_pred_x0"])
    loss = L.dmd_loss(x0_hat, direction)
    loss.backward()
    assert_close(direction, golden[f"dmd/{case}/grad"], **TOLERANCE)
    assert_close(loss, golden[f"dmd/{case}/loss"], **TOLERANCE)
    assert_close(x0_hat.grad, golden[f"dmd/{case}/grad_fake_sample"], **TOLERANCE)


def test_resizing(golden: Golden) -> None:
    sets = sorted({n.split("/")[1] for n in golden.names("scale/") if n.endswith("/full")})
    assert sets
    for name in sets:
        sizes = golden[f"scale/{name}/scales"].tolist()
        full = golden[f"scale/{name}/full"]
        schedule = ScaleSchedule([1 - i / 10 for i in range(len(sizes))], sizes)
        for i, side in enumerate(sizes):
            interval, key = schedule.interval(i), f"scale/{name}/{side}"
            if sizes.count(side) > 1:  # the released code picks a wrong previous scale there
                continue
            current = downscale(full, (side, side))
            assert_close(current, golden[f"{key}/down_to_current"], **TOLERANCE)
            source = downscale(full, interval.source)
            assert_close(upsample(source, interval.target), golden[f"{key}/up_from_prev"], **TOLERANCE)
            if i:
                cascade = upsample(downscale(current, interval.source), interval.target)
                assert_close(cascade, golden[f"{key}/down_prev_and_up"], **TOLERANCE)


@pytest.mark.parametrize("side", [64, 80, 96])
def test_pixel_downscale(golden: Golden, side: int) -> None:
    assert_close(downscale(golden["scale/pixels/in"], (side, side)), golden[f"scale/pixels/{side}"], **TOLERANCE)


def test_sampler(golden: Golden) -> None:
    text = golden["sampler/prompt_embeds"], golden["sampler/pooled"]
    empty = golden["sampler/uncond_prompt_embeds"], golden["sampler/uncond_pooled"]
    for case in sorted({n.split("/")[1] for n in golden.names("sampler/") if n.endswith("/out")}):
        noises = [golden[n] for n in sorted(golden.names(f"sampler/{case}/noise"))]
        calls = []

        def velocity(x, t, conditioning, case=case, calls=calls):
            calls.append([x.shape[-1], t.item()])
            return 0.5 * x if case.startswith("half") else golden_velocity(x, t, *conditioning)

        sigmas = golden["sched/boundary_sigmas_6" if len(noises) == 6 else "sched/boundary_sigmas_4"][:-1]
        scheduler = ScaleSchedule(sigmas.tolist(), [n.shape[-1] for n in noises]).scheduler()
        x = noises[0]
        for i, t in enumerate(scheduler.timesteps):
            v = velocity(x, t, text)
            if "cfg" in case:
                v_empty = velocity(x, t, empty)
                v = v_empty + float(case.split("cfg")[1]) * (v - v_empty)
            following = noises[i + 1] if i + 1 < len(noises) else None
            x = scheduler.step(v, t, x, noise=following).prev_sample
        assert_close(x, golden[f"sampler/{case}/out"], **TOLERANCE)
        assert_close(torch.tensor(calls), golden[f"sampler/{case}/calls"], **TOLERANCE)


def golden_velocity(x: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """The stub network behind the stored guided samples, recovered from them: exact to 1e-6 at every pixel."""
    text, pool = (v.flatten(1).mean(1).view(-1, 1, 1, 1) for v in (embeds, pooled))
    return 0.3 * x + 0.2 * t / 1000 + text - 0.1 * pool
