"""The shared contract of all families, on tiny random pipelines."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from lightning import Trainer
from PIL import Image
from tiny import CONF, composed, in_float64
from torch import Tensor, nn
from torch.testing import assert_close

from swd.data.iterations import Iterations
from swd.losses import DMD, GAN, MMD, CriticStep, GeneratorStep, LossTerm
from swd.losses.base import Step
from swd.losses.update import critic_loss, generator_gradient, settle, wanted
from swd.modules.distiller import Distiller
from swd.modules.networks import Networks, SharedBase
from swd.modules.pretrained import Pretrained
from swd.modules.sampling import sample_latents
from swd.schedule import ScaleSchedule
from swd.types import Conditioning, PictureBatch, Role, SeededDraws, UserError

PROMPTS = ["a red star", "a large blue ring above a small heart"]


@pytest.fixture(scope="module", params=families.FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class BuiltOnce(Pretrained):
    """Loads encoders, VAE and the networks of each set of roles once; they begin every test with the same weights."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.shared: dict[Any, dict[str, Any]] = {}
        self.kept: dict[Any, tuple[Networks, dict[str, Tensor], dict[nn.Module, bool]]] = {}

    def pipeline(self, dtype: torch.dtype = torch.float32, kept: bool = False, **overrides: Any) -> Any:
        """A pipeline with a network and a scheduler of its own; the other parts are those of the first one."""
        parts = self.shared.setdefault((dtype, self.vae_dtype(dtype, kept)), {})
        pipeline = super().pipeline(dtype, kept, **parts | overrides)
        own = {*overrides, "scheduler", self.backbone_class.subfolder}
        parts.update({key: part for key, part in pipeline.components.items() if key not in own})
        return pipeline

    def networks(self, roles: Sequence[Role], *args: Any) -> Networks:
        if roles not in self.kept:
            networks = super().networks(roles, *args)
            state = {k: v.clone() for k, v in networks.state_dict().items()}
            self.kept[roles] = networks, state, {module: module.training for module in networks.modules()}
        networks, state, modes = self.kept[roles]
        networks.load_state_dict(state)
        networks.zero_grad()
        for module, training in modes.items():
            module.training = training
        return networks

    def with_settings(self, name: str, **more: Any) -> BuiltOnce:
        """The same with other settings, which change no part but the networks."""
        other = families.pretrained(name, self.folder, BuiltOnce, **more)
        other.shared = self.shared
        return other


@pytest.fixture(scope="module")
def built(name: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuiltOnce]:
    """The model by how it is trained."""
    return built_for(name, tmp_path_factory.mktemp(name) / "pipeline")


def built_for(name: str, folder: Path) -> dict[str, BuiltOnce]:
    lora = families.pretrained(name, families.save(name, folder), BuiltOnce)
    half = families.pretrained(name, folder, BuiltOnce, precision="bf16")
    return {"lora": lora, "full": lora.with_settings(name, tuning="full"), "bf16": half}


@pytest.fixture(scope="module")
def model(built: dict[str, BuiltOnce]) -> BuiltOnce:
    return built["lora"]


def latents(name: str, size: Any = None, batch: int = 2, seed: int = 0) -> Tensor:
    size = size or families.SIZES[name][-1]
    size = (size, size) if isinstance(size, int) else tuple(size)
    return torch.randn(batch, families.CHANNELS[name], *size, generator=torch.Generator().manual_seed(seed))


def randomised(networks: Networks) -> SharedBase:
    """Adapters whose updates are not zero."""
    assert isinstance(networks, SharedBase)
    generator = torch.Generator().manual_seed(5)
    for role in networks.roles:
        for parameter in networks.role_parameters(role):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return networks


def conditioning(model: Pretrained, batch: int = 2) -> Conditioning:
    return model.backbone_class.random_conditioning(model.network_config, batch, 7)


def test_prediction_and_features_have_their_shapes(name: str, model: Pretrained) -> None:
    backbone, blocks = model.network(), range(model.limits.blocks)
    for size in (*families.SIZES[name], families.NON_SQUARE[name]):
        x = latents(name, size)
        prediction, features = backbone.predict(x, torch.tensor([0.9, 0.3]), conditioning(model), blocks)
        assert prediction.shape == x.shape and prediction.isfinite().all()
        assert len(features) == model.limits.blocks
        for feature in features:
            assert feature.shape[0] == 2 and feature.shape[2] == model.limits.width


def test_early_exit_equals_the_whole_pass(name: str, model: Pretrained) -> None:
    backbone, x, sigma, text = model.network(), latents(name), torch.tensor([0.9, 0.3]), conditioning(model)
    last = model.limits.blocks - 1
    _, whole = backbone.predict(x, sigma, text, (last,))
    assert torch.equal(backbone.features(x, sigma, text, (last,))[0], whole[0])


