"""Costs: evaluations, FLOPs, and latency by parts with a clock of our own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from swd.evaluation import timing
from swd.evaluation.candidate_pictures import CandidatePainter
from swd.evaluation.candidates import DrawingModel
from swd.evaluation.plan import Plan
from swd.evaluation.timing import Costs, Timing
from swd.metrics.flops import forward_gflop
from swd.modules.adapters import load, save_adapter
from swd.modules.drawing import DrawingOptions, build_pipeline, draw
from swd.modules.pretrained import Pretrained
from swd.modules.requests import Requests
from swd.types import UserError

ROWS = [("a red star", None), ("a green circle", None)]


@pytest.fixture
def model(tiny_model: Path) -> Pretrained:
    return Pretrained(
        "sd3", str(tiny_model), rank=4, precision="fp32", feature_blocks=[1], max_text_tokens=12, teacher_steps=3
    )


def painter(candidate: DrawingModel, folder: Path) -> CandidatePainter:
    return CandidatePainter(Plan(folder, "p", Requests(ROWS, 1, 0), (candidate,), 2, 2), candidate)


@pytest.fixture
def student(model: Pretrained, tmp_path: Path) -> DrawingModel:
    networks = model.networks(["student"])
    generator = torch.Generator().manual_seed(5)
    for parameter in networks.role_parameters("student"):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    schedule = tiny.build_schedule().scheduler(2)
    folder = save_adapter(
        tmp_path / "adapter", networks.adapter_state("student"), 4, 4, schedule, "tiny", "transformer"
    )
    return DrawingModel("mine", "x", model, load(folder), schedule, (8, 8), 3)


def test_flops_are_those_of_every_step_at_its_size(model: Pretrained, student: DrawingModel, tmp_path: Path) -> None:
    row = model.encoders().encode_prompts([""])
    gflop = {side: forward_gflop(model, (side, side), row) for side in tiny.SIZES}
    teacher = DrawingModel("teacher", "teacher", model, None, None, (8, 8), 3)
    for candidate, evaluations, expected in (
        (teacher, 6, 6 * gflop[8]),
        (student, 3, sum(gflop.values())),
    ):
        drawer = painter(candidate, tmp_path)
        costs = Costs(drawer.plan, candidate, None)
        assert costs.load() is None
        costs.measure(drawer)
        assert costs.load() == {
            "steps": 3,
            "evaluations": evaluations,
            "tflop": pytest.approx(expected / 1000),
        }
        assert Costs(drawer.plan, candidate, Timing()).load() is None  # asked for other things


def test_latency_is_a_mean_by_parts_without_the_first_runs(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text takes 1, decoding 2, and all of a batch 2, 4, 6 and 8 seconds, of which the first batch warms up."""
    drawer = painter(DrawingModel("teacher", "teacher", model, None, None, (8, 8), 3), tmp_path)
    now, longer = [0.0], iter([7.0, 4.0, 6.0, 8.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    pipe: Any = drawer.pipe
    pipe.encode_prompt = lambda: spend(1)
    pipe.vae.decode = lambda: spend(2)

    def draw(given: Any, model: Any, requests: Any, size: Any, show_sizes: bool) -> None:
        assert [request.prompt for request in requests] == ["a red star", "a green circle"] * 2
        given.encode_prompt()
        given.vae.decode()
        spend(next(longer) - 3)

    monkeypatch.setattr(timing, "draw", draw)
    found = timing.latency(drawer, Timing(batch=4, runs=3, warmup=1))
    assert found["latency"].pop("device")
    assert found["latency"] == pytest.approx(
        {
            "batch": 4,
            "runs": 3,
            "text_s": 1 / 4,
            "denoise_s": (6 - 3) / 4,
            "decode_s": 2 / 4,
            "per_picture_s": 6 / 4,
        }
    )
    assert found["peak_memory_bytes"] > 10_000_000


def test_the_students_lora_is_folded_in_and_timing_changes_no_picture(student: DrawingModel, tmp_path: Path) -> None:
    drawer = painter(student, tmp_path)
    before = torch.stack(drawer.draw(range(2)))
    assert not [name for name, _ in drawer.pipe.transformer.named_parameters() if "lora" in name]
    timing.latency(drawer, Timing(batch=2, runs=1, warmup=0))
    assert torch.equal(torch.stack(drawer.draw(range(2))), before)
    apart = build_pipeline(student.model, student.student, student.schedule)
    drawn = draw(apart, student.model, drawer.plan.requests[:2], student.size, show_sizes=False)[0]
    torch.testing.assert_close(before, torch.stack(drawn), rtol=0, atol=1e-4)


def test_latency_of_a_real_pipeline_has_all_parts(student: DrawingModel, tmp_path: Path) -> None:
    found = timing.latency(painter(student, tmp_path), Timing(batch=1, runs=2, warmup=1))["latency"]
    parts = [found[f"{part}_s"] for part in ("text", "denoise", "decode")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(found["per_picture_s"])


# As the paper times


def test_the_timed_pipeline_is_another_than_the_one_that_draws(
    student: DrawingModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler is replaced by one that counts the calls of what it was given."""
    calls: Counter[str] = Counter()

    def counting(function: Any, **options: Any) -> Any:
        owner = type(function.__self__).__name__
        return lambda *args, **kwargs: (calls.update([owner]), function(*args, **kwargs))[1]

    timed: list[tuple[Any, Any]] = []

    def spy(pipe: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        timed.append((pipe, model))
        return draw(pipe, model, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(timing, "draw", spy)
    drawer = painter(student, tmp_path)
    before = torch.stack(drawer.draw(range(2)))
    vae = str(tiny.save_tiny_vae(tmp_path / "vae"))
    options = DrawingOptions(tiny_vae=vae, compile="whole", compile_coders=True)
    found = timing.latency(drawer, Timing(batch=1, runs=2, warmup=1, precision="fp16", options=options))["latency"]

    # Three runs of three steps, in half precision, with the tiny decoder, all of it compiled.
    pipe, model = timed[0]
    assert (model.precision, student.model.precision) == ("fp16", "fp32")
    for part in (pipe.transformer, pipe.text_encoder_3, pipe.vae):
        assert {parameter.dtype for parameter in part.parameters()} <= {torch.float16, torch.float32}
        assert next(parameter for parameter in part.parameters() if parameter.ndim > 1).dtype == torch.float16
    text = {"CLIPTextModelWithProjection": 6, "T5EncoderModel": 3}
    assert calls == {"SD3Transformer2DModel": 9, "AutoencoderTiny": 3} | text
    assert {key: found[key] for key in ("precision", "compile", "compile_coders", "tiny_vae")} == {
        "precision": "fp16", "compile": "whole", "compile_coders": True, "tiny_vae": vae,
    }  # fmt: skip
    assert found["decode_s"] > 0

    # Pictures are drawn as before, and nothing of it is left there.
    assert torch.equal(torch.stack(drawer.draw(range(2))), before)
    assert drawer.pipe is not pipe and drawer.pipe.transformer.dtype == torch.float32
    assert calls.total() == 21


def test_costs_are_those_of_the_settings_that_were_asked_for(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = painter(DrawingModel("teacher", "teacher", model, None, None, (8, 8), 3), tmp_path)
    plain, half = Timing(1, 1, 0), Timing(1, 1, 0, precision="fp16")
    options = DrawingOptions(compile=True)
    # Costs that were stored before there were such settings stay valid.
    assert plain.asked == [1, 1, 0] and half.asked == [1, 1, 0, {"precision": "fp16"}]
    assert Timing(1, 1, 0, options=options).asked == [1, 1, 0, {"compile": True}]
    monkeypatch.setattr(timing, "latency", lambda *args: {"latency": {}})
    Costs(drawer.plan, drawer.candidate, plain).measure(drawer)
    assert Costs(drawer.plan, drawer.candidate, plain).load() is not None
    assert Costs(drawer.plan, drawer.candidate, half).load() is None


def test_what_a_device_cannot_do_is_said_in_one_line(
    model: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = painter(DrawingModel("teacher", "teacher", model, None, None, (8, 8), 3), tmp_path)
    compiler = type("InductorError", (Exception,), {"__module__": "torch._inductor.exc"})
    half = RuntimeError("\"conv\" not implemented for 'Half'")
    blocks = Timing(1, 1, 0, options=DrawingOptions(compile="blocks"))
    for error, asked, message in (
        (
            compiler("no header Python.h\nin a file"),
            blocks,
            r"^timing\.compile=blocks fails .*\(no header Python\.h\); ",
        ),
        (
            half,
            Timing(1, 1, 0, "fp16"),
            r"^timing\.precision=fp16: this device does not compute it \(.*'Half'\); leave",
        ),
        (torch.OutOfMemoryError(), Timing(4, 1, 0), r"^timing\.batch=4 does not fit"),
    ):
        monkeypatch.setattr(timing, "load_pipeline", lambda *args: drawer.pipe)

        def fails(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(timing, "draw", fails)
        with pytest.raises(UserError, match=message) as told:
            timing.latency(drawer, asked)
        assert "\n" not in str(told.value)
    # Other errors are this program's own.
    monkeypatch.setattr(timing, "draw", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        timing.latency(drawer, blocks)


def test_half_precision_without_a_gpu_is_timed_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=r"^timing\.precision=fp16: CPU .* converts these numbers"):
        timing.warn_of_slow_precision("fp16")
    for precision in ("fp32", None):
        timing.warn_of_slow_precision(precision)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    timing.warn_of_slow_precision("fp16")
