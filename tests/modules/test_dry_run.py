"""Updates without weights: their operations are those of a real training, and their memory that of known tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer
from skeletons import options
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD
from swd.losses.base import LossTerm
from swd.losses.update import settle
from swd.modules.distiller import Distiller
from swd.modules.dry_run import DryRun, _AsOnGpu, _Meter
from swd.modules.iteration_cost import iteration_costs
from swd.modules.pretrained import Pretrained
from swd.modules.published import published, published_folder
from swd.schedule import ScaleSchedule
from swd.types import Cached, CachedBatch

MiB = 2**20


def terms_of(model: Pretrained, *names: str) -> dict[str, LossTerm]:
    blocks = model.feature_blocks
    every: dict[str, LossTerm] = {
        "dmd": DMD(guidance_scale=model.dmd_guidance_scale),
        "mmd": MMD(blocks=blocks),
        "gan": GAN(blocks=blocks),
    }
    chosen = {name: every[name] for name in names}
    settle(chosen)
    return chosen


def counted_training(task: Distiller, folder: Path) -> float:
    """Floating-point operations of a training that goes once through the schedule, on two samples an update."""
    model, sizes = task.model, task.schedule.sizes
    text = model.backbone_class.random_conditioning(model.network_config, 2, model.text_tokens)
    latents = {size: (torch.randn(2, model.channels, *size), torch.ones(2, model.channels, *size)) for size in sizes}
    batch = CachedBatch(Cached(text, latents), prompts=["a star", "a ring"])
    task.inputs.cache = type("Cache", (), {"empty": lambda self, bucket: text.rows(slice(0, 1))})()
    task.setup = lambda stage: None  # type: ignore[method-assign]
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(max_steps=len(sizes), accelerator="cpu", enable_model_summary=False, **quiet)
    loader = Iterations([batch] * (task.batches_per_iteration * len(sizes)), task.batches_per_iteration)
    # The one way of computing attention on the CPU whose products the counter sees.
    products: Any = {torch.ops.aten.addmm_: lambda self, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=products) as counter:
        trainer.fit(task, loader)
    return counter.get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["sd35_medium", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_operations_are_those_of_a_real_training(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model = families.pretrained(name, families.save(name, tmp_path / name))
    flow = model.backbone_class.process.prediction_type == "flow"
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES[name], process="flow" if flow else "epsilon")
    terms = terms_of(model, "dmd", "mmd", "gan")
    task = Distiller(model, schedule, terms, critic_updates=2, checkpointing=checkpointing)
    dry = DryRun(model, terms, schedule, checkpointing)
    expected = 2 * sum(dry.update("generator", i).flop + 2 * dry.update("critic", i).flop for i in range(len(schedule)))
    # Attention in a UNet reads a text that may need no gradient; fused kernels, as in the dry run, compute it anyway.
    tolerance = 0.005 if name == "sdxl" else 1e-6
    assert counted_training(task, tmp_path) == pytest.approx(expected, rel=0.01 if checkpointing else tolerance)


def metered(work: Any) -> tuple[float, int]:
    mode = _AsOnGpu()
    mode.meter = meter = _Meter({}, ())
    with meter, mode:
        work()
    return meter.flop, meter.peak


def test_memory_is_that_of_the_tensors_alive() -> None:
    def temporaries() -> None:
        a = torch.empty(MiB, device="meta")  # 4 MiB
        b = a + 1
        c = b.view(2, -1) + 1  # three at once
        del a, b
        c += 1
        torch.relu(c)

    assert metered(temporaries)[1] == 12 * MiB


def test_linear_layers_and_attention_keep_what_kernels_on_a_gpu_keep() -> None:
    layer = nn.Linear(512, 512, bias=False, device="meta", dtype=torch.bfloat16)
    x = torch.empty(8, 256, 512, device="meta", requires_grad=True)

    def forward_and_backward() -> None:
        y = layer(x).view(8, 256, 4, 128).transpose(1, 2)
        torch.nn.functional.scaled_dot_product_attention(y, y, y).sum().backward()

    flop, peak = metered(forward_and_backward)
    linear, attention = 2 * 8 * 256 * 512 * 512, 4 * 8 * 4 * 256 * 256 * 128
    # Both gradients of the linear layer, whose weight is trained here; attention's backward pass twice its forward.
    assert flop == 3 * linear + 3 * attention
    # No matrix of 256 x 256 for each head, which alone would be as much as three of these tensors in bf16.
    assert peak < 10 * (2 * x.numel())


def test_recomputing_takes_less_memory_and_more_work() -> None:
    model = Pretrained(**options("shapes"))
    schedule, terms = ScaleSchedule([1.0, 0.7], [8, 16]), terms_of(model, "dmd", "mmd", "gan")
    plain, recomputed = (DryRun(model, terms, schedule, checkpointing) for checkpointing in (False, True))
    for kind in ("generator", "critic"):
        one, eight, less = plain.update(kind, 1), plain.update(kind, 1, 8), recomputed.update(kind, 1)
        assert eight.flop == pytest.approx(8 * one.flop, rel=1e-9)
        assert 7 * one.peak < eight.peak <= 8 * one.peak
        assert 1.2 * one.flop < less.flop < 1.5 * one.flop and less.peak < one.peak / 2


@pytest.mark.parametrize("kind", ["generator", "critic"])
def test_gradients_of_weights_are_counted_with_the_weights_alone(kind: Any) -> None:
    model = Pretrained(**options("shapes") | {"tuning": "full"})
    dry = DryRun(model, terms_of(model, "dmd", "mmd", "gan"), ScaleSchedule([1.0], [4]), checkpointing=True)
    trained = {"generator": dry.networks.role_parameters("student"), "critic": dry.networks.role_parameters("fake")}
    gradients = sum(4 * parameter.numel() for parameter in trained[kind])
    assert dry.update(kind, 0).peak < gradients / 2  # casts of a few blocks' weights to bf16


def test_costs_between_measured_sizes_are_exact() -> None:
    """Work is quadratic in the number of tokens, and memory linear, so that three sizes tell the others."""
    model = Pretrained(**options("shapes"))
    schedule = ScaleSchedule([1.0, 0.9, 0.8, 0.7, 0.6], [6, 8, 10, 12, 16])
    terms = terms_of(model, "mmd")
    dry = DryRun(model, terms, schedule)
    costs = iteration_costs(model, schedule, terms, critic_updates=5, checkpointing=False)
    for step, cost in enumerate(costs):
        measured = dry.update("generator", step)
        assert cost.flop == pytest.approx(measured.flop, rel=1e-6)
        assert cost.peak == pytest.approx(measured.peak, rel=0.02)


RELEASED = {"sd35_medium": (8, 2635), "sd35_large": (4, 3320)}
"""Batch of the released script, and TFLOP of its iteration with all losses as counted from its code: encoders included,
averaged over the sizes 64, 80, 96 and 128."""
SIDES = (64, 80, 96, 128)


def iteration_tflop(name: str, folder: Path, *losses: str, checkpointing: bool = False) -> float:
    """TFLOP of an iteration on cached data at the released script's batch, averaged over the sizes."""
    given = options(name)
    path = published_folder(name, given["family"], folder / name)
    model = Pretrained(**given | {"path": str(path)})
    schedule = ScaleSchedule([1.0, 0.9, 0.74, 0.6], SIDES)
    costs = iteration_costs(model, schedule, terms_of(model, *losses), 5, checkpointing)
    return RELEASED[name][0] * sum(cost.flop for cost in costs) / len(costs) / 1e12


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plain", "recomputed"), [("sd35_medium", 0.63, 0.82), ("sd35_large", 0.69, 0.92)])
def test_work_at_real_size_against_the_released_code(
    name: str, plain: float, recomputed: float, tmp_path: Path
) -> None:
    every = ("dmd", "mmd", "gan")
    released = RELEASED[name][1]
    whole = iteration_tflop(name, tmp_path / "a", *every)
    assert whole / released <= plain
    assert iteration_tflop(name, tmp_path / "b", *every, checkpointing=True) / released <= recomputed
    assert iteration_tflop(name, tmp_path / "c", "mmd") <= whole / 7


def test_a_published_configuration_for_every_network() -> None:
    assert {"sd35_medium", "sd35_large", "flux_dev", "sdxl", "wan21_1_3b", "sana_1600m"} <= set(published())