def test_repeated_blocks_are_in_the_order_in_which_they_run(name: str, model: Pretrained) -> None:
    backbone, ran = model.network(), []
    blocks = list(backbone.repeated_blocks)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: ran.append(module))
    backbone.predict(latents(name), torch.tensor([0.9, 0.3]), conditioning(model))
    assert list(map(id, ran)) == list(map(id, blocks)) and len(blocks) > 1


@pytest.mark.parametrize("blocks", [(0,), ()])
def test_exposed_features_change_no_prediction(name: str, model: Pretrained, blocks: tuple[int, ...]) -> None:
    """Hooks of the network see features among its outputs, also if a pass ends early; callers see no difference."""
    backbone, x, sigma, text = model.network(), latents(name), torch.tensor([0.9, 0.3]), conditioning(model)
    prediction, features = backbone.predict(x, sigma, text, blocks)
    exited = backbone.features(x, sigma, text, blocks) if blocks else []
    seen: list[Any] = []
    backbone.network.register_forward_hook(lambda module, args, output: seen.append(output))
    backbone.expose_features()
    again = backbone.predict(x, sigma, text, blocks)
    assert torch.equal(again[0], prediction) and all(map(torch.equal, again[1], features))
    with torch.no_grad():
        backbone.predict(x, sigma, text, blocks)
        assert not torch.is_grad_enabled()
    if blocks:
        assert torch.equal(backbone.features(x, sigma, text, blocks)[0], exited[0])
        whole, _, early = seen
        assert early[0] is None and torch.equal(early[1][0], exited[0]) and torch.equal(whole[1][0], exited[0])
        _, kept = backbone.predict(x.requires_grad_(), sigma, text, blocks, grad_to_features_only=True)
        assert kept[0].requires_grad and torch.is_grad_enabled() and not backbone._found


def test_a_sample_does_not_depend_on_its_batch(name: str, model: Pretrained) -> None:
    backbone, x, sigma, text = model.network(), latents(name), torch.tensor([0.9, 0.3]), conditioning(model)
    both = backbone.predict(x, sigma, text)[0]
    alone = backbone.predict(x[1:], sigma[1:], text.map(lambda t: t[1:]))[0]
    assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_level_and_text_matter(name: str, model: Pretrained) -> None:
    backbone, x, text = model.network(), latents(name), conditioning(model)
    base = backbone.predict(x, torch.tensor([0.9, 0.9]), text)[0]
    assert not torch.allclose(base, backbone.predict(x, torch.tensor([0.5, 0.5]), text)[0], atol=1e-4)
    other = model.backbone_class.random_conditioning(model.network_config, 2, 7, seed=9)
    assert not torch.allclose(base, backbone.predict(x, torch.tensor([0.9, 0.9]), other)[0], atol=1e-5)


def test_sizes_that_would_be_truncated_are_refused(name: str, model: Pretrained) -> None:
    odd = (5, 5) if len(model.limits.native) == 2 else (1, 5, 5)
    if model.limits.divisor > 1:
        with pytest.raises(UserError, match="not divisible by 2"):
            model.limits.check_size(odd)
    with pytest.raises(UserError, match="takes"):
        model.limits.check_size((4, 4, 4, 4))
    with pytest.raises(UserError, match="does not exist"):
        model.limits.check_block(model.limits.blocks)


