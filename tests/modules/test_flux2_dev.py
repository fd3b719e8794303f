"""FLUX.2-dev where it differs from FLUX.2 klein: fed guidance, its text encoder, and a tokenizer inside a processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import families_flux2
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from swd.losses import DMD
from swd.modules.adapters import Adapter
from swd.modules.distiller import Distiller
from swd.modules.drawing import build_pipeline, draw
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Request
from swd.modules.sampling import sample_latents
from swd.modules.tokens import TextLimit
from swd.schedule import ScaleSchedule
from swd.types import UserError

PROMPTS = ["a red star", "a large blue ring above a small heart"]
SIZE = (8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its index names a processor, as the published one does; the class itself needs torchvision."""
    made = tmp_path_factory.mktemp("flux2") / "pipeline"
    families_flux2.dev().save_pretrained(made)
    index = json.loads((made / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (made / "model_index.json").write_text(json.dumps(index))
    return made


def pretrained(folder: Path, **more: Any) -> Pretrained:
    options = {"rank": 4, "precision": "fp32", "feature_blocks": [2], "max_text_tokens": 24, "size": 8}
    options |= {"embedded_guidance": 4.0, "dmd_guidance_scale": 1.0, "drawing_guidance_scale": 1.0}
    return Pretrained("flux2", str(folder), **options | more)


def test_the_stock_pipeline_draws_what_training_draws(folder: Path) -> None:
    """Pictures of the training sampler and of the pipeline's own decoder; the guidance that is fed matters."""
    model = pretrained(folder)
    schedule = ScaleSchedule(families.SIGMAS, families.SIZES["flux2_klein"])
    state = families.random_state(model)
    networks = model.networks(("student",))
    networks.load_adapter("student", state)
    pipe = build_pipeline(model, Adapter(state, Path("none")), schedule.scheduler(2, "flow"))
    final, _ = draw(pipe, model, [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)], SIZE)

    scheduler = schedule.scheduler(2, "flow")
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    start = scheduler.initial_latents(2, 4, *SIZE, generator=generators)
    encoders = model.encoders()
    text = encoders.encode_prompts(PROMPTS)
    clean = sample_latents(networks, scheduler, start, text)
    decoded = encoders.decode(clean)
    assert clean.shape == (2, 4, *SIZE)
    assert_close(torch.stack(final), decoded, rtol=1e-3, atol=1e-3)

    arguments = model.backbone_class.sampling_arguments(24, 4.0) | {"height": 64, "width": 96, "output_type": "pt"}
    again = pipe.scheduler.initial_latents(2, 4, *SIZE, generator=[g.manual_seed(i) for i, g in enumerate(generators)])
    arguments |= {"prompt": PROMPTS, "num_inference_steps": 3, "latents": model.backbone_class.to_pipeline(again)}
    pictures = pipe(**arguments)[0]
    assert_close(2 * pictures - 1, decoded, rtol=1e-3, atol=2e-3)
    other = pipe(**arguments | {"guidance_scale": 2.0})[0]
    assert (other - pictures).abs().max() > 0.01


def test_dmds_teacher_is_the_stock_pipelines(folder: Path) -> None:
    """At every step of the pipeline's own sampler, in one pass that is fed the guidance."""
    model = pretrained(folder, teacher_steps=3)
    pipe = build_pipeline(model)
    seen: list[tuple[Tensor, float, Tensor]] = []
    original = pipe.scheduler.step

    def watched(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((prediction.clone(), float(timestep), sample.clone()))
        return original(prediction, timestep, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    final, _ = draw(pipe, model, [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)], SIZE)
    assert len(seen) == 3 and all(picture.isfinite().all() for picture in final)
    task = Distiller(model, ScaleSchedule([1.0], [SIZE]), {"dmd": DMD(guidance_scale=1.0)}, critic_updates=1)
    task.configure_model()
    text, backbone = task.encode_prompts(PROMPTS), model.backbone_class
    for prediction, timestep, sample in seen:
        sigma = torch.full((2,), timestep / 1000)
        x_t = backbone.from_pipeline(sample, SIZE)
        with torch.no_grad():
            ours = task.networks.guided_x0(x_t, sigma, text, task.empty, 1.0)
        theirs = backbone.process.to_x0(x_t, backbone.from_pipeline(prediction, SIZE), sigma)
        assert (ours - theirs).abs().max() < 5e-5 * theirs.abs().max()


def test_its_guidance_is_fed_and_has_no_other_kind(folder: Path) -> None:
    with pytest.raises(UserError, match=r"model\.embedded_guidance is null"):
        pretrained(folder, embedded_guidance=None)
    for options in ({"drawing_guidance_scale": 3.0}, {"drawing_guidance_scale": 3.0, "negative_prompt": "a ring"}):
        with pytest.raises(UserError, match=r"drawing_guidance_scale=3.0: Flux2Pipeline has no classifier-free") as e:
            pretrained(folder, **options)
        assert "\n" not in str(e.value)


def test_tokens_are_those_of_the_template(folder: Path) -> None:
    """The system message is one token here; what is beyond the limit is not seen."""
    model = pretrained(folder)
    words = ["a", "red", "star", "above", "a", "blue", "ring", "and", "a", "small", "heart"]
    texts = [" ".join((3 * words)[:count]) for count in (22, 23, 24)]
    limit = TextLimit(model)
    assert limit.counts(texts) == [23, 24, 25] and limit.beyond(texts).count == 1
    within, whole, beyond = model.encoders().encode_prompts(texts).embeds
    assert torch.equal(whole, beyond) and not torch.equal(whole, within)


def test_a_processor_s_tokenizer_is_compared_with_its_text_encoder(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copied / "text_encoder" / "config.json").read_text())
    nested = {key: value for key, value in config.items() if key != "vocab_size"} | {"text_config": {"vocab_size": 9}}
    (copied / "text_encoder" / "config.json").write_text(json.dumps(nested))
    with pytest.raises(UserError, match=r"'tokenizer' has \d+ entries, but its text encoder knows 9"):
        pretrained(copied).fetch()
