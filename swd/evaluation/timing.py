"""Costs of a picture: network evaluations, FLOPs, latency as the paper measures it, and memory.

The paper's Table 4: batch 8, the mean of 100 runs after warming up, divided by the batch, text encoding and decoding
included; fp16, everything compiled, a tiny VAE. Here text, denoising and decoding are also given apart, and the last
three are options, since pictures that are to be scored are drawn without them.
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from swd.evaluation.candidate_pictures import CandidatePainter, load_pipeline
from swd.evaluation.candidates import DrawingModel
from swd.evaluation.plan import Plan, key_of
from swd.io.files import write_json
from swd.io.job_log import JobLog
from swd.metrics.flops import forward_gflop
from swd.modules.drawing import DrawingOptions, draw
from swd.modules.model_folders import read_json
from swd.modules.pretrained import Precision, Pretrained, native_bf16
from swd.types import UserError


@dataclass(frozen=True)
class Timing:
    """How latency is measured; the numbers are the paper's (section 7 of its supplement: Table 4).

    Attributes:
        batch: pictures drawn at once.
        runs: batches that are timed.
        warmup: batches before them.
        precision: dtype of all weights; None: that of the pictures.
        options: what the timed pipeline has that the one which drew the pictures has not.
    """

    batch: int = 8
    runs: int = 100
    warmup: int = 3
    precision: Precision | None = None
    options: DrawingOptions = field(default_factory=DrawingOptions)

    @property
    def own(self) -> dict[str, Any]:
        """The settings in which the timed pipeline differs from the one that drew the pictures, as plain values."""
        plain = {key: getattr(DrawingOptions(), key) for key in asdict(self.options)}
        given = {key: value for key, value in asdict(self.options).items() if value != plain[key]}
        return given if self.precision is None else {"precision": self.precision} | given

    @property
    def asked(self) -> list[Any]:
        """All settings, for the hash of a measurement; those that have no effect are left out, so that costs which
        were stored before there were such settings stay valid."""
        numbers = [self.batch, self.runs, self.warmup]
        return [*numbers, self.own] if self.own else numbers


class Costs:
    """The costs of one model, stored beside its pictures.

    Args:
        plan: whose folder holds them.
        candidate: the model.
        timing: None leaves latency and memory out.
    """

    def __init__(self, plan: Plan, candidate: DrawingModel, timing: Timing | None) -> None:
        self.plan = plan
        self.candidate = candidate
        self.timing = timing
        self.file = plan.folder / "costs" / f"{candidate.name}.json"
        asked = None if timing is None else timing.asked
        self.key = key_of({"model": plan.model_settings[candidate.name], "timing": asked, "device": device_name()})

    def load(self) -> dict[str, Any] | None:
        """The stored measurement on such a device; None if there is none."""
        if not self.file.is_file():
            return None
        stored = read_json(self.file)
        return stored["costs"] if stored.get("key") == self.key else None

    def measure(self, painter: CandidatePainter) -> None:
        """Measure and store; loads the pipeline if it is not there."""
        model, candidate = self.candidate.model, self.candidate
        encoders = model.backbone_class.encoders_type(painter.pipe, model.max_text_tokens)
        row = encoders.encode_prompts([""], candidate.size)
        gflop = {size: forward_gflop(model, size, row) for size in set(candidate.step_sizes)}
        costs = {
            "steps": candidate.steps,
            "evaluations": candidate.evaluations,
            "tflop": candidate.passes * sum(gflop[size] for size in candidate.step_sizes) / 1000,
        }
        if self.timing is not None:
            costs |= latency(painter, self.timing)
        write_json(self.file, {"key": self.key, "costs": costs})


def latency(painter: CandidatePainter, timing: Timing) -> dict[str, Any]:
    """Seconds for text, denoising and decoding of a batch, per picture, and the peak of memory in bytes."""
    candidate, prompts = painter.candidate, painter.plan.requests
    requests = [prompts[i % len(prompts)] for i in range(timing.batch)]
    model, pipe = candidate.model, painter.pipe
    if timing.own:
        painter.free()  # one pipeline at a time
        model, pipe = timed_pipeline(painter.candidate, timing)
    log = JobLog(f"timing {candidate.name}", timing.warmup + timing.runs, "run")
    with Stopwatch(pipe) as watch, log as progress:
        reset_peak()
        for number in range(timing.warmup + timing.runs):
            with as_user_error(timing):
                watch.measure(lambda: draw(pipe, model, requests, candidate.size, show_sizes=False))
            if number < timing.warmup:
                watch.forget()
            progress.advance()
    text, decode, total = (statistics.fmean(each) / timing.batch for each in (watch.text, watch.decode, watch.total))
    return {
        "latency": {
            "batch": timing.batch,
            "runs": timing.runs,
            "text_s": text,
            "denoise_s": total - text - decode,
            "decode_s": decode,
            "per_picture_s": total,
            "device": device_name(),
            **timing.own,
        },
        "peak_memory_bytes": peak(),
    }


def timed_pipeline(candidate: DrawingModel, timing: Timing) -> tuple[Pretrained, Any]:
    """A candidate's base and pipeline with the timing's own settings."""
    model = copy(candidate.model)
    if timing.precision is not None:
        model.precision = timing.precision
    return model, load_pipeline(replace(candidate, model=model), timing.options)


@contextmanager
def as_user_error(timing: Timing) -> Iterator[None]:
    """Turn what a device cannot do, known only once it is tried, into UserError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"timing.batch={timing.batch} does not fit the device's memory; use a smaller one, or timing=null"
        ) from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        # The compiler's classes are not imported for this: that takes seconds.
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(
                f"timing.compile={str(timing.options.compile).lower()} fails on this machine ({reason}); leave it out"
            ) from None
        if timing.precision is not None and "not implemented for" in str(error):
            raise UserError(
                f"timing.precision={timing.precision}: this device does not compute it ({reason}); leave it out"
            ) from None
        raise


