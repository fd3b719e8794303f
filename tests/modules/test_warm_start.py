"""A training that starts from a published adapter starts exactly there, whatever its alpha and the run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build_conditioning, build_latents, composed, overrides
from torch.testing import assert_close

from swd.commands.train import build_task_and_data
from swd.modules import adapters
from swd.modules.adapters import check_start
from swd.modules.pretrained import Pretrained
from swd.modules.quantize import QuantizedLinear
from swd.modules.targets import targets_of
from swd.types import UserError

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
PUBLISHED: dict[str, dict[str, Any]] = {
    "alpha = rank": {"lora_alpha": 4},
    "alpha = 3 ranks": {"lora_alpha": 12},
    "alpha = rank / 4": {"lora_alpha": 1},
    "scaled by the root of the rank": {"lora_alpha": 6, "use_rslora": True},
    "alpha by module": {"lora_alpha": 8, "alpha_pattern": {"to_q": 2, "net.2": 20}},
}


def published(model: Pretrained, folder: Path, **config: Any) -> Path:
    """An adapter with random weights, written by peft itself."""
    torch.manual_seed(0)
    network = get_peft_model(model.network().network, LoraConfig(r=4, target_modules=TARGETS, **config))
    for key, parameter in network.named_parameters():
        if "lora_" in key:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    network.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == config["lora_alpha"]
    return folder


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("case", list(PUBLISHED))
def test_the_student_starts_as_the_published_model(
    tiny_model: Path, tmp_path: Path, case: str, alpha: float | None
) -> None:
    base = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=(1,))
    folder = published(base, tmp_path / "adapter", **PUBLISHED[case])
    given = overrides(tiny_model, tmp_path, model__init_adapter=folder, model__alpha=alpha)
    task: Any = build_task_and_data(composed(given))[0]
    task.configure_model()
    x, sigma, text = build_latents(), torch.tensor([0.9, 0.4]), build_conditioning()

    theirs = PeftModel.from_pretrained(base.network().network, folder).eval()
    with torch.no_grad():
        arguments = {"encoder_hidden_states": text.embeds, "pooled_projections": text.pooled, "return_dict": False}
        velocity = theirs(hidden_states=x, timestep=1000 * sigma, **arguments)[0]
        with theirs.disable_adapter():
            teacher = theirs(hidden_states=x, timestep=1000 * sigma, **arguments)[0]
        with task.networks.role("student"):
            ours = task.networks.backbone.predict(x, sigma, text)[0]
    assert (velocity - teacher).norm() > 0.05 * teacher.norm(), "the adapter must matter"
    assert_close(ours, velocity, rtol=1e-4, atol=1e-5)


def test_the_file_is_read_once_and_let_go_of(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=(1,))
    folder = published(base, tmp_path / "adapter", lora_alpha=4)
    reads = []
    load = adapters.load
    monkeypatch.setattr(adapters, "load", lambda path: reads.append(path) or load(path))
    task: Any = build_task_and_data(composed(overrides(tiny_model, tmp_path, model__init_adapter=folder)))[0]
    assert len(reads) == 1 and task.model.initial
    task.configure_model()
    assert len(reads) == 1 and task.model.initial is None


def test_the_targets_that_a_message_names_are_right(tiny_model: Path, tmp_path: Path) -> None:
    """The targets that the message names let the same adapter in."""
    base = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=(1,))
    folder = published(base, tmp_path / "adapter", lora_alpha=4)
    options: dict[str, Any] = {"rank": 4, "feature_blocks": (1,), "init_adapter": str(folder)}
    with pytest.raises(UserError) as caught:
        check_start(Pretrained("sd3", str(tiny_model), targets=("to_q", "proj_out"), **options))
    message = str(caught.value)
    assert "only in the adapter" in message and "1 only in model.targets (e.g. proj_out)" in message
    named = message.partition("'model.targets=[")[2].removesuffix("]'").split(",")
    check_start(Pretrained("sd3", str(tiny_model), targets=named, **options))


def test_short_names_mean_exactly_the_modules() -> None:
    layers = ["a.0.to_q", "a.1.to_q", "b.0.to_q", "b.0.net.2", "a.0.net.2", "proj", "c.proj"]
    assert targets_of({"a.0.to_q", "a.1.to_q", "b.0.to_q"}, layers) == ["to_q"]
    assert targets_of({"a.0.to_q"}, layers) == ["a.0.to_q"]
    assert targets_of({"b.0.net.2", "a.0.net.2"}, layers) == ["net.2"]
    assert targets_of({"c.proj"}, layers) == ["c.proj"]
    assert targets_of({"proj", "c.proj"}, layers) == ["proj"]


def test_a_start_in_8_bits_keeps_the_adapter_exact(tiny_model: Path, tmp_path: Path) -> None:
    base = Pretrained("sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=(1,))
    folder = published(base, tmp_path / "adapter", lora_alpha=12)
    given = overrides(tiny_model, tmp_path, model__init_adapter=folder, model__quantization="int8")
    task: Any = build_task_and_data(composed(given))[0]
    task.configure_model()
    assert any(isinstance(module, QuantizedLinear) for module in task.networks.modules())
    state = task.networks.adapter_state("student")
    for key, value in adapters.load(folder).state.items():
        assert_close(state[key], value)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    weights = {"transformer.q.lora_A.weight": torch.ones(1, 2), "transformer.q.lora_B.weight": torch.ones(2, 1)}
    save_file(weights, file, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match="damaged metadata: lora_adapter_metadata is no JSON object"):
        adapters.load(file)
