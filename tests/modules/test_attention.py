"""Another kernel for attention: where it is refused, what is compared, and that the network then uses it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor
from torch.nn.attention import SDPBackend

from swd.modules import attention
from swd.modules.attention import use_attention
from swd.modules.drawing import build_pipeline
from swd.types import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def says(message: str) -> Any:
    """A UserError with this message in one line."""
    return pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$")


@pytest.fixture
def as_before() -> Iterator[None]:
    """Undoes what a kernel changes for the process."""
    active = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName(active))
    attention._process.close()


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return families.pretrained("flux", families.save("flux", tmp_path_factory.mktemp("flux") / "m")).network().network


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.save("sd3", tmp_path_factory.mktemp("sd3") / "m")


def test_a_kernel_that_is_not_here_is_refused_in_one_line(
    flux: Any, sd3_folder: Path, as_before: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = families.pretrained("sd3", sd3_folder, attention="flash")
    for refusing in (model.check_trainable, lambda: build_pipeline(model)):
        with says("model.attention=flash needs an NVIDIA GPU, and this machine has none; leave it out"):
            refusing()
    assert model.network("cpu").network is not None  # as exports are compared, wherever they were trained
    sd3 = families.pretrained("sd3", sd3_folder, attention="native").network().network
    with says("model.attention=flash3: SD3Transformer2DModel of diffusers computes attention by PyTorch alone; use"):
        use_attention(sd3, "flash3", GPU)
    for kind in ("flash", "flash3", "sage"):
        with says(f"model.attention={kind} is not usable here ("):
            use_attention(flux, kind, GPU)
    with says("model.attention=sage is for drawing: it has no gradients"):
        families.pretrained("sd3", sd3_folder, attention="sage").check_trainable()


def test_a_kernel_is_compared_and_then_used(flux: Any, as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of PyTorch's own kernels stands for a package's, and a device without a GPU for one with it."""
    monkeypatch.setitem(attention.BACKENDS, "flash", "_native_math")
    compared: list[str] = []
    check = attention.check_kernel

    def on_the_cpu(kind: str, attend: Any, width: int, device: torch.device) -> None:
        compared.append(f"{kind} {device.type} {width}")
        check(kind, attend, width, CPU)

    monkeypatch.setattr(attention, "check_kernel", on_the_cpu)
    use_attention(flux, "flash", GPU)
    assert compared == [f"flash cuda {flux.config['attention_head_dim']}"]
    processors = [module.processor for module in flux.modules() if hasattr(module, "processor")]
    assert processors and all(each._attention_backend == "_native_math" for each in processors)


def test_what_differs_or_does_not_run_is_refused() -> None:
    plain = F.scaled_dot_product_attention
    attention.check_kernel("flash", plain, 64, CPU)

    def wrong_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plain(query, key.detach() + 0.1 * (key - key.detach()), value)

    def coarse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return plain(query, key, (value * 8).round() / 8)

    def missing(*_: Tensor) -> Tensor:
        raise RuntimeError("No available kernel.\nAborting")

    for attend in (
        lambda q, k, v: plain(q, k, v) * 1.02,
        wrong_gradient,
        lambda q, k, v: plain(q, k, v) * float("nan"),
    ):
        with says("model.attention=flash differs from PyTorch's own attention by "):
            attention.check_kernel("flash", attend, 64, CPU)
    with torch.no_grad():
        attention.check_kernel("sage", coarse, 64, CPU)
    with says("model.attention=cudnn does not run on this device (No available kernel.); leave it out"):
        attention.check_kernel("cudnn", missing, 64, CPU)


def test_cudnn_comes_first_for_the_process(sd3_folder: Path, as_before: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = families.pretrained("sd3", sd3_folder).network().network
    monkeypatch.setattr(attention, "check_kernel", lambda *_: None)
    before = torch._C._get_sdp_priority_order()
    use_attention(network, "cudnn", GPU)
    use_attention(network, "cudnn", GPU)
    assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.CUDNN_ATTENTION)
    attention._process.close()
    assert torch._C._get_sdp_priority_order() == before