def warn_of_slow_precision(precision: Precision | None) -> None:
    """Warn if this machine converts numbers of a precision back and forth: times say nothing of those that do not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (precision == "fp16" and device.type == "cpu") or (precision == "bf16" and not native_bf16(device)):
        warnings.warn(
            f"timing.precision={precision}: {device_name()} converts these numbers to compute with them, so that its "
            "times say nothing of devices that do not",
            stacklevel=2,
        )


class Stopwatch:
    """Times drawing, and inside it the pipeline's text encoding and the VAE's decoding.

    Attributes:
        text, decode, total: seconds of every call.
    """

    before: tuple[Callable[..., Any], Callable[..., Any]]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.text: list[float] = []
        self.decode: list[float] = []
        self.total: list[float] = []

    def __enter__(self) -> Stopwatch:
        self.before = self.pipe.encode_prompt, self.pipe.vae.decode  # which compiling may have replaced already
        self.pipe.encode_prompt = self._timed(self.pipe.encode_prompt, self.text)
        self.pipe.vae.decode = self._timed(self.pipe.vae.decode, self.decode)
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.encode_prompt, self.pipe.vae.decode = self.before

    def measure(self, call: Callable[[], object]) -> None:
        """Time one call."""
        before = len(self.text), len(self.decode)
        self._timed(call, self.total)()
        # Pipelines may encode, and VAEs decode, in several parts.
        self.text[before[0] :] = [sum(self.text[before[0] :])]
        self.decode[before[1] :] = [sum(self.decode[before[1] :])]

    def forget(self) -> None:
        """Drop what was timed so far."""
        for each in (self.text, self.decode, self.total):
            each.clear()

    @staticmethod
    def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize()
            seconds.append(time.perf_counter() - start)
            return result

        return call


# The machine


def device_name() -> str:
    """The device that draws, for the record."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}"


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Count the peak of memory from now on, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak to what is in use now
    except OSError:
        return


def peak() -> int:
    """The peak of memory in bytes: of the device, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    except (OSError, StopIteration, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