def test_noise_and_back(name: str, model: Pretrained) -> None:
    process, x0 = model.backbone_class.process, latents(name)
    eps, sigma = torch.randn_like(x0), torch.tensor([0.95, 0.2])
    x_t = process.add_noise(x0, eps, sigma)
    prediction = eps if process.prediction_type == "epsilon" else eps - x0
    assert_close(process.to_x0(x_t, prediction, sigma), x0, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_roles_on_one_base_have_the_gradients_of_separate_copies(
    name: str, model: Pretrained, checkpointing: bool
) -> None:
    """The generator's gradient through the fake network's features, and the student's own, as with two networks."""
    networks = randomised(families.pretrained(name, model.folder).networks(("student", "fake")))
    if checkpointing:
        networks.enable_checkpointing()
    networks.train()
    student, fake = merged(networks, "student"), merged(networks, "fake")
    x, sigma, text = latents(name), torch.tensor([0.9, 0.6]), conditioning(model)

    def loss(run_student: Any, run_fake: Any) -> Tensor:
        x0 = run_student(x)
        return run_fake(networks.process.add_noise(x0, torch.ones_like(x0), sigma))[0].square().mean()

    shared = loss(
        lambda z: networks.x0("student", z, sigma, text)[0], lambda z: networks.features("fake", z, sigma, text, (0,))
    )
    shared.backward()
    separate = loss(
        lambda z: networks.process.to_x0(z, student.predict(z, sigma, text)[0], sigma),
        lambda z: fake.features(z, sigma, text, (0,)),
    )
    separate.backward()
    assert_close(shared, separate, rtol=1e-4, atol=1e-6)
    for role, alone in (("student", student), ("fake", fake)):
        weights = dict(alone.network.named_parameters())
        checked = 0
        for key, a in networks.backbone.network.named_parameters():
            if f".lora_A.{role}." not in key:
                continue
            module = key.removesuffix(f".lora_A.{role}.weight")
            b = networks.backbone.network.get_parameter(f"{module}.lora_B.{role}.weight")
            grad = weights[f"{module}.weight"].grad
            if grad is None:  # behind the features
                assert a.grad is None and b.grad is None, key
                continue
            # The update is B A: dL/dA = B^T dL/dW, dL/dB = dL/dW A^T.
            assert_close(a.grad, b.detach().t() @ grad, rtol=2e-3, atol=1e-5)
            assert_close(b.grad, grad @ a.detach().t(), rtol=2e-3, atol=1e-5)
            checked += 1
        assert checked > 3, role


def partly_masked(model: Pretrained) -> Conditioning:
    """Text of two rows, the last three tokens of the first one masked in families that take a mask."""
    text = conditioning(model)
    if text.mask is not None:
        text.mask[0, 4:] = 0
    return text


def test_checkpointing_changes_no_number(name: str, model: Pretrained) -> None:
    """Prediction, features and gradients with a partly masked text: a block that is recomputed must see the mask."""
    found = []
    for checkpointing in (False, True):
        networks = randomised(families.pretrained(name, model.folder).networks(("student",)))
        if checkpointing:
            networks.enable_checkpointing()
        networks.train()
        x0, features = networks.x0("student", latents(name), torch.tensor([0.9, 0.6]), partly_masked(model), (0,))
        (x0.square().mean() + features[0].square().mean()).backward()
        gradients = [p.grad for p in networks.role_parameters("student")]
        found.append([x0, features[0], *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_noised_fake_and_real_share_a_critics_pass(
    name: str, model: Pretrained, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 loss and gradients are those of two passes, and blocks behind the features run for the fake alone."""
    networks = in_float64(randomised(families.pretrained(name, model.folder).networks(("student", "fake"))))
    if checkpointing:
        networks.enable_checkpointing()
    networks.train()
    terms: dict[str, LossTerm] = {"dmd": DMD(), "gan": GAN(blocks=(0,), discriminator_weight=0.5)}
    torch.manual_seed(0)
    terms["gan"].build(model.limits.width)
    text = partly_masked(model).map(lambda tensor: tensor.double())
    runs = SampleCounts([*networks.backbone.block_list, *networks.backbone.behind(0)])
    found = []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(Step, "_joins", lambda step: False)
        networks.zero_grad()
        asked = wanted(terms, "critic_pass")
        step = CriticStep(networks, text, text, latents(name), latents(name, seed=1), SeededDraws(0), asked)
        loss = critic_loss(terms, step)[0]
        first, last = runs.taken()
        assert first == ({4} if joined else {2}) and last == {2}
        loss.backward()
        runs.taken()
        gradients = [p.grad for p in networks.role_parameters("fake")]
        found.append([loss, *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1]) > 8
    for together, apart in zip(*found, strict=True):
        assert (together - apart).norm() <= EXACT.get(name, 1e-10) * apart.norm().clamp(min=1e-3)


EXACT = {"wan": 1e-5}
"""Relative tolerance in float64 of networks that compute a part of themselves in float32."""


class SampleCounts:
    """Numbers of samples that the first of some modules is run with, and the last."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.seen: tuple[set[int], set[int]] = (set(), set())
        for number, module in ((0, modules[0]), (1, modules[-1])):
            module.register_forward_hook(partial(self._note, number))

    def _note(self, number: int, module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        self.seen[number].update(len(tensor) for tensor in tensors if tensor is not None)

    def taken(self) -> tuple[set[int], set[int]]:
        """What was seen since the last call."""
        seen = self.seen
        self.seen = (set(), set())
        return seen


def test_masked_tokens_are_not_seen(name: str, model: Pretrained) -> None:
    """Nor do they count as text: a shorter text with the rest cut away gives the same, guided too."""
    text = partly_masked(model)
    if text.mask is None:
        pytest.skip("it attends to all tokens")
    backbone, x, sigma = model.network(), latents(name), torch.tensor([0.9, 0.6])
    embeds = text.embeds.clone()
    embeds[0, 4:] += 5
    prediction = backbone.predict(x, sigma, text)[0]
    assert torch.equal(backbone.predict(x, sigma, replace(text, embeds=embeds))[0], prediction)
    short = text.rows([0]).map(lambda t: t[:, :4])
    assert_close(backbone.predict(x[:1], sigma[:1], short)[0], prediction[:1], rtol=1e-4, atol=1e-5)
    networks = model.networks(("student",))
    with torch.no_grad():
        guided = [networks.guided_x0(x, sigma, text, empty, 3.0) for empty in (text.rows([0]), short)]
    assert_close(*guided, rtol=1e-4, atol=1e-5)


def merged(networks: SharedBase, role: Any) -> Any:
    """A separate network with a role's update added to its weights."""
    backbone = copy.deepcopy(networks.backbone)
    state = networks.adapter_state(role)
    with torch.no_grad():
        for module in [m for m in backbone.network.modules() if hasattr(m, "base_layer")]:
            module._disable_adapters = True
        layers = dict(backbone.network.named_modules())
        for key in state:
            if key.endswith("lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                layers[name].base_layer.weight += state[f"{name}.lora_B.weight"] @ state[key]
        for name, layer in list(layers.items()):
            if hasattr(layer, "base_layer"):
                parent, _, child = name.rpartition(".")
                setattr(backbone.network.get_submodule(parent), child, layer.base_layer)
    return backbone.requires_grad_(True)


TERMS = {
    "swd": lambda: {"dmd": DMD(), "mmd": MMD(blocks=[0]), "gan": GAN(blocks=[0])},
    "mmd": lambda: {"mmd": MMD(blocks=[0])},
    "dmd": lambda: {"dmd": DMD(guidance_scale=1.0)},
    "dmd_mmd": lambda: {"dmd": DMD(guidance_scale=2.0), "mmd": MMD(blocks=[0], features="teacher")},
    "dmd_gan": lambda: {"dmd": DMD(), "gan": GAN(blocks=[0])},
    "mmd_gan": lambda: {"mmd": MMD(blocks=[0]), "gan": GAN(blocks=[0])},
    "gan": lambda: {"gan": GAN(blocks=[0])},
}


def test_terms_are_those_of_the_configurations() -> None:
    assert set(TERMS) == {file.stem for file in (CONF / "loss").glob("*.yaml")}
    for option, terms in TERMS.items():
        assert set(terms()) == ({"dmd", "mmd", "gan"} if option == "swd" else set(option.split("_")))


@pytest.mark.parametrize("terms", TERMS)
def test_every_loss_gives_a_gradient(name: str, built: dict[str, BuiltOnce], terms: str) -> None:
    model = built["lora"]
    loss = TERMS[terms]()
    settle(loss)
    for term in loss.values():
        term.build(model.limits.width)
    networks = randomised(model.networks(("student", "fake")))
    x0_hat = latents(name).requires_grad_()
    step = GeneratorStep(
        networks,
        conditioning(model),
        model.backbone_class.random_conditioning(model.network_config, 1, 7, 3),
        x0_hat,
        latents(name, seed=1),
        SeededDraws(0),
        wanted(loss, "generator_pass"),
    )
    total, gradient, _ = generator_gradient(loss, step)
    assert total.isfinite() and gradient.isfinite().all() and gradient.abs().sum() > 0
    assert all(p.grad is None for p in networks.parameters())


def two_iterations(name: str, model: Pretrained, terms: str, folder: Path) -> tuple[Distiller, dict[str, Tensor]]:
    """A task after two iterations with one critic update each, and its parameters before them."""
    shape = (2, 3, *model.pixel_size(model.size))
    pixels = [torch.rand(shape, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(4)]
    batches = [PictureBatch(each, prompts=PROMPTS) for each in pixels]
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES[name])
    task = Distiller(model, schedule, TERMS[terms](), critic_updates=1, lr=1e-3)
    task.configure_model()
    before = {k: p.detach().clone() for k, p in task.named_parameters()}
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(task, Iterations(batches, task.batches_per_iteration))
    assert trainer.global_step == 2
    for metric, value in task.last_metrics.items():
        assert value.isfinite(), metric
    return task, before


def changed(task: Distiller, before: dict[str, Tensor]) -> set[str]:
    return {key for key, parameter in task.named_parameters() if not torch.equal(parameter, before[key])}


def test_the_vae_works_through_a_batch_in_parts(
    name: str, built: dict[str, BuiltOnce], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows fit, then the fifth is alone: the result is that of one call."""
    model, encoders = built["lora"], built["lora"].encoders()
    size = model.pixel_size(model.size)
    pixels = torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = encoders.encode(pixels, SeededDraws(0))
    pictures = encoders.decode(whole)
    calls: list[int] = []
    for method in ("encode", "decode"):
        original = getattr(encoders.vae, method)

        def counted(x: Tensor, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            calls.append(len(x))
            return original(x, *args, **kwargs)

        monkeypatch.setattr(encoders.vae, method, counted)
    monkeypatch.setattr(encoders, "at_once", 3 * math.prod(size) - 1)
    assert_close(encoders.encode(pixels, SeededDraws(0)), whole, rtol=1e-4, atol=1e-5)
    assert_close(encoders.decode(whole), pictures, rtol=1e-4, atol=1e-4)
    assert calls == [2, 2, 1, 2, 2, 1]
    monkeypatch.setattr(encoders, "at_once", 1)
    encoders.decode(whole[:2])
    assert calls[6:] == [1, 1]
    # On the CPU by its own limit, which is the lower one.
    monkeypatch.setattr(encoders, "at_once", 8 * 1024**2)
    monkeypatch.setattr(encoders, "at_once_on_cpu", 3 * math.prod(size) - 1)
    encoders.decode(whole)
    assert calls[8:] == [2, 2, 1]


def check_training(name: str, model: Pretrained, terms: str, folder: Path) -> None:
    """Two iterations change what the losses train, and nothing else."""
    task, before = two_iterations(name, model, terms, folder)
    assert {term for term in ("dmd", "mmd", "gan") if term in task.last_metrics} == set(TERMS[terms]())
    trained = changed(task, before)
    assert trained and trained <= {k for k, p in task.named_parameters() if p.requires_grad}
    assert task.roles == (("student",) if terms == "mmd" else ("student", "fake"))
    for role in task.roles:
        assert any(role in key for key in trained)
    assert any("head" in key for key in trained) == ("gan" in TERMS[terms]())
    if terms in ("mmd", "swd"):
        pictures, steps = task.sample(PROMPTS, [1, 2], keep_x0=True)
        assert tuple(pictures.shape[2:]) == model.pixel_size(model.size)
        assert pictures.isfinite().all() and len(steps) == 3


TRAININGS = list(product(TERMS, ("lora", "full")))
OF_EVERY_FAMILY = [("swd", "lora"), ("mmd", "lora"), ("swd", "full")]
"""With and without a fake score, and by whole copies. What a family and one loss have to do with each other,
`test_every_loss_gives_a_gradient` tests for all; what losses and tuning have, one family shows for the others."""


@pytest.mark.parametrize(("terms", "tuning"), OF_EVERY_FAMILY)
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_two_iterations_train_the_student(
    name: str, built: dict[str, BuiltOnce], terms: str, tuning: str, tmp_path: Path
) -> None:
    check_training(name, built[tuning], terms, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("terms", "tuning"), [each for each in TRAININGS if each not in OF_EVERY_FAMILY])
@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_two_iterations_of_any_losses_train_the_student(
    name: str, built: dict[str, BuiltOnce], terms: str, tuning: str, tmp_path: Path
) -> None:
    check_training(name, built[tuning], terms, tmp_path)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuiltOnce]:
    return built_for("sd3", tmp_path_factory.mktemp("all-losses") / "pipeline")


@pytest.mark.parametrize(("terms", "tuning"), [each for each in TRAININGS if each not in OF_EVERY_FAMILY])
def test_two_iterations_of_any_losses_train_one_family(
    sd3: dict[str, BuiltOnce], terms: str, tuning: str, tmp_path: Path
) -> None:
    check_training("sd3", sd3[tuning], terms, tmp_path)


@pytest.mark.filterwarnings("ignore:DMD is known to fail")
def test_a_bf16_base_trains_float32_adapters(name: str, built: dict[str, BuiltOnce], tmp_path: Path) -> None:
    """Some families keep a few small weights in float32, as diffusers loads them."""
    task, before = two_iterations(name, built["bf16"], "swd", tmp_path)
    assert task.networks.backbone.dtype == torch.bfloat16
    kept = tuple(task.networks.backbone.network._keep_in_fp32_modules or ())  # type: ignore[union-attr,arg-type]
    for key, parameter in task.networks.named_parameters("networks"):
        frozen = "lora_" not in key
        expected = torch.bfloat16 if frozen and not any(part in key.split(".") for part in kept) else torch.float32
        assert parameter.dtype == expected, key
        assert parameter.requires_grad != frozen, key
    trained = changed(task, before)
    assert trained and all(task.get_parameter(key).requires_grad for key in trained)
    for role in task.roles:
        assert any(role in key for key in trained)
    assert task.encoders.vae.dtype == (torch.bfloat16 if name == "sana" else torch.float32)
    pictures, _ = task.sample(PROMPTS, [1, 2])
    assert pictures.isfinite().all()


def test_full_copies_start_as_the_teacher(name: str, built: dict[str, BuiltOnce]) -> None:
    model, networks = built["full"], built["full"].networks(("student", "fake"))
    x, sigma, text = latents(name), torch.tensor([0.9, 0.3]), conditioning(model)
    with torch.no_grad():
        teacher = networks.x0("teacher", x, sigma, text)[0]
        assert torch.equal(networks.x0("student", x, sigma, text)[0], teacher)
    assert all(not p.requires_grad for p in networks.backbone.parameters())
    assert len(networks.role_parameters("student")) == len(list(networks.backbone.parameters()))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_8_bit_base_predicts_nearly_the_same_and_trains(name: str, model: Pretrained, kind: Any) -> None:
    x, sigma, text = latents(name), torch.tensor([0.9, 0.3]), conditioning(model)
    exact = model.networks(("student",))
    small = families.pretrained(name, model.folder, quantization=kind).networks(("student",))
    with torch.no_grad():
        a, b = (n.x0("teacher", x, sigma, text)[0] for n in (exact, small))
    assert 0 < ((a - b).norm() / a.norm()).item() < {"int8": 0.02, "fp8": 0.08}[kind]
    small.x0("student", x, sigma, text)[0].square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in small.role_parameters("student"))


@pytest.mark.parametrize("square", [True, False])
def test_the_stock_pipeline_draws_what_training_draws(name: str, model: Pretrained, square: bool) -> None:
    from swd.commands.sample import Request, build_pipeline, draw
    from swd.modules.adapters import Adapter

    networks = randomised(model.networks(("student",)))
    divisor, kind = model.limits.divisor, model.backbone_class.process.prediction_type
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES[name])
    adapter = Adapter(networks.adapter_state("student"), Path("none"))
    pipe = build_pipeline(model, adapter, schedule.scheduler(divisor, kind))
    size = model.size if square else families.NON_SQUARE[name]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    final, steps = draw(pipe, model, requests, size)

    encoders = model.encoders()
    scheduler = schedule.scheduler(divisor, kind)
    generators = [torch.Generator().manual_seed(r.seed) for r in requests]
    start = scheduler.initial_latents(
        2, model.channels, size[-2], size[-1], size[0] if len(size) == 3 else None, generators
    )
    clean = sample_latents(networks, scheduler, start, encoders.encode_prompts(PROMPTS, size))
    assert tuple(clean.shape[2:]) == size
    assert_close(torch.stack(final), encoders.decode(clean), rtol=1e-3, atol=1e-3)
    assert len(steps) == 3


@pytest.mark.parametrize("guidance", [1.0, 9.0])
def test_dmds_guided_prediction_is_the_stock_pipelines(name: str, model: BuiltOnce, guidance: float) -> None:
    """At every step of the stock pipeline's own sampler: text, empty text, fed guidance, sizes, all as it is called."""
    from swd.commands.sample import Request, build_pipeline, draw

    teacher = model.with_settings(name, drawing_guidance_scale=guidance, teacher_steps=3)
    pipe = build_pipeline(teacher)
    seen: list[tuple[Tensor, Any, Tensor]] = []
    original = pipe.scheduler.step

    def watched(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((prediction.clone(), float(timestep), sample.clone()))
        return original(prediction, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    size = families.NON_SQUARE[name]
    draw(pipe, teacher, [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)], size)
    assert len(seen) == 3

    task = Distiller(teacher, ScaleSchedule([1.0], [size]), {"mmd": MMD(blocks=[0])})
    task.configure_model()
    text, backbone = task.encode_prompts(PROMPTS), teacher.backbone_class
    for prediction, timestep, sample in seen:
        sigma = torch.full((2,), timestep / 1000)
        x_t = backbone.from_pipeline(sample, size)
        with torch.no_grad():
            ours = task.networks.guided_x0(x_t, sigma, text, task.empty, guidance)
            plain = task.networks.guided_x0(x_t, sigma, text, task.empty, 1.0)
        theirs = backbone.process.to_x0(x_t, backbone.from_pipeline(prediction, size), sigma)
        effect = 1e-3 if guidance == 1.0 else float((plain - theirs).abs().max() / theirs.abs().max())
        assert (ours - theirs).abs().max() < 0.05 * effect * theirs.abs().max()


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxls_input_without_a_prompt_is_what_its_pipeline_says(tmp_path: Path, zeros: bool) -> None:
    pipeline = families.build("sdxl")
    pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    pipeline.save_pretrained(tmp_path / "sdxl")
    model = families.pretrained("sdxl", tmp_path / "sdxl")
    task = Distiller(model, ScaleSchedule([1.0], [8]), {"mmd": MMD(blocks=[0])})
    task.configure_model()
    _, embeds, _, pooled = pipeline.encode_prompt("a star", do_classifier_free_guidance=True)
    assert_close(task.empty.embeds, embeds)
    assert task.empty.pooled is not None and task.empty.time_ids is not None
    assert_close(task.empty.pooled, pooled)
    assert bool(embeds.any()) is not zeros and task.empty.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]


# Calls as users of diffusers make them


def scale_wise(name: str, model: Pretrained, sizes: Any = None) -> Any:
    """The stock pipeline with our scheduler, and what it is called with beside size and latents."""
    from swd.commands.sample import build_pipeline

    pipe = build_pipeline(model)
    kind = model.backbone_class.process.prediction_type
    schedule = ScaleSchedule(families.SIGMAS, sizes or families.SIZES[name])
    schedule.scheduler(model.limits.divisor, kind).attach(pipe)
    options = dict(model.backbone_class.sampling_arguments(model.max_text_tokens, model.embedded_guidance))
    options |= {"prompt": "a red star", "num_inference_steps": 3, "output_type": "latent"}
    return pipe, options


def in_pixels(model: Pretrained, size: Any) -> dict[str, int]:
    size = (size, size) if isinstance(size, int) else tuple(size)
    *frames, height, width = model.pixel_size(size)
    return {"height": height, "width": width} | ({"num_frames": frames[0]} if frames else {})


@pytest.mark.parametrize("which", [1, 2, "default"])
def test_a_call_at_a_later_size_is_refused(name: str, model: Pretrained, which: Any) -> None:
    """It would end at the square of the size's ratio: twice the side for the last size of most schedules."""
    if which == "default" and name == "wan":
        pytest.skip("its default is 480p whatever the network")
    pipe, options = scale_wise(name, model)
    size = {} if which == "default" else in_pixels(model, families.SIZES[name][which])
    tokens = model.backbone_class.layout == "tokens"
    message = r"tokens are no latent.*pass latents=" if tokens else r"starts at .* and ends at .*Pass latents="
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            pipe(**options, **size)
        assert "\n" not in str(caught.value)
    if not tokens:
        start = in_pixels(model, families.SIZES[name][0])
        assert tuple(pipe(**options, **start)[0].shape[2:]) == model.size


def test_a_call_with_tokens_ends_at_its_height_and_width(name: str, model: Pretrained) -> None:
    if model.backbone_class.layout != "tokens":
        pytest.skip("its latents are maps")
    pipe, options = scale_wise(name, model)
    for sides in ((8, 8), (8, 12), (10, 6), (8, 8)):
        latents = pipe.scheduler.initial_latents(1, model.channels, *sides, packed=True)
        size = in_pixels(model, sides)
        first = pipe(**options, **size, latents=latents)[0]
        assert first.shape[1] == sides[0] * sides[1] // 4
        assert_close(copy.deepcopy(pipe)(**options, **size, latents=latents)[0], first, rtol=1e-4, atol=1e-5)
        pipe.scheduler.initial_latents(1, model.channels, 12, 8)  # of a call that never comes
        assert torch.equal(pipe(**options, **size, latents=latents)[0], first)
    with pytest.raises(ValueError, match="height and width of the final size"):
        pipe(**options, **in_pixels(model, 4), latents=pipe.scheduler.initial_latents(1, model.channels, packed=True))
    turned = pipe.scheduler.initial_latents(1, model.channels, 4, 16, packed=True)  # as many tokens as the square
    with pytest.raises(ValueError, match=r"made for the final size \(4, 16\).*are those of \(8, 8\)"):
        pipe(**options, **in_pixels(model, 8), latents=turned)


def test_latents_end_where_they_were_planned_to_whatever_was_called_before(name: str, model: Pretrained) -> None:
    """Two final sizes with one first size and one seed; calls in both orders, again, and by a copy of the pipeline."""
    if model.backbone_class.layout == "tokens":
        pytest.skip("its calls end at their height and width")
    pipe, options = scale_wise(name, model, [[1, 4, 4], [2, 6, 6], [3, 8, 16]] if name == "wan" else [4, 6, 16])
    scheduler, own = pipe.scheduler, pipe.scheduler.base_sizes[-1]
    other = (*own[:-1], 14)

    def latents(final: Any) -> Tensor:
        frames = final[0] if len(final) == 3 else None
        generator = torch.Generator().manual_seed(0)
        layout = model.backbone_class.layout
        return scheduler.initial_latents(1, model.channels, *final[-2:], frames, generator, layout=layout)

    def ends(**more: Any) -> tuple[int, ...]:
        return tuple(pipe(**options, **more)[0].shape[2:])

    first = in_pixels(model, scheduler.base_sizes[0])
    a, b = latents(own), latents(other)
    assert a.shape == b.shape and not torch.equal(a, b)
    plain = {"generator": torch.Generator().manual_seed(0), **first}
    assert [ends(latents=x, **first) for x in (b, a, a, b)] == [other, own, own, other]
    assert [ends(**plain), ends(latents=b, **first), ends(**plain)] == [own, other, own]
    pipe = copy.deepcopy(pipe)
    assert [ends(latents=x.half().float(), **first) for x in (a, b)] == [own, other]


def test_the_stock_pipeline_draws_what_training_draws_in_bf16(name: str, built: dict[str, BuiltOnce]) -> None:
    """Training computes under autocast, a stock pipeline in bf16 throughout: they agree as far as bf16 goes.

    Relative distances of predictions were 0.0019 to 0.0044; bf16 rounds by up to 2^-8 = 0.0039. Another text,
    another level (by 0.1) or no adapter moves them by 0.03 and more.
    """
    from swd.commands.sample import Request, build_pipeline, draw
    from swd.modules.adapters import Adapter

    half = built["bf16"]
    networks = randomised(half.networks(("student",)))
    divisor, kind = half.limits.divisor, half.backbone_class.process.prediction_type
    stock, ours = (ScaleSchedule(families.SIGMAS, families.SIZES[name]).scheduler(divisor, kind) for _ in range(2))
    pipe = build_pipeline(half, Adapter(networks.adapter_state("student"), Path("none")), stock)
    final, _ = draw(pipe, half, [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)])
    assert all(picture.isfinite().all() for picture in final)
    assert pipe.text_encoder.dtype == getattr(pipe, half.backbone_class.subfolder).dtype == torch.bfloat16
    full = ("sdxl", "wan", "qwen_image", "flux2_klein")
    assert pipe.vae.dtype == (torch.float32 if name in full else torch.bfloat16)

    frames = half.size[0] if len(half.size) == 3 else None
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    start = ours.initial_latents(2, half.channels, *half.size[-2:], frames, generators)
    encoders = half.encoders()
    ours.keep_x0 = True
    sample_latents(networks, ours, start, encoders.encode_prompts(PROMPTS, half.size))
    for theirs, mine in zip(stock.x0_predictions, ours.x0_predictions, strict=True):
        assert (theirs.float() - mine.float()).norm() < 0.008 * mine.float().norm()


def test_sample_writes_files_with_their_origin(name: str, model: Pretrained, tmp_path: Path) -> None:
    from swd.commands import sample
    from swd.io import video
    from swd.modules.adapters import save_adapter

    networks = randomised(model.networks(("student",)))
    kind = model.backbone_class.process.prediction_type
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES[name]).scheduler(model.limits.divisor, kind)
    part = model.backbone_class.subfolder
    adapter = save_adapter(tmp_path / "adapter", networks.adapter_state("student"), 4, 4, schedule, "base", part)
    ending = "mp4" if name == "wan" else "png"
    cfg = composed(
        [
            f"folder={tmp_path / 'out'}",
            "name=test",
            f"adapter={adapter}",
            f"model.family={model.family}",
            f"model.path={model.folder}",
            f"model.size={families.SIZES[name][-1]}".replace(" ", ""),
            f"model.max_text_tokens={model.max_text_tokens}",
            f"model.targets=[{','.join(model.targets)}]",
            f"++model.embedded_guidance={model.embedded_guidance or 'null'}",
            "model.precision=fp32",
            "show_sizes=true",
            "seed=3",
        ],
        "sample",
    )
    cfg.prompts = PROMPTS[:1]
    sample.run(cfg)
    files = sorted(p.name for p in (tmp_path / "out").glob(f"*.{ending}"))
    assert len(files) == 1 + len(families.SIGMAS)
    final = tmp_path / "out" / f"a-red-star_seed3.{ending}"
    if ending == "mp4":
        assert tuple(video.read(final).shape[1:]) == model.pixel_size(model.size)
        assert b"a red star" in final.read_bytes()
    else:
        with Image.open(final) as image:
            assert (image.height, image.width) == model.pixel_size(model.size)
            assert image.info["prompt"] == "a red star" and len(image.info["adapter_hash"]) == 16
            assert str(families.SIGMAS) in image.info["schedule"]


@pytest.mark.parametrize("part", ["tokenizer", "vae"])
def test_a_missing_part_is_named(name: str, model: Pretrained, tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(model.folder, tmp_path / "copy")
    for file in (folder / part).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"{part}"):
        families.pretrained(name, folder)
    (folder / part / "other.txt").write_text("x")
    with pytest.raises(UserError, match="holds no tokenizer" if part == "tokenizer" else "has no config.json"):
        families.pretrained(name, folder)


def test_a_pipeline_of_another_family_is_refused(name: str, model: Pretrained) -> None:
    other = "flux" if model.family != "flux" else "sdxl"
    with pytest.raises(UserError, match=f"model.family={other} is for"):
        Pretrained(other, str(model.folder))
    with pytest.raises(UserError, match=r"model\.family=fluxx is not known; use one of"):
        Pretrained("fluxx", str(model.folder))
